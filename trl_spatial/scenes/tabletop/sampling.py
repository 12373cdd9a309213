"""Samples scenes: scatters things at random, then picks relations that hold between them."""

from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np

from ..graph import COLORS, SPLITS, Relation, SceneGraph, split_of
from ..placements import REGIONS, Bound
from ..relations import RELATIONS
from .placing import CANVAS, CLEARANCE, PLACEMENTS, SHADE, Slot, is_possible, sample_sizes
from .things import NOUNS, SCENES, SOLIDS, Item


_ATTEMPTS = 300
MAX_ITEMS = 8
MAX_RELATIONS = 12
DIMENSIONS = tuple(dict.fromkeys(RELATIONS[name].dimension for name in PLACEMENTS))


def sample_tabletop_graph(
    rng: np.random.Generator,
    *,
    num_relations: int,
    dimensions: Sequence[str] | None = None,
    split: str | None = None,
) -> SceneGraph:
    """
    Draw a scene that can be placed.

    Args:
        rng (`np.random.Generator`):
            Source of the draw.
        num_relations (`int`):
            Number of relations, 1 to 12. Two things are related at most once.
        dimensions (`Sequence[str]`, *optional*):
            Dimensions of which the graph has a relation each, see [`~scenes.RelationKind`]. The others are of any.
        split (`str`, *optional*):
            Draw from this split only, see [`~scenes.SceneGraph.split`].

    Returns:
        [`SceneGraph`]: the graph; its entities are [`Item`]s, each in a relation.

    Raises:
        `ValueError`: If none was found.
    """
    if not 1 <= num_relations <= MAX_RELATIONS:
        raise ValueError(f"num_relations={num_relations} must be between 1 and {MAX_RELATIONS}.")
    wanted = list(dict.fromkeys(dimensions or ()))
    if unknown := [dimension for dimension in wanted if dimension not in DIMENSIONS]:
        raise ValueError(f"dimensions has unknown {unknown}; choose from {list(DIMENSIONS)}.")
    if len(wanted) > num_relations:
        raise ValueError(f"num_relations={num_relations} is too small for a relation of each dimension of {wanted}.")
    if split is not None and split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; choose one of {list(SPLITS)}.")
    for _ in range(_ATTEMPTS):
        items = _sample_items(rng, num_relations, wanted)
        while split is not None and split_of(items) != split:
            items = _sample_items(rng, num_relations, wanted)
        sizes = sample_sizes(items, rng)
        scattered = _scatter(items, sizes, wanted, rng)
        if scattered is None:
            continue
        relations = _read_off(items, sizes, *scattered, num_relations, wanted, rng)
        if relations is None:
            continue
        graph = SceneGraph(tuple(items), tuple(relations))
        if is_possible([graph], rng):
            return graph
    raise ValueError(
        f"No scene with num_relations={num_relations} and relations of the dimensions {wanted} was found in {_ATTEMPTS} "
        "attempts. Ask for fewer relations."
    )


def _sample_items(rng: np.random.Generator, num_relations: int, wanted: Sequence[str]) -> list[Item]:
    least = max(3, -(-num_relations * 5 // 8))
    if num_relations == 1:  # every thing must be in this relation
        number = {"region": 1, "between": 3, "order": 3}.get(wanted[0] if wanted else "", 2)
    else:
        number = int(rng.integers(least, min(least + 2, MAX_ITEMS) + 1)) if least < MAX_ITEMS else MAX_ITEMS
    nouns = list(NOUNS)
    items: dict[str, Item] = {}
    if "vertical" in wanted or rng.random() < 0.3:
        flat = [noun for noun in nouns if SOLIDS[NOUNS[noun]].is_flat]
        _add_items(items, flat, 2, rng)
    if "containment" in wanted or rng.random() < 0.3:
        _add_items(items, [noun for noun in nouns if SOLIDS[NOUNS[noun]].is_container], 1, rng)
        _add_items(items, [noun for noun in nouns if NOUNS[noun] in ("can", "rod", "sphere", "cone")], 1, rng)
    _add_items(items, [n for n in nouns if not SOLIDS[NOUNS[n]].is_container], number - len(items), rng)
    return [list(items.values())[i] for i in rng.permutation(len(items))]


def _add_items(items: dict[str, Item], nouns: list[str], number: int, rng: np.random.Generator) -> None:
    end = len(items) + number
    while len(items) < end:
        item = Item(list(COLORS)[rng.integers(len(COLORS))], nouns[rng.integers(len(nouns))])
        # at most two things per color, so that the color helps to identify a thing
        if item.look not in items and sum(other.color == item.color for other in items.values()) < 2:
            items[item.look] = item


def _scatter(
    items: list[Item], sizes: dict[Item, float], wanted: Sequence[str], rng: np.random.Generator
) -> tuple[np.ndarray, list[Relation]] | None:
    """
    Draws positions `(num_items, 2)`, and before them the stacks, returned as relations; `None` if there is no room.
    """
    stacks = []
    flat = [i for i, item in enumerate(items) if item.solid.is_flat]
    if len(flat) > 1 and ("vertical" in wanted or rng.random() < 0.4):
        top, support = flat[0], flat[1]
        stacks.append((top, support, Relation(*_either("on", "under", items[top], items[support], rng))))
    boxes = [i for i, item in enumerate(items) if item.solid.is_container]
    small = [i for i, item in enumerate(items) if not item.solid.is_container and not item.solid.is_flat]
    small = small or [i for i, item in enumerate(items) if item.solid.form == "cylinder"]
    free = [i for i in small if all(i not in stack[:2] for stack in stacks)]
    if boxes and free and ("containment" in wanted or rng.random() < 0.5):
        stacks.append(
            (free[0], boxes[0], Relation(*_either("inside", "contains", items[free[0]], items[boxes[0]], rng)))
        )
    above = {top: support for top, support, _ in stacks}
    positions = np.full((len(items), 2), np.nan)
    for i in rng.permutation(len(items)):
        if i in above:
            continue
        neighbors = np.flatnonzero(positions[:, 0] >= 0)
        for attempt in range(60):
            margin = sizes[items[i]] + 0.02
            place = rng.uniform(margin, 1 - margin, size=2)
            if (
                attempt < 10 and len(neighbors) and rng.random() < 0.4
            ):  # next to another one, which chance alone rarely gives
                j = neighbors[rng.integers(len(neighbors))]
                reach = sizes[items[i]] + sizes[items[j]] + rng.uniform(0.035, 0.06)
                place = positions[j] + np.array([reach * (1 if rng.random() < 0.5 else -1), rng.uniform(-0.02, 0.02)])
                if not (margin <= place).all() or not (place <= 1 - margin).all():
                    continue
            if all(
                _is_clear(i, place, j, positions[j], items, sizes) for j in range(len(items)) if positions[j, 0] >= 0
            ):
                positions[i] = place
                break
        else:
            return None
    for top, support in above.items():
        positions[top] = positions[support]
    return positions, [relation for _, _, relation in stacks]


def _either(name: str, inverse: str, a: Item, b: Item, rng: np.random.Generator) -> tuple[str, tuple[Item, Item]]:
    return (name, (a, b)) if rng.random() < 0.5 else (inverse, (b, a))


def _is_clear(
    i: int, place: np.ndarray, j: int, other: np.ndarray, items: list[Item], sizes: dict[Item, float]
) -> bool:
    dx, dz = np.abs(place - other)
    reach = sizes[items[i]] + sizes[items[j]] + CLEARANCE
    front = items[i] if place[1] > other[1] else items[j]
    return dx > reach or dz > reach + SHADE * sizes[front] * front.solid.height


def _read_off(
    items: list[Item], sizes: dict[Item, float], positions: np.ndarray, stacked: list[Relation],
    num_relations: int, wanted: Sequence[str], rng: np.random.Generator,
) -> list[Relation] | None:  # fmt: skip
    """
    Draws `num_relations` relations that hold at these positions, the stacks among them: at least one of each wanted
    dimension, and at least one of each thing. Returns `None` if the draw fails.
    """
    slots = {item: Slot(i, item, sizes[item]) for i, item in enumerate(items)}
    lifted = {relation.arguments[0 if relation.name in ("on", "inside") else 1] for relation in stacked}
    candidates: dict[str, list[Relation]] = {}
    for relation in _statements([item for item in items if item not in lifted], rng):
        places = PLACEMENTS[relation.name]([slots[item] for item in relation.arguments], relation.region)
        if any(all(_holds(bound, positions) for bound in bounds) for bounds in places):
            candidates.setdefault(RELATIONS[relation.name].dimension, []).append(relation)
    chosen = list(stacked)
    covered = {pair for relation in chosen for pair in _pairs(relation)}
    missing = [dimension for dimension in wanted if dimension not in ("vertical", "containment")]
    while len(chosen) < num_relations:
        open_items = set(items) - {item for relation in chosen for item in relation.arguments}
        if num_relations > 1 and len(open_items) > 2 * (num_relations - len(chosen)):
            return None
        dimension = missing.pop() if missing else None
        pool = [
            relation
            for kind, relations in candidates.items()
            if dimension in (None, kind)
            for relation in relations
            if not covered & _pairs(relation)
        ]
        if not pool:
            return None
        # prefer relations of a thing without one; draw the dimension first, then the relation, then the things
        pool = [relation for relation in pool if open_items & set(relation.arguments)] or pool
        for key in (lambda relation: RELATIONS[relation.name].dimension, lambda relation: relation.name):
            values = sorted({key(relation) for relation in pool})
            value = values[rng.integers(len(values))]
            pool = [relation for relation in pool if key(relation) == value]
        relation = pool[rng.integers(len(pool))]
        chosen.append(relation)
        covered |= _pairs(relation)
    named = {item for relation in chosen for item in relation.arguments}
    found = {RELATIONS[relation.name].dimension for relation in chosen}
    if len(chosen) > num_relations or named != set(items) or not found >= set(wanted):
        return None
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _statements(items: list[Item], rng: np.random.Generator) -> list[Relation]:
    """
    Returns all relations that things on the table can have; the order of arguments is random where it does not matter.
    """
    found = [Relation("at", (item,), region) for item in items for region in REGIONS]
    for a, b in permutations(items, 2):
        found += [Relation(name, (a, b)) for name in ("left_of", "right_of", "front_of", "behind")]
    for a, b in combinations(items, 2):
        pair = (a, b) if rng.random() < 0.5 else (b, a)
        found += [Relation(name, pair) for name in ("near", "next_to", "far_from")]
    for trio in permutations(items, 3):
        found.append(Relation("row_order", trio))
        if trio[1] < trio[2]:  # the ends of "between" are interchangeable
            ends = trio[1:] if rng.random() < 0.5 else trio[:0:-1]
            found.append(Relation("between", (trio[0], *ends)))
    return found


def _holds(bound: Bound, positions: np.ndarray) -> bool:
    lower, upper = (0.0 if i == CANVAS else positions[i, bound.axis] for i in (bound.lower, bound.upper))
    return upper - lower >= bound.minimum


def _pairs(relation: Relation) -> set[frozenset]:
    if len(relation.arguments) == 1:
        return {frozenset(relation.arguments)}
    return {frozenset(pair) for pair in combinations(relation.arguments, 2)}


def sample_scene(rng: np.random.Generator) -> str:
    """Draws one of `SCENES`."""
    return list(SCENES)[rng.integers(len(SCENES))]
