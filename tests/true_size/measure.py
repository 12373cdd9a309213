"""Writes `recipes/bench/true_size.json`, with which the tests compare: `python -m tests.true_size.measure [RECIPE ...]`."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.true_size.generators import METHODS, RECIPES, measure_generator
from tests.true_size.rewards import REWARDS, measure_reward


TABLE = RECIPES / "bench" / "true_size.json"
GENERATORS = sorted(path.stem for method in METHODS for path in RECIPES.glob(f"{method}_*.yaml"))


def check_against_table(name: str, counts: dict[str, dict[str, int]]) -> None:
    """Fails if a count of a recipe is not what the table says, to 1 %."""
    recorded = json.loads(TABLE.read_text(encoding="utf-8"))[name]
    assert counts.keys() == recorded.keys()
    for phase, record in recorded.items():
        for key, value in record.items():
            assert counts[phase][key] == pytest.approx(value, rel=0.01), (
                f"{phase}, {key}: see tests/true_size/measure.py"
            )


def main(recipes: list[str]) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            is_reward = recipe in REWARDS
            table[recipe] = measure_reward(REWARDS[recipe]) if is_reward else measure_generator(recipe, Path(folder))
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or [*GENERATORS, *REWARDS])
