"""The folder in which a dataset is built: the recipe, one log of records per stage, and the images."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ...endpoints import RecordedSpend, Spend
from ...store import (
    PROCESS,
    ContentStore,
    RecordLog,
    SharedLog,
    lock_folder,
    read_record,
    remove_partial_files,
    write_record,
)
from .recipe import load_recipe, make_recipe


RECIPE_FILE = "recipe.json"
# Section of the recipe → the log that fixes its settings once it exists; and the settings that may change even then.
_LOGS = {"prompts": "prompts", "render": "images", "filter": "verdicts"}
_FREE = {("prompts", "num_prompts"), ("prompts", "max_cost"), ("render", "max_cost"), ("filter", "max_cost")}

# Settings that affect where a model runs, how fast it is called, or what it costs, but not its results.
_PRACTICAL = {
    "base_url", "endpoint", "api_key_env", "concurrency", "timeout_s", "max_attempts", "prices", "price_per_image", "license",
    "device",
}  # fmt: skip


class BuildStore:
    """
    A dataset that is being built.

    Args:
        path (`str` or `Path`):
            A recipe, which names the folder, or the folder itself, once it exists.

    Raises:
        `ValueError`: If the folder holds something else, or if the recipe differs from the original one in settings
            that can no longer be changed.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if path.is_dir():
            found = read_record(path / RECIPE_FILE)
            if not found:
                raise ValueError(
                    f"{path} is not the folder of a dataset that is being built: it has no {RECIPE_FILE}."
                )
            self.recipe, self.folder = make_recipe(found), path
        elif path.is_file():
            self.recipe = load_recipe(path)
            self.folder = Path(self.recipe.store)
        else:
            raise FileNotFoundError(
                f"There is no recipe or folder {path}. Name a YAML file, or the folder of a dataset that is being built."
            )
        files = [] if not self.folder.is_dir() else [path.name for path in self.folder.iterdir()]
        if RECIPE_FILE not in files and any(name[0] != "." for name in files):
            raise ValueError(
                f"{self.folder} is not empty and does not hold a dataset that is being built. Use another `store`."
            )
        self.prompts = RecordLog(self.folder / "prompts.jsonl")
        self.edits = RecordLog(self.folder / "edits.jsonl")
        self.images = SharedLog(self.folder, "images")
        self.verdicts = RecordLog(self.folder / "verdicts.jsonl")
        self.payments = SharedLog(self.folder, "payments")
        self.votes_file = self.folder / "votes.jsonl"
        self.cache = self.folder / "answers.sqlite"
        self._check_recipe()

    def _check_recipe(self) -> None:
        found = read_record(self.folder / RECIPE_FILE)
        now = self.recipe.to_dict()
        if not found:
            return
        then = make_recipe(found).to_dict()
        if then["seed"] != now["seed"] and any(True for _ in self.prompts):
            self._refuse("seed", then["seed"], now["seed"])
        for section, log in _LOGS.items():
            has_begun = (self.folder / f"{log}.jsonl").is_file()
            for key, value in now[section].items():
                if has_begun and (section, key) not in _FREE and _deciding(then[section][key]) != _deciding(value):
                    self._refuse(f"{section}.{key}", then[section][key], value)

    def _refuse(self, key: str, then: Any, now: Any) -> None:
        raise ValueError(
            f"{key} was {then} when {self.folder} was begun and is {now} now. Restore it, or name another `store`."
        )

    def open(self, stack: ExitStack) -> None:
        """
        Makes the folder, locks it against other builds, records the recipe, and removes what killed writes have left. Only the
        first process does so.
        """
        if PROCESS == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(self.folder))
            remove_partial_files(self.folder)
            write_record(self.folder / RECIPE_FILE, self.recipe.to_dict())
            remove_partial_files(self.files.folder)

    def spend(self, section: str) -> Spend:
        """Returns the spending limit of a section of the recipe. Each payment is on disk before its result is."""
        limit = getattr(self.recipe, section).max_cost
        return RecordedSpend(math.inf if limit is None else limit, self.payments, section=section)

    @property
    def files(self) -> ContentStore:
        """The images, stored by content."""
        return ContentStore(self.folder / "images")

    def image_path(self, name: str) -> Path:
        """Path of an image that a record names."""
        return self.folder / "images" / name

    def accepted_prompts(self) -> dict[str, dict[str, Any]]:
        """Id → record of the prompts that were not dropped."""
        return {record["id"]: record for record in self.prompts if "dropped" not in record}

    def accepted_edits(self) -> dict[str, dict[str, Any]]:
        """Id of a prompt → record of its perturbation, if it has one."""
        return {record["id"]: record for record in self.edits if "dropped" not in record}

    def rng(self, *path: int | str) -> np.random.Generator:
        """Returns a random generator that depends only on the seed of the recipe and on `path`, its purpose."""
        return np.random.default_rng(self.seed_of(*path))

    def seed_of(self, *path: int | str) -> int:
        """Returns a 63-bit seed that depends only on the seed of the recipe and on `path`, its purpose."""
        key = repr((self.recipe.seed, *path)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def drop_reasons(records: RecordLog) -> Counter[str]:
    """Counts the dropped records of a log by reason, ignoring details."""
    return Counter(record["dropped"].split(":")[0] for record in records if "dropped" in record)


def _deciding(value: Any) -> Any:
    """Returns a setting without its `_PRACTICAL` entries, at any depth: the part that decides the results."""
    if isinstance(value, Mapping):
        return {key: _deciding(item) for key, item in value.items() if key not in _PRACTICAL}
    return [_deciding(item) for item in value] if isinstance(value, list) else value


class Quota:
    """
    Deals out values such that each has its share after any number of draws, and their order is random.

    Args:
        weights (`Mapping[Any, float]`):
            Value → weight.
        rng (`np.random.Generator`):
            Source of the order.
    """

    def __init__(self, weights: Mapping[Any, float], rng: np.random.Generator):
        self.shares = {value: weight / sum(weights.values()) for value, weight in weights.items()}
        self.rng = rng
        self.dealt: Counter[Any] = Counter()

    def __iter__(self) -> Iterator[Any]:
        while True:
            block = []
            for _ in range(100):
                number = self.dealt.total() + 1
                value = max(self.shares, key=lambda value: self.shares[value] * number - self.dealt[value])
                self.dealt[value] += 1
                block.append(value)
            yield from (block[i] for i in self.rng.permutation(len(block)))
