"""Rules of SpatialBench-UC: a verdict on two objects in an image, which may be undecidable, and its confidence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .t2i_compbench_rules import intersection_over_union


Verdict = Literal["PASS", "FAIL", "UNDECIDABLE"]
Box = Sequence[float]
Boxes = Sequence[Mapping[str, Any]]
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]

# relation → (axis of the image, -1 if the first object has the smaller coordinate or 1 if it has the larger)
RELATIONS = {"left_of": (0, -1), "right_of": (0, 1), "above": (1, -1), "below": (1, 1)}
COMPONENTS = ("detection", "geometry", "stability", "agreement")
_WEIGHTS = (0.4, 0.3, 0.2, 0.1)  # exponents of the components
_GEOMETRY_SLOPE = 0.15  # distance beyond the margin at which the geometry component reaches 1
_EPSILON = 1e-10


@dataclass(frozen=True)
class Limits:
    """
    Thresholds of the rules.

    Args:
        min_score (`float`), min_area (`float`):
            Boxes with a lower score, or a smaller share of the image, are ignored.
        min_score_gap (`float`):
            If the scores of the two best boxes with the same name are closer, the choice is ambiguous.
        max_overlap (`float`):
            Intersection over union beyond which left and right are undecidable.
        margin (`float`):
            Distance of the centers, as a share of the image, up to which a relation is undecidable.
        min_stability (`float`):
            Stability below which a verdict is undecidable.
    """

    min_score: float = 0.2
    min_area: float = 0.005
    min_score_gap: float = 0.1
    max_overlap: float = 0.5
    margin: float = 0.1
    min_stability: float = 0.5


LIMITS = Limits()


class Checked(NamedTuple):
    """
    The result of checking an image.

    Args:
        verdict (`str`):
            `"PASS"`, `"FAIL"` or `"UNDECIDABLE"`.
        reason (`str`, *optional*):
            Why it is undecidable.
        confidence (`float`), components (`Mapping[str, float]`):
            Confidence of the verdict, from 0 to 1, and its four components.
        delta (`float`, *optional*):
            From the second center to the first along the relation's axis, as a share of the image.
        overlap (`float`, *optional*):
            Intersection over union of the two boxes.
    """

    verdict: Verdict
    reason: str | None = None
    confidence: float = 0.0
    components: Mapping[str, float] = dict.fromkeys(COMPONENTS, 0.0)
    delta: float | None = None
    overlap: float | None = None


def check_image(
    relation: str,
    names: tuple[str, str],
    size: Sequence[int],
    boxes: Boxes,
    views: Sequence[Boxes | None] = (),
    second_opinions: Sequence[Boxes | None] = (),
    limits: Limits = LIMITS,
) -> Checked:
    """
    Judges whether two objects are in a relation, or says why that cannot be judged.

    Args:
        relation (`str`):
            The relation of the first object to the second.
        names (`tuple[str, str]`):
            Labels of the two.
        size (`Sequence[int]` of length 2):
            Width and height of the image, in pixels.
        boxes (`Sequence[Mapping]`):
            What the detector found: `label`, `score`, `box`.
        views (`Sequence[Sequence[Mapping]]`, *optional*):
            What it found in each changed view; `None` where it failed. Without views every verdict is stable.
        second_opinions (`Sequence[Sequence[Mapping]]`, *optional*):
            What other detectors found in the image. Without one they agree.
        limits ([`Limits`], *optional*):
            Thresholds.
    """
    best = [best_box(boxes, name, size, limits) for name in names]
    missing = [name for name, box in zip(names, best, strict=True) if box is None]
    if missing:
        return Checked("UNDECIDABLE", f"missing: {', '.join(missing)}")
    for name in names:
        if is_ambiguous(boxes, name, limits):
            return Checked("UNDECIDABLE", f"ambiguous: multiple {name}")
    pair = _pair(best)
    assert pair is not None
    delta = center_distance(relation, *_edges(pair), size)
    overlap = intersection_over_union(*_edges(pair))
    if relation in ("left_of", "right_of") and overlap > limits.max_overlap:
        too_close = f"high_overlap: IoU={overlap:.2f} > {limits.max_overlap}"
        return Checked("UNDECIDABLE", too_close, delta=delta, overlap=overlap)
    verdict, reason = judge_distance(relation, delta, limits.margin)
    stability = 1.0
    if verdict != "UNDECIDABLE" and views:
        others = [None if found is None else _find_pair(found, names, size, limits) for found in views]
        stability = measure_stability(relation, verdict, pair, others, size, limits)
        if stability < limits.min_stability:
            verdict, reason = "UNDECIDABLE", f"unstable: stability={stability:.2f} < {limits.min_stability}"
    agreement = 1.0
    if second_opinions:
        others = [None if found is None else _find_pair(found, names, size, limits) for found in second_opinions]
        agreements = [measure_agreement(relation, verdict, delta, pair, other, size, limits) for other in others]
        agreement = sum(agreements) / len(agreements)
    scores = pair[0]["score"], pair[1]["score"]
    components = rate_components(scores, delta, stability, agreement, limits.margin)
    return Checked(verdict, reason, combine_components(components), components, delta, overlap)


def best_box(boxes: Boxes, name: str, size: Sequence[int], limits: Limits = LIMITS) -> Mapping[str, Any] | None:
    """Returns the first box with this name and the highest score; `None` if none is certain and large enough."""
    min_area = limits.min_area * (size[0] * size[1])
    candidates = [box for box in _named(boxes, name, limits) if _area(box["box"]) >= min_area]
    return max(candidates, key=lambda box: box["score"], default=None)


def is_ambiguous(boxes: Boxes, name: str, limits: Limits = LIMITS) -> bool:
    """Whether the scores of the two best boxes with this name are too close to choose one. Tiny boxes count."""
    scores = sorted((box["score"] for box in _named(boxes, name, limits)), reverse=True)
    return len(scores) > 1 and scores[0] - scores[1] < limits.min_score_gap


def center_distance(relation: str, first: Box, second: Box, size: Sequence[int]) -> float:
    """Distance from the second center to the first along the relation's axis, as a share of the image."""
    axis, _ = RELATIONS.get(relation, (1, 0))
    centers = [(box[axis] + box[axis + 2]) / 2 for box in (first, second)]
    return (centers[0] - centers[1]) / size[axis]


def judge_distance(relation: str, delta: float, margin: float = LIMITS.margin) -> tuple[Verdict, str | None]:
    """Returns the verdict on a distance of centers, and the reason if it is undecidable."""
    if abs(delta) <= margin:
        return "UNDECIDABLE", f"near_boundary (|delta|={abs(delta):.3f} <= margin={margin})"
    if relation not in RELATIONS:
        return "UNDECIDABLE", f"unknown_relation: {relation}"
    _, sign = RELATIONS[relation]
    return ("PASS" if sign * delta > 0 else "FAIL"), None


def measure_stability(
    relation: str, verdict: Verdict, pair: Pair, views: Sequence[Pair | None], size: Sequence[int], limits: Limits
) -> float:
    """
    Measures how stable a verdict is under changed views: half of it is the share of views with the same verdict, half
    the mean overlap of the boxes with those in the unchanged image, over the views that have both objects. 0 if none
    has.
    """
    complete = [view for view in views if view is not None]
    if not complete:
        return 0.0
    verdicts = [
        judge_distance(relation, center_distance(relation, *_edges(view), size), limits.margin)[0] for view in complete
    ]
    overlaps = [
        intersection_over_union(box["box"], other["box"])
        for view in complete
        for box, other in zip(pair, view, strict=True)
    ]
    return 0.5 * (verdicts.count(verdict) / len(views) + sum(overlaps) / len(overlaps))


def measure_agreement(
    relation: str, verdict: Verdict, delta: float, pair: Pair, other: Pair | None, size: Sequence[int], limits: Limits
) -> float:
    """
    Measures how far a second detector agrees: a quarter each for the same verdict, the same side, and the overlap of
    the boxes of each of the two objects. 0.5 if that detector has not found both.
    """
    if other is None:
        return 0.5
    other_delta = center_distance(relation, *_edges(other), size)
    other_verdict, _ = judge_distance(relation, other_delta, limits.margin)
    overlaps = [intersection_over_union(box["box"], found["box"]) for box, found in zip(pair, other, strict=True)]
    return ((other_verdict == verdict) + (delta * other_delta >= 0) + sum(overlaps)) / 4


def rate_components(
    scores: tuple[float, float], delta: float, stability: float, agreement: float, margin: float = LIMITS.margin
) -> dict[str, float]:
    """Returns the four components of the confidence, each from 0 to 1."""
    parts = (math.sqrt(scores[0] * scores[1]), (abs(delta) - margin) / _GEOMETRY_SLOPE, stability, agreement)
    return {name: min(1.0, max(0.0, part)) for name, part in zip(COMPONENTS, parts, strict=True)}


def combine_components(components: Mapping[str, float]) -> float:
    """The confidence: the product of powers of its components."""
    return math.prod(
        (components[name] + _EPSILON) ** weight for name, weight in zip(COMPONENTS, _WEIGHTS, strict=True)
    )


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _named(boxes: Boxes, name: str, limits: Limits) -> list[Mapping[str, Any]]:
    return [box for box in boxes if box["label"].lower() == name.lower() and box["score"] >= limits.min_score]


def _find_pair(boxes: Boxes, names: tuple[str, str], size: Sequence[int], limits: Limits) -> Pair | None:
    return _pair([best_box(boxes, name, size, limits) for name in names])


def _pair(best: Sequence[Mapping[str, Any] | None]) -> Pair | None:
    first, second = best
    return None if first is None or second is None else (first, second)


def _edges(pair: Pair) -> tuple[Box, Box]:
    return pair[0]["box"], pair[1]["box"]
