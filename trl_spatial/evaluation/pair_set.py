"""The pairs on which scorers are measured: images, prompts, changes, and clusters of related pairs."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from PIL.Image import Image as PILImage
from tqdm.auto import tqdm

from ..preferences.columns import IMAGE_COLUMNS, pick_columns
from ..preferences.faults import Place, shorten
from ..preferences.images import load_image
from ..preferences.prompts import clean_prompt
from ..preferences.rows import find_faults, look_at_image
from ..scenes import describe_changes
from .pair_controls import CONTROLS, GIVEN, prompts_of


# Groups of pairs that differ only in these relations: errors that people call the worst, and judges see the least.
ORIENTATIONS = {"left/right": {"left_of", "right_of"}, "front/behind": {"front_of", "behind"}}


class PairSet:
    """
    The first pairs of a preference dataset. Images are read from the disk as they are needed.

    Args:
        dataset (`Dataset`):
            With the columns `prompt`, `chosen` and `rejected`. Of the others, `perturbed_prompt`, `level`, `operations`,
            `generator` and `source` are used.
        name (`str`):
            Name of the dataset, in errors and reports.
        limit (`int`, *optional*):
            Number of pairs. If not set, all.
        folder (`Path`, *optional*):
            Where relative paths of images start. If not set, at the current folder.
        dataset_id (`str`, *optional*), split (`str`, *optional*):
            Its repository on the Hub, and its split there.

    Raises:
        `ValueError`: If there is no pair, a column is missing or of a wrong type, or a prompt cannot be used.
    """

    def __init__(
        self,
        dataset: Dataset,
        name: str,
        *,
        limit: int | None = None,
        folder: Path | None = None,
        dataset_id: str | None = None,
        split: str | None = None,
    ):
        pick_columns(dataset.features, False, name)
        for column in IMAGE_COLUMNS:
            if isinstance(dataset.features[column], Image):
                dataset = dataset.cast_column(column, Image(decode=False))
        if limit is not None and limit < 1:
            raise ValueError(f"The limit is {limit}: measure at least 1 pair.")
        self.rows = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
        if len(self.rows) == 0:
            raise ValueError(f"{name} has no rows.")
        self.name, self.folder = name, folder or Path()
        # results on part of a split are not reported on the Hub
        self.dataset_id = dataset_id if len(self.rows) == len(dataset) else None
        self.split = split
        self.prompts = []
        for row, prompt in enumerate(self.rows["prompt"]):
            try:
                self.prompts.append(clean_prompt(prompt))
            except ValueError as error:
                raise ValueError(f"{name}, row {row}, `prompt`: {shorten(prompt)} {error}.") from error

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, index: int) -> tuple[PILImage, PILImage]:
        """
        The chosen and the rejected image of a pair.

        Raises:
            `ValueError`: If one cannot be read; the message names the row.
        """
        row = self.rows[index]
        images = []
        for column in IMAGE_COLUMNS:
            try:
                images.append(load_image(self._locate(row[column])))
            except ValueError as error:
                raise ValueError(f"{Place(self.name, index, column)}: {shorten(row[column])} {error}.") from error
        return images[0], images[1]

    def check(self) -> None:
        """
        Decodes every image.

        Raises:
            `ValueError`: If one cannot be used, or both images of a pair are the same; the message names the row.
        """
        for index, row in enumerate(tqdm(self.rows, desc="Checking pairs", unit="pair", delay=3)):
            pair = {"prompt": self.prompts[index]} | {column: self._locate(row[column]) for column in IMAGE_COLUMNS}
            facts = {column: look_at_image(pair[column], decode=True) for column in IMAGE_COLUMNS}
            for finding in find_faults(pair, facts, Place(self.name, index)):
                raise ValueError(f"{finding} Repair or remove the row.")

    def digest(self) -> str:
        """Hash of the prompts and the images, as they are stored."""
        total = hashlib.sha256()
        for index, row in enumerate(self.rows):
            for part in (self.prompts[index].encode(), *(_content(self._locate(row[c])) for c in IMAGE_COLUMNS)):
                total.update(hashlib.sha256(part).digest())
        return total.hexdigest()

    def records(self) -> list[dict[str, Any]]:
        """
        Returns what the tables need of each pair, as JSON: `pair`, its row; `prompts`, by control; `cluster`;
        `groups`, the name of a grouping → the pair's group in it; `change`, in words.
        """
        perturbed = self._column("perturbed_prompt")
        clusters = find_clusters(self.prompts, perturbed)
        prompts = {condition: prompts_of(condition, self.prompts, clusters) for condition in (GIVEN, *CONTROLS)}
        levels, operations = self._column("level"), [_as_list(value) for value in self._column("operations")]
        named = {name: self._column(name) for name in ("generator", "source")}
        return [
            {
                "pair": str(index),
                "prompts": {condition: texts[index] for condition, texts in prompts.items() if texts is not None},
                "cluster": clusters[index],
                "groups": {name: str(values[index]) for name, values in named.items() if values[index] is not None}
                | change_groups(levels[index], operations[index]),
                "change": describe_changes(operations[index]),
            }
            for index in range(len(self))
        ]

    def _column(self, name: str) -> list[Any]:
        return list(self.rows[name]) if name in self.rows.column_names else [None] * len(self)

    def _locate(self, image: Any) -> Any:
        return str(self.folder / image) if isinstance(image, str) and "://" not in image else image


def change_groups(level: int | None, operations: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """
    The groups of a pair by its changes: `level`, their number; `relation` and `operation`, of a single change; `orientation`,
    a key of `ORIENTATIONS`, if all changes are between its relations.
    """
    groups = {} if level is None else {"level": str(level)}
    if len(operations) == 1:
        groups |= {"relation": relation_of(operations[0]["before"]), "operation": operations[0]["operation"]}
    relations = {relation_of(operation[side]) for operation in operations for side in ("before", "after")}
    for name, members in ORIENTATIONS.items():
        if relations and relations <= members:
            groups["orientation"] = name
    return groups


def relation_of(changed: Mapping[str, Any] | str) -> str:
    """Returns the name of the relation `before` or `after` a change, which older datasets hold as `left_of(a, b)`."""
    return changed.partition("(")[0] if isinstance(changed, str) else changed["relation"]


def find_clusters(prompts: Sequence[str], perturbed: Sequence[str | None]) -> list[int]:
    """
    Numbers the groups of pairs that share a text: the prompt, or, if there is one, the perturbed prompt of the rejected image.
    Both directions of a pair, and all changes of one prompt, are one cluster.
    """
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        parent.setdefault(text, text)
        while parent[text] != text:
            parent[text] = text = parent[parent[text]]
        return text

    for prompt, other in zip(prompts, perturbed, strict=True):
        parent[root(prompt)] = root(prompt if other is None else other)
    numbers: dict[str, int] = {}
    return [numbers.setdefault(root(prompt), len(numbers)) for prompt in prompts]


def _as_list(operations: Any) -> list[dict[str, Any]]:
    if isinstance(operations, Mapping):  # datasets before 4.0 wrote a list of mappings like this
        return [dict(zip(operations, values, strict=True)) for values in zip(*operations.values(), strict=True)]
    return list(operations or ())


def _content(image: Any) -> bytes:
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    return Path(image).read_bytes() if isinstance(image, str) else bytes(image)
