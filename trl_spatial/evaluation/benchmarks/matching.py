"""Matches images whose names differ slightly from the official ones."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from .base import ImageKey


_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def match_files(paths: Mapping[ImageKey, str], files: Sequence[str]) -> dict[ImageKey, str]:
    """
    Finds images by their official paths. If a path is missing, a file with another format or other leading zeros is
    accepted: `7_0.jpg` or `007_0.png` for `7_0.png`.

    Args:
        paths (`Mapping[tuple[str, int], str]`):
            Id of an item and number of the image → its official path.
        files (`Sequence[str]`):
            The existing files.

    Returns:
        `dict`: Id of an item and number of the image → its file. What is missing is left out.

    Raises:
        `ValueError`: If several files could be one image.
    """
    known = set(files)
    similar: dict[str, list[str]] = {}
    for file in files:
        if PurePosixPath(file).suffix.lower() in _SUFFIXES:
            similar.setdefault(_simplify(file), []).append(file)
    found = {}
    for key, path in paths.items():
        candidates = [path] if path in known else similar.get(_simplify(path), [])
        if len(candidates) > 1:
            raise ValueError(
                f"Each of {', '.join(candidates)} could be image {key[1]} of item {key[0]!r}. Name the right one {path!r}."
            )
        if candidates:
            found[key] = candidates[0]
    return found


def _simplify(path: str) -> str:
    return re.sub(r"\d+", lambda digits: str(int(digits[0])), str(PurePosixPath(path).with_suffix("")))
