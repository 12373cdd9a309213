"""Publishes a preference dataset on the Hub."""

import io
import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict, Image
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image as PILImage

from ..figures.pairs import ScoredPair, draw_pairs
from ..hub.cards import PAPER, SAMPLES_FILE, card_template, task_id
from ..hub.errors import call_with_retries, explain_errors
from ..hub.upload import create_repository, push_files
from ..preferences import benchmark
from ..preferences.columns import COLUMNS, IMAGE_COLUMNS
from ..preferences.faults import shorten
from ..preferences.files import check_paths
from ..preferences.images import load_image
from ..scenes import describe_changes
from .validation import ValidationReport, validate_splits


PLOT_FILE = "statistics.png"
EVAL_FILE = "eval.yaml"
NUM_SAMPLES = 4
_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))


def prepare_splits(splits: Mapping[str, Dataset], source: str) -> DatasetDict:
    """
    Converts columns of image paths or files to images, so that an upload embeds them, and checks that other columns
    name no file elsewhere. Paths of images are relative to the folder of `source`. The columns of `COLUMNS` come
    first.

    Raises:
        [`~preferences.files.OutsideError`]: If a row names a file that is not in that folder: it would be uploaded.
    """
    folder = Path(source).absolute()
    folder = folder if folder.is_dir() else folder.parent
    prepared = DatasetDict({split: _prepare(rows, folder) for split, rows in splits.items()})
    for rows in prepared.values():
        check_paths(rows, [folder], source)
    return prepared


def _prepare(rows: Dataset, folder: Path) -> Dataset:
    for column in IMAGE_COLUMNS:
        feature = rows.features.get(column)
        if feature is None or (isinstance(feature, Image) and feature.decode):
            continue
        if getattr(feature, "dtype", None) == "string":
            rows = rows.map(_find_files, fn_kwargs={"column": column, "folder": folder})
        rows = rows.cast_column(column, Image())
    known = [name for name in COLUMNS if name in rows.column_names]
    return rows.select_columns(known + [name for name in rows.column_names if name not in COLUMNS])


def _find_files(row: dict[str, Any], column: str, folder: Path) -> dict[str, str | None]:
    return {column: None if row[column] is None else os.path.join(folder, row[column])}


def check_splits(splits: DatasetDict, *, show_progress: bool = True) -> ValidationReport:
    """
    Validates the splits to be uploaded.

    Raises:
        `ValueError`: If it has errors; the message names the first ones.
    """
    report = validate_splits(splits, show_progress=show_progress)
    if report.errors:
        shown = "; ".join(f"{finding.place}: {finding.value} {finding.reason}" for finding in report.errors[:3])
        raise ValueError(
            f"The dataset has {len(report.errors)} errors, and is not uploaded: {shown} `trl_spatial data validate` lists "
            "them all."
        )
    return report


def push_dataset(
    splits: DatasetDict,
    repo_id: str,
    report: ValidationReport,
    *,
    config_name: str = "default",
    private: bool | None = None,
    max_shard_size: str = "500MB",
    license: str | None = None,
    notes: str | None = None,
    others: Mapping[str, DatasetDict] | None = None,
) -> str:
    """
    Uploads a dataset from [`prepare_splits`]: Parquet shards with the images in them, and a card with the numbers of `report`, and
    returns its address. An interrupted upload that is started again sends only the shards that are not there. Splits of the same
    names in the repository are replaced, others stay. `others` are further configurations, such as one without images.

    Raises:
        `HubError`: If the Hub cannot be reached or refuses; the message says why.
    """
    address = create_repository(repo_id, repo_type="dataset", private=private)
    with explain_errors(f"Uploading to {repo_id}"):
        for name, part in {**(others or {}), config_name: splits}.items():
            call_with_retries(
                part.push_to_hub, repo_id, config_name=name, private=private, max_shard_size=max_shard_size
            )
    push_files(
        card_files(
            splits,
            repo_id,
            report,
            config_name=config_name,
            license=license,
            notes=notes,
            written=_metadata(repo_id),
        ),
        repo_id,
        repo_type="dataset",
        message="Card",
    )
    return address


def card_files(
    splits: DatasetDict,
    dataset_id: str,
    report: ValidationReport,
    *,
    config_name: str = "default",
    license: str | None = None,
    notes: str | None = None,
    written: Mapping[str, Any] | None = None,
) -> dict[str, Path | bytes]:
    """
    The card of a dataset with its pictures and, if it has the split `benchmark`, `eval.yaml`: name in the repository →
    content. `notes` are sections on how the dataset was made, as Markdown; `written` is existing front matter, which
    assigns files to splits.
    """
    written = dict(written or {})
    pictures: dict[str, Path | bytes] = {SAMPLES_FILE: _png(_draw_samples(next(iter(splits.values()))))}
    if find_spec("matplotlib") is not None:
        pictures[PLOT_FILE] = _plot(report, dataset_id)
    number = sum(map(len, splits.values()))
    front_matter = {
        "license": license or written.pop("license", None),
        "language": ["en"],
        "pretty_name": dataset_id.split("/")[-1],
        "size_categories": [next((name for name, limit in _SIZES if number < limit), "n>10M")],
        "task_categories": ["text-to-image"],
        "tags": ["preference", "reward-model", "spatial-reasoning", "trl"],
    }
    features = next(iter(splits.values())).features
    card = DatasetCard.from_template(
        DatasetCardData(**(written | {name: value for name, value in front_matter.items() if value is not None})),
        template_path=str(card_template("dataset.md")),
        name=dataset_id.split("/")[-1],
        dataset_id=dataset_id,
        config_name=None if config_name == "default" else config_name,
        first_split=next(iter(splits)),
        splits={split: statistics.to_dict() for split, statistics in report.statistics.items()},
        no_shared_prompts=not any(finding.kind == "shared_prompt" for finding in report.findings),
        columns=[_describe_column(name, feature) for name, feature in features.items()],
        generators=sorted({name for part in report.statistics.values() for name in part.counts["generators"]}),
        benchmark=benchmark.SPLIT if benchmark.SPLIT in splits else None,
        samples=SAMPLES_FILE,
        plot=PLOT_FILE if PLOT_FILE in pictures else None,
        notes=notes,
        paper=PAPER,
    )
    files = {"README.md": str(card).encode(), **pictures}
    if benchmark.SPLIT in splits:
        files[EVAL_FILE] = _describe_benchmark(dataset_id, config_name, len(splits[benchmark.SPLIT]))
    return files


def _describe_benchmark(dataset_id: str, config_name: str, num_pairs: int) -> bytes:
    """
    Returns `eval.yaml`, from which the Hub builds the leaderboards of a dataset. It has no `evaluation_framework`,
    because this package is not in the Hub's list.
    """
    content = {
        "name": dataset_id.split("/")[-1],
        "description": f"How often a scorer prefers the image that shows what the prompt says about where things are: {num_pairs:,} "
        "pairs, with trl_spatial evaluate pairs.",
        "tasks": [
            {"id": task_id(number, benchmark.SPLIT), "config": config_name, "split": benchmark.SPLIT}
            for number in benchmark.NUMBERS
        ],
    }
    return yaml.safe_dump(content, sort_keys=False, width=120).encode()


def _metadata(repo_id: str) -> dict[str, Any]:
    """Reads the front matter that the upload of the shards wrote; empty if there is no card."""
    with explain_errors(f"Reading the card of {repo_id}"):
        try:
            return call_with_retries(DatasetCard.load, repo_id, token=HfApi().token).data.to_dict()
        except EntryNotFoundError:
            return {}


def _describe_column(name: str, feature: Any) -> dict[str, str]:
    column = COLUMNS.get(name)
    kind = (
        "image" if isinstance(feature, Image) else getattr(feature, "dtype", None) or (column.holds if column else "")
    )
    return {"name": name, "type": str(kind), "purpose": column.purpose if column else ""}


def _draw_samples(rows: Dataset) -> PILImage.Image:
    rows = rows.select(range(min(NUM_SAMPLES, len(rows))))
    for column in IMAGE_COLUMNS:
        rows = rows.cast_column(column, Image(decode=False))
    pairs = [
        ScoredPair(
            prompt=row["prompt"],
            chosen=load_image(row["chosen"]),
            rejected=load_image(row["rejected"]),
            chosen_score=None,
            rejected_score=None,
            caption=_describe_change(row),
        )
        for row in rows
    ]
    return draw_pairs(pairs, title="")


def _describe_change(row: Mapping[str, Any]) -> str:
    operations = row.get("operations") or []
    if operations and isinstance(operations[0], Mapping) and {"before", "after"} <= set(operations[0]):
        return describe_changes(operations)
    return shorten(row.get("perturbed_prompt") or "")


def _plot(report: ValidationReport, title: str) -> bytes:
    from .charts import save_statistics

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PLOT_FILE
        save_statistics(report.statistics, file, title=title)
        return file.read_bytes()


def _png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
