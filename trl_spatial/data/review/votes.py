"""The items that reviewers see, and the append-only log of their votes."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...store import RecordLog


ANSWERS = ("left", "right", "both", "neither", "cannot_tell")
VERSION = 1  # version of the vote format


@dataclass(frozen=True)
class ReviewItem:
    """
    A pair of images that people compare for one prompt.

    Args:
        id (`str`):
            Its id.
        prompt (`str`):
            The prompt.
        spans (`list[tuple[int, int]]`):
            Characters of the prompt that state each relation.
        relations (`list[str]`):
            The relations in words, one per span.
        images (`dict[str, Path]`):
            `"original"` and `"edited"` → file of the image.
        gold (`str`, *optional*):
            The side that is known to be right, for an item that checks the reviewer.
    """

    id: str
    prompt: str
    spans: list[tuple[int, int]]
    relations: list[str]
    images: dict[str, Path]
    gold: str | None = None


class VoteLog:
    """
    All votes, one JSON line each. A vote is on disk when [`~VoteLog.append`] returns; votes that are taken back stay
    in the file.

    Args:
        path (`Path`):
            The file. It is made with the first vote.

    Raises:
        `ValueError`: If a line is damaged.
    """

    def __init__(self, path: Path):
        self._log = RecordLog(path)
        self._lock = threading.Lock()
        self._ids: set[str] = set()
        self._current: dict[tuple[str, str], dict[str, Any]] = {}
        for record in self._log:
            self._count(record)

    def append(self, vote: Mapping[str, Any]) -> bool:
        """
        Adds a vote.

        Args:
            vote (`Mapping[str, Any]`):
                `id`, unique to it; `item`; `reviewer`; and `answer`, one of `ANSWERS`, or `None` to take back what this
                reviewer said of the item. Further: `order` (the sides, as shown from left to right), `ticks` (for each
                relation whether it holds in the left and in the right image), `milliseconds`, `version`, `time`.

        Returns:
            `bool`: whether it is new: a vote that is sent twice counts once.
        """
        with self._lock:
            if vote["id"] in self._ids:
                return False
            self._log.append([vote])
            self._count(vote)
            return True

    def add_changed(self, vote: Mapping[str, Any]) -> bool:
        """
        Adds a vote that was imported. One that is already in this log is only added if its answer has changed, and
        then for the reviewer who gave it originally.

        Returns:
            `bool`: whether it was added.
        """
        known = next((kept for kept in self if kept["id"] == vote["id"]), None)
        if known is None:
            return self.append(vote)
        if preferred_side(known) == preferred_side(vote):
            return False
        return self.append({**vote, "id": f"{vote['id']}:{vote['answer']}", "reviewer": known["reviewer"]})

    def current(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Returns (item, reviewer) → the current vote."""
        with self._lock:
            return dict(self._current)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._log)

    def _count(self, vote: Mapping[str, Any]) -> None:
        self._ids.add(vote["id"])
        key = (vote["item"], vote["reviewer"])
        if vote["answer"] is None:
            self._current.pop(key, None)
        else:
            self._current[key] = dict(vote)


def preferred_side(vote: Mapping[str, Any]) -> str:
    """The answer of a vote by image: `"original"`, `"edited"`, `"both"`, `"neither"` or `"cannot_tell"`."""
    if vote["answer"] in ("left", "right"):
        return vote["order"][("left", "right").index(vote["answer"])]
    return vote["answer"]
