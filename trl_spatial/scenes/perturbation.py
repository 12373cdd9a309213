"""Samples consistent scene graphs, and changes some of their relations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .graph import COLORS, Relation, SceneGraph, sample_entities
from .layout import is_placeable
from .placements import REGIONS
from .relations import MIRRORED_REGIONS, RELATIONS
from .shapes import SHAPES


_ATTEMPTS = 200


@dataclass(frozen=True)
class Operation:
    """
    One change of one relation.

    Args:
        operation (`str`):
            `"swap"` (arguments exchanged), `"flip"` (opposite relation), `"move"` (another place or distance) or
            `"slot_swap"` (two objects exchange their slots in a row or around a middle).
        before ([`Relation`]):
            The relation as it was.
        after ([`Relation`]):
            The relation as it is now.
    """

    operation: str
    before: Relation
    after: Relation


def sample_graph(
    rng: np.random.Generator,
    *,
    num_objects: int = 3,
    num_relations: int = 2,
    relations: Sequence[str] = tuple(RELATIONS),
    split: str | None = None,
    size_probability: float = 0.0,
    colors: Sequence[str] = tuple(COLORS),
    shapes: Sequence[str] = SHAPES,
) -> SceneGraph:
    """
    Draw a consistent scene graph: one that can be placed on a canvas. Two objects are related at most once, and an object is at one
    region at most; the kinds of relations are drawn equally often where they fit. The rest is as for [`sample_entities`].
    """
    for name in relations:
        if name not in RELATIONS:
            raise ValueError(f"Unknown relation {name!r} in `relations`; choose from {list(RELATIONS)}.")
    for _ in range(_ATTEMPTS):
        entities = sample_entities(rng, num_objects, split, size_probability, colors, shapes)
        chosen: list[Relation] = []
        related: set[frozenset] = set()
        for _ in range(20 * num_relations):
            if len(chosen) == num_relations:
                break
            relation = _sample_relation(rng, entities, chosen, related, relations)
            if relation is not None:
                chosen.append(relation)
                related |= _pairs(relation)
        graph = SceneGraph(entities, tuple(chosen))
        if len(chosen) == num_relations and is_placeable([graph], rng):
            return graph
    raise ValueError(
        f"No consistent graph of num_objects={num_objects} and num_relations={num_relations} of kinds {list(relations)} "
        f"in {_ATTEMPTS} attempts. Ask for fewer relations, more objects or more kinds."
    )


def _sample_relation(rng, entities, chosen, related, names) -> Relation | None:
    """
    Draw one more relation, or `None` if the draw conflicts with the `chosen` ones, whose [`_pairs`] are `related`.
    """
    kind = RELATIONS[names[rng.integers(len(names))]]
    mentioned = {entity for relation in chosen for entity in relation.arguments}
    # objects without a relation come first
    order = sorted(rng.permutation(len(entities)).tolist(), key=lambda i: entities[i] in mentioned)
    size = kind.num_arguments
    if len(entities) < size:
        return None
    arguments = tuple(entities[order[i]] for i in rng.permutation(size).tolist())
    region = list(REGIONS)[rng.integers(len(REGIONS))] if kind.name == "at" else None
    relation = Relation(kind.name, arguments, region)
    if not related.isdisjoint(_pairs(relation)):
        return None
    if kind.is_overlapping and any(
        RELATIONS[other.name].is_overlapping and set(other.arguments) & set(arguments) for other in chosen
    ):
        return None
    return relation


def _pairs(relation: Relation) -> set[frozenset]:
    """Return the pairs of objects that a relation relates, or its only object."""
    if len(relation.arguments) == 1:
        return {frozenset(relation.arguments)}
    return {frozenset(pair) for pair in combinations(relation.arguments, 2)}


def _changes(relation: Relation) -> list[Operation]:
    """Return all changes of one relation that contradict it."""
    kind, arguments = RELATIONS[relation.name], relation.arguments
    if relation.name == "at":
        mirrored = MIRRORED_REGIONS.get(str(relation.region))
        return [
            Operation("flip" if region == mirrored else "move", relation, Relation("at", arguments, region))
            for region in REGIONS
            if region != relation.region
        ]
    if len(arguments) > 2:
        # in `between`, exchange the middle (the first argument) with an end; in a row, exchange neighbors
        swaps = [(0, 1), (0, 2)] if relation.name == "between" else [(i, i + 1) for i in range(len(arguments) - 1)]
        changes = []
        for i, j in swaps:
            order = list(arguments)
            order[i], order[j] = order[j], order[i]
            changes.append(Operation("slot_swap", relation, Relation(relation.name, tuple(order))))
        return changes
    changes = []
    if not kind.is_symmetric:
        changes.append(Operation("swap", relation, Relation(relation.name, arguments[::-1])))
    if kind.opposite is not None:
        name = "flip" if kind.opposite == kind.inverse else "move"
        changes.append(Operation(name, relation, Relation(kind.opposite, arguments)))
    return changes


def perturb(
    graph: SceneGraph,
    rng: np.random.Generator,
    num_changes: int = 1,
    *,
    dimension: str | None = None,
    is_possible: Callable[[Sequence[SceneGraph], np.random.Generator], bool] = is_placeable,
) -> tuple[SceneGraph, list[Operation]]:
    """
    Change some relations of a graph and keep the rest.

    Every change contradicts the relation it replaces, and the new graph is consistent with the same objects at the same
    sizes: hence no changed relation was implied by the unchanged ones.

    Args:
        graph ([`SceneGraph`]):
            A consistent graph.
        rng (`np.random.Generator`):
            Source of the draw.
        num_changes (`int`, *optional*, defaults to `1`):
            Number of relations to change.
        dimension (`str`, *optional*):
            Change a relation of this dimension, see [`~scenes.RelationKind`]. Further changes are of any.
        is_possible (`Callable`, *optional*):
            `(graphs, rng)` → whether the graphs can be shown with the same objects. By default on the flat canvas.

    Returns:
        `tuple[SceneGraph, list[Operation]]`: the new graph and the record of the changes.

    Raises:
        `ValueError`: if the graph has too few relations, or none can be changed consistently.
    """
    if not 1 <= num_changes <= len(graph.relations):
        raise ValueError(
            f"num_changes={num_changes} must be between 1 and the number of relations, {len(graph.relations)}."
        )
    first = [
        i for i, relation in enumerate(graph.relations) if dimension in (None, RELATIONS[relation.name].dimension)
    ]
    if not first:
        raise ValueError(f"None of {[str(r) for r in graph.relations]} is of dimension={dimension!r}.")
    for _ in range(_ATTEMPTS):
        relations, operations = list(graph.relations), []
        order = rng.permutation(len(relations)).tolist()
        foremost = next(i for i in order if i in first)
        for i in [foremost, *(i for i in order if i != foremost)][:num_changes]:
            changes = _changes(relations[i])
            # draw the operation first, then one of its changes: the many regions of `at` are one `move`
            kinds = sorted({change.operation for change in changes})
            kind = kinds[rng.integers(len(kinds))]
            ways = [change for change in changes if change.operation == kind]
            operation = ways[rng.integers(len(ways))]
            relations[i] = operation.after
            operations.append(operation)
        perturbed = SceneGraph(graph.entities, tuple(relations))
        if is_possible([graph, perturbed], rng):
            return perturbed, operations
    raise ValueError(f"No consistent way to change {num_changes} of {[str(r) for r in graph.relations]} was found.")
