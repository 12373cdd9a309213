"""Yes/no answers: reading them, dropping those whose premise fails, and recognizing questions about space."""

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from .base import Metric


Key = TypeVar("Key", bound=Hashable)

_ANSWER = re.compile(r"[\W_]*(yes|no)(?![^\W_])", re.IGNORECASE)
_IN_FRONT = r"in front of|behind|hidden by|hides"
_FACING = (
    r"facing|point(?:s|ing)? (?:at|to|toward)|look(?:s|ing)? (?:at|to|toward|away)|towards?|turned|tilt\w*|upright|upside"
    r"|sideways|horizontal\w*|vertical\w*|diagonal\w*|parallel|perpendicular"
)
_ELSEWHERE = (
    r"left|right|above|below|beneath|under|underneath|over|top|bottom|on|near|next to|beside|between|inside|outside|around"
    r"|surround\w*|adjacent|opposite|front|foreground|background|cent(?:er|re)|middle|corner|edge|side"
)
# kind of spatial question → words that such questions contain
SPATIAL_PARTS = {
    "spatial": re.compile(rf"\b(?:{_IN_FRONT}|{_FACING}|{_ELSEWHERE})\b", re.IGNORECASE),
    "front and behind": re.compile(rf"\b(?:{_IN_FRONT})\b", re.IGNORECASE),
    "orientation": re.compile(rf"\b(?:{_FACING})\b", re.IGNORECASE),
}


def read_answer(reply: Any) -> bool | None:
    """
    Whether a reply says yes: its first word, in any case, ignoring quotes, emphasis and thoughts before it. `None` if
    it says neither yes nor no, or there is no reply.
    """
    found = _ANSWER.match(reply.rpartition("</think>")[2]) if isinstance(reply, str) else None
    return found[1].lower() == "yes" if found else None


def is_answer(reply: Any) -> bool:
    """Whether a reply says yes or no."""
    return read_answer(reply) is not None


def drop_unfounded(answers: Mapping[Key, bool], parents: Mapping[Key, Sequence[Key]]) -> dict[Key, bool]:
    """
    Revokes every yes that depends on a no: if there is no chair, it cannot be red.

    Args:
        answers (`Mapping[Key, bool]`):
            Question → whether the answer is yes.
        parents (`Mapping[Key, Sequence[Key]]`):
            Question → the questions it depends on. Unknown ones are ignored.

    Returns:
        `dict`: Question → whether its answer, and those of all it depends on, directly or not, are yes.
    """
    kept = dict(answers)
    while True:
        unfounded = [
            key for key, is_yes in kept.items() if is_yes and not all(kept.get(p, True) for p in parents.get(key, ()))
        ]
        if not unfounded:
            return kept
        kept |= dict.fromkeys(unfounded, False)


def negate(question: str) -> str:
    """
    Returns the twin of a question, whose answer is no if the question's is yes. It exposes judges that always say yes.
    """
    return f'Consider the question "{question.strip()}" Is "no" the right answer to it?'


def make_metric(name: str, values: Sequence[tuple[str, float]], *, is_headline: bool = False) -> Metric:
    """Makes a metric from pairs (id of an item, value)."""
    return Metric(
        name, np.array([value for _, value in values], float), [id for id, _ in values], is_headline=is_headline
    )
