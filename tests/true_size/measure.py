"""Writes `recipes/bench/true_size.json`, with which the tests compare: `python -m tests.true_size.measure [RECIPE ...]`."""

import json
import sys
import tempfile
from pathlib import Path

from tests.true_size.generators import RECIPES, measure_generator


TABLE = RECIPES / "bench" / "true_size.json"
GENERATORS = [path.stem for path in sorted(RECIPES.glob("grpo_*.yaml"))]


def main(recipes: list[str]) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            table[recipe] = measure_generator(recipe, Path(folder))
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or GENERATORS)
