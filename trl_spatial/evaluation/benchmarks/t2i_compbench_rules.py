"""Rules of T2I-CompBench++'s spatial parts: which boxes are the two objects, and whether their relation holds."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .base import OfficialError


# phrase → relation, in the order in which the official program searches the text for them; it has no rule for the last
OFFICIAL_PHRASES_2D = {
    "on side of": "near",
    "next to": "near",
    "near": "near",
    "on the left of": "left",
    "on the right of": "right",
    "on the bottom of": "below",
    "on the top of": "above",
    "on top of": None,
}
OFFICIAL_PHRASES_3D = {"in front of": "front", "behind": "behind", "hidden": "behind"}
# phrase → relation. The benchmark's prompts use the phrases above; the others are synonyms.
PHRASES_2D = {
    "on the left of": "left",
    "to the left of": "left",
    "on the right of": "right",
    "to the right of": "right",
    "on the top of": "above",
    "on top of": "above",
    "above": "above",
    "on the bottom of": "below",
    "below": "below",
    "next to": "near",
    "on side of": "near",
    "near": "near",
}
PHRASES_3D = {"in front of": "front", "behind": "behind", "hidden by": "behind"}

# relation → (axis of the image, 1 if the first object has the smaller coordinate or -1 if it has the larger)
_DIRECTIONS = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}
# relation → 1 if the first object is brighter in the depth map, in which near is bright, or -1 if it is darker
_DEPTH_ORDERS = {"front": 1, "behind": -1}

_SHORT_SIDE, _MAX_LONG_SIDE = 479, 480  # pixels of the images that the official detector sees
_NEAR = 150  # in the same pixels
_PLANE_OVERLAP, _DEPTH_OVERLAP = 0.1, 0.5

Box = Sequence[float]
Depths = tuple[float | None, float | None]


class Prompt(NamedTuple):
    """Two objects, and the relation of the first to the second."""

    first: str
    relation: str
    second: str


def read_prompt(text: str, phrases: Mapping[str, str]) -> Prompt:
    """
    Reads the two objects and their relation.

    Raises:
        `ValueError`: If the text is not a pair of objects around one of the phrases.
    """
    article = r"(?:an? |the )?"
    found = re.fullmatch(
        rf"{article}(.+?) (?:is )?(?:partly )?({'|'.join(phrases)}) {article}(.+?)\.?", text.strip(), re.IGNORECASE
    )
    if found is None:
        raise ValueError(f"{text!r} is not an object, one of the phrases {', '.join(phrases)}, and another object.")
    first, phrase, second = (part.lower() for part in found.groups())
    return Prompt(first, phrases[phrase], second)


def official_size(width: int, height: int) -> tuple[int, int]:
    """Size, in pixels, to which the official program resizes an image before it looks for objects."""
    short, long = sorted((width, height))
    new_short, new_long = _SHORT_SIDE, int(_SHORT_SIDE * long / short)
    if new_long > _MAX_LONG_SIDE:
        new_short, new_long = int(_MAX_LONG_SIDE * new_short / new_long), _MAX_LONG_SIDE
    return (new_short, new_long) if width <= height else (new_long, new_short)


def official_relation_score(phrase: str | None, first: Box, second: Box, depths: Depths = (None, None)) -> float:
    """
    Scores the relation of two boxes by the official rules.

    Args:
        phrase (`str`, *optional*):
            The words of the relation. The score is 0 for words without a rule.
        first, second (`Sequence[float]` of length 4):
            Boxes of the objects: left, top, right, bottom, in pixels of an image of [`official_size`].
        depths (`tuple[float, float]`, *optional*):
            The mean of the depth map in each, as the official program reads it. `None` where it reads nothing.

    Raises:
        [`OfficialError`]: If both boxes together have no area.
    """
    intersection, union = _overlap(first, second)
    if union == 0:
        raise OfficialError(f"The boxes {list(first)} and {list(second)} have no area: it divides by zero.")
    overlap = intersection / union
    relation = (OFFICIAL_PHRASES_2D | OFFICIAL_PHRASES_3D).get(phrase or "")
    if relation == "near":
        distances = [abs(offset) for offset in _offset(first, second)]
        return 1.0 if min(distances) < _NEAR else _NEAR / max(distances)
    if relation in _DIRECTIONS:
        return _direction_score(relation, first, second, overlap)
    if relation in _DEPTH_ORDERS and is_depth_order_right(relation, depths) and overlap != _DEPTH_OVERLAP:
        return min(1.0, overlap / _DEPTH_OVERLAP)
    return 0.0


class RelationResult(NamedTuple):
    """Whether two boxes are in a relation, and how clearly, from 0 to 1."""

    is_right: bool
    score: float


def fixed_relation(
    relation: str, first: Box, second: Box, size: Sequence[int], depths: Depths = (None, None)
) -> RelationResult:
    """
    Judges whether two boxes are in a relation: distances are shares of the longer side of the image, "near" considers
    both axes, and the order in depth needs no overlap.

    Args:
        relation (`str`):
            `"left"`, `"right"`, `"above"`, `"below"`, `"near"`, `"front"` or `"behind"`.
        first, second (`Sequence[float]` of length 4):
            Boxes of the objects: left, top, right, bottom, in pixels.
        size (`Sequence[int]` of length 2):
            Width and height of the image, in pixels.
        depths (`tuple[float, float]`, *optional*):
            The mean of the depth map in each; near is bright. `None` where it is unknown.
    """
    if relation == "near":
        distance = max(abs(offset) for offset in _offset(first, second)) / max(size)
        limit = _NEAR / _SHORT_SIDE
        return RelationResult(distance < limit, 1.0 if distance < limit else limit / distance)
    overlap = intersection_over_union(first, second)
    if relation in _DEPTH_ORDERS:
        is_right = is_depth_order_right(relation, depths)
        return RelationResult(is_right, min(1.0, overlap / _DEPTH_OVERLAP) if is_right else 0.0)
    score = _direction_score(relation, first, second, overlap)
    return RelationResult(score > 0, score)


def is_depth_order_right(relation: str, depths: Depths) -> bool:
    """Whether the first of two objects is in front of, or behind, the second; false if a depth is unknown."""
    first, second = (math.nan if depth is None else depth for depth in depths)
    return _DEPTH_ORDERS[relation] * (first - second) > 0


def intersection_over_union(first: Box, second: Box) -> float:
    """Overlap of two boxes, from 0 to 1; 0 if they have no area."""
    intersection, union = _overlap(first, second)
    return intersection / union if union > 0 else 0.0


def _overlap(first: Box, second: Box) -> tuple[float, float]:
    """Returns the areas of the intersection and of the union."""
    width = max(0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return width * height, areas - width * height


def _offset(first: Box, second: Box) -> tuple[float, float]:
    """Returns the offset from the center of the first box to that of the second."""
    return (
        (second[0] + second[2]) / 2 - (first[0] + first[2]) / 2,
        (second[1] + second[3]) / 2 - (first[1] + first[3]) / 2,
    )


def _direction_score(relation: str, first: Box, second: Box, overlap: float) -> float:
    axis, sign = _DIRECTIONS[relation]
    offset = _offset(first, second)
    if sign * offset[axis] <= 0 or abs(offset[axis]) <= abs(offset[1 - axis]):
        return 0.0
    return 1.0 if overlap < _PLANE_OVERLAP else _PLANE_OVERLAP / overlap


def find_official_2d(labels: Sequence[str], nouns: Sequence[str]) -> list[int | None]:
    """Finds the box of each noun as the official 2D program does: the first whose label is the noun."""
    return [labels.index(noun) if noun in labels else None for noun in nouns]


def find_official_3d(labels: Sequence[str], nouns: Sequence[str]) -> list[int | None]:
    """
    Finds the box of each noun as the official 3D program does: one whose label contains the noun. If both nouns occur,
    the search continues until it has a box for each, and keeps the last box of a noun.

    Raises:
        [`OfficialError`]: If a noun is found only across two labels: the program joins them before it looks.
    """
    joined = " ".join(labels)
    wanted = [noun in joined for noun in nouns]
    places: list[int | None] = [None] * len(nouns)
    for place, label in enumerate(labels):
        for index, noun in enumerate(nouns):
            if wanted[index] and noun in label:
                places[index] = place
        if all((place is not None) for place, is_wanted in zip(places, wanted, strict=True) if is_wanted):
            break
    for index, noun in enumerate(nouns):
        if wanted[index] and places[index] is None:
            raise OfficialError(f"{noun!r} is in no label of {list(labels)}, but in all of them joined.")
    return places


def find_fixed(labels: Sequence[str], nouns: Sequence[str]) -> list[int | None]:
    """Finds the box of each noun, of boxes sorted by confidence: the first with its label that is not taken yet."""
    places: list[int | None] = []
    for noun in nouns:
        matching = (
            place for place, label in enumerate(labels) if label.lower() == noun.lower() and place not in places
        )
        places.append(next(matching, None))
    return places
