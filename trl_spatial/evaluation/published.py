"""Numbers that others have published, beside which ours are shown."""

import json
from functools import cache
from pathlib import Path
from typing import Any


def published_numbers(benchmark: str) -> list[dict[str, Any]]:
    """
    Returns what has been published for a benchmark.

    Args:
        benchmark (`str`):
            Its name, or `"pairs"` for the accuracy of scorers.

    Returns:
        `list[dict]`: `metric`, `model`, `value`, `judge`, `protocol`, `source`, and `comparable`, whether it was measured as we do, with
        `why` it is not.
    """
    return [row for row in _read() if row["benchmark"] == benchmark]


@cache
def _read() -> list[dict[str, Any]]:
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
