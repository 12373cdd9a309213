"""Reads prompts to train or evaluate on, in batches, because there may be millions."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, concatenate_datasets

from .faults import shorten
from .prompts import clean_prompt


_BATCH_SIZE = 10_000


def read_lines(path: Path) -> DatasetDict:
    """
    The lines of a text file that are not blank, as the split `"train"` with a column `prompt`.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If it is not UTF-8; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. It should hold the prompts, one per line.")
    chunks = []
    try:
        # lines end at \n, \r and \r\n; `str.splitlines` would also split at U+2028 and the like
        with path.open(encoding="utf-8-sig") as file:
            lines = (line.rstrip("\n") for line in file if line.strip())
            while batch := list(islice(lines, _BATCH_SIZE)):
                chunks.append(pa.array(batch, pa.string()))
    except UnicodeDecodeError as error:
        content = path.read_bytes()
        raise ValueError(
            f"{path}, line {_first_bad_line(content)} is not UTF-8 text. Save the file as UTF-8."
        ) from error
    return DatasetDict({"train": _one_column(chunks)})


def _first_bad_line(content: bytes) -> int:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        content = content[: error.start]
    return content.count(b"\n") + 1


def clean_prompts(prompts: Dataset, source: str) -> Dataset:
    """
    The rows with their column `prompt` as [`clean_prompt`] gives it. `source` is what errors call the dataset.

    Raises:
        `ValueError`: If a prompt is invalid; the message names the row.
    """
    if all(cleaned == texts for texts, cleaned in _cleaned_batches(prompts, source)):
        return prompts
    chunks = [pa.array(cleaned, pa.string()) for _, cleaned in _cleaned_batches(prompts, source)]
    others = prompts.remove_columns("prompt")
    columns = [others] if others.column_names else []
    return concatenate_datasets([_one_column(chunks), *columns], axis=1).select_columns(prompts.column_names)


def _cleaned_batches(prompts: Dataset, source: str) -> Iterator[tuple[list[str], list[str]]]:
    texts = prompts.select_columns("prompt")
    for start in range(0, len(texts), _BATCH_SIZE):
        batch, cleaned = texts[start : start + _BATCH_SIZE]["prompt"], []
        for row, text in enumerate(batch, start):
            try:
                cleaned.append(clean_prompt(text))
            except ValueError as error:
                raise ValueError(f"{source}, row {row}, column `prompt`: {shorten(text)} {error}.") from error
        yield batch, cleaned


def _one_column(chunks: list[pa.Array]) -> Dataset:
    # without this fingerprint, datasets would pickle the whole table to make one, at four times its memory
    digest = hashlib.blake2b(digest_size=8)
    for chunk in chunks:
        for buffer in filter(None, chunk.buffers()):
            digest.update(buffer)
    return Dataset(pa.table({"prompt": pa.chunked_array(chunks, pa.string())}), fingerprint=digest.hexdigest())
