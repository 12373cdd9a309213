"""
Outputs of official scoring programs on synthetic answers, which lie beside a checkout and are no part of it. The tests that use
them are skipped where they are missing; `TRL_SPATIAL_GOLDENS` names another folder of the same form.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest


FOLDER = Path(os.environ.get("TRL_SPATIAL_GOLDENS", Path(__file__).parents[3] / "shared" / "goldens"))


class Golden(NamedTuple):
    """What went into an official program, what came out, and what should have (`None` where that is not recorded)."""

    group: str
    tags: list[str]
    given: dict[str, Any]
    official: dict[str, Any]
    fixed: dict[str, Any] | None


def goldens(benchmark: str, *groups: str) -> Any:
    """A decorator that runs a test for every golden of a benchmark, or of some groups, as the argument `golden`."""
    folder = FOLDER / benchmark
    if not folder.is_dir():
        return pytest.mark.skip(reason=f"there is no folder {folder}")
    read = {name: json.loads((folder / name).read_text()) for name in ("inputs.json", "official.json")}
    fixed = json.loads((folder / "fixed.json").read_text())["results"] if (folder / "fixed.json").is_file() else {}
    cases = [
        pytest.param(
            Golden(
                case["group"],
                case["tags"],
                case["input"],
                read["official.json"]["results"][case["id"]],
                fixed.get(case["id"]),
            ),
            id=case["id"],
        )
        for case in read["inputs.json"]["cases"]
        if not groups or case["group"] in groups
    ]
    return pytest.mark.parametrize("golden", cases)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Compares JSON values, numbers to a tolerance; `"NaN"` is not a number."""
    if expected == "NaN":
        assert found == "NaN" or math.isnan(found)
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys(), f"{found} is not {expected}"
        for key in expected:
            assert_same(found[key], expected[key], tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected), f"{found} is not {expected}"
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(expected, (int, float)) and not isinstance(expected, bool) and expected is not None:
        assert found == pytest.approx(expected, abs=tolerance)
    else:
        assert found == expected
