"""Loads datasets and prompts by the names that commands take."""

import re
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


def load_dataset_dict(
    name_or_path: str, *, config_name: str | None = None, streaming: bool = False
) -> "DatasetDict | IterableDatasetDict":
    """
    Load a dataset from a folder written by `save_to_disk`, from a Parquet, JSON, JSON Lines or CSV file or a folder of them, or
    from the Hub: `ORG/NAME`, `ORG/NAME@REVISION`, or `hub/NAME` for one of your own. A file or a folder without splits is the
    split `"train"`.

    Raises:
        `FileNotFoundError`: If `name_or_path` is neither a file or folder nor like a name on the Hub.
        `ValueError`: If a file is damaged, empty or of another type, or names files elsewhere; if a dataset on the Hub holds
        pickles or code.
        `HubError`: If a dataset on the Hub is not there, may not be read, or cannot be reached.
    """
    from datasets import load_dataset

    from ..hub import check_repository, explain_errors, find_reference
    from ..preferences.files import FILE_TYPES, check_splits_paths, load_files

    path = Path(name_or_path)
    if name_or_path and path.exists():
        return load_files(path, config_name=config_name, streaming=streaming)
    if path.suffix.lower() in FILE_TYPES:  # a name on the Hub may contain a dot, but not these suffixes
        raise FileNotFoundError(f"There is no file or folder {name_or_path}.")
    reference = find_reference(name_or_path, kind="dataset")
    check_repository(reference, kind="dataset")
    with explain_errors(f"Loading the dataset {reference}"):
        splits = load_dataset(reference.name, name=config_name, revision=reference.revision, streaming=streaming)
    return check_splits_paths(splits, [], reference.name)


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
    splits: "DatasetDict | IterableDatasetDict", split: str, name_or_path: str, *, option: str
) -> "Dataset | IterableDataset":
    """The split named `split`, as `option` asks; an error that lists the splits if there is none."""
    if split not in splits:
        raise ValueError(
            f"{name_or_path} has no split {split!r}; it has {', '.join(map(repr, splits))}. Name one with {option}."
        )
    return splits[split]


def load_prompts(
    source: str,
    split: str,
    *,
    config_name: str | None = None,
    use_only_split: bool = False,
    option: str = "--dataset_train_split",
) -> "Dataset":
    """
    Load prompts to train or evaluate on: a dataset with a column `prompt`. `source` is a `.txt` file, whose lines are the split
    `"train"`, `scenes:N`, or a dataset; with `use_only_split`, its only split is taken whatever its name. `option` is the one that
    names the split.

    Raises:
        `ValueError`: If there are no prompts or no such split.
        `FileNotFoundError`: If there is no such file or dataset.
    """
    from datasets import Image

    from ..preferences.prompt_files import clean_prompts, read_lines

    kind, _, number = source.partition(":")
    if kind == "scenes":
        from ..scenes import make_prompt_dataset

        if not re.fullmatch(r"[0-9]+", number):
            raise ValueError(f"The prompts are {source!r}. Say how many scenes: scenes:1000.")
        return make_prompt_dataset(int(number), split=split)
    splits = (
        read_lines(Path(source))
        if source.lower().endswith(".txt")
        else load_dataset_dict(source, config_name=config_name)
    )
    split = next(iter(splits)) if use_only_split and len(splits) == 1 else split
    prompts = pick_split(splits, split, source, option=option)
    if "prompt" not in prompts.column_names or len(prompts) == 0:
        raise ValueError(
            f"{source} has {len(prompts)} rows and the columns {', '.join(prompts.column_names)}. It needs prompts: a "
            "column `prompt`, or lines of text in a .txt file."
        )
    # drop the images of preference pairs, which would be decoded for every row
    prompts = prompts.remove_columns([name for name, kind in prompts.features.items() if isinstance(kind, Image)])
    return clean_prompts(prompts, source)
