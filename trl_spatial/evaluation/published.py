"""Published numbers of others, shown beside ours."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


def published_numbers(benchmark: str, *, judges: Sequence[str] = (), difference: str = "") -> list[dict[str, Any]]:
    """
    Returns published numbers for a benchmark, and whether ours are comparable with them.

    Args:
        benchmark (`str`):
            Its name; `"pairs"` for scorers on the pairs of SpatialScore's paper, `"mmrb2"` for scorers on Multimodal RewardBench 2.
        judges (`Sequence[str]`, *optional*):
            Names of our judges. A number is only comparable if its judge's name is in one of them.
        difference (`str`, *optional*):
            A sentence about what else differs from the published setup, if anything does.

    Returns:
        `list[dict]`: `benchmark`, `metric`, `model`, `value` as it was published, `judge` (`None` if there is none), `protocol`,
        `source`, `is_comparable`, and `why` it is not.
    """
    rows = [row for row in _read() if row["benchmark"] == benchmark]
    whys = [difference or _other_judge(row["judge"], judges) for row in rows]
    return [row | {"is_comparable": not why, "why": why} for row, why in zip(rows, whys, strict=True)]


@cache
def _read() -> list[dict[str, Any]]:
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def _other_judge(judge: str | None, judges: Sequence[str]) -> str:
    if judge is None or any(_letters(judge) in _letters(name) for name in judges):
        return ""
    return f"Judged by {judge}." if judge != "unknown" else "Its judge is not named."


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))
