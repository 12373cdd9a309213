"""The output of a writer: a prompt with the scene graph that it states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...scenes import Operation, Phrase, Relation, SceneGraph


@dataclass(frozen=True)
class Draft:
    """
    A prompt and the scene graph that it states.

    Args:
        scene (`str`):
            The scene, such as `"kitchen"`.
        graph ([`~scenes.SceneGraph`]):
            The objects and relations that the prompt states.
        prompt (`str`):
            The text.
        spans (`list[tuple[int, int]]`):
            For each relation of the graph, the characters of the prompt that state it.
        writer (`str`):
            What wrote it: the grammar, or the model that answered.
        cost (`float`, *optional*, defaults to 0):
            What it cost, in US dollars.
    """

    scene: str
    graph: SceneGraph
    prompt: str
    spans: list[tuple[int, int]]
    writer: str
    cost: float = 0.0


@dataclass(frozen=True)
class Dropped:
    """
    A draft that was not usable.

    Args:
        reason (`str`):
            Why: a few words, then details after a colon.
        raw (`str`, *optional*):
            The raw answer.
        cost (`float`, *optional*, defaults to 0):
            What it cost, in US dollars.
    """

    reason: str
    raw: str = ""
    cost: float = 0.0


def relation_record(relation: Relation, span: tuple[int, int] | None = None) -> dict[str, Any]:
    """A relation as JSON: its name, the names of its arguments, a region last, and where the prompt states it."""
    arguments = [str(entity) for entity in relation.arguments] + ([relation.region] if relation.region else [])
    return {"relation": relation.name, "arguments": arguments} | ({} if span is None else {"span": list(span)})


def relation_of(record: dict[str, Any]) -> Relation:
    """The inverse of [`relation_record`]; objects are known by their names."""
    arguments = list(record["arguments"])
    region = arguments.pop() if record["relation"] == "at" else None
    return Relation(record["relation"], tuple(Phrase(name) for name in arguments), region)


def graph_of(entities: Sequence[str], relations: Sequence[dict[str, Any]]) -> SceneGraph:
    """The graph of a record's entities and relations; objects are known by their names."""
    return SceneGraph(tuple(map(Phrase, entities)), tuple(map(relation_of, relations)))


def operation_record(operation: Operation) -> dict[str, Any]:
    """A change as JSON."""
    before, after = relation_record(operation.before), relation_record(operation.after)
    return {"operation": operation.operation, "before": before, "after": after}
