"""Writes prompts with a language model, rewrites them for changed relations, and reads rewrites back to check them."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any, Protocol, TypeVar

from ...endpoints import Answer, BadAnswer
from ...endpoints.structured import show_fault
from ...judges.questions import relation_statement
from ...scenes import REGIONS, RELATIONS, Operation, Phrase, Relation, SceneGraph
from ...scenes.consistency import canonical_relation, is_consistent, say_the_same
from .drafts import Draft, Dropped


Result = TypeVar("Result")

_FEWEST_WORDS, _MOST_WORDS = 40, 90
_LONGEST_PROMPT = 134  # words; the longest prompt of the paper
_WORDS_PER_RELATION = 11  # added for each relation beyond 7; the paper's mean
_LEAST_KEPT = 0.5  # share of the words that a rewrite keeps
_ARTICLES = ("a", "an", "the")


class ChatModel(Protocol):
    """A model that answers in words: an [`~endpoints.Endpoint`] or a [`~endpoints.local_chat.LocalChat`]."""

    model: str

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        schema: Mapping[str, Any] | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        vote: int = 0,
    ) -> Answer:
        """See [`~endpoints.Endpoint.chat`]."""
        ...


@dataclass(frozen=True)
class Reading:
    """
    The relations that a model read in a prompt.

    Args:
        relations (`tuple[Relation, ...]`):
            The relations, over [`~scenes.Phrase`]s.
        raw (`str`):
            The answer, word for word.
        cost (`float`):
            Price of the calls, in US dollars.
    """

    relations: tuple[Relation, ...]
    raw: str
    cost: float


class _Fault(ValueError):
    """A fault in an answer: `reason` for the drop statistics, and the details that the model is shown."""

    def __init__(self, reason: str, details: str):
        super().__init__(details)
        self.reason = reason


class LanguageWriter:
    """
    Writes prompts with a language model. Every answer is checked; a bad one is shown to the model with what is wrong, once.

    Args:
        endpoint ([`~endpoints.Endpoint`] or [`~endpoints.local_chat.LocalChat`]):
            The model that writes.
        reader ([`~endpoints.Endpoint`] or [`~endpoints.local_chat.LocalChat`], *optional*):
            The model that reads what was rewritten. If not set, the one that writes, in a call of its own.
    """

    def __init__(self, endpoint: ChatModel, *, reader: ChatModel | None = None):
        self.endpoint = endpoint
        self.reader = reader or endpoint

    def write(self, scene: str, num_relations: int, dimensions: Sequence[str], seed: int) -> Draft | Dropped:
        """
        Writes a prompt.

        Args:
            scene (`str`):
                The scene, such as `"kitchen"`.
            num_relations (`int`):
                How many relations it states.
            dimensions (`Sequence[str]`):
                Kinds of relations that it must contain, see [`~scenes.RelationKind`], each at least as often as it is
                listed. May be empty.
            seed (`int`):
                Number of the prompt; with a different one, the model is asked for a different scene.

        Returns:
            [`Draft`] or [`Dropped`]: The prompt, or why there is none.

        Raises:
            `ValueError`: If there are more `dimensions` than relations, or one is unknown.
            [`~endpoints.ServerError`], [`~endpoints.BudgetReached`]: As [`~endpoints.Endpoint.chat`].
        """
        known = {kind.dimension for kind in RELATIONS.values()}
        if unknown := set(dimensions) - known:
            raise ValueError(f"Unknown dimensions {sorted(unknown)}; choose from {sorted(known)}.")
        if len(dimensions) > num_relations:
            raise ValueError(
                f"{len(dimensions)} `dimensions` need as many relations, got num_relations={num_relations}."
            )
        fewest, most = word_limits(num_relations)
        task = (
            f"Scene: {scene}\nRelations: {num_relations}\nKinds: {', '.join(dimensions) or 'any'}\n"
            f"Words: {fewest} to {most}\nNumber: {seed}"
        )

        def check(answer: Answer) -> Draft:
            names, prompt = answer.data["entities"], answer.data["prompt"].strip()
            graph, spans = _read_graph(names, answer.data["relations"], prompt)
            if len(graph.relations) != num_relations:
                raise _Fault(
                    "number of relations",
                    f"there are {len(graph.relations)} relations, and {num_relations} are asked for",
                )
            missing = Counter(dimensions) - Counter(RELATIONS[relation.name].dimension for relation in graph.relations)
            if missing:
                raise _Fault(
                    "kinds of relations", f"relations of these kinds are missing: {', '.join(missing.elements())}"
                )
            _check_prompt(prompt, graph)
            return Draft(scene, graph, prompt, spans, answer.served_model or self.endpoint.model, 0.0)

        draft, cost = _ask(self.endpoint, [_system(_WRITE), _user(task)], _WRITE_SCHEMA, seed, check)
        return replace(draft, cost=cost)

    def rewrite(self, draft: Draft, after: SceneGraph, operations: Sequence[Operation], seed: int) -> Draft | Dropped:
        """
        Changes a prompt so that it states other relations, and nothing else. What was written is then read by the reader,
        which must find exactly the relations that were asked for.

        Args:
            draft ([`Draft`]):
                The prompt.
            after ([`~scenes.SceneGraph`]):
                The graph that the new prompt states, of the same things.
            operations (`Sequence[Operation]`):
                The changes from `draft.graph` to `after`.
            seed (`int`):
                Seed of the model.

        Returns:
            [`Draft`] or [`Dropped`]: The changed prompt, its spans in the order of `after.relations`, or why there is none.

        Raises:
            [`~endpoints.ServerError`], [`~endpoints.BudgetReached`]: As [`~endpoints.Endpoint.chat`].
        """
        task = {
            "prompt": draft.prompt,
            "relations": [_as_record(relation) for relation in after.relations],
            "changes": [
                {"before": _as_record(operation.before), "after": _as_record(operation.after)}
                for operation in operations
            ],
        }

        def check(answer: Answer) -> Draft:
            prompt = answer.data["prompt"].strip()
            graph, spans = _read_graph([str(thing) for thing in after.entities], answer.data["relations"], prompt)
            if not say_the_same(graph.relations, after.relations):
                raise _Fault(
                    "other relations", "`relations` must be the ones that were given, with the words that state them"
                )
            _check_prompt(prompt, graph)
            kept = SequenceMatcher(None, draft.prompt.split(), prompt.split(), autojunk=False).ratio()
            if prompt == draft.prompt:
                raise _Fault("nothing changed", "the prompt is the same as before")
            if kept < _LEAST_KEPT:
                raise _Fault("too much changed", "most of the prompt has changed; change only what the changes need")
            places = dict(zip(map(canonical_relation, graph.relations), spans, strict=True))
            ordered = [places[canonical_relation(relation)] for relation in after.relations]
            return Draft(draft.scene, after, prompt, ordered, answer.served_model or self.endpoint.model, 0.0)

        messages = [_system(_REWRITE), _user(json.dumps(task, ensure_ascii=False))]
        written, cost = _ask(self.endpoint, messages, _REWRITE_SCHEMA, seed, check)
        if isinstance(written, Dropped):
            return replace(written, cost=cost)
        reading = self.read(written.prompt, [str(thing) for thing in after.entities], seed)
        cost += reading.cost
        if isinstance(reading, Dropped):
            return replace(reading, cost=cost)
        if not say_the_same(reading.relations, after.relations):
            return Dropped("read differently", reading.raw, cost)
        return replace(written, cost=cost)

    def read(self, prompt: str, entities: Sequence[str], seed: int = 0) -> Reading | Dropped:
        """
        Reads the relations that a prompt states.

        Args:
            prompt (`str`):
                The prompt.
            entities (`Sequence[str]`):
                Names of the things in it.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the model.

        Returns:
            [`Reading`] or [`Dropped`]: The relations, or why there are none.

        Raises:
            [`~endpoints.ServerError`], [`~endpoints.BudgetReached`]: As [`~endpoints.Endpoint.chat`].
        """
        things = _things(entities)

        def check(answer: Answer) -> Reading:
            relations = tuple(_as_relation(record, things) for record in answer.data["relations"])
            return Reading(relations, answer.text, 0.0)

        task = json.dumps({"prompt": prompt, "things": list(entities)}, ensure_ascii=False)
        reading, cost = _ask(self.reader, [_system(_READ), _user(task)], _READ_SCHEMA, seed, check)
        return replace(reading, cost=cost)


def word_limits(num_relations: int) -> tuple[int, int]:
    """Minimum and maximum number of words of a prompt with this number of relations."""
    most = _MOST_WORDS + _WORDS_PER_RELATION * max(num_relations - 7, 0)
    return _FEWEST_WORDS, min(most, _LONGEST_PROMPT)


def _ask(
    model: ChatModel,
    messages: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any],
    seed: int,
    check: Callable[[Answer], Result],
) -> tuple[Result | Dropped, float]:
    """
    Asks the model and checks its answer; if `check` finds a fault, shows it to the model and asks once more. Returns
    the result of `check`, or `Dropped`, and the total cost.
    """
    cost = 0.0
    dropped = Dropped("", "", 0.0)
    for _ in range(2):
        try:
            answer = model.chat(messages, schema=schema, seed=seed)
        except BadAnswer as error:
            return Dropped("no usable answer", error.raw, 0.0), cost + error.cost
        cost += answer.cost
        try:
            return check(answer), cost
        except _Fault as fault:
            dropped = Dropped(fault.reason, answer.text, 0.0)
            messages = show_fault(messages, answer.text, str(fault))
    return dropped, cost


def _read_graph(
    names: Sequence[str], records: Sequence[Mapping[str, Any]], prompt: str
) -> tuple[SceneGraph, list[tuple[int, int]]]:
    """Builds the scene graph of an answer and the spans of its relations in the prompt; raises `_Fault` if invalid."""
    things = _things(names)
    if len(things) != len(names):
        raise _Fault("things of one name", "two entities have the same name")
    relations = tuple(_as_relation(record, things) for record in records)
    if len({*map(canonical_relation, relations)}) != len(relations):
        raise _Fault("repeated relations", "a relation is there twice, perhaps once as its inverse")
    spans = []
    for record in records:
        text = record["span_text"].strip()
        start = prompt.find(text)
        if not text or start < 0:
            raise _Fault("span not in the prompt", f"span_text {text!r} is not, letter by letter, in the prompt")
        spans.append((start, start + len(text)))
    graph = SceneGraph(tuple(things.values()), relations)
    if not is_consistent(graph):
        raise _Fault("contradiction", "the relations contradict each other")
    return graph, spans


def _check_prompt(prompt: str, graph: SceneGraph) -> None:
    num_words = len(prompt.split())
    fewest, most = word_limits(len(graph.relations))
    if not fewest <= num_words <= most:
        raise _Fault("length", f"the prompt has {num_words} words, not {fewest} to {most}")
    if absent := [thing.text for thing in graph.entities if thing.look not in prompt.lower()]:
        raise _Fault("thing not in the prompt", f"the prompt does not name {', '.join(absent)}, word by word")


def _things(names: Sequence[str]) -> dict[str, Phrase]:
    """Returns look → object, with articles removed from the names."""
    things = [Phrase(_without_article(name)) for name in names]
    return {thing.look: thing for thing in things}


def _without_article(name: str) -> str:
    words = name.split()
    return " ".join(words[1:] if len(words) > 1 and words[0].lower() in _ARTICLES else words)


def _as_relation(record: Mapping[str, Any], things: Mapping[str, Phrase]) -> Relation:
    name, arguments = record["relation"], list(record["arguments"])
    region = arguments.pop().strip().lower() if name == "at" and arguments else None
    looks = [_without_article(argument).lower() for argument in arguments]
    if unknown := [look for look in looks if look not in things]:
        raise _Fault("unknown arguments", f"{name} has the arguments {unknown}, which are not among the entities")
    try:
        return Relation(name, tuple(things[look] for look in looks), region)
    except ValueError as error:
        raise _Fault("unknown arguments", str(error)) from None


def _as_record(relation: Relation) -> dict[str, Any]:
    arguments = [str(thing) for thing in relation.arguments] + ([relation.region] if relation.region else [])
    return {"relation": relation.name, "arguments": arguments}


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": f"{text}\n\n{_VOCABULARY}"}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _example(name: str) -> str:
    arguments = ["a", "center"] if name == "at" else ["a", "b", "c"][: RELATIONS[name].num_arguments]
    statement = relation_statement({"relation": name, "arguments": arguments})
    return f"- {name} {json.dumps(arguments)} ({RELATIONS[name].dimension}): {statement}"


_VOCABULARY = (
    "Left and right are the viewer's, as in the picture. In front means nearer to the viewer. The relations, with their "
    "arguments and, in brackets, their kind:\n"
    + "\n".join(map(_example, RELATIONS))
    + f"\nThe regions of `at`: {', '.join(REGIONS)}. `row_order` takes three things or more."
)
_WRITE = (
    "You write prompts for a text-to-image model. A prompt describes one picture of an everyday scene: several things and "
    "exactly as many spatial relations between them as are asked for, in plain, precise English, all of which one picture can "
    "show. Give three fields. `entities`: the names of the things, without article and all different, such as `chipped blue "
    "mug`; each stands word by word in the prompt. `relations`: each relation of the prompt once, with the names of its things "
    "as arguments, and `span_text`, a copy, letter by letter, of the words of the prompt that state it. `prompt`: the prompt. "
    "It states no other spatial relation. The relations do not contradict or imply each other; a thing rests on one other "
    "thing at most and is in one at most. If kinds are named, each has a relation at least. The number of the scene makes it "
    "different from all others: choose things that do not come to mind first."
)
_REWRITE = (
    "You change prompts for a text-to-image model. Given are a prompt, the changes of its relations, and all relations that "
    "the changed prompt has to state. Rewrite the prompt so that it states exactly these. Change the words that state the "
    "changed relations, and other words only where they would contradict the change, such as a second mention of a side; "
    "leave everything else as it is, letter by letter. Give two fields. `prompt`: the changed prompt. `relations`: the given "
    "relations, each with `span_text`, a copy, letter by letter, of the words of the changed prompt that state it."
)
_READ = (
    "You read prompts of a text-to-image model. Given are a prompt and the names of the things in it. List in `relations` "
    "every spatial relation that the prompt states between these things, once each, with the names as arguments. List only "
    "what the words say, not what follows from it."
)


def _schema(title: str, **properties: Any) -> dict[str, Any]:
    return {
        "title": title,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list_of(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_STRING = {"type": "string"}
_NAME = {"type": "string", "enum": list(RELATIONS)}
_READ_RELATIONS = _list_of(_schema("relation", relation=_NAME, arguments=_list_of(_STRING)))
_STATED_RELATIONS = _list_of(_schema("relation", relation=_NAME, arguments=_list_of(_STRING), span_text=_STRING))
_WRITE_SCHEMA = _schema("scene", entities=_list_of(_STRING), relations=_STATED_RELATIONS, prompt=_STRING)
_REWRITE_SCHEMA = _schema("rewrite", prompt=_STRING, relations=_STATED_RELATIONS)
_READ_SCHEMA = _schema("relations", relations=_READ_RELATIONS)
