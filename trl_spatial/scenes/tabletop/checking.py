"""Compares a picture of a table with a graph, from the points that its rays hit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..checking import RelationCheck, SceneCheck
from ..graph import SceneGraph
from ..placements import REGIONS
from ..relations import Verdict, graded
from .raycasting import Rendering
from .things import Item


MIN_PIXELS = 12  # visible pixels from which a thing counts as present


@dataclass(frozen=True)
class SeenItem:
    """
    The visible part of a thing.

    Args:
        item ([`Item`]):
            What it is.
        column (`float`):
            Middle in the image, from 0 at the left to 1.
        x (`float`), z (`float`):
            Middle on the table.
        low (`float`), high (`float`):
            Lowest and highest visible height.
        radius (`float`):
            Half the visible width.
    """

    item: Item
    column: float
    x: float
    z: float
    low: float
    high: float
    radius: float


def see_items(rendering: Rendering) -> dict[Item, SeenItem]:
    """
    Measures the things in a picture. Hidden parts are not guessed, except that the middle of a thing is half a width
    behind its point nearest to the viewer.

    Args:
        rendering ([`Rendering`]):
            The picture.

    Returns:
        `dict[Item, SeenItem]`: without things of which less than a dozen pixels are seen.
    """
    seen = {}
    for number, item in enumerate(rendering.items):
        mask = rendering.labels == number
        if mask.sum() < MIN_PIXELS:
            continue
        x, y, z = rendering.points[mask].T
        columns = np.nonzero(mask.any(axis=0))[0]
        radius = float(x.max() - x.min()) / 2
        seen[item] = SeenItem(
            item,
            float(columns[0] + columns[-1] + 1) / 2 / mask.shape[1],
            float(x.max() + x.min()) / 2,
            float(z.max()) - radius,
            float(y.min()),
            float(y.max()),
            radius,
        )
    return seen


def _gap(a: SeenItem, b: SeenItem) -> float:
    gaps = (max(abs(p - q) - a.radius - b.radius, 0.0) for p, q in ((a.x, b.x), (a.z, b.z)))
    return math.hypot(*gaps)


def _is_over(a: SeenItem, b: SeenItem) -> bool:
    return max(abs(a.x - b.x), abs(a.z - b.z)) < max(a.radius, b.radius)


def _left_of(things, region):
    a, b = things
    distance = b.column - a.column
    return graded(distance, 0.04, 0.015, f"its middle is {distance:+.2f} to the left in the image")


def _front_of(things, region):
    a, b = things
    distance = a.z - b.z
    return graded(distance, 0.06, 0.02, f"it is {distance:+.2f} nearer to the viewer")


def _on(things, region):
    a, b = things
    gap = a.low - b.high
    text = f"its foot is {gap:+.2f} over the other's top"
    if not _is_over(a, b) or b.item.solid.is_container or gap <= -0.04 or gap >= 0.1:
        return Verdict.VIOLATED, text
    # a wide thing hides the top of its support, so the gap looks larger
    is_close = -0.02 <= gap <= 0.07
    return (Verdict.SATISFIED, text) if is_close else (Verdict.UNDECIDABLE, f"{text}: too close to call")


def _inside(things, region):
    a, b = things
    off = max(abs(a.x - b.x), abs(a.z - b.z)) / b.radius
    if not b.item.solid.is_container or a.item.solid.is_container:
        return Verdict.VIOLATED, f"a {a.item.noun} does not lie in a {b.item.noun}"
    return graded(-off, -0.6, -1.0, f"it is {off:.2f} of half a width off the middle")


def _near(things, region):
    gap = _gap(*things)
    return graded(-gap, -0.17, -0.22, f"the gap is {gap:.2f}")


def _next_to(things, region):
    a, b = things
    if _is_over(a, b):
        return Verdict.VIOLATED, "one is in or on the other"
    return _near(things, region)


def _far_from(things, region):
    gap = _gap(*things)
    return graded(gap, 0.3, 0.22, f"the gap is {gap:.2f}")


def _between(things, region):
    a, b, c = (np.array([thing.x, thing.z]) for thing in things)
    length = float(np.hypot(*(c - b)))
    if length < 0.1:
        return Verdict.UNDECIDABLE, "the two outer things are at the same place"
    direction = (c - b) / length
    along = float((a - b) @ direction) / length
    aside = float(abs((a - b)[0] * direction[1] - (a - b)[1] * direction[0]))
    text = f"it is {along:.0%} of the way and {aside:.2f} aside"
    if 0.15 <= along <= 0.85 and aside <= 0.12:
        return Verdict.SATISFIED, text
    if not 0.05 < along < 0.95 or aside >= 0.2:
        return Verdict.VIOLATED, text
    return Verdict.UNDECIDABLE, f"{text}: too close to call"


def _at(things, region):
    (a,) = things
    off = max(
        abs(place - (0.0, 0.5, 1.0)[cell]) - (0.0 if cell == 1 else 0.2)
        for place, cell in zip((a.x, a.z), REGIONS[region], strict=True)
    )
    return graded(-off, -0.13, -0.18, f"its middle is at ({a.x:.2f}, {a.z:.2f})")


def _row_order(things, region):
    spread = max(thing.z for thing in things) - min(thing.z for thing in things)
    steps = [after.column - before.column for before, after in pairwise(things)]
    text = f"the smallest step to the right is {min(steps):+.2f}, the row's depth {spread:.2f}"
    if min(steps) <= 0.015 or spread >= 0.3:
        return Verdict.VIOLATED, text
    if min(steps) >= 0.04 and spread <= 0.15:
        return Verdict.SATISFIED, text
    return Verdict.UNDECIDABLE, f"{text}: too close to call"


_Rule = Callable[[Sequence[SeenItem], str | None], tuple[Verdict, str]]


def _swapped(rule: _Rule) -> _Rule:
    return lambda things, region: rule(things[::-1], region)


RULES: dict[str, _Rule] = {
    "left_of": _left_of,
    "right_of": _swapped(_left_of),
    "front_of": _front_of,
    "behind": _swapped(_front_of),
    "on": _on,
    "under": _swapped(_on),
    "inside": _inside,
    "contains": _swapped(_inside),
    "near": _near,
    "next_to": _next_to,
    "far_from": _far_from,
    "between": _between,
    "at": _at,
    "row_order": _row_order,
}


def check_tabletop(rendering: Rendering, graph: SceneGraph) -> SceneCheck:
    """
    Compare a picture with a graph, from the points that its rays hit rather than from the graph that it was drawn
    from.

    Args:
        rendering ([`Rendering`]):
            The picture.
        graph ([`SceneGraph`]):
            What it should show: any relations of the things that were drawn.

    Returns:
        [`SceneCheck`]: a verdict with its reason per relation, and which things are missing or hidden. A relation of such a
        thing is undecidable.
    """
    seen = see_items(rendering)
    checks = []
    for relation in graph.relations:
        hidden = [item for item in relation.arguments if item not in seen]
        if hidden:
            checks.append(RelationCheck(relation, Verdict.UNDECIDABLE, f"{hidden[0]} cannot be seen"))
        elif relation.name not in RULES:
            checks.append(RelationCheck(relation, Verdict.UNDECIDABLE, "there is no rule for it on a table"))
        else:
            rule = RULES[relation.name]
            checks.append(RelationCheck(relation, *rule([seen[item] for item in relation.arguments], relation.region)))
    missing = [item for item in graph.entities if item not in seen]
    return SceneCheck(relations=checks, objects=[], missing=missing, duplicated=[], extra=[])
