"""Which rows of a preference dataset cannot be used, and why."""

import filecmp
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features, Image, Value
from PIL import Image as PILImage

from .images import load_image, open_image


IMAGE_COLUMNS = ("chosen", "rejected")
WAY_OUT = "Repair or remove the row, or set `skip_bad_rows` to leave such rows out and list them."


@dataclass(frozen=True)
class BadRow:
    """
    A row that cannot be used, and why.

    Args:
        dataset (`str`):
            Name of the dataset, such as `"train"`.
        row (`int`):
            Number of the row, from 0. In a stream that several workers read, each worker counts its own rows.
        column (`str`):
            Name of the column at fault.
        value (`str`):
            The value, shortened.
        reason (`str`):
            What is wrong with it, as a sentence whose subject is the value.
    """

    dataset: str
    row: int
    column: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"Row {self.row} of the {self.dataset} dataset, column `{self.column}`: {self.value} {self.reason}"


class _Fault(Exception):
    def __init__(self, column: str, value: Any, reason: str):
        self.column, self.value, self.reason = column, shorten(value), reason


class RowChecker:
    """
    Tells whether a row of a preference dataset can be used.

    Args:
        processor ([`~gaussian_reward.processing.SpatialScoreProcessor`]):
            Processor that will encode the rows.
        use_reverse_pairs (`bool`):
            Whether the `perturbed_prompt` is used too.
        max_length (`int`, *optional*):
            Maximum number of tokens of a row, image tokens included.
        decode_images (`bool`, *optional*, defaults to `False`):
            Whether images are decoded. Otherwise only their headers are read, and damage further on stays unseen.
    """

    def __init__(
        self,
        processor: Any,
        *,
        use_reverse_pairs: bool,
        max_length: int | None = None,
        decode_images: bool = False,
    ):
        self.processor = processor
        self.prompt_columns = ("prompt", "perturbed_prompt") if use_reverse_pairs else ("prompt",)
        self.max_length = max_length
        self.decode_images = decode_images

    def find_fault(self, row: dict[str, Any], dataset_name: str, row_number: int) -> BadRow | None:
        """Returns the first fault of the row, or `None` if it can be used."""
        try:
            self._check_prompts(row)
            self._check_margin(row)
            self._check_lengths(row, self._check_images(row))
        except _Fault as fault:
            return BadRow(dataset_name, row_number, fault.column, fault.value, fault.reason)
        return None

    def _check_prompts(self, row: dict[str, Any]) -> None:
        for column in self.prompt_columns:
            prompt = row.get(column)
            if not isinstance(prompt, str):
                raise _Fault(column, prompt, f"is a {type(prompt).__name__}, not a string.")
            if not prompt.strip():
                raise _Fault(column, prompt, "is empty.")
        if len(self.prompt_columns) > 1 and row["prompt"] == row["perturbed_prompt"]:
            raise _Fault("perturbed_prompt", prompt, "is the prompt itself, so the reverse pair contradicts the pair.")

    def _check_margin(self, row: dict[str, Any]) -> None:
        margin = row.get("margin", 0.0)
        if not isinstance(margin, Real) or not math.isfinite(margin):
            raise _Fault("margin", margin, "is not a finite number.")

    def _check_images(self, row: dict[str, Any]) -> list[tuple[int, int]]:
        """Returns width and height of the two images."""
        sizes = []
        for column in IMAGE_COLUMNS:
            try:
                sizes.append((load_image if self.decode_images else open_image)(row.get(column)).size)
            except ValueError as error:
                raise _Fault(column, row.get(column), f"{error}.") from error
        if is_same_image(row["chosen"], row["rejected"]):
            raise _Fault("rejected", row["rejected"], "is the chosen image: there is nothing to prefer.")
        return sizes

    def _check_lengths(self, row: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
        if self.max_length is None:
            return
        images = list(zip(IMAGE_COLUMNS, sizes, strict=True))
        rows = [(prompt_column, *image) for prompt_column in self.prompt_columns for image in images]
        lengths = self.processor.num_tokens(
            [row[prompt_column] for prompt_column, _, _ in rows], [size for _, _, size in rows]
        )
        for (prompt_column, image_column, (width, height)), length in zip(rows, lengths, strict=True):
            if length > self.max_length:
                raise _Fault(
                    prompt_column,
                    row[prompt_column],
                    f"makes {length} tokens with the {image_column} image of {width}x{height} pixels, but `max_length` "
                    f"is {self.max_length}. Raise `max_length`, lower `max_pixels`, or shorten the prompt.",
                )


def pick_columns(names: list[str], use_reverse_pairs: bool | None, dataset_name: str) -> list[str]:
    """
    Returns the columns that are used, of those the dataset has.

    Raises:
        `ValueError`: If a needed column is missing; the message says how to rename.
    """
    columns = ["prompt", *IMAGE_COLUMNS]
    if use_reverse_pairs:
        columns.append("perturbed_prompt")
    for column in columns:
        if column not in names:
            raise ValueError(
                f"The {dataset_name} dataset has no column `{column}`; it has {sorted(names)}. Rename yours with "
                f"`dataset.rename_column(..., {column!r})`"
                + (", or set `use_reverse_pairs` to False." if column == "perturbed_prompt" else ".")
            )
    optional = ["margin"] if use_reverse_pairs is not None else ["margin", "perturbed_prompt"]
    return columns + [column for column in optional if column in names]


def check_types(features: Features, columns: list[str], dataset_name: str) -> None:
    """
    Checks what the columns hold.

    Raises:
        `ValueError`: If a column cannot hold what it should; the message says what it holds.
    """
    for column in columns:
        feature = features[column]
        dtype = feature.dtype if isinstance(feature, Value) else None
        if column in IMAGE_COLUMNS:
            expected = "images (`Image`, paths, bytes or {'bytes', 'path'} dictionaries)"
            is_right = (
                isinstance(feature, Image)
                or dtype in ("string", "large_string", "binary", "large_binary")
                or (isinstance(feature, dict) and {"bytes", "path"}.issuperset(feature))
            )
        elif column == "margin":
            expected = "numbers"
            is_right = dtype is not None and dtype.startswith(("int", "uint", "float"))
        else:
            expected = "strings"
            is_right = dtype in ("string", "large_string")
        if not is_right:
            raise ValueError(
                f"Column `{column}` of the {dataset_name} dataset holds {feature}, not {expected}. Convert it with "
                "`dataset.map` or `dataset.cast_column`."
            )


def is_same_image(image: Any, other: Any) -> bool:
    """Whether two images, given in the same form, are the same: equal bytes, files or pixels."""
    image, other = _content(image), _content(other)
    if isinstance(image, str) and isinstance(other, str):
        return image == other or filecmp.cmp(image, other, shallow=False)
    if isinstance(image, PILImage.Image) and isinstance(other, PILImage.Image):
        is_same_shape = (image.size, image.mode) == (other.size, other.mode)
        return image is other or (is_same_shape and image.tobytes() == other.tobytes())
    return type(image) is type(other) and image == other


def shorten(value: Any) -> str:
    """Shows a value in a message: images by their size, long texts by both ends."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {shorten(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (bytes, pa.Buffer)):
        return f"<{len(value)} bytes>"
    if isinstance(value, PILImage.Image):
        return f"<image of {value.width}x{value.height} pixels>"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:48]}...{text[-48:]}"


def write_bad_rows(bad_rows: Sequence[BadRow], path: Path | None) -> None:
    """Appends rows to a JSON-lines file; one write per call, so that workers do not mix their lines."""
    if path is not None and bad_rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(bad_row)) + "\n" for bad_row in bad_rows))


def _content(image: Any) -> Any:
    if isinstance(image, dict):
        return image.get("path") if image.get("bytes") is None else image["bytes"]
    return str(image) if isinstance(image, Path) else image
