"""Detects near-duplicate prompts."""

import hashlib
import re
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from ...scenes import RELATIONS


NUM_BANDS, BAND_SIZE = 16, 4  # texts that share 70 % of their n-grams share a band with probability 0.99
SIMILARITY = 0.8
PART = 3  # words per n-gram
_PRIME = 2**31 - 1
_FACTORS, _OFFSETS = np.random.default_rng(0).integers(1, _PRIME, size=(2, NUM_BANDS * BAND_SIZE, 1))


class DuplicateFinder:
    """
    Remembers prompts, and finds those that are nearly the same: texts that share four fifths of their sequences of three
    words (found by MinHash: Broder, "On the resemblance and containment of documents", 1997), and graphs of the same scene
    in which objects of the same nouns stand in the same relations, whatever else is said of them.
    """

    def __init__(self) -> None:
        self._texts: dict[str, frozenset[int]] = {}
        self._bands: dict[tuple[int, bytes], list[str]] = defaultdict(list)
        self._graphs: dict[str, str] = {}

    def add(self, record: dict[str, Any]) -> str | None:
        """
        Remembers a prompt, unless it is a duplicate.

        Args:
            record (`dict`):
                A record of a prompt: `id`, `scene`, `entities`, `relations` and `prompt`.

        Returns:
            `str`, *optional*: why it is a duplicate, or `None`.
        """
        graph = graph_key(record)
        if graph in self._graphs:
            return f"same graph: {self._graphs[graph]}"
        parts = _parts(record["prompt"])
        bands = _bands(parts)
        for other in dict.fromkeys(name for band in bands for name in self._bands.get(band, ())):
            known = self._texts[other]
            if len(parts & known) >= SIMILARITY * len(parts | known):
                return f"nearly the same text: {other}"
        self._graphs[graph] = record["id"]
        self._texts[record["id"]] = parts
        for band in bands:
            self._bands[band].append(record["id"])
        return None


def _parts(text: str) -> frozenset[int]:
    words = re.findall(r"\w+", text.lower())
    parts = {" ".join(words[i : i + PART]) for i in range(max(len(words) - PART + 1, 1))}
    return frozenset(int.from_bytes(hashlib.blake2b(part.encode(), digest_size=4).digest(), "big") for part in parts)


def _bands(parts: frozenset[int]) -> list[tuple[int, bytes]]:
    values = np.fromiter(parts, np.int64, len(parts)) % _PRIME
    signature = ((_FACTORS * values + _OFFSETS) % _PRIME).min(axis=1).reshape(NUM_BANDS, BAND_SIZE)
    return [(number, row.tobytes()) for number, row in enumerate(signature)]


def graph_key(record: dict[str, Any]) -> str:
    """
    Returns a key that two prompts share if exchanging their objects, noun for noun, makes their relations the same
    (Weisfeiler-Leman coloring, which may also merge some rare graphs that differ).

    Args:
        record (`dict`):
            `scene`, `entities` and `relations` of a prompt.
    """
    edges = [_normalize(relation) for relation in record["relations"]]
    colors = {name: name.lower().split()[-1] for name in record["entities"]}
    for _ in range(3):
        seen: dict[str, Counter[str]] = {name: Counter() for name in colors}
        for label, roles in edges:
            around = sorted((role, colors[name]) for name, role in roles)
            for name, role in roles:
                seen[name][f"{label} {role} {around}"] += 1
        colors = {name: _digest(f"{color} {sorted(seen[name].items())}") for name, color in colors.items()}
    return _digest(f"{record['scene']} {sorted(colors.values())}")


def _normalize(relation: dict[str, Any]) -> tuple[str, list[tuple[str, int]]]:
    """
    Returns the label of a relation and its (argument, role) pairs; arguments with the same role are interchangeable. A
    relation and its inverse give the same result.
    """
    name, arguments = relation["relation"], list(relation["arguments"])
    kind = RELATIONS[name]
    if name == "at":
        return f"at {arguments[-1]}", [(arguments[0], 0)]
    if name == "between":
        return name, [(arguments[0], 0), *((end, 1) for end in arguments[1:])]
    if kind.is_symmetric:
        return name, [(argument, 0) for argument in arguments]
    if kind.inverse is not None and kind.inverse < name:
        name, arguments = kind.inverse, arguments[::-1]
    return name, [(argument, role) for role, argument in enumerate(arguments)]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
