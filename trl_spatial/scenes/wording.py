"""Describes a scene graph in words, and parses the words."""

import re
from collections.abc import Sequence

import numpy as np

from .graph import COLORS, RADII, Entity, Relation, SceneGraph
from .placements import REGIONS
from .relations import RELATIONS
from .shapes import SHAPES


LENGTHS = ("short", "long")
# Openers of the sentences of a long text; none expresses a relation.
_OPENERS = ("", "In this picture, ", "Seen from the viewer's side, ", "Also, ", "In addition, ", "At the same time, ")
_INTRODUCTIONS = (
    "There is {all} in the picture.",
    "The picture shows {all}.",
    "A simple drawing of {all}.",
)
_CLOSINGS = ("", "Nothing else is in the picture.", "The background is plain.")

_NOUN_PHRASE = "(?:an? |the )?(?:(?:{sizes}) )?(?:{colors}) (?:{shapes})".format(
    sizes="|".join(size for size in RADII if size), colors="|".join(COLORS), shapes="|".join(SHAPES)
)
_LIST = f"{_NOUN_PHRASE}(?:(?:, | and ){_NOUN_PHRASE})*"


def describe_scene(graph: SceneGraph, *, seed: int, length: str = "short") -> str:
    """
    Put a scene graph into words.

    Two graphs over the same entities that differ in some relations give, for the same seed, texts that differ in the
    sentences of these relations alone.

    Args:
        graph ([`SceneGraph`]):
            What to describe.
        seed (`int`):
            Seed of the wording.
        length (`str`, *optional*, defaults to `"short"`):
            `"short"`: the relations, a sentence each; `"long"`: also an introduction that names all objects, linking
            words and a closing.

    Returns:
        `str`: the text; [`parse_description`] gives the graph back.
    """
    if length not in LENGTHS:
        raise ValueError(f"length={length!r} must be one of {LENGTHS}.")
    rng = np.random.default_rng(seed)
    introduction, closing = _INTRODUCTIONS[rng.integers(3)], _CLOSINGS[rng.integers(3)]
    draws = rng.integers(0, 2**16, size=(len(graph.relations), 2))
    related = {entity for relation in graph.relations for entity in relation.arguments}
    is_introduced = length == "long" or len(related) < len(graph.entities)
    mentioned: set[Entity] = set()
    sentences = []
    if is_introduced:
        sentences.append(introduction.format(all=_join([_mention(entity, mentioned) for entity in graph.entities])))
    for i, (relation, (phrase, opener)) in enumerate(zip(graph.relations, draws, strict=True)):
        phrases = RELATIONS[relation.name].phrases
        names = [_mention(entity, mentioned) for entity in relation.arguments]
        text = phrases[phrase % len(phrases)].format(*names, all=_join(names), region=relation.region)
        # only the first three openers do not refer to an earlier sentence
        openers = (_OPENERS[:3] if i == 0 else _OPENERS) if length == "long" else _OPENERS[:1]
        sentences.append(openers[opener % len(openers)] + text + ".")
    if length == "long" and closing:
        sentences.append(closing)
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _mention(entity: Entity, mentioned: set[Entity]) -> str:
    """Return `a red circle` for the first mention, `the red circle` afterwards."""
    name = str(entity)
    if entity in mentioned:
        return f"the {name}"
    mentioned.add(entity)
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _pattern(phrase: str) -> re.Pattern:
    """Compile a wording to a regular expression; its blanks become named groups."""
    pattern = re.escape(phrase)
    for i in range(3):
        pattern = pattern.replace(rf"\{{{i}\}}", f"(?P<argument{i}>{_NOUN_PHRASE})")
    pattern = pattern.replace(r"\{all\}", f"(?P<all>{_LIST})")
    pattern = pattern.replace(r"\{region\}", f"(?P<region>{'|'.join(REGIONS)})")
    return re.compile(pattern, re.IGNORECASE)


_INTRODUCTION_PATTERNS = [_pattern(text) for text in _INTRODUCTIONS]
# Each with the longest literal part of its wording: searching for it rules out most wordings faster than the pattern.
_RELATION_PATTERNS = [
    (kind.name, max(re.split(r"{\w+}", phrase), key=len), _pattern(phrase + "."))
    for kind in RELATIONS.values()
    for phrase in kind.phrases
]


def parse_description(text: str) -> SceneGraph:
    """
    Read a scene graph from its description.

    Args:
        text (`str`):
            A text as [`describe_scene`] writes it; capital letters do not matter.

    Returns:
        [`SceneGraph`]: the graph; its entities and relations stand in the order of the text.

    Raises:
        `ValueError`: if a sentence is not one of this world's.
    """
    entities: dict[Entity, None] = {}  # ordered
    relations = []
    for sentence in re.findall(r"[^.]+\.?", text.strip()):
        sentence = sentence.strip()
        for opener in _OPENERS[1:]:
            if sentence.lower().startswith(opener.lower()):
                sentence = sentence[len(opener) :]
        if sentence in _CLOSINGS:
            continue
        found = next((m for pattern in _INTRODUCTION_PATTERNS if (m := pattern.fullmatch(sentence))), None)
        if found:
            entities.update(dict.fromkeys(_read_entities(found["all"])))
            continue
        folded = sentence.casefold()
        matches = ((name, pattern.fullmatch(sentence)) for name, part, pattern in _RELATION_PATTERNS if part in folded)
        name, found = next((pair for pair in matches if pair[1]), ("", None))
        if found is None:
            raise ValueError(
                f"Cannot read the sentence {sentence!r}: it is none of the wordings in `RELATIONS`, of objects with the "
                f"colors {list(COLORS)} and the shapes {list(SHAPES)}."
            )
        groups = found.groupdict()
        named = groups.get("all") or " and ".join(groups[key] for key in sorted(groups) if key.startswith("argument"))
        arguments = _read_entities(named)
        entities.update(dict.fromkeys(arguments))
        region = groups.get("region")
        relations.append(Relation(name, arguments, region.lower() if region else None))
    return SceneGraph(tuple(entities), tuple(relations))


def _read_entities(text: str) -> tuple[Entity, ...]:
    found = []
    for phrase in re.findall(_NOUN_PHRASE, text, re.IGNORECASE):
        words = phrase.lower().split()
        size = next((word for word in words if word in RADII), None)
        found.append(Entity(words[-2], words[-1], size))
    return tuple(found)
