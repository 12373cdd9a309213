"""Places objects so that a relation holds between them, by bounds on differences of their positions.

Positions are in canvas units: x to the right, y down, both from 0 to 1. A placement maps slots to alternatives, each a list of
bounds that must all hold. Placements demand more than the rules do, so that a placed relation is never a close call.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from .shapes import hiding_offset


class Bound(NamedTuple):
    """`position[upper] - position[lower] >= minimum` along `axis` (0: x, 1: y); index `CANVAS` stands for 0."""

    axis: int
    lower: int
    upper: int
    minimum: float


class Slot(NamedTuple):
    """An object to be placed: its number in the graph, its radius in canvas units, its shape."""

    number: int
    radius: float
    shape: str


CANVAS = -1
X, Y = 0, 1
Placement = Callable[[Sequence[Slot], str | None], list[list[Bound]]]

# Region → its cell in a 3 × 3 grid: (column, row).
REGIONS = {
    "top left corner": (0, 0),
    "top right corner": (2, 0),
    "bottom left corner": (0, 2),
    "bottom right corner": (2, 2),
    "left edge": (0, 1),
    "right edge": (2, 1),
    "top edge": (1, 0),
    "bottom edge": (1, 2),
    "center": (1, 1),
}


def _within(axis: int, lower: int, upper: int, minimum: float, maximum: float) -> list[Bound]:
    return [Bound(axis, lower, upper, minimum), Bound(axis, upper, lower, -maximum)]


def place_left_of(slots, region):
    a, b = slots
    return [[Bound(X, a.number, b.number, max(0.75 * (a.radius + b.radius), 0.13))]]


def place_above(slots, region):
    a, b = slots
    return [[Bound(Y, a.number, b.number, a.radius + b.radius + 0.03)]]


def place_on(slots, region):
    # hardly any sideways shift, so that even on round and pointed supports the contact is at the top
    a, b = slots
    reach = a.radius + b.radius
    return [_within(Y, a.number, b.number, reach, reach + 0.004) + _within(X, a.number, b.number, -0.02, 0.02)]


def place_inside(slots, region):
    inner, outer = slots
    if outer.shape == "triangle":
        return []  # too little room
    # even the corner of a square stays inside a diamond: |x| + |y| <= radius
    slack = max((outer.radius - 2 * inner.radius) / 2 - 0.008, 0.0)
    return [[bound for axis in (X, Y) for bound in _within(axis, outer.number, inner.number, -slack, slack)]]


# Share of the object behind that is hidden: enough to show the order, little enough to recognize the object.
HIDDEN_SHARE = 0.35


def place_front_of(slots, region):
    front, behind = slots
    radius = (front.radius + behind.radius) / 2
    alternatives = []
    for axis in (X, Y):
        for sign in (-1, 1):
            if (front.shape, behind.shape, axis, sign) == ("square", "triangle", Y, 1):
                continue  # a square over the base of a triangle leaves a smaller triangle, which looks like "on"
            offset = radius * hiding_offset(front.shape, behind.shape, axis, sign, HIDDEN_SHARE)
            first, second = (behind, front) if sign == 1 else (front, behind)
            along = _within(axis, first.number, second.number, 0.95 * offset, 1.05 * offset)
            aside = _within(1 - axis, first.number, second.number, -0.06 * radius, 0.06 * radius)
            alternatives.append(along + aside)
    return alternatives


def place_next_to(slots, region):
    a, b = slots
    reach, aside = a.radius + b.radius, 0.6 * min(a.radius, b.radius)
    return [
        _within(axis, first.number, second.number, reach + 0.035, reach + 0.09)
        + _within(1 - axis, first.number, second.number, -aside, aside)
        for axis in (X, Y)
        for first, second in ((a, b), (b, a))
    ]


def place_far_from(slots, region):
    a, b = slots
    return [
        [Bound(axis, first.number, second.number, a.radius + b.radius + 0.33)]
        for axis in (X, Y)
        for first, second in ((a, b), (b, a))
    ]


def place_between(slots, region):
    middle, *ends = slots
    return [
        [
            *_within(1 - axis, first.number, second.number, -0.06, 0.06),
            *_within(1 - axis, first.number, middle.number, -0.04, 0.04),
            Bound(axis, first.number, middle.number, first.radius + middle.radius + 0.035),
            Bound(axis, middle.number, second.number, middle.radius + second.radius + 0.035),
        ]
        for axis in (X, Y)
        for first, second in (ends, ends[::-1])
    ]


def place_at(slots, region):
    (a,) = slots
    bounds = []
    for axis, cell in zip((X, Y), REGIONS[region], strict=True):
        minimum, maximum = ((0.0, 0.27), (0.42, 0.58), (0.73, 1.0))[cell]
        bounds += _within(axis, CANVAS, a.number, minimum, maximum)
    return [bounds]


def place_row_order(slots, region):
    bounds = []
    for a, b in pairwise(slots):
        bounds.append(Bound(X, a.number, b.number, a.radius + b.radius + 0.035))
    for other in slots[1:]:
        bounds += _within(Y, slots[0].number, other.number, -0.04, 0.04)
    return [bounds]
