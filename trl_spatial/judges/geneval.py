"""GenEval's rules: whether detected boxes meet a prompt's specification. Nothing here reads pixels."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np


THRESHOLD = 0.3  # detections with a higher score count
COUNTING_THRESHOLD = 0.9  # for counting prompts, where one doubtful box makes the count wrong
MAX_OBJECTS = 16  # per class
POSITION_MARGIN = 0.1  # share of the summed sizes that is subtracted from the offset of two centers
POSITION_DOMINANCE = 0.5  # share of the distance that the rest must exceed on an axis
_LEAST_OFFSET = 1e-3  # pixels; with a smaller rest on both axes, two boxes are in the same place
RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# Detectors' names of GenEval's classes, without spaces → GenEval's names.
_SYNONYMS = {
    "aeroplane": "airplane",
    "cellphone": "cell phone",
    "diningtable": "dining table",
    "doughnut": "donut",
    "hairdryer": "hair drier",
    "hotdog": "hot dog",
    "keyboard": "computer keyboard",
    "mobilephone": "cell phone",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "remotecontrol": "tv remote",
    "sofa": "couch",
    "television": "tv",
    "tvmonitor": "tv",
}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """
    An object that a detector has found.

    Args:
        label (`str`):
            Its class.
        score (`float`):
            Confidence, 0 to 1.
        box (`tuple[float, float, float, float]`):
            Left, top, right and bottom edge in pixels, y down.
        mask (`np.ndarray` of shape `(height, width)` and type `bool`, *optional*):
            Its pixels in the image, from detectors that provide them. Not compared.
    """

    label: str
    score: float
    box: Box
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Requirement:
    """What a specification requires of one class."""

    class_name: str  # in GenEval's words
    count: int  # how many there should be; for an excluded class, the number from which there are too many
    color: str | None = None  # one of `COLORS`
    position: tuple[str, int] | None = None  # one of `RELATIONS`, and the index of the requirement it refers to


@dataclass(frozen=True)
class Specification:
    """
    What an image should show: a row of GenEval's `evaluation_metadata.jsonl`.

    Args:
        include (`tuple[Requirement, ...]`):
            What should be there.
        exclude (`tuple[Requirement, ...]`, *optional*):
            What should not.
        tag (`str`, *optional*):
            The task: single_object, two_object, counting, colors, position or color_attr.
    """

    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()
    tag: str | None = None

    @property
    def class_names(self) -> list[str]:
        """Every class that it names, once."""
        return list(dict.fromkeys(requirement.class_name for requirement in self.include + self.exclude))

    @property
    def needs_colors(self) -> bool:
        """Whether the color of an object matters."""
        return any(requirement.color is not None for requirement in self.include)


@dataclass(frozen=True)
class GenEvalResult:
    """
    The result of judging an image by its specification.

    Args:
        correct (`bool`):
            GenEval's verdict: whether everything is as specified.
        reason (`str`):
            What is not as specified, one line each, in the words of GenEval's program; empty if `correct`.
        partial (`float`):
            Share of what is asked for that is there, 0 to 1; 1 if and only if `correct`. See [`judge`].
    """

    correct: bool
    reason: str
    partial: float

    @property
    def strict(self) -> float:
        """The verdict as a number: 1.0 or 0.0."""
        return float(self.correct)


@cache
def geneval_name(label: str) -> str:
    """GenEval's name of a class, whatever a detector calls it: `"tvmonitor"` → `"tv"`. Other names only lose their case."""
    words = re.sub(r"[\s_-]+", " ", label.strip().lower())
    return _SYNONYMS.get(words.replace(" ", ""), words)


def read_specification(row: Mapping[str, Any] | str) -> Specification:
    """
    Reads and checks a specification.

    Args:
        row (`Mapping[str, Any]` or `str`):
            A row of GenEval's metadata, or its JSON: `include`, and where there are some `exclude` and `tag`. Keys whose
            value is `None`, as `datasets` fills in what other rows have, are as if they were not there.

    Raises:
        `ValueError`: If it is not one; the message says what is wrong.
    """
    row = _as_mapping(row, "The specification")
    parts = {}
    for key in ("include", "exclude"):
        entries = row.get(key) or []
        if not isinstance(entries, (list, tuple)):
            raise ValueError(f"`{key}` is {entries!r}. It should be a list of mappings with the key `class`.")
        parts[key] = tuple(_read_requirement(entry, index, key) for index, entry in enumerate(entries))
    if not parts["include"] and not parts["exclude"]:
        raise ValueError(f"The specification {dict(row)!r} asks for nothing: `include` lists no objects.")
    return Specification(**parts, tag=row.get("tag"))


def _as_mapping(value: Any, what: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{what} {value!r} is not JSON: {error}.") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}. It should be a mapping, or one as JSON.")
    return value


def _read_requirement(entry: Any, index: int, key: str) -> Requirement:
    entry = _as_mapping(entry, f"`{key}[{index}]`")
    name, count, color, position = (entry.get(field) for field in ("class", "count", "color", "position"))
    where = f"`{key}[{index}]` is {dict(entry)!r}"
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}, which names no `class`.")
    count = 1 if count is None else count
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_OBJECTS:
        raise ValueError(f"{where}: `count` should be a whole number from 1 to {MAX_OBJECTS}.")
    if color is not None and color not in COLORS:
        raise ValueError(f"{where}: `color` should be one of {', '.join(COLORS)}.")
    return Requirement(geneval_name(name), count, color, _read_position(position, index, where))


def _read_position(position: Any, index: int, where: str) -> tuple[str, int] | None:
    if position is None:
        return None
    try:
        relation, target = position
        target = int(target)  # a column of strings holds "0"
    except (TypeError, ValueError):
        relation, target = None, -1
    if relation not in RELATIONS or not 0 <= target < index:
        raise ValueError(
            f"{where}: `position` should be one of {', '.join(RELATIONS)}, and the index of an entry before this one."
        )
    return relation, target


def relative_positions(box: Box, target: Box) -> set[str]:
    """
    Returns the relations of one box to another, by GenEval's rule.

    With the offset `o` of the centers, `o' = max(|o| - 0.1 (size + size of the target), 0) · sign(o)` on each axis is what is
    left of it, and a relation holds where `o' / ‖o‖` is beyond 0.5 on its axis. So at most one relation holds on each axis,
    and both on a diagonal.

    Args:
        box, target (`tuple[float, float, float, float]`):
            Left, top, right and bottom edge, y down, of the box and of the one it is compared with.

    Returns:
        `set[str]`: those of `RELATIONS` that hold; empty for concentric boxes.
    """
    dx, width = (box[0] + box[2] - target[0] - target[2]) / 2, abs(box[2] - box[0]) + abs(target[2] - target[0])
    dy, height = (box[1] + box[3] - target[1] - target[3]) / 2, abs(box[3] - box[1]) + abs(target[3] - target[1])
    distance = math.hypot(dx, dy)
    rest_x, rest_y = abs(dx) - POSITION_MARGIN * width, abs(dy) - POSITION_MARGIN * height
    relations: set[str] = set()
    if max(rest_x, rest_y) < _LEAST_OFFSET:
        return relations
    # The rest has the sign of the offset, so its size is compared; multiplying avoids dividing by a distance of 0.
    if rest_x > POSITION_DOMINANCE * distance:
        relations.add("left of" if dx < 0 else "right of")
    if rest_y > POSITION_DOMINANCE * distance:
        relations.add("above" if dy < 0 else "below")
    return relations


def confident_objects(detections: Iterable[Detection], threshold: float) -> dict[str, list[Detection]]:
    """
    Groups detections above a score by GenEval's name of their class: most confident first, at most `MAX_OBJECTS` each.
    """
    objects: dict[str, list[Detection]] = defaultdict(list)
    for detection in sorted(detections, key=lambda found: -found.score):
        same = objects[geneval_name(detection.label)]
        if detection.score > threshold and len(same) < MAX_OBJECTS:
            same.append(detection)
    return {name: same for name, same in objects.items() if same}


def judge(
    specification: Specification,
    detections: Iterable[Detection],
    find_color: Callable[[Detection], str] | None = None,
    *,
    threshold: float = THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
) -> GenEvalResult:
    """
    Judges an image by what was detected in it.

    `correct` is GenEval's verdict. Of every class in `include` there are at least `count` objects; among the `count` most
    confident ones all have the color, and each has the position to each of the target's `count`, which must be there and
    have their own color and position; of a class in `exclude` there are fewer than `count`.

    `partial` is finer, for reinforcement learning: the mean over all that is asked for, namely

    - the number of each class in `include`: 1, less `1 / count` for each object that is missing or, where the class is
      excluded from some number on, too many, down to 0;
    - each color: the share of the `count` objects that have it, 0 if some are missing;
    - each position: 1 or 0 as in `correct`;
    - each class in `exclude` that `include` does not name: 1 or 0 as in `correct`.

    A specification that asks for nothing is met by every image.

    Args:
        specification ([`Specification`]):
            What should be there.
        detections (`Iterable[Detection]`):
            What was detected.
        find_color (`Callable[[Detection], str]`, *optional*):
            Names the color of an object. Needed if the specification names colors.
        threshold (`float`, *optional*, defaults to `0.3`), counting_threshold (`float`, *optional*, defaults to `0.9`):
            Score above which a detection counts, and the same for specifications tagged `counting`.

    Returns:
        [`GenEvalResult`]: the verdict, its reason and the share.

    Raises:
        `ValueError`: If colors are needed and `find_color` is `None`.
    """
    if specification.needs_colors and find_color is None:
        raise ValueError(
            f"The specification {specification} names colors, which cannot be seen from boxes. Give a color classifier, or leave "
            "out the prompts with colors."
        )
    objects = confident_objects(detections, counting_threshold if specification.tag == "counting" else threshold)
    shares: list[float] = []
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for requirement in specification.include:
        found = objects.get(requirement.class_name, [])
        shares.append(_number_share(requirement, len(found), specification.exclude))
        matched.append(_match(requirement, found[: requirement.count], matched, find_color, shares, reasons))
    included = {requirement.class_name for requirement in specification.include}
    for requirement in specification.exclude:
        number = len(objects.get(requirement.class_name, []))
        if requirement.class_name not in included:
            shares.append(float(number < requirement.count))
        if number >= requirement.count:
            reasons.append(f"expected {requirement.class_name}<{requirement.count}, found {number}")
    return GenEvalResult(not reasons, "\n".join(reasons), sum(shares) / len(shares) if shares else 1.0)


def _number_share(requirement: Requirement, number: int, exclude: Sequence[Requirement]) -> float:
    too_many = [other.count for other in exclude if other.class_name == requirement.class_name]
    deviation = max(requirement.count - number, 0)
    if too_many:
        deviation += max(number - (min(too_many) - 1), 0)
    return max(1 - deviation / requirement.count, 0.0)


def _match(
    requirement: Requirement,
    found: list[Detection],
    matched: Sequence[list[Detection] | None],
    find_color: Callable[[Detection], str] | None,
    shares: list[float],
    reasons: list[str],
) -> list[Detection] | None:
    """
    Returns the objects that meet a requirement, or `None` if it fails. Appends the shares for color and position to
    `shares`, and what failed to `reasons`.
    """
    failures = []
    if len(found) < requirement.count:
        failures.append(f"expected {requirement.class_name}>={requirement.count}, found {len(found)}")
    if requirement.color is not None:
        colors = [find_color(detection) for detection in found] if find_color and not failures else []
        shares.append(colors.count(requirement.color) / requirement.count)
        if colors and shares[-1] < 1:
            failures.append(
                f"expected {requirement.color} {requirement.class_name}>={requirement.count}, found "
                f"{colors.count(requirement.color)} {requirement.color}; and "
                + ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            )
    if requirement.position is not None:
        relation, index = requirement.position
        if not failures:
            failures += _position_failures(requirement.class_name, relation, found, matched[index])
        shares.append(float(not failures))
    reasons += failures
    return None if failures else found


def _position_failures(
    name: str, relation: str, found: Sequence[Detection], targets: Sequence[Detection] | None
) -> list[str]:
    """Describes the first object and target that are not in the relation; empty if all pairs are."""
    if targets is None:
        return [f"no target for {name} to be {relation}"]
    for detection in found:
        for target in targets:
            relations = relative_positions(detection.box, target.box)
            if relation not in relations:
                return [f"expected {name} {relation} target, found {' and '.join(sorted(relations))} target"]
    return []
