"""JSON answers from models: found in prose, checked against a schema, and requested once more if invalid."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .answers import Answer, BadAnswer


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_KEYWORDS = {
    "type", "title", "description", "enum", "properties", "required", "additionalProperties", "items", "minItems", "maxItems",
}  # fmt: skip
_MOST_TRIES = 64  # positions in a text at which to look for a JSON value
_LONGEST_SHOWN = 20_000  # characters; a model that repeated itself endlessly need not see all of its answer


def check_schema(value: Any, schema: Mapping[str, Any], place: str = "the answer") -> None:
    """
    Checks a JSON value against a JSON schema.

    Args:
        value (`Any`):
            The value.
        schema (`Mapping[str, Any]`):
            The schema, of the keywords `type`, `enum`, `properties`, `required`, `additionalProperties`, `items`, `minItems`,
            `maxItems`, `title` and `description`.
        place (`str`, *optional*, defaults to `"the answer"`):
            What the value is, for the error.

    Raises:
        `ValueError`: If it does not match. The message names the place and what is expected there, not the value.
    """
    kind = schema.get("type")
    if kind is not None and (
        not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))
    ):
        raise ValueError(f"{place} must be of type {kind}")
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"{place} must be one of {', '.join(map(str, schema['enum']))}")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if missing := [name for name in schema.get("required", ()) if name not in value]:
            raise ValueError(f"{place} lacks {', '.join(missing)}")
        if schema.get("additionalProperties") is False and set(value) - set(properties):
            raise ValueError(f"{place} may hold nothing but {', '.join(properties)}")
        for name in properties.keys() & value.keys():
            check_schema(value[name], properties[name], f"{place}.{name}")
    if isinstance(value, list):
        low, high = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not low <= len(value) <= high:
            raise ValueError(f"{place} must have {low if len(value) < low else high} items, not {len(value)}")
        for i, item in enumerate(value):
            check_schema(item, schema.get("items", {}), f"{place}[{i}]")


def check_keywords(schema: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for a schema with keywords that [`check_schema`] would ignore."""
    if unknown := set(schema) - _KEYWORDS:
        raise ValueError(f"The schema has the keywords {sorted(unknown)}; only {sorted(_KEYWORDS)} are checked.")
    for part in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
        check_keywords(part)


def read_json(text: str, schema: Mapping[str, Any]) -> Any:
    """
    Finds the JSON value in an answer: the whole text, or a part of it, in a code fence or between other words.

    Args:
        text (`str`):
            The answer.
        schema (`Mapping[str, Any]`):
            What the value has to match.

    Returns:
        `Any`: The first value that matches.

    Raises:
        `ValueError`: If there is none. The message is about the largest JSON value that was found.
    """
    fault = "it holds no JSON value"
    largest = -1
    for value in _values(text):
        try:
            check_schema(value, schema)
            return value
        except ValueError as error:
            if (size := len(str(value))) > largest:
                fault, largest = str(error), size
    raise ValueError(fault)


def _values(text: str) -> Iterator[Any]:
    # skip a reasoning model's thoughts
    text = text.rpartition("</think>")[2].strip()
    for candidate in (text, *re.findall(r"```(?:\w+)?\s*\n(.*?)```", text, re.DOTALL)):
        yield from _parse(candidate, 0)
    starts = [match.start() for match in re.finditer(r"[{\[]", text)]
    for start in starts[:_MOST_TRIES]:
        yield from _parse(text, start)


def _parse(text: str, start: int) -> Iterator[Any]:
    """Yields the JSON value that begins at `start`, if there is one."""
    try:
        value, _ = json.JSONDecoder(parse_constant=_refuse).raw_decode(text, start)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except (ValueError, RecursionError):
        return
    yield value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def describe_schema(schema: Mapping[str, Any]) -> str:
    """Asks for the schema in words, for servers that do not take one."""
    return f"Answer with one JSON value that matches this JSON schema, and nothing else:\n{json.dumps(schema)}"


def add_text(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Messages with a text added to the last of them."""
    *others, last = map(dict, messages)
    content = last["content"]
    if isinstance(content, str):
        last["content"] = f"{content}\n\n{text}"
    else:
        last["content"] = [*content, {"type": "text", "text": text}]
    return [*others, last]


def ask_for_json(
    ask: Callable[[Sequence[Mapping[str, Any]]], Answer],
    messages: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any],
) -> Answer:
    """
    Asks a model for a JSON value. If the answer holds none that matches, the model is shown what is wrong and asked again,
    once.

    Args:
        ask (`Callable`):
            Sends messages and returns the answer.
        messages (`Sequence[Mapping[str, Any]]`):
            The messages.
        schema (`Mapping[str, Any]`):
            What the value has to match.

    Returns:
        [`Answer`]: With the value as `data`, the tokens and the price of both calls.

    Raises:
        [`BadAnswer`]: If the second answer is no better.
    """
    first = ask(messages)
    try:
        return replace(first, data=read_json(first.text, schema))
    except ValueError as error:
        fault = str(error)
    second = ask(show_fault(messages, first.text, fault))
    total = add_up(first, second)
    try:
        return replace(total, data=read_json(second.text, schema))
    except ValueError as error:
        raise BadAnswer(
            f"The model failed twice to answer in the requested format: {error}.",
            second.text,
            second.served_model,
            total.cost,
        ) from None


def show_fault(messages: Sequence[Mapping[str, Any]], text: str, fault: str) -> list[Mapping[str, Any]]:
    """Messages that show a model its answer and what is wrong with it."""
    return [
        *messages,
        {"role": "assistant", "content": text[:_LONGEST_SHOWN] or "(empty)"},
        {
            "role": "user",
            "content": f"This answer cannot be used: {fault}. Answer again, whole, and in the same form.",
        },
    ]


def add_up(first: Answer, second: Answer) -> Answer:
    """The second of two answers, with the tokens and the price of both."""
    return replace(
        second,
        input_tokens=first.input_tokens + second.input_tokens,
        output_tokens=first.output_tokens + second.output_tokens,
        cost=first.cost + second.cost,
        is_cached=first.is_cached and second.is_cached,
    )
