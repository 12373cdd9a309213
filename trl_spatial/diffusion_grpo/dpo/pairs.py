"""Image pairs of a preference dataset for training: checked in advance, decoded when batches are made."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from PIL import Image as PILImage

from ...preferences.columns import IMAGE_COLUMNS, pick_columns
from ...preferences.faults import Finding, Place, shorten
from ...preferences.images import load_image
from ...preferences.rows import ImageFacts, as_stored, find_faults, look_at_image, rows_of
from ..policies import SamplingOptions


# Keys of an entry
ENTRIES = ("row", "prompt", *IMAGE_COLUMNS, "noise_seeds")
# Columns in which data building records, as JSON, how an image was drawn
RECIPE_COLUMNS = {column: f"{column}_recipe" for column in IMAGE_COLUMNS}
# Images are resized for training; their aspect ratio may differ by this much
MAX_DISTORTION = 0.02
# Seeds that PyTorch's generators accept
_SEEDS = range(-(2**63), 2**64)


class PreferencePairs(torch.utils.data.Dataset):
    """
    The pairs of a preference dataset, whose prompts have already been checked. An entry has its `row` number, its `prompt`, the
    images `chosen` and `rejected` at the training size, and `noise_seeds`: the seeds they were drawn from, `None` if unknown.

    Args:
        rows ([`~datasets.Dataset`] or list of `dict`):
            Rows of a preference dataset, as [`~preferences.columns.COLUMNS`] describes it. The columns `chosen_recipe` and
            `rejected_recipe`, if present, record how the images were drawn, as JSON.
        pipeline_class (`str`):
            Class name of the trained pipeline.
        options ([`SamplingOptions`]):
            Size of the images in training.

    Raises:
        `ValueError`: If a column is missing or a row cannot be used. The message names row, column, value and the fix.
    """

    def __init__(self, rows: Dataset | Sequence[Mapping[str, Any]], pipeline_class: str, options: SamplingOptions):
        if isinstance(rows, Dataset):
            rows = as_stored(rows, "training")
        features = rows.features if isinstance(rows, Dataset) else dict.fromkeys(rows[0])
        columns = [
            name for name in pick_columns(features, False, "`train_dataset`") if name in ("prompt", *IMAGE_COLUMNS)
        ]
        self._recipes = [name for name in RECIPE_COLUMNS.values() if name in features]
        self._rows = rows = rows.select_columns([*columns, *self._recipes]) if isinstance(rows, Dataset) else rows
        self._pipeline_class = pipeline_class
        self._size = (options.width, options.height)
        for number, row in enumerate(_iterate(rows)):
            fault = self._find_fault({name: row[name] for name in columns}, number)
            if fault is not None:
                raise ValueError(f"{fault} Repair or remove the row.")
            self._noise_seeds(row, number)

    def _find_fault(self, row: dict[str, Any], number: int) -> Finding | None:
        place = Place("`train_dataset`", number)
        images = {column: look_at_image(row[column], decode=False) for column in IMAGE_COLUMNS}
        fault = next(iter(find_faults(row, images, place)), None)
        if fault is not None:
            return fault
        for column, image in images.items():
            assert isinstance(image, ImageFacts)
            sizes = (image.width, image.height), (image.height, image.width)  # as stored, or turned upright by EXIF
            if all(reasons := [self._find_distortion(size) for size in sizes]):
                return Finding("bad_image", Place(place.split, number, column), shorten(row[column]), str(reasons[0]))
        return None

    def _find_distortion(self, size: tuple[int, int]) -> str | None:
        """Explains why an image of this size cannot be resized for training; `None` if it can."""
        width, height = self._size
        if abs(size[0] * height / (size[1] * width) - 1) <= MAX_DISTORTION:
            return None
        return (
            f"has {size[0]}x{size[1]} pixels, another shape than the {width}x{height} of training, to which it would be distorted. "
            "Crop or pad it, or set `height` and `width`."
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._rows[number]
        pair: dict[str, Any] = {"row": number, "prompt": row["prompt"]}
        for column in IMAGE_COLUMNS:
            place = f"{Place('`train_dataset`', number, column)}: {shorten(row[column])}"
            try:
                image = load_image(row[column])
            except ValueError as error:
                raise ValueError(f"{place} {error}. Repair or remove the row.") from error
            if reason := self._find_distortion(image.size):
                raise ValueError(f"{place} {reason}")
            pair[column] = image if image.size == self._size else image.resize(self._size, PILImage.Resampling.LANCZOS)
        return pair | {"noise_seeds": self._noise_seeds(row, number)}

    def _noise_seeds(self, row: Mapping[str, Any], number: int) -> tuple[int | None, int | None]:
        """
        Seeds of the noise that the two images were drawn from, if a pipeline of this class drew both at this size. Else both are
        `None`: a pair is trained on either with each image's own noise or with one noise for both.
        """
        seeds = []
        for column in self._recipes:
            facts = {} if row[column] is None else _read_recipe(row[column], Place("`train_dataset`", number, column))
            size = (facts.get("width"), facts.get("height"))
            is_own = facts.get("pipeline") == self._pipeline_class and size == self._size
            seeds.append(facts.get("torch_seed") if is_own and facts.get("generator_device") == "cpu" else None)
        return (seeds[0], seeds[1]) if len(seeds) == 2 and None not in seeds else (None, None)


def _read_recipe(recipe: Any, place: Place) -> dict[str, Any]:
    try:
        facts = json.loads(recipe)
    except (TypeError, ValueError, RecursionError):
        facts = None
    seed = facts.get("torch_seed") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not (seed is None or (type(seed) is int and seed in _SEEDS)):
        raise ValueError(
            f"{place}: {shorten(recipe)} does not say what drew the image. It should be a JSON object as `trl_spatial data "
            "build` writes it, with a whole number of 64 bits as its `torch_seed`. Repair the row, or leave out the column."
        )
    return facts


def collate_pairs(pairs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes a batch for the trainer: the pairs, unchanged."""
    return list(pairs)


def _iterate(rows: Dataset | Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the rows; those of a dataset without reading their image files."""
    if not isinstance(rows, Dataset):
        yield from rows
        return
    for table in rows.with_format("arrow").iter(batch_size=100):
        yield from rows_of(table)
