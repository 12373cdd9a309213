"""Validates a preference dataset row by row, and its splits against each other."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

from datasets import Dataset, Image
from tqdm.auto import tqdm

from ..preferences.columns import IMAGE_COLUMNS, check_columns
from ..preferences.faults import Finding, Place, shorten
from ..preferences.prompts import clean_prompt
from ..preferences.rows import ImageFacts, find_faults, look_at_image
from .counts import SplitStatistics, kinds_of


_BATCH_SIZE = 16  # rows whose image files are in memory at once


@dataclass(frozen=True)
class ValidationReport:
    """
    The findings about a preference dataset, and its statistics.

    Args:
        findings (`list[Finding]`):
            All that was found: split by split in the order of the rows, then what the splits share.
        statistics (`dict[str, SplitStatistics]`):
            What is in each split.
    """

    findings: list[Finding]
    statistics: dict[str, SplitStatistics]

    def of_severity(self, severity: str) -> list[Finding]:
        """The findings that are an `"error"`, a `"warning"` or a `"note"`."""
        return [finding for finding in self.findings if finding.severity == severity]

    @property
    def errors(self) -> list[Finding]:
        """Findings that make the dataset unfit for training."""
        return self.of_severity("error")

    @property
    def warnings(self) -> list[Finding]:
        """Findings that may be intended, and should be checked."""
        return self.of_severity("warning")

    @property
    def notes(self) -> list[Finding]:
        """Facts that are neither errors nor warnings."""
        return self.of_severity("note")

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON: `is_valid`, `errors`, `warnings`, `notes`, and `splits` with their statistics."""
        found = {
            name: [finding.to_dict() for finding in getattr(self, name)] for name in ("errors", "warnings", "notes")
        }
        splits = {split: statistics.to_dict() for split, statistics in self.statistics.items()}
        return {"is_valid": not self.errors, **found, "splits": splits}


def validate_splits(
    splits: Mapping[str, Dataset],
    *,
    max_rows: int | None = None,
    num_threads: int | None = None,
    show_progress: bool = False,
) -> ValidationReport:
    """
    Validate a preference dataset.

    Images are decoded to the last byte, one at a time per thread, and forgotten: what is kept is 16 bytes for each. A null in
    an optional column means that the value is not known, but for `perturbed_prompt`, which training would use.

    Args:
        splits ([`~datasets.DatasetDict`]):
            The splits. Columns other than those of `COLUMNS` are not read.
        max_rows (`int`, *optional*):
            Look at the first rows of each split only.
        num_threads (`int`, *optional*):
            Threads that decode images. By default one per processor, at most 8.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`ValidationReport`]: what was found. Faults in the dataset raise no exception.

    Raises:
        `ValueError`: If there is no split, or `max_rows` or `num_threads` is below 1.
    """
    if not splits:
        raise ValueError("splits is empty: there is nothing to validate.")
    for name, number in (("max_rows", max_rows), ("num_threads", num_threads)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    heads = {
        split: rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))
        for split, rows in splits.items()
    }
    total = max(sum(map(len, splits.values())), 1)
    checks = []
    bar = tqdm(total=sum(map(len, heads.values())), desc="Validating", unit="row", disable=not show_progress)
    with bar, ThreadPoolExecutor(num_threads or min(os.cpu_count() or 1, 8)) as pool:
        for split, rows in heads.items():
            check = _SplitCheck(split, SplitStatistics(len(splits[split]), len(splits[split]) / total))
            for num_rows in check.run(rows, pool):
                bar.update(num_rows)
            checks.append(check)
    findings = [finding for check in checks for finding in check.findings] + _find_shared(checks)
    return ValidationReport(findings, {check.split: check.statistics for check in checks})


class _SplitCheck:
    """Reads a split once; collects findings, counts, and the first place of each prompt and image."""

    def __init__(self, split: str, statistics: SplitStatistics):
        self.split, self.statistics = split, statistics
        self.findings: list[Finding] = []
        self.prompts: dict[str, Place] = {}
        self.images: dict[bytes | None, Place] = {}  # keyed by the hash of the pixels
        self.rows: dict[bytes, int] = {}  # keyed by the hash of the prompt and both images
        self.scenes: set[str] = set()

    def run(self, rows: Dataset, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Checks all rows and yields the number of rows in each batch."""
        columns, self.findings = check_columns(rows.features, self.split)
        if len(rows) == 0:
            self.findings.append(Finding("empty_split", Place(self.split), "the split", "has no rows."))
        if not columns:
            return
        rows = rows.with_format(None).select_columns(columns)
        for column in IMAGE_COLUMNS:
            if isinstance(rows.features.get(column), Image):
                rows = rows.cast_column(column, Image(decode=False))
        start = 0
        for batch in rows.iter(_BATCH_SIZE):
            num_rows = len(batch[columns[0]])
            present = [column for column in IMAGE_COLUMNS if column in batch]
            cells = [cell for column in present for cell in batch[column]]
            # a pair and its reverse are neighbors and have the same two images: decode each image once
            first = [cells.index(cell) for cell in cells]
            distinct = sorted(set(first))
            found = pool.map(partial(look_at_image, decode=True), [cells[number] for number in distinct])
            facts = dict(zip(distinct, found, strict=True))
            for i in range(num_rows):
                row = {column: batch[column][i] for column in columns}
                images = {column: facts[first[i + k * num_rows]] for k, column in enumerate(present)}
                self._check_row(start + i, row, images)
            start += num_rows
            yield num_rows
        self.statistics.num_prompts, self.statistics.num_images = len(self.prompts), len(self.images)
        if "scene" in columns:
            self.statistics.num_scenes = len(self.scenes)

    def _check_row(self, number: int, row: dict[str, Any], images: dict[str, ImageFacts | ValueError]) -> None:
        faults = list(find_faults(row, images, Place(self.split, number)))
        self.findings += faults
        self._check_record(number, row)
        bad_columns = {fault.place.column for fault in faults}
        prompt = None if "prompt" in bad_columns or "prompt" not in row else clean_prompt(row["prompt"])
        if prompt is not None:
            self.prompts.setdefault(prompt, Place(self.split, number, "prompt"))
        decoded = []
        for column, image in images.items():
            if isinstance(image, ImageFacts):
                decoded.append(image)
                self.images.setdefault(image.digest, Place(self.split, number, column))
        self.statistics.add(row, decoded)
        if row.get("scene"):
            self.scenes.add(row["scene"])
        if prompt is not None and len(decoded) == len(IMAGE_COLUMNS):
            self._check_duplicate(number, prompt, decoded)

    def _report(self, kind: str, number: int, column: str, value: str, reason: str) -> None:
        self.findings.append(Finding(kind, Place(self.split, number, column), value, reason))

    def _check_record(self, number: int, row: dict[str, Any]) -> None:
        level, operations = row.get("level"), kinds_of(row.get("operations"), "operation")
        if level is not None and operations is not None and level != len(operations):
            reason = f"is not the number of operations, {len(operations)}."
            self._report("wrong_level", number, "level", str(level), reason)
        if kinds_of(row.get("relations"), "relation") == []:
            reason = "is empty: the prompt asks for nothing."
            self._report("no_relations", number, "relations", shorten(row["relations"]), reason)

    def _check_duplicate(self, number: int, prompt: str, images: Sequence[ImageFacts]) -> None:
        digest = hashlib.blake2b(
            b"".join(image.digest or b"" for image in images) + prompt.encode(), digest_size=16
        ).digest()
        first = self.rows.setdefault(digest, number)
        if first != number:
            reason, other = f"repeats row {first}: same prompt, same images.", Place(self.split, first)
            self.findings.append(Finding("duplicate_row", Place(self.split, number), "the row", reason, other))


def _find_shared(checks: Sequence[_SplitCheck]) -> list[Finding]:
    """Finds images and prompts shared by two splits: one finding per pair of splits, at their first rows in each."""
    findings = []
    for first, second in combinations(checks, 2):
        for digest, place in second.images.items():
            if digest in first.images:
                findings.append(_shared("shared_image", "the image", place, first.images[digest]))
        for prompt, place in second.prompts.items():
            if prompt in first.prompts:
                findings.append(_shared("shared_prompt", shorten(prompt), place, first.prompts[prompt]))
    return findings


def _shared(kind: str, value: str, place: Place, other: Place) -> Finding:
    return Finding(kind, place, value, f"is also at {other}.", other)
