"""Places a scene graph on the canvas by solving difference constraints exactly.

Every relation is a choice between a few lists of bounds on differences of coordinates, and so is keeping two objects
apart. For one choice of each, the tightest implied bounds decide whether a layout exists, and any coordinate inside
its implied interval extends to a complete layout, so that drawing them one by one never has to backtrack (Dechter,
Meiri and Pearl, "Temporal constraint networks", 1991).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .graph import RADII, Entity, SceneGraph
from .placements import CANVAS, Bound, Slot, X, Y
from .relations import RELATIONS


# Minimum distance between objects that do not overlap, and between an object and the border, in canvas units.
CLEARANCE = 0.035
BORDER = 0.015
# Branches to try before a graph is considered too crowded; a solvable graph of six objects needs a few dozen.
MAX_BRANCHES = 1500


class LayoutError(ValueError):
    """A scene graph that no layout satisfies, or none was found for."""


@dataclass(frozen=True)
class PlacedObject:
    """One object on the canvas: what it is, its center, and half its width and height, in canvas units."""

    entity: Entity
    x: float
    y: float
    radius: float


class DifferenceSystem:
    """Upper bounds on all differences of coordinates, kept as tight as the added bounds imply."""

    def __init__(self, upper: list[list[list[float]]]):
        # upper[axis][i][j]: upper bound of position[j] - position[i], for num_objects + 1 positions. For so few
        # numbers, lists are twice as fast as arrays.
        self.upper = upper

    @classmethod
    def within_borders(cls, margins: Sequence[float]) -> "DifferenceSystem":
        """Return the system of positions that each keep a margin, of at most a half, to all sides of the canvas."""
        ends = [*margins, 0.0]  # the last position is that of `CANVAS`
        starts = [*[1.0 - margin for margin in margins], 0.0]
        rows = [[start - end for start in starts] for end in ends]
        for i, row in enumerate(rows):
            row[i] = 0.0
        return cls([rows, rows[:]])

    def copy(self) -> "DifferenceSystem":
        return DifferenceSystem([rows[:] for rows in self.upper])  # `add` replaces rows and never changes them

    def add(self, bound: Bound) -> bool:
        """Add a bound; `False` if it contradicts the others."""
        axis, lower, upper, minimum = bound
        rows = self.upper[axis]
        if -minimum >= rows[upper][lower]:
            return True
        beyond = rows[lower]
        if beyond[upper] < minimum:
            return False
        for number, row in enumerate(rows):
            reach = row[upper] - minimum
            if reach < row[lower]:  # otherwise no bound through `lower` gets tighter either
                rows[number] = [
                    old if old <= (new := reach + more) else new for old, more in zip(row, beyond, strict=False)
                ]
        return True

    def implies(self, alternative: Sequence[Bound]) -> bool:
        """Whether all these bounds already hold."""
        return all(-minimum >= self.upper[axis][upper][lower] for axis, lower, upper, minimum in alternative)

    def draw(self, rng: np.random.Generator) -> list[tuple[float, float]]:
        """Draw the position of every object: each coordinate uniform in the interval that the earlier ones leave."""
        num_objects = len(self.upper[X]) - 1
        positions = [[0.0, 0.0] for _ in range(num_objects)]
        for axis in (X, Y):
            rows = self.upper[axis]
            order, shares = rng.permutation(num_objects).tolist(), rng.random(num_objects).tolist()
            for index, share in zip(order, shares, strict=True):
                low, high = -rows[index][CANVAS], rows[CANVAS][index]
                value = positions[index][axis] = low + (high - low) * share
                if index != order[-1]:
                    self.add(Bound(axis, CANVAS, index, value))
                    self.add(Bound(axis, index, CANVAS, -value))
        return [(x, y) for x, y in positions]


def sample_radii(graphs: Sequence[SceneGraph], rng: np.random.Generator, freedom: float = 1.0) -> dict[Entity, float]:
    """
    Draw half the width of every object, in canvas units, such that they fit every one of several graphs over the same objects.
    Images of a pair share their sizes, or the sizes would tell the two apart. `freedom` is the share of the possible sizes to draw
    from, the smallest first.

    Raises:
        [`LayoutError`]: if a size word and a relation, or two relations, ask for different sizes.
    """
    # more objects have to be smaller, to leave room for each other
    crowding = min(1.0, (4.5 / len(graphs[0].entities)) ** 0.5)
    ranges = {
        entity: RADII[entity.size] if entity.size else tuple(max(r * crowding, 0.075) for r in RADII[None])
        for entity in graphs[0].entities
    }
    constrained = {entity for entity in ranges if entity.size}
    for graph in graphs:
        for relation in graph.relations:
            for entity, role in zip(relation.arguments, RELATIONS[relation.name].radius_ranges or (), strict=False):
                low, high = ranges[entity] if entity in constrained else role
                ranges[entity] = max(low, role[0]), min(high, role[1])
                constrained.add(entity)
                if ranges[entity][0] > ranges[entity][1]:
                    raise LayoutError(
                        f"The {entity} cannot have the size that {relation} needs, {role}, and the one said of it or "
                        f"needed by another relation, {(low, high)}. Change the size word or the relation."
                    )
    return {entity: float(rng.uniform(low, low + freedom * (high - low))) for entity, (low, high) in ranges.items()}


def place_scene(graph: SceneGraph, radii: dict[Entity, float], rng: np.random.Generator) -> list[PlacedObject]:
    """
    Place the objects of a graph, of given radii, such that every relation holds clearly and no two objects touch that need not.
    They are returned in drawing order, those behind first.

    Raises:
        [`LayoutError`]: if no layout satisfies the graph.
    """
    positions = _solve(graph, radii, rng).draw(rng)
    placed = [PlacedObject(e, x, y, radii[e]) for e, (x, y) in zip(graph.entities, positions, strict=True)]
    return [placed[i] for i in _drawing_order(graph, rng)]


def _solve(graph: SceneGraph, radii: dict[Entity, float], rng: np.random.Generator) -> DifferenceSystem:
    """Return consistent bounds for the layouts of a graph; raises a [`LayoutError`] if none are found."""
    entities = graph.entities
    index = {entity: i for i, entity in enumerate(entities)}
    sizes = [radii[entity] for entity in entities]
    for entity, radius in zip(entities, sizes, strict=True):
        if radius + BORDER > 0.5:
            raise LayoutError(f"The {entity} of radius {radius:.2f} is larger than the canvas.")
    system = DifferenceSystem.within_borders([radius + BORDER for radius in sizes])
    choices, apart = [], {(i, j) for j in range(len(entities)) for i in range(j)}
    for relation in graph.relations:
        kind = RELATIONS[relation.name]
        slots = [Slot(index[entity], radii[entity], entity.shape) for entity in relation.arguments]
        choices.append(kind.place(slots, relation.region))
        if kind.is_overlapping:
            apart.discard(tuple(sorted(slot.number for slot in slots)))
    choices.sort(key=len)  # choices without an alternative come first and narrow the rest
    for i, j in sorted(apart):
        distance = sizes[i] + sizes[j] + CLEARANCE
        choices.append([[Bound(axis, *pair, distance)] for axis in (X, Y) for pair in ((i, j), (j, i))])
    solved = choose_alternatives(system, choices, rng, [MAX_BRANCHES])
    if solved is None:
        raise LayoutError(f"No layout satisfies {[str(relation) for relation in graph.relations]} at once.")
    return solved


def choose_alternatives(system: DifferenceSystem, choices: list, rng: np.random.Generator, budget: list[int]):
    """Search depth-first for one alternative of every choice such that all are consistent."""
    if not choices:
        return system
    alternatives, *rest = choices
    # no choice is needed if one alternative already holds
    if any(map(system.implies, alternatives)):
        return choose_alternatives(system, rest, rng, budget)
    order = rng.permutation(len(alternatives)).tolist() if len(alternatives) > 1 else [0][: len(alternatives)]
    for k in order:
        budget[0] -= 1
        if budget[0] < 0:
            return None
        trial = system if k == order[-1] else system.copy()  # the caller discards `system` if the last one fails
        if all(map(trial.add, alternatives[k])):
            solved = choose_alternatives(trial, rest, rng, budget)
            if solved is not None:
                return solved
    return None


def _drawing_order(graph: SceneGraph, rng: np.random.Generator) -> list[int]:
    """Return the indices of the entities from back to front; an object takes part in one overlap at most."""
    depth = dict(enumerate(rng.random(len(graph.entities))))
    for relation in graph.relations:
        if relation.name in ("front_of", "inside"):
            depth[graph.entities.index(relation.arguments[0])] = 2.0
        elif relation.name in ("behind", "contains"):
            depth[graph.entities.index(relation.arguments[1])] = 2.0
    return sorted(depth, key=depth.__getitem__)


def place_together(
    graphs: Sequence[SceneGraph], rng: np.random.Generator, num_draws: int = 20
) -> list[list[PlacedObject]]:
    """
    Place several graphs over the same objects, with the same sizes of the objects in every layout. Sizes are drawn up to
    `num_draws` times, every other one from smaller and smaller sizes: in a crowded scene some leave no room.

    Raises:
        [`LayoutError`]: if no layout was found.
    """
    for draw in range(num_draws):
        # every other draw is from all sizes: "far from" more often needs a large object in between than a small one
        radii = sample_radii(graphs, rng, freedom=1.0 - draw / num_draws if draw % 2 else 1.0)
        try:
            return [place_scene(graph, radii, rng) for graph in graphs]
        except LayoutError:
            if draw == num_draws - 1:
                raise
    raise ValueError(f"num_draws={num_draws} must be at least 1.")


def is_placeable(graphs: Sequence[SceneGraph], rng: np.random.Generator) -> bool:
    """Whether every one of several graphs over the same objects has a layout with one draw of the objects' sizes."""
    try:
        radii = sample_radii(graphs, rng)
        for graph in graphs:
            _solve(graph, radii, rng)
            # draw as `place_scene` would, so that seeds give the same scenes as in versions that placed objects here
            for _ in (X, Y):
                rng.permutation(len(radii))
                rng.random(len(radii))
            rng.random(len(radii))
    except LayoutError:
        return False
    return True
