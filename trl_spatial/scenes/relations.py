"""The spatial relations, each with its logic, wordings, placement and rule.

To add a relation, add an entry to `RELATIONS`. Positions are in canvas units: x to the right, y down, both from 0 to
1; left and right are the viewer's, "in front" is nearer to the viewer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np

from . import placements
from .placements import REGIONS, Placement
from .shapes import signed_distance


class Verdict(StrEnum):
    """The verdict of a rule on one relation in one image."""

    SATISFIED = "satisfied"
    VIOLATED = "violated"
    UNDECIDABLE = "undecidable"


@dataclass(frozen=True)
class LocatedObject:
    """
    One object as found in an image. Its outline is the fitted one: where another object hides a part, the hidden part
    belongs to the outline but not to the mask, `(height, width)`. The shape is `"unknown"` where none fits, and no relation uses the
    object then; center and radius are in canvas units; `completeness` is the share of the outline's area that is visible.
    """

    color: str
    shape: str
    x: float
    y: float
    radius: float
    completeness: float
    mask: np.ndarray


Rule = Callable[[Sequence[LocatedObject], str | None], tuple[Verdict, str]]
# A rule maps located objects to a verdict and a reason. Between its two thresholds it abstains.


def graded(value: float, satisfied_from: float, violated_to: float, text: str) -> tuple[Verdict, str]:
    if value >= satisfied_from:
        return Verdict.SATISFIED, text
    if value <= violated_to:
        return Verdict.VIOLATED, text
    return Verdict.UNDECIDABLE, f"{text}: too close to call"


def _gap(a: LocatedObject, b: LocatedObject) -> float:
    """Distance between two bounding boxes, 0 if they touch or overlap."""
    gap_x, gap_y = (max(abs(p - q) - a.radius - b.radius, 0.0) for p, q in ((a.x, b.x), (a.y, b.y)))
    return math.hypot(gap_x, gap_y)


def _enclosed_share(inner: LocatedObject, outer: LocatedObject) -> float:
    """Share of `inner`'s visible pixels that are inside `outer`'s outline."""
    height, width = inner.mask.shape
    side = max(height, width)
    rows, columns = np.nonzero(inner.mask)
    if len(rows) == 0:
        return 0.0
    # the canvas is the smallest square around the image
    x, y = (columns + 0.5 + (side - width) / 2) / side, (rows + 0.5 + (side - height) / 2) / side
    half_a_pixel = 0.5 / side
    return float((signed_distance(outer.shape, x - outer.x, y - outer.y, outer.radius) < half_a_pixel).mean())


def _check_left_of(objects, region):
    a, b = objects
    distance = b.x - a.x
    return graded(distance, 0.06, 0.02, f"its center is {distance:+.2f} to the left")


def _check_above(objects, region):
    a, b = objects
    lift, gap = b.y - a.y, (b.y - b.radius) - (a.y + a.radius)
    if lift <= 0.02:
        return Verdict.VIOLATED, f"its center is {lift:+.2f} higher"
    return graded(gap, -0.035, -1.0, f"the vertical gap is {gap:+.2f}")


def _check_on(objects, region):
    a, b = objects
    gap, shift = (b.y - b.radius) - (a.y + a.radius), abs(a.x - b.x)
    text = f"the vertical gap is {gap:+.2f}, the sideways shift {shift:.2f}"
    if a.y >= b.y or gap >= 0.09 or shift >= a.radius + b.radius:
        return Verdict.VIOLATED, text
    if abs(gap) <= 0.05 and shift <= b.radius + 0.02:
        return Verdict.SATISFIED, text
    return Verdict.UNDECIDABLE, f"{text}: contact is unclear"


def _check_inside(objects, region):
    share = _enclosed_share(*objects)
    return graded(share, 0.9, 0.5, f"{share:.0%} of it is enclosed")


def _check_front_of(objects, region):
    a, b = objects
    if _gap(a, b) > 0.0:
        return Verdict.UNDECIDABLE, "the two do not overlap, so their depth order cannot be seen"
    difference = a.completeness - b.completeness
    text = f"{a.completeness:.0%} of it and {b.completeness:.0%} of the other are visible"
    return graded(difference, 0.08, -0.08, text)


def _check_near(objects, region):
    gap = _gap(*objects)
    return graded(-gap, -0.14, -0.22, f"the gap is {gap:.2f}")


def _check_next_to(objects, region):
    a, b = objects
    share = max(_enclosed_share(a, b), _enclosed_share(b, a))
    if share >= 0.5:
        return Verdict.VIOLATED, f"{share:.0%} of one is enclosed by the other"
    return _check_near(objects, region)


def _check_far_from(objects, region):
    gap = _gap(*objects)
    return graded(gap, 0.28, 0.18, f"the gap is {gap:.2f}")


def _check_between(objects, region):
    a, b, c = (np.array([o.x, o.y]) for o in objects)
    length = float(np.hypot(*(c - b)))
    if length < 0.1:
        return Verdict.UNDECIDABLE, "the two outer objects are at the same place"
    direction = (c - b) / length
    along = float((a - b) @ direction) / length
    aside = float(abs((a - b)[0] * direction[1] - (a - b)[1] * direction[0]))
    text = f"it is {along:.0%} of the way and {aside:.2f} aside"
    if 0.2 <= along <= 0.8 and aside <= 0.15:
        return Verdict.SATISFIED, text
    if not 0.1 < along < 0.9 or aside >= 0.25:
        return Verdict.VIOLATED, text
    return Verdict.UNDECIDABLE, f"{text}: too close to call"


_CELL_CENTERS = (0.0, 0.5, 1.0)
# Region → the opposite one, which a flip turns it into; the center has none.
MIRRORED_REGIONS = {
    name: next(other for other, cell in REGIONS.items() if cell == (2 - column, 2 - row))
    for name, (column, row) in REGIONS.items()
    if name != "center"
}


def _check_at(objects, region):
    (a,) = objects
    # distance of the center from the middle line of a middle cell, or from the outer 0.2 of the canvas for outer cells
    off = max(
        abs(position - _CELL_CENTERS[cell]) - (0.0 if cell == 1 else 0.2)
        for position, cell in zip((a.x, a.y), REGIONS[region], strict=True)
    )
    return graded(-off, -0.15, -0.19, f"its center is at ({a.x:.2f}, {a.y:.2f})")


def _check_row_order(objects, region):
    spread = max(o.y for o in objects) - min(o.y for o in objects)
    steps = [after.x - before.x for before, after in pairwise(objects)]
    text = f"the smallest step to the right is {min(steps):+.2f}, the row's height spread {spread:.2f}"
    if min(steps) <= 0.02 or spread >= 0.3:
        return Verdict.VIOLATED, text
    if min(steps) >= 0.06 and spread <= 0.2:
        return Verdict.SATISFIED, text
    return Verdict.UNDECIDABLE, f"{text}: too close to call"


def _swapped(function):
    """Return a rule or placement with its two arguments exchanged."""

    def swapped(items, region):
        return function(items[::-1], region)

    return swapped


@dataclass(frozen=True)
class RelationKind:
    """
    Everything the world knows about one relation.

    Args:
        name (`str`):
            Identifier, as in data sets and logs.
        phrases (`tuple[str, ...]`):
            Wordings; `{0}`, `{1}`, `{2}` are the arguments, `{all}` the list of all, `{region}` the region. Every wording
            belongs to one relation only, so that text can be parsed back.
        check (`Callable`):
            The rule: `(objects, region)` → ([`Verdict`], reason).
        place (`Callable`):
            The placement: `(slots, region)` → alternatives of bounds; none if there is no way.
        dimension (`str`):
            What kind of space it speaks of: `"lateral"`, `"vertical"`, `"depth"`, `"containment"`, `"distance"`,
            `"between"`, `"order"` or `"region"`.
        inverse (`str`, *optional*):
            The relation that says the same with the two arguments exchanged.
        opposite (`str`, *optional*):
            The relation that contradicts it with the same arguments.
        is_symmetric (`bool`, *optional*, defaults to `False`):
            Whether exchanging the two arguments changes nothing.
        is_transitive (`bool`, *optional*, defaults to `False`):
            Whether `r(a, b)` and `r(b, c)` give `r(a, c)`.
        num_arguments (`int`, *optional*, defaults to `2`):
            Number of arguments; the smallest number for `row_order`, which takes more.
        radius_ranges (`tuple[tuple[float, float], ...]`, *optional*):
            Size that each argument must have for the relation to be visible, in canvas units.
        is_overlapping (`bool`, *optional*, defaults to `False`):
            Whether the arguments may touch or cover each other; all other objects are kept apart. An object takes part
            in at most one such relation.
    """

    name: str
    phrases: tuple[str, ...]
    check: Rule
    place: Placement
    dimension: str
    inverse: str | None = None
    opposite: str | None = None
    is_symmetric: bool = False
    is_transitive: bool = False
    num_arguments: int = 2
    radius_ranges: tuple[tuple[float, float], ...] | None = None
    is_overlapping: bool = False


_SIMILAR = ((0.12, 0.13), (0.12, 0.13))
_INNER, _OUTER = (0.07, 0.085), (0.19, 0.22)

RELATIONS: dict[str, RelationKind] = {
    kind.name: kind
    for kind in (
        RelationKind(
            name="left_of",
            phrases=("{0} is to the left of {1}", "{0} is left of {1}", "{0} sits on the left side of {1}"),
            check=_check_left_of,
            place=placements.place_left_of,
            dimension="lateral",
            inverse="right_of",
            opposite="right_of",
            is_transitive=True,
        ),
        RelationKind(
            name="right_of",
            phrases=("{0} is to the right of {1}", "{0} is right of {1}", "{0} sits on the right side of {1}"),
            check=_swapped(_check_left_of),
            place=_swapped(placements.place_left_of),
            dimension="lateral",
            inverse="left_of",
            opposite="left_of",
            is_transitive=True,
        ),
        RelationKind(
            name="above",
            phrases=("{0} is above {1}", "{0} is higher up than {1}", "{0} floats over {1}"),
            check=_check_above,
            place=placements.place_above,
            dimension="vertical",
            inverse="below",
            opposite="below",
            is_transitive=True,
        ),
        RelationKind(
            name="below",
            phrases=("{0} is below {1}", "{0} is lower down than {1}", "{0} is beneath {1}"),
            check=_swapped(_check_above),
            place=_swapped(placements.place_above),
            dimension="vertical",
            inverse="above",
            opposite="above",
            is_transitive=True,
        ),
        RelationKind(
            name="on",
            phrases=("{0} is on {1}", "{0} stands on top of {1}", "{0} rests on {1}"),
            check=_check_on,
            place=placements.place_on,
            dimension="vertical",
            inverse="under",
            opposite="under",
            is_overlapping=True,
        ),
        RelationKind(
            name="under",
            phrases=("{0} is under {1}", "{0} is directly under {1}", "{0} carries {1}"),
            check=_swapped(_check_on),
            place=_swapped(placements.place_on),
            dimension="vertical",
            inverse="on",
            opposite="on",
            is_overlapping=True,
        ),
        RelationKind(
            name="inside",
            phrases=("{0} is inside {1}", "{0} is enclosed by {1}", "{0} lies within {1}"),
            check=_check_inside,
            place=placements.place_inside,
            dimension="containment",
            inverse="contains",
            opposite="next_to",
            is_transitive=True,
            radius_ranges=(_INNER, _OUTER),
            is_overlapping=True,
        ),
        RelationKind(
            name="contains",
            phrases=("{0} contains {1}", "{0} encloses {1}", "{0} surrounds {1}"),
            check=_swapped(_check_inside),
            place=_swapped(placements.place_inside),
            dimension="containment",
            inverse="inside",
            opposite="next_to",
            is_transitive=True,
            radius_ranges=(_OUTER, _INNER),
            is_overlapping=True,
        ),
        RelationKind(
            name="front_of",
            phrases=("{0} is in front of {1}", "{0} stands in front of {1}", "{0} partly hides {1}"),
            check=_check_front_of,
            place=placements.place_front_of,
            dimension="depth",
            inverse="behind",
            opposite="behind",
            is_transitive=True,
            radius_ranges=_SIMILAR,
            is_overlapping=True,
        ),
        RelationKind(
            name="behind",
            phrases=("{0} is behind {1}", "{0} stands behind {1}", "{0} is partly hidden by {1}"),
            check=_swapped(_check_front_of),
            place=_swapped(placements.place_front_of),
            dimension="depth",
            inverse="front_of",
            opposite="front_of",
            is_transitive=True,
            radius_ranges=_SIMILAR,
            is_overlapping=True,
        ),
        RelationKind(
            name="near",
            phrases=("{0} is near {1}", "{0} is close to {1}"),
            check=_check_near,
            place=placements.place_next_to,
            dimension="distance",
            inverse="near",
            opposite="far_from",
            is_symmetric=True,
        ),
        RelationKind(
            name="next_to",
            phrases=("{0} is next to {1}", "{0} is beside {1}"),
            check=_check_next_to,
            place=placements.place_next_to,
            dimension="distance",
            inverse="next_to",
            opposite="far_from",
            is_symmetric=True,
        ),
        RelationKind(
            name="far_from",
            phrases=("{0} is far from {1}", "{0} is far away from {1}"),
            check=_check_far_from,
            place=placements.place_far_from,
            dimension="distance",
            inverse="far_from",
            opposite="near",
            is_symmetric=True,
        ),
        RelationKind(
            name="between",
            phrases=("{0} is between {1} and {2}", "{0} is in the middle between {1} and {2}"),
            check=_check_between,
            place=placements.place_between,
            dimension="between",
            num_arguments=3,
        ),
        RelationKind(
            name="at",
            phrases=("{0} is at the {region}", "{0} is placed at the {region}"),
            check=_check_at,
            place=placements.place_at,
            dimension="region",
            num_arguments=1,
        ),
        RelationKind(
            name="row_order",
            phrases=("{all} stand in a row from left to right", "{all} form a row from left to right"),
            check=_check_row_order,
            place=placements.place_row_order,
            dimension="order",
            num_arguments=3,
        ),
    )
}
