"""Datasets and prompts by the names that commands take."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..preferences.faults import shorten
from ..preferences.prompts import clean_prompt


# "NA" and "null" are words here; an empty cell has no value. The encoding drops the byte order mark of Windows.
READER_OPTIONS: dict[str, dict[str, Any]] = {
    "parquet": {},
    "json": {"encoding": "utf-8-sig"},
    "csv": {"encoding": "utf-8-sig", "keep_default_na": False, "na_values": [""]},
}


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


def load_dataset_dict(
    name_or_path: str, *, config_name: str | None = None, streaming: bool = False
) -> "DatasetDict | IterableDatasetDict":
    """
    Load a dataset from wherever it is.

    Args:
        name_or_path (`str`):
            Folder written by `save_to_disk`; a Parquet, JSON, JSON Lines or CSV file, or a folder of them; or a dataset on
            the Hub: `ORG/NAME`, `ORG/NAME@REVISION`, or `hub/NAME` for one of your own.
        config_name (`str`, *optional*):
            Configuration of a dataset on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read the rows as they are needed.

    Returns:
        [`~datasets.DatasetDict`] or, with `streaming`, [`~datasets.IterableDatasetDict`]: The dataset's splits; a file or a
        folder without splits is the split `"train"`.

    Raises:
        `FileNotFoundError`: If `name_or_path` is neither a file or folder nor like a name on the Hub.
        `ValueError`: If a file is of another kind, or a dataset on the Hub holds pickles or code.
        `HubError`: If a dataset on the Hub is not there, may not be read, or cannot be reached.
    """
    from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    from ..hub import check_repository, explain_errors, find_reference

    path = Path(name_or_path)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        loaded = load_from_disk(path)
        splits = DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded
        return (
            IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
            if streaming
            else splits
        )
    builder = {".jsonl": "json"}.get(path.suffix, path.suffix.removeprefix("."))
    if path.is_file():
        if builder not in ("parquet", "json", "csv"):
            raise ValueError(f"{path} is not a .parquet, .json, .jsonl or .csv file.")
        return load_dataset(builder, data_files=str(path), streaming=streaming, **READER_OPTIONS[builder])
    if path.is_dir():
        return load_dataset(str(path), streaming=streaming)
    if builder in ("parquet", "json", "csv"):  # a name on the Hub may have a point, but not these
        raise FileNotFoundError(f"There is no file or folder {name_or_path}.")
    reference = find_reference(name_or_path, kind="dataset")
    check_repository(reference, kind="dataset")
    with explain_errors(f"Loading the dataset {reference}"):
        return load_dataset(reference.name, name=config_name, revision=reference.revision, streaming=streaming)


def hub_dataset_name(name_or_path: str | None) -> str | None:
    """Id on the Hub of what [`load_dataset_dict`] was given, or `None` if that is not on the Hub."""
    from ..hub import find_reference
    from ..hub.references import UnknownReferenceError

    try:
        reference = find_reference(name_or_path or "", kind="dataset")
    except UnknownReferenceError:
        return None
    return None if reference.is_local else reference.name


def pick_split(
    splits: "DatasetDict | IterableDatasetDict", split: str, name_or_path: str
) -> "Dataset | IterableDataset":
    """The split named `split`; an error that lists the splits if there is none."""
    if split not in splits:
        raise ValueError(f"{name_or_path} has no split {split!r}; it has {', '.join(map(repr, splits))}.")
    return splits[split]


def load_prompts(
    source: str, split: str, *, config_name: str | None = None, use_only_split: bool = False
) -> "Dataset":
    """
    Load prompts to train or evaluate on.

    Args:
        source (`str`):
            A `.txt` file, `scenes:N`, or a dataset; see [`~scripts.grpo.GRPOScriptArguments`].
        split (`str`):
            Split of the dataset or the scenes. A text file is the split `"train"`.
        config_name (`str`, *optional*):
            Configuration of a dataset on the Hub.
        use_only_split (`bool`, *optional*, defaults to `False`):
            Whether to take the only split of a source that has just one, whatever its name.

    Returns:
        [`~datasets.Dataset`] with a column `prompt`.

    Raises:
        `ValueError`: If there are no prompts or no such split.
        `FileNotFoundError`: If there is no such file or dataset.
    """
    from datasets import Dataset, DatasetDict, Image

    kind, _, number = source.partition(":")
    if kind == "scenes":
        from ..scenes import make_prompt_dataset

        if not re.fullmatch(r"[0-9]+", number):
            raise ValueError(f"The prompts are {source!r}. Say how many scenes: scenes:1000.")
        return make_prompt_dataset(int(number), split=split)
    if source.endswith(".txt"):
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no file {source}. It should hold the prompts, one per line.")
        splits = DatasetDict({"train": Dataset.from_dict({"prompt": _read_lines(Path(source))})})
    else:
        splits = load_dataset_dict(source, config_name=config_name)
    prompts = pick_split(splits, next(iter(splits)) if use_only_split and len(splits) == 1 else split, source)
    if "prompt" not in prompts.column_names or len(prompts) == 0:
        raise ValueError(
            f"{source} has {len(prompts)} rows and the columns {', '.join(prompts.column_names)}. It needs prompts: a "
            "column `prompt`, or lines of text in a .txt file."
        )
    # prompts of preference pairs come without their images, which would be decoded for every row
    prompts = prompts.remove_columns([name for name, kind in prompts.features.items() if isinstance(kind, Image)])
    texts = prompts["prompt"][:]
    cleaned = [_clean(text, index, source) for index, text in enumerate(texts)]
    if cleaned == texts:
        return prompts
    return prompts.add_column("cleaned", cleaned).remove_columns("prompt").rename_column("cleaned", "prompt")


def _read_lines(file: Path) -> list[str]:
    """The lines of a text file but the blank ones. Only line feeds and carriage returns end a line."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line}, is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    return [line for line in re.split("\r\n|\n|\r", text) if line.strip("\ufeff \t")]


def _clean(prompt: Any, index: int, source: str) -> str:
    try:
        return clean_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"{source}, row {index}, `prompt`: {shorten(prompt)} {error}.") from error
