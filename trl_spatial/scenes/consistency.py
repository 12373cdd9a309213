"""Checks by logic alone whether relations can hold together: for things of any kind, which no renderer can place."""

from collections.abc import Iterable
from itertools import pairwise

from .graph import Relation, SceneGraph, Thing
from .relations import RELATIONS


# Name of a relation of two things, and the two things.
Fact = tuple[str, Thing, Thing]

_ORDERS = ("left_of", "right_of", "above", "below", "front_of", "behind")
# Relation → another relation, besides its inverse, that it implies.
_IMPLIED = {"on": "above", "under": "below"}
# Relation → relations that cannot hold between the same two things.
_EXCLUDED = {
    "inside": (*_ORDERS, "on", "under", "near", "next_to", "far_from"),
    "on": ("far_from", "inside", "contains"),
}
_COLUMNS, _ROWS = {"left": 0, "center": 1, "right": 2}, {"top": 0, "center": 1, "bottom": 2}


def canonical_relation(relation: Relation) -> tuple[str, ...]:
    """
    Return the canonical form of equivalent relations, such as `left_of(a, b)` and `right_of(b, a)`.

    Args:
        relation ([`~scenes.Relation`]):
            A relation.

    Returns:
        `tuple[str, ...]`: Name, looks of the things and region.
    """
    kind, looks = RELATIONS[relation.name], [thing.look for thing in relation.arguments]
    forms = [(relation.name, *looks)]
    if kind.inverse is not None:
        forms.append((kind.inverse, *looks[::-1]))
    if relation.name == "between":
        forms = [(relation.name, looks[0], *sorted(looks[1:]))]
    return min(forms) + ((relation.region,) if relation.region else ())


def say_the_same(relations: Iterable[Relation], others: Iterable[Relation]) -> bool:
    """Whether two sets of relations are equal up to inverses and order."""
    return {*map(canonical_relation, relations)} == {*map(canonical_relation, others)}


def is_consistent(graph: SceneGraph) -> bool:
    """
    Whether the relations of a graph can hold together: the counterpart of [`~scenes.is_placeable`] for things of any kind.

    Directions are followed through chains, and from a container to what is in it. Not consistent are: a direction and its
    opposite; a direction, a distance or a support between a thing and its container; far and near, or far and resting on
    it; two supports, two containers that are not in each other; a thing between two others that are both on one side of it;
    another of the same three between the other two; one thing at two regions, and regions against directions.

    Args:
        graph ([`~scenes.SceneGraph`]):
            A graph over any things.

    Returns:
        `bool`: Whether no contradiction was found. Chains of `between` are not followed.
    """
    facts = _close(_stated_facts(graph))
    if any(a == b for _, a, b in facts):
        return False
    for name, a, b in facts:
        opposite = RELATIONS[name].opposite
        excluded = (*_EXCLUDED.get(name, ()), *((opposite,) if opposite else ()))
        if any((other, a, b) in facts for other in excluded):
            return False
    return (
        _has_one_support(facts)
        and _has_nested_containers(facts)
        and _has_middles(graph, facts)
        and _has_one_region(graph)
    )


def _stated_facts(graph: SceneGraph) -> set[Fact]:
    facts: set[Fact] = set()
    for relation in graph.relations:
        if relation.name == "row_order":
            facts |= {("left_of", a, b) for a, b in pairwise(relation.arguments)}
        elif len(relation.arguments) == 2:
            facts.add((relation.name, relation.arguments[0], relation.arguments[1]))
    regions = {
        relation.arguments[0]: str(relation.region).split() for relation in graph.relations if relation.name == "at"
    }
    for name, cells in (("left_of", _COLUMNS), ("above", _ROWS)):
        places = {thing: cells[word] for thing, words in regions.items() for word in words if word in cells}
        facts |= {(name, a, b) for a in places for b in places if places[a] < places[b]}
    return facts


def _close(facts: set[Fact]) -> set[Fact]:
    """Return the closure of the facts: all that follow from them, inverses included."""
    while True:
        new = {(_IMPLIED[name], a, b) for name, a, b in facts if name in _IMPLIED}
        new |= {(inverse, b, a) for name, a, b in facts if (inverse := RELATIONS[name].inverse)}
        new |= {
            (name, a, c)
            for name, a, b in facts
            if RELATIONS[name].is_transitive
            for other, start, c in facts
            if (other, start) == (name, b)
        }
        # a thing in a container is in the same direction of other things as the container
        new |= {
            (name, inner, b)
            for relation, inner, outer in facts
            if relation == "inside"
            for name, a, b in facts
            if name in _ORDERS and a == outer
        }
        if new <= facts:
            return facts
        facts = facts | new


def _has_one_support(facts: set[Fact]) -> bool:
    supported = [a for name, a, _ in facts if name == "on"]
    return len(supported) == len(set(supported))


def _has_nested_containers(facts: set[Fact]) -> bool:
    """Whether of any two containers of a thing, one is in the other."""
    inside = {(a, b) for name, a, b in facts if name == "inside"}
    return all(b == c or (b, c) in inside or (c, b) in inside for a, b in inside for other, c in inside if other == a)


def _has_middles(graph: SceneGraph, facts: set[Fact]) -> bool:
    middles: dict[frozenset, Thing] = {}
    for relation in graph.relations:
        if relation.name != "between":
            continue
        a, b, c = relation.arguments
        if middles.setdefault(frozenset(relation.arguments), a) != a:
            return False
        if any((name, a, b) in facts and (name, a, c) in facts for name in _ORDERS):
            return False
    return True


def _has_one_region(graph: SceneGraph) -> bool:
    regions = {(relation.arguments[0], relation.region) for relation in graph.relations if relation.name == "at"}
    return len({thing for thing, _ in regions}) == len(regions)
