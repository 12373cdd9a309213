"""Places things on the table: relations as bounds on differences of positions.

Positions are in units of the table: x to the right, z toward the viewer, both from 0 to 1; heights in the same units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..graph import SceneGraph
from ..layout import DifferenceSystem, LayoutError, choose_alternatives
from ..placements import CANVAS, REGIONS, Bound
from .things import Item


X, Z = 0, 1
CLEARANCE = 0.03
BORDER = 0.01
MAX_BRANCHES = 1500
# Distance along z, as a share of the height of the thing in front, that keeps it from hiding much of one behind it.
SHADE = 0.75


@dataclass(frozen=True)
class PlacedItem:
    """
    A thing on the table.

    Args:
        item ([`Item`]):
            What it is.
        x (`float`), z (`float`):
            Its middle.
        base (`float`):
            Height of its foot: 0 on the table, more on another thing.
        radius (`float`):
            Half its width.
    """

    item: Item
    x: float
    z: float
    base: float
    radius: float

    @property
    def height(self) -> float:
        """Its height."""
        return self.radius * self.item.solid.height


@dataclass(frozen=True)
class Slot:
    """A thing to be placed: its number, what it is, and half its width."""

    number: int
    item: Item
    radius: float


Placement = Callable[[Sequence[Slot], str | None], list[list[Bound]]]


def _within(axis: int, lower: int, upper: int, minimum: float, maximum: float) -> list[Bound]:
    return [Bound(axis, lower, upper, minimum), Bound(axis, upper, lower, -maximum)]


def _left_of(slots, region):
    a, b = slots
    return [[Bound(X, a.number, b.number, max(a.radius + b.radius, 0.17))]]


def _front_of(slots, region):
    a, b = slots
    reach = a.radius + b.radius
    hidden = SHADE * a.radius * a.item.solid.height
    return [
        [Bound(Z, b.number, a.number, max(reach + CLEARANCE + hidden, 0.14)),
         *_within(X, a.number, b.number, -reach, reach)]
    ]  # fmt: skip


def _on(slots, region):
    a, b = slots
    if not (a.item.solid.is_flat and b.item.solid.is_flat):
        return []
    slack = 0.25 * min(a.radius, b.radius)
    # the support of a wider thing must remain visible below its edge
    if 0.77 * b.radius * b.item.solid.height - 0.63 * (a.radius - b.radius + slack) < 0.012:
        return []
    return [[bound for axis in (X, Z) for bound in _within(axis, a.number, b.number, -slack, slack)]]


def _inside(slots, region):
    inner, outer = slots
    if not outer.item.solid.is_container or inner.item.solid.is_container:
        return []
    # the corners of a box must fit into a round bowl
    width = inner.radius * (1.42 if outer.item.solid.form == "bowl" and inner.item.solid.form == "box" else 1.0)
    slack = min(outer.radius - 0.012 - width, 0.03)
    if slack < 0:
        return []
    return [[bound for axis in (X, Z) for bound in _within(axis, outer.number, inner.number, -slack, slack)]]


def _next_to(slots, region):
    a, b = slots
    reach, aside = a.radius + b.radius, 0.5 * min(a.radius, b.radius)
    ways = []
    for axis in (X, Z):
        for first, second in ((a, b), (b, a)):
            # along z, `second` is nearer to the viewer and hides part of `first`
            hidden = SHADE * second.radius * second.item.solid.height if axis == Z else 0.0
            if hidden < 0.08:
                ways.append(
                    _within(axis, first.number, second.number, reach + 0.02 + hidden, reach + 0.07 + hidden)
                    + _within(1 - axis, first.number, second.number, -aside, aside)
                )
    return ways


def _far_from(slots, region):
    a, b = slots
    return [
        [Bound(axis, first.number, second.number, a.radius + b.radius + 0.36)]
        for axis in (X, Z)
        for first, second in ((a, b), (b, a))
    ]


def _between(slots, region):
    middle, *ends = slots
    ways = []
    for axis in (X, Z):
        for first, second in (ends, ends[::-1]):
            bounds = _within(1 - axis, first.number, second.number, -0.06, 0.06)
            bounds += _within(1 - axis, first.number, middle.number, -0.04, 0.04)
            for behind, before in ((first, middle), (middle, second)):
                hidden = SHADE * before.radius * before.item.solid.height if axis == Z else 0.0
                bounds.append(Bound(axis, behind.number, before.number, behind.radius + before.radius + 0.03 + hidden))
            ways.append(bounds)
    return ways


def _at(slots, region):
    (a,) = slots
    bounds = []
    for axis, cell in zip((X, Z), REGIONS[region], strict=True):
        minimum, maximum = ((0.0, 0.25), (0.42, 0.58), (0.75, 1.0))[cell]
        bounds += _within(axis, CANVAS, a.number, minimum, maximum)
    return [bounds]


def _row_order(slots, region):
    bounds = []
    for a, b in pairwise(slots):
        bounds.append(Bound(X, a.number, b.number, max(a.radius + b.radius + 0.03, 0.13)))
    for other in slots[1:]:
        bounds += _within(Z, slots[0].number, other.number, -0.04, 0.04)
    return [bounds]


def _swapped(place: Placement) -> Placement:
    return lambda slots, region: place(slots[::-1], region)


PLACEMENTS: dict[str, Placement] = {
    "left_of": _left_of,
    "right_of": _swapped(_left_of),
    "front_of": _front_of,
    "behind": _swapped(_front_of),
    "on": _on,
    "under": _swapped(_on),
    "inside": _inside,
    "contains": _swapped(_inside),
    "near": _next_to,
    "next_to": _next_to,
    "far_from": _far_from,
    "between": _between,
    "at": _at,
    "row_order": _row_order,
}


def sample_sizes(items: Sequence[Item], rng: np.random.Generator) -> dict[Item, float]:
    """Draws half the width of every thing. It depends on the things alone, not on their order or their relations."""
    crowding = min(1.0, (6.5 / len(items)) ** 0.25)  # more things have to be smaller
    sizes = {}
    for item, share in zip(sorted(items), rng.random(len(items)), strict=True):
        low, high = item.solid.radius
        sizes[item] = crowding * (low + share * (high - low))
    return sizes


def place_tabletop(graph: SceneGraph, sizes: dict[Item, float], rng: np.random.Generator) -> list[PlacedItem]:
    """
    Places the things of a graph such that every relation holds clearly and each can be seen.

    Args:
        graph ([`SceneGraph`]):
            What to place; its entities are [`Item`]s.
        sizes (`dict[Item, float]`):
            Half the width of every thing, from [`sample_sizes`].
        rng (`np.random.Generator`):
            Source of the draw.

    Returns:
        `list[PlacedItem]`: the things in the order of the graph.

    Raises:
        [`LayoutError`]: if no layout satisfies the graph, or none was found.
    """
    slots = {item: Slot(i, item, sizes[item]) for i, item in enumerate(graph.entities)}
    below, heights = _stacks(graph, sizes)
    for slot in slots.values():
        if slot.radius + BORDER > 0.5:
            raise LayoutError(f"The {slot.item} is larger than the table.")
    system = DifferenceSystem.within_borders([slot.radius + BORDER for slot in slots.values()])
    choices = []
    for relation in graph.relations:
        if relation.name not in PLACEMENTS:
            raise LayoutError(f"{relation} is not a relation of things on a table.")
        choices.append(PLACEMENTS[relation.name]([slots[item] for item in relation.arguments], relation.region))
    choices.sort(key=len)  # choices without an alternative come first and narrow the rest
    order = list(slots.values())
    for i, a in enumerate(order):
        for b in order[:i]:
            if b.item not in (below.get(a.item), *_partners(below, a.item)):
                choices.append(_apart(a, b, heights))
    solved = choose_alternatives(system, choices, rng, [MAX_BRANCHES])
    if solved is None:
        raise LayoutError(f"No layout satisfies {[str(relation) for relation in graph.relations]} at once.")
    positions = solved.draw(rng)
    placed = []
    for slot in order:
        support = below.get(slot.item)
        x, z = positions[slot.number]
        placed.append(PlacedItem(slot.item, float(x), float(z), _base(support, sizes), slot.radius))
    return placed


def _stacks(graph: SceneGraph, sizes: dict[Item, float]) -> tuple[dict[Item, Item], dict[Item, float]]:
    """Returns thing → what it stands on or lies in, and thing → height above the table of the top of its stack."""
    below: dict[Item, Item] = {}
    for relation in graph.relations:
        if relation.name in ("on", "inside", "under", "contains"):
            top, support = relation.arguments if relation.name in ("on", "inside") else relation.arguments[::-1]
            if top in below or support in below or top in below.values():
                raise LayoutError(f"{relation}: a thing takes part in one stack, of two things.")
            below[top] = support
    heights = {item: sizes[item] * item.solid.height for item in graph.entities}
    for top, support in below.items():
        heights[support] = max(heights[support], _base(support, sizes) + heights[top])
        heights[top] = heights[support]
    return below, heights


def _base(support: Item | None, sizes: dict[Item, float]) -> float:
    if support is None:
        return 0.0
    return 0.01 if support.solid.is_container else sizes[support] * support.solid.height


def _partners(below: dict[Item, Item], item: Item) -> list[Item]:
    return [top for top, support in below.items() if support == item]


def _apart(a: Slot, b: Slot, heights: dict[Item, float]) -> list[list[Bound]]:
    """Returns the alternatives in which neither thing touches the other or hides much of it."""
    reach = a.radius + b.radius + CLEARANCE
    return [
        [Bound(X, a.number, b.number, reach)],
        [Bound(X, b.number, a.number, reach)],
        [Bound(Z, a.number, b.number, reach + SHADE * heights[b.item])],
        [Bound(Z, b.number, a.number, reach + SHADE * heights[a.item])],
    ]


def is_possible(graphs: Sequence[SceneGraph], rng: np.random.Generator) -> bool:
    """Whether every one of several graphs over the same things has a layout, with one draw of their sizes."""
    try:
        sizes = sample_sizes(graphs[0].entities, rng)
        for graph in graphs:
            place_tabletop(graph, sizes, rng)
    except LayoutError:
        return False
    return True
