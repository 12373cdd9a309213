"""Finds unusable rows of a preference dataset, by the same rules in training and in validation."""

import filecmp
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, IterableDataset
from PIL import Image as PILImage

from .columns import IMAGE_COLUMNS, PROMPT_COLUMNS
from .faults import Finding, Place, shorten
from .images import decode_image, image_digest, open_image
from .prompts import clean_prompt


WAY_OUT = "Repair or remove the row, or set `skip_bad_rows` to leave such rows out and list them."


@dataclass(frozen=True)
class ImageFacts:
    """
    What is known of an image: its size in pixels, upright if it was decoded, otherwise as it is stored; Pillow's name of the
    pixels in the file, such as `"RGB"`; and, if it was decoded, [`~preferences.images.image_digest`] of its pixels.
    """

    width: int
    height: int
    mode: str
    digest: bytes | None = None


def as_stored(dataset: Dataset | IterableDataset, dataset_name: str) -> Dataset | IterableDataset:
    """The dataset as it is stored: no formats, images not decoded."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {dataset_name} dataset has a transform (`set_transform`), which would not be applied. Apply it with "
            "`dataset.map`, or remove it with `dataset.reset_format()`."
        )
    dataset = dataset.with_format(None)
    for column in IMAGE_COLUMNS:
        if dataset.features is not None and isinstance(dataset.features.get(column), Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows whose images are views of the table's memory, so that reading a header does not read the file."""
    columns = [_views(column) for column in table.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(table.column_names, values, strict=True))


def _views(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        fields = [_views(pc.struct_field(column, name)) for name in names]
        mappings = (dict(zip(names, values, strict=True)) for values in zip(*fields, strict=True))
        return [
            mapping if is_valid else None
            for mapping, is_valid in zip(mappings, column.is_valid().to_pylist(), strict=True)
        ]
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [scalar.as_buffer() for scalar in column]
    return column.to_pylist()


def look_at_image(value: Any, *, decode: bool) -> ImageFacts | ValueError:
    """The facts of an image, or why it cannot be used. Without `decode` only its header is read."""
    try:
        opened = open_image(value)
        mode = opened.mode
        if not decode:
            return ImageFacts(*opened.size, mode)
        image = decode_image(opened, is_own=opened is not value)
    except ValueError as error:
        return error
    return ImageFacts(*image.size, mode, image_digest(image))


def find_faults(
    row: Mapping[str, Any], images: Mapping[str, ImageFacts | ValueError], place: Place
) -> Iterator[Finding]:
    """
    Yields what makes a row unusable. Only columns that training uses are looked at, and only those that are there; `images` is
    what [`look_at_image`] says of the image in each column.
    """

    def found(kind: str, column: str, reason: str) -> Finding:
        return Finding(kind, Place(place.split, place.row, column), shorten(row[column]), reason)

    prompts = []
    for column in PROMPT_COLUMNS:
        if column in row:
            try:
                prompts.append(clean_prompt(row[column]))
            except ValueError as error:
                yield found("bad_prompt", column, f"{error}.")
    if len(prompts) == 2 and prompts[0] == prompts[1]:
        yield found(
            "same_prompts", "perturbed_prompt", "is the prompt itself, so the reverse pair contradicts the pair."
        )
    if "margin" in row and not (isinstance(row["margin"], Real) and math.isfinite(row["margin"])):
        yield found("bad_margin", "margin", "is not a finite number.")
    for column, image in images.items():
        if isinstance(image, ValueError):
            yield found("bad_image", column, f"{image}.")
    chosen, rejected = (images.get(column) for column in IMAGE_COLUMNS)
    if isinstance(chosen, ImageFacts) and isinstance(rejected, ImageFacts):
        is_same = chosen.digest == rejected.digest if chosen.digest else is_same_image(row["chosen"], row["rejected"])
        if is_same:
            yield found("same_images", "rejected", "shows the chosen image: there is nothing to prefer.")


def is_same_image(image: Any, other: Any) -> bool:
    """Whether two images, given in the same form, are the same: equal bytes, files or pixels."""
    image, other = _content(image), _content(other)
    if isinstance(image, str) and isinstance(other, str):
        return image == other or filecmp.cmp(image, other, shallow=False)
    if isinstance(image, PILImage.Image) and isinstance(other, PILImage.Image):
        is_same_shape = (image.size, image.mode) == (other.size, other.mode)
        return image is other or (is_same_shape and image.tobytes() == other.tobytes())
    return type(image) is type(other) and image == other


def _content(image: Any) -> Any:
    if isinstance(image, dict):
        return image.get("path") if image.get("bytes") is None else image["bytes"]
    return str(image) if isinstance(image, Path) else image


def write_bad_rows(findings: Sequence[Finding], path: Path | None) -> None:
    """Appends rows to a JSON-lines file; one write per call, so that workers do not mix their lines."""
    if path is not None and findings:
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [
            {"dataset": found.place.split, "row": found.place.row, "column": found.place.column, "kind": found.kind}
            | {"value": found.value, "reason": found.reason}
            for found in findings
        ]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
