"""Describes the things on a table in words, and parses the words."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..graph import COLORS, Relation, SceneGraph
from ..placements import REGIONS
from .things import NOUNS, SCENES, Item


class Description(NamedTuple):
    """
    A scene in words.

    Args:
        text (`str`):
            The text.
        spans (`list[tuple[int, int]]`):
            For each relation of the graph, the characters that state it.
    """

    text: str
    spans: list[tuple[int, int]]


PHRASES = {
    "left_of": ("{0} is left of {1}", "{0} stands to the left of {1}", "to the left of {1} there is {0}"),
    "right_of": ("{0} is right of {1}", "{0} stands to the right of {1}", "to the right of {1} there is {0}"),
    "front_of": ("{0} is in front of {1}", "{0} stands in front of {1}", "in front of {1} there is {0}"),
    "behind": ("{0} is behind {1}", "{0} stands behind {1}", "behind {1} there is {0}"),
    "on": ("{0} rests on {1}", "{0} is on top of {1}", "on top of {1} there is {0}"),
    "under": ("{0} is underneath {1}", "{0} carries {1}", "underneath {1} there is {0}"),
    "inside": ("{0} is inside {1}", "{0} lies in {1}", "inside {1} there is {0}"),
    "contains": ("{0} contains {1}", "{0} holds {1}"),
    "near": ("{0} is near {1}", "{0} stands close to {1}"),
    "next_to": ("{0} is right next to {1}", "{0} stands beside {1}"),
    "far_from": ("{0} is far from {1}", "{0} stands far away from {1}"),
    "between": ("{0} is between {1} and {2}", "{0} stands in the middle between {1} and {2}"),
    "at": ("{0} is at the {region}", "{0} stands at the {region}", "at the {region} there is {0}"),
    "row_order": ("{all} stand in a row from left to right", "from left to right there are {all} in a row"),
}
# Regions are named as seen from above, with the back of the table at the top.
REGION_WORDS = {name: name.replace("top", "back").replace("bottom", "front") for name in REGIONS}
_OPENINGS = (
    "A photo of a {place} with {number} things on it.",
    "This picture shows a {place} with {number} things on it, as the viewer sees them.",
    "There are {number} things on a {place}; left, right and front are the viewer's.",
)
_LINKS = ("", "", "also, ", "in this picture, ")
MAX_LINKED = 6  # with more relations, the text is long enough without links
_CLOSINGS = ("Nothing else is there.", "There are no other things.", "")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_ITEM = f"(?:an? |the )?(?:{'|'.join(COLORS)}) (?:{'|'.join(sorted(NOUNS, key=len, reverse=True))})"
_LIST = f"{_ITEM}(?:(?:, | and ){_ITEM})*"


def describe_tabletop(graph: SceneGraph, *, seed: int, scene: str) -> Description:
    """
    Put the things on a table into words, about ten a relation.

    Two graphs over the same things that differ in some relations give, for the same seed, texts that differ in the sentences
    of these relations alone.

    Args:
        graph ([`SceneGraph`]):
            What to describe.
        seed (`int`):
            Seed of the wording.
        scene (`str`):
            A key of `SCENES`.

    Returns:
        [`Description`]: the text, which [`parse_tabletop`] reads back.
    """
    rng = np.random.default_rng(seed)
    is_long = len(graph.relations) > MAX_LINKED
    opening, closing = rng.integers(len(_OPENINGS)), _CLOSINGS[rng.integers(len(_CLOSINGS))]
    draws = rng.integers(0, 2**16, size=(len(graph.relations), 2))
    text = _OPENINGS[0 if is_long else opening].format(place=SCENES[scene], number=_NUMBERS[len(graph.entities)])
    mentioned: set[Item] = set()
    spans = []
    for number, (relation, (phrase, link)) in enumerate(zip(graph.relations, draws, strict=True)):
        names = [_mention(item, mentioned) for item in relation.arguments]
        region = REGION_WORDS[relation.region] if relation.region else ""
        options = PHRASES[relation.name]
        if is_long:
            options = tuple(option for option in options if len(option.split()) <= len(options[0].split()))
        clause = options[phrase % len(options)].format(*names, all=_join(names), region=region)
        sentence = (_LINKS[link % len(_LINKS)] if number and not is_long else "") + clause
        start = len(text) + 1 + len(sentence) - len(clause)
        text += f" {sentence[0].upper()}{sentence[1:]}."
        spans.append((start, start + len(clause)))
    return Description(text if is_long else f"{text} {closing}".strip(), spans)


def _mention(item: Item, mentioned: set[Item]) -> str:
    if item in mentioned:
        return f"the {item}"
    mentioned.add(item)
    return f"an {item}" if str(item)[0] in "aeiou" else f"a {item}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _pattern(phrase: str) -> re.Pattern:
    pattern = re.escape(phrase)
    for i in range(3):
        pattern = pattern.replace(rf"\{{{i}\}}", f"(?P<argument{i}>{_ITEM})")
    pattern = pattern.replace(r"\{all\}", f"(?P<all>{_LIST})")
    pattern = pattern.replace(r"\{region\}", f"(?P<region>{'|'.join(REGION_WORDS.values())})")
    links = "|".join(re.escape(link) for link in set(_LINKS) if link)
    return re.compile(f"(?:{links})?{pattern}", re.IGNORECASE)


_PATTERNS = [(name, _pattern(phrase)) for name, phrases in PHRASES.items() for phrase in phrases]
_OPENING = re.compile(
    "|".join(
        re.escape(opening.removesuffix("."))
        .replace(r"\{place\}", f"(?:{'|'.join(SCENES.values())})")
        .replace(r"\{number\}", f"(?:{'|'.join(_NUMBERS)})")
        for opening in _OPENINGS
    )
)
_REGION_NAMES = {words: name for name, words in REGION_WORDS.items()}


def parse_tabletop(text: str) -> SceneGraph:
    """
    Read a graph from its description.

    Args:
        text (`str`):
            A text as [`describe_tabletop`] writes it.

    Returns:
        [`SceneGraph`]: the graph, its relations in the order of the text.

    Raises:
        `ValueError`: if a sentence is not one of this world's.
    """
    entities: dict[Item, None] = {}  # ordered
    relations = []
    for sentence in filter(None, (part.strip() for part in text.split("."))):
        if f"{sentence}." in _CLOSINGS or _OPENING.fullmatch(sentence):
            continue
        matches = ((name, pattern.fullmatch(sentence)) for name, pattern in _PATTERNS)
        name, found = next((match for match in matches if match[1]), ("", None))
        if found is None:
            raise ValueError(
                f"Cannot read the sentence {sentence!r}: it is none of the wordings of the tabletop world, of things with "
                f"the colors {list(COLORS)} and the nouns {list(NOUNS)}."
            )
        groups = found.groupdict()
        named = groups.get("all") or " and ".join(groups[key] for key in sorted(groups) if key.startswith("argument"))
        arguments = _read_items(named)
        entities.update(dict.fromkeys(arguments))
        region = groups.get("region")
        relations.append(Relation(name, arguments, _REGION_NAMES[region.lower()] if region else None))
    return SceneGraph(tuple(entities), tuple(relations))


def _read_items(text: str) -> tuple[Item, ...]:
    items = []
    for phrase in re.findall(_ITEM, text, re.IGNORECASE):
        words = re.sub("^(?:an?|the) ", "", phrase.lower())
        items.append(Item(*words.split(" ", 1)))
    return tuple(items)


def scene_of(text: str) -> str:
    """
    The scene that a description names.

    Raises:
        `ValueError`: if it names none.
    """
    places = {scene: place for scene, place in SCENES.items() if place in text.split(".")[0]}
    if not places:
        raise ValueError(f"The text names none of the places {list(SCENES.values())}: {text[:80]!r}.")
    return max(places, key=lambda scene: len(places[scene]))
