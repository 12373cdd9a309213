"""What reviewers see and what they say, kept in a file that only grows."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...store import RecordLog


ANSWERS = ("left", "right", "both", "neither", "cannot_tell")
VERSION = 1  # of the form of a vote


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
    All votes, one JSON line each. A vote has reached the disk when [`~VoteLog.append`] returns; what is taken back stays in the
    file.

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
        Adds a vote that comes back from elsewhere: if it is one of this log, only if it says something else, and for the
        reviewer who gave it.

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
        """Item and reviewer → the vote that holds."""
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
    """What a vote says, whatever was shown where: `"original"`, `"edited"`, `"both"`, `"neither"` or `"cannot_tell"`."""
    if vote["answer"] in ("left", "right"):
        return vote["order"][("left", "right").index(vote["answer"])]
    return vote["answer"]
