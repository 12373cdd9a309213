"""Preference pairs of images: checked before training, used in both directions, decoded when batches are made."""

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers.data.data_collator import DataCollatorMixin

from ..preferences.columns import IMAGE_COLUMNS, PROMPT_COLUMNS, pick_columns
from ..preferences.faults import Finding, Place, shorten
from ..preferences.images import load_image
from ..preferences.rows import (
    WAY_OUT,
    ImageFacts,
    as_stored,
    find_faults,
    is_same_image,
    look_at_image,
    rows_of,
    write_bad_rows,
)
from .processing import SpatialScoreProcessor


logger = logging.getLogger(__name__)

# The origin of a pair, for messages: the number of its row in the dataset given to `prepare_pairs`, and whether it is the
# reverse pair, whose columns are swapped.
ROW_COLUMN, IS_REVERSE_COLUMN = "__row__", "__is_reverse__"

_ROWS_PER_TASK = 32  # rows that a thread checks at a time


class PreferencePairs(torch.utils.data.Dataset):
    """
    View of rows of a dataset as pairs, each row followed by its reverse pair with `use_reverse_pairs`. Nothing is copied:
    adding or renaming columns of a selected or shuffled [`~datasets.Dataset`] would rewrite its images.
    """

    def __init__(self, dataset: Dataset, rows: Sequence[int], use_reverse_pairs: bool):
        self.dataset = dataset
        self.rows = rows
        self.use_reverse_pairs = use_reverse_pairs

    def __len__(self) -> int:
        return len(self.rows) * (1 + self.use_reverse_pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position, is_reverse = divmod(index, 2) if self.use_reverse_pairs else (index, 0)
        row_number = self.rows[position]
        row = {**self.dataset[row_number], ROW_COLUMN: row_number, IS_REVERSE_COLUMN: False}
        return reverse_pair(row) if is_reverse else row


class RowSampler(torch.utils.data.Sampler[int]):
    """
    Draws the rows of [`PreferencePairs`] in a random order, each pair followed by its reverse, so that a batch holds both, and
    their images and the tokens before the prompts are encoded once.
    """

    def __init__(self, num_rows: int, seed: int):
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return 2 * self.num_rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for row in torch.randperm(self.num_rows, generator=generator).tolist():
            yield from (2 * row, 2 * row + 1)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch. Each epoch has its own order."""
        self.epoch = epoch


@dataclass(frozen=True)
class RowChecker:
    """
    Checks whether a row of a preference dataset can be used in training: its `columns`, and its length of at most `max_length`
    tokens, including image tokens. Unless `decode_images`, only the headers of images are read, and damage after them goes
    unnoticed.
    """

    processor: SpatialScoreProcessor
    columns: Sequence[str]
    max_length: int | None = None
    decode_images: bool = False

    def find_fault(self, row: dict[str, Any], dataset_name: str, number: int) -> Finding | None:
        """The first fault of the row, or `None` if it can be used."""
        place = Place(dataset_name, number)
        row = {column: row.get(column) for column in self.columns}
        images = {column: look_at_image(row[column], decode=self.decode_images) for column in IMAGE_COLUMNS}
        return next(find_faults(row, images, place), None) or self._find_long(row, images, place)

    def _find_long(
        self, row: dict[str, Any], images: dict[str, ImageFacts | ValueError], place: Place
    ) -> Finding | None:
        if self.max_length is None:
            return None
        sizes = [(image.width, image.height) for image in images.values() if isinstance(image, ImageFacts)]
        for prompt_column in (column for column in PROMPT_COLUMNS if column in row):
            if all(self.processor.max_num_tokens(row[prompt_column], size) <= self.max_length for size in sizes):
                continue  # usually, and tokenizing takes longer than all other checks
            lengths = self.processor.num_tokens([row[prompt_column]] * len(sizes), sizes)
            for image_column, (width, height), length in zip(IMAGE_COLUMNS, sizes, lengths, strict=True):
                if length > self.max_length:
                    reason = (
                        f"has {length} tokens with the {image_column} image of {width}x{height} pixels, but `max_length` "
                        f"is {self.max_length}. Raise `max_length`, lower `max_pixels`, or shorten the prompt."
                    )
                    value = shorten(row[prompt_column])
                    return Finding("too_long", Place(place.split, place.row, prompt_column), value, reason)
        return None


class _PairStream:
    """Maps a streamed row, as a batch of one, to its pairs: none if it is bad, two if it has a reverse."""

    def __init__(
        self,
        checker: RowChecker,
        *,
        use_reverse_pairs: bool,
        skip_bad_rows: bool,
        bad_rows_file: Path | None,
        dataset_name: str,
        num_shards: int,
    ):
        self.checker = checker
        self.use_reverse_pairs = use_reverse_pairs
        self.skip_bad_rows = skip_bad_rows
        self.bad_rows_file = bad_rows_file
        self.dataset_name = dataset_name
        self.num_shards = num_shards
        self.num_bad_rows = 0

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        row = {column: values[0] for column, values in batch.items()}
        reader = self._reader()
        row |= {ROW_COLUMN: f"{indices[0]}{reader}", IS_REVERSE_COLUMN: False}
        bad_row = self.checker.find_fault(row, f"{self.dataset_name}{reader}", indices[0])
        if bad_row is None:
            pairs = [row, reverse_pair(row)] if self.use_reverse_pairs else [row]
        elif self.skip_bad_rows:
            pairs = []
            self._report(bad_row)
        else:
            raise ValueError(f"{bad_row} {WAY_OUT}")
        return {column: [pair[column] for pair in pairs] for column in row}

    def _reader(self) -> str:
        """Names the worker that numbers the rows: if there are several, each numbers the rows of its own shards."""
        worker = torch.utils.data.get_worker_info()
        num_readers = 1 if worker is None else min(worker.num_workers, self.num_shards)
        return "" if worker is None or num_readers == 1 else f" as worker {worker.id} of {num_readers} reads it"

    def _report(self, bad_row: Finding) -> None:
        write_bad_rows([bad_row], self.bad_rows_file)
        self.num_bad_rows += 1
        if math.log10(self.num_bad_rows).is_integer():  # at 1, 10, 100, ... to avoid a flood
            logger.warning("Bad rows left out so far: %d. The last one: %s", self.num_bad_rows, bad_row)


@dataclass
class DataCollatorForSpatialPreference(DataCollatorMixin):
    """
    Data collator used for pairs of images. It runs in the workers of the [`~torch.utils.data.DataLoader`] and is where
    images are decoded, resized and cut into patches.

    This collator expects each example in the input list to be a dictionary with the keys `"prompt"`, `"chosen"` and
    `"rejected"`, the last two being images as PIL, bytes, paths or `{"bytes", "path"}` dictionaries. It returns the
    processor's output for the rows, the first half with the chosen and the second half with the rejected images:
    - `"input_ids"`, `"attention_mask"`, `"mm_token_type_ids"`: Tensors of shape `(2 * num_pairs, sequence_length)`.
    - `"pixel_values"`: Tensor of shape `(total_patches, patch_dim)`, the patches of all images. A pair and its reverse
      share theirs.
    - `"image_grid_thw"`: Tensor of shape `(num_images, 3)`.
    - `"image_index"`: Tensor of shape `(2 * num_pairs,)`, the number of each row's image.

    Optionally, the examples can contain a `"margin"` key, in which case the returned dictionary will also contain a
    `"margin"` key with a tensor of shape `(num_pairs,)`.

    Args:
        processor ([`SpatialScoreProcessor`]):
            Processor of the reward model.
        pixel_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Type of `"pixel_values"`. Training in bfloat16 casts them first anyway: in bfloat16 here, they take half the
            shared memory between the workers and the trainer.
        return_tensors (`str`, *optional*, defaults to `"pt"`):
            Type of Tensor to return. Only `"pt"` is currently supported.
    """

    processor: SpatialScoreProcessor
    pixel_dtype: torch.dtype = torch.float32
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [example["prompt"] for example in examples]
        loaded: dict[Any, PILImage.Image] = {}  # images of a row that occurs in both directions are decoded once
        images = [self._load_image(example, column, loaded) for column in IMAGE_COLUMNS for example in examples]
        for example, chosen, rejected in zip(examples, images, images[len(examples) :], strict=False):
            if chosen.size == rejected.size and chosen.tobytes() == rejected.tobytes():
                reason = f"shows the chosen image: there is nothing to prefer. {WAY_OUT}"
                place = _place_of(example, _stored_column(example, "rejected"))
                raise ValueError(f"{place}: {shorten(example['rejected'])} {reason}")
        output = dict(self.processor(prompts + prompts, images))
        output["pixel_values"] = output["pixel_values"].to(self.pixel_dtype)
        if "margin" in examples[0]:
            output["margin"] = torch.tensor([example["margin"] for example in examples], dtype=torch.float)
        return output

    def _load_image(self, example: dict[str, Any], column: str, loaded: dict[Any, PILImage.Image]) -> PILImage.Image:
        stored_column = _stored_column(example, column)
        key = (example.get(ROW_COLUMN, id(example)), stored_column)
        if key not in loaded:
            try:
                loaded[key] = load_image(example[column])
            except ValueError as error:
                place = _place_of(example, stored_column)
                raise ValueError(f"{place}: {shorten(example[column])} {error}. {WAY_OUT}") from error
        return loaded[key]


def _stored_column(example: dict[str, Any], column: str) -> str:
    """Dataset column that an image of a pair comes from."""
    return IMAGE_COLUMNS[1 - IMAGE_COLUMNS.index(column)] if example.get(IS_REVERSE_COLUMN) else column


def _place_of(example: dict[str, Any], column: str) -> str:
    """Row and column of the dataset, for messages."""
    return f"row {example.get(ROW_COLUMN, 'of unknown number')}, `{column}`"


def prepare_pairs(
    dataset: Dataset | IterableDataset,
    processor: SpatialScoreProcessor,
    *,
    dataset_name: str = "train",
    max_length: int | None = None,
    use_reverse_pairs: bool | None = None,
    skip_bad_rows: bool = False,
    bad_rows_file: Path | None = None,
    num_threads: int | None = None,
    show_progress: bool = True,
) -> PreferencePairs | IterableDataset:
    """
    Checks a preference dataset and turns it into pairs for [`DataCollatorForSpatialPreference`].

    A [`~datasets.Dataset`] is checked immediately, row by row: texts, lengths and the headers of the images. A stream is
    checked while it is read; if several workers share its shards, messages name the worker that counted the rows. Images are
    not decoded, except that with `skip_bad_rows` each is decoded once to see whether it can be.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with the columns `prompt` (`str`), `chosen` and `rejected` (images as PIL, bytes, paths,
            `{"bytes", "path"}` or [`~datasets.Image`]), and optionally `margin` (`float`) and `perturbed_prompt`
            (`str`). Other columns are not used.
        processor ([`SpatialScoreProcessor`]):
            Processor of the reward model.
        dataset_name (`str`, *optional*, defaults to `"train"`):
            Name for messages.
        max_length (`int`, *optional*):
            Maximum number of tokens in a row, including image tokens.
        use_reverse_pairs (`bool`, *optional*):
            Whether each row also gives the pair (`perturbed_prompt`, `rejected` over `chosen`). If `None`, when the
            dataset has a `perturbed_prompt` column.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Whether rows that cannot be used are left out and reported instead of being an error.
        bad_rows_file (`Path`, *optional*):
            File to which they are appended, one JSON object per line.
        num_threads (`int`, *optional*):
            Number of threads that check a [`~datasets.Dataset`]. If `None`, one.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar if the check takes more than a few seconds.

    Returns:
        [`PreferencePairs`] or [`~datasets.IterableDataset`]:
            The pairs, in the order of the rows. A dataset that is already prepared is returned unchanged.

    Raises:
        `ValueError`: If the dataset is empty, lacks a column, holds a column of a wrong type, holds the same row only,
            or, unless `skip_bad_rows`, holds a bad row. The message names row, column, value and the way out.
    """
    if isinstance(dataset, PreferencePairs):
        return dataset
    dataset = as_stored(dataset, dataset_name)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {dataset_name} dataset is empty. Check its split and its filters.")
    if ROW_COLUMN in first_row:
        return dataset

    columns = pick_columns(dataset.features or dict.fromkeys(first_row), use_reverse_pairs, dataset_name)
    use_reverse_pairs = "perturbed_prompt" in columns
    checker = RowChecker(processor, columns, max_length=max_length, decode_images=skip_bad_rows)

    if isinstance(dataset, IterableDataset):
        to_pairs = _PairStream(
            checker,
            use_reverse_pairs=use_reverse_pairs,
            skip_bad_rows=skip_bad_rows,
            bad_rows_file=bad_rows_file,
            dataset_name=dataset_name,
            num_shards=dataset.num_shards,
        )
        stream = dataset.map(to_pairs, with_indices=True, batched=True, batch_size=1)
        if skip_bad_rows:
            to_pairs.bad_rows_file = None  # rows before the first pair are listed when they are read for training
            is_empty = next(iter(stream), None) is None
            to_pairs.bad_rows_file = bad_rows_file
            if is_empty:
                list(stream)
                raise ValueError(
                    f"All rows of the {dataset_name} dataset are bad; they are listed in {bad_rows_file}."
                )
        return stream

    dataset = dataset.select_columns(columns)
    bad_rows = []
    for bad_row in _find_bad_rows(dataset, checker, dataset_name, num_threads or 1, show_progress):
        if not skip_bad_rows:
            raise ValueError(f"{bad_row} {WAY_OUT}")
        bad_rows.append(bad_row)
    rows = _without_bad_rows(len(dataset), bad_rows, bad_rows_file, dataset_name)
    _check_not_all_same(dataset, rows, dataset_name)
    return PreferencePairs(dataset, rows, use_reverse_pairs)


def reverse_pair(pair: dict[str, Any]) -> dict[str, Any]:
    """Returns the same two images for the perturbed prompt, for which the other one is right."""
    return {
        **pair,
        "prompt": pair["perturbed_prompt"],
        "perturbed_prompt": pair["prompt"],
        "chosen": pair["rejected"],
        "rejected": pair["chosen"],
        IS_REVERSE_COLUMN: True,
    }


def _find_bad_rows(
    dataset: Dataset, checker: RowChecker, dataset_name: str, num_threads: int, show_progress: bool
) -> Iterator[Finding]:
    def check(table: pa.Table, first: int) -> list[Finding]:
        faults = (checker.find_fault(row, dataset_name, number) for number, row in enumerate(rows_of(table), first))
        return [fault for fault in faults if fault is not None]

    tables = dataset.with_format("arrow").iter(batch_size=_ROWS_PER_TASK)
    tasks = zip(tables, range(0, len(dataset), _ROWS_PER_TASK), strict=True)
    # The bar has a delay: most checks are over before it would appear.
    bar = tqdm(total=len(dataset), desc=f"Checking {dataset_name} dataset", delay=3, disable=not show_progress)
    with bar, ThreadPoolExecutor(num_threads) as pool:
        # In chunks, as `pool.map` would read all rows before it returns the first result.
        while chunk := list(islice(tasks, num_threads)):
            for (table, _), faults in zip(chunk, pool.map(check, *zip(*chunk, strict=True)), strict=True):
                yield from faults
                bar.update(table.num_rows)


def _without_bad_rows(
    num_rows: int, bad_rows: list[Finding], bad_rows_file: Path | None, dataset_name: str
) -> Sequence[int]:
    if not bad_rows:
        return range(num_rows)
    write_bad_rows(bad_rows, bad_rows_file)
    if len(bad_rows) == num_rows:
        raise ValueError(f"All {num_rows} rows of the {dataset_name} dataset are bad. The first: {bad_rows[0]}")
    logger.warning(
        "Left out %d of the %d rows of the %s dataset, listed in %s. The first: %s",
        len(bad_rows),
        num_rows,
        dataset_name,
        bad_rows_file,
        bad_rows[0],
    )
    excluded = {bad_row.place.row for bad_row in bad_rows}
    return [row for row in range(num_rows) if row not in excluded]


def _check_not_all_same(dataset: Dataset, rows: Sequence[int], dataset_name: str) -> None:
    first = dataset[rows[0]]
    for row in rows[1:]:  # ends at the first difference, nearly always right away
        other = dataset[row]
        is_same = other["prompt"] == first["prompt"]
        if not (is_same and all(is_same_image(other[column], first[column]) for column in IMAGE_COLUMNS)):
            return
    if len(rows) > 1:
        raise ValueError(
            f"All {len(rows)} rows of the {dataset_name} dataset are the same pair, {shorten(first)}: there is nothing "
            "to learn from the second one on. Check how the dataset was built."
        )
