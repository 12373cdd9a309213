"""Loads datasets from local files. Errors name the damaged file, and no file outside the dataset's folder is read."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
    logging,
)
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub import metadata_load
from huggingface_hub.constants import HF_HUB_CACHE

from .columns import PROMPT_COLUMNS
from .faults import shorten


# suffix, in lower case → builder of datasets
FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_CSV_OPTIONS = {
    # keep text as written: the words NA and null, the numeral 007
    "keep_default_na": False,
    "na_values": [""],
    "converters": dict.fromkeys(PROMPT_COLUMNS, str),
}


class OutsideError(ValueError):
    """A dataset names a file that is not in its folder."""


def load_files(path: Path, *, config_name: str | None = None, streaming: bool = False) -> DatasetDict:
    """
    Loads a dataset from a file with one of the suffixes of `FILE_TYPES`, a folder of such files, or one that `save_to_disk` wrote,
    as a [`~datasets.DatasetDict`]. With `streaming`, damage shows when it is reached.

    Raises:
        `ValueError`: If a file is empty, damaged or of another type, or the dataset names a file outside its folder. The
        message names the file, and the line if it is text.
    """
    if path.is_file() and path.suffix.lower() not in FILE_TYPES:
        raise ValueError(f"{path} is not a .parquet, .json, .jsonl or .csv file.")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is neither a regular file nor a folder.")
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # datasets would also log the error
    try:
        splits = _load(path, config_name, streaming)
        if not streaming:
            for rows in splits.values():
                rows.data.validate(full=True)  # readers accept text that is not valid UTF-8
    except OutsideError:
        raise
    except Exception as error:  # readers raise all kinds: ArrowInvalid, StopIteration, KeyError, BadZipFile, ...
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        if isinstance(error, (MemoryError, PermissionError)) or (
            isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, EOFError)) and error.errno
        ):
            raise error from None  # not the file's fault: a full disk, for example
        raise ValueError(_explain(path, error)) from error
    finally:
        logging.set_verbosity(level)
    return check_splits_paths(splits, [path if path.is_dir() else path.parent], str(path))


def check_splits_paths(splits: Any, folders: Sequence[Path], name: str) -> Any:
    """[`check_paths`] for the splits of a dataset as it was loaded; those of a stream are checked row by row, as they come."""
    folders = [*folders, Path(HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
    if isinstance(splits, IterableDatasetDict):
        return IterableDatasetDict({split: _check_stream(rows, folders, name) for split, rows in splits.items()})
    for rows in splits.values():
        check_paths(rows, folders, name)
    return splits


def _check_stream(rows: IterableDataset, folders: Sequence[Path], name: str) -> IterableDataset:
    features = rows.features
    for column, kind in (features or {}).items():
        if isinstance(kind, Image):  # check the path before the file is opened
            rows = rows.cast_column(column, Image(decode=False))

    def check(row: dict[str, Any]) -> dict[str, Any]:
        for column, value in row.items():
            for path in _named_files_of(value):
                _check_path(path, folders, name, column)
        return row

    checked = rows.map(check)
    return checked if features is None else checked.cast(features)


def check_paths(rows: Dataset, folders: Sequence[Path], name: str) -> None:
    """
    Checks that the files named by cells with `bytes` and `path`, however deep, lie in one of the given folders. Otherwise reading
    or publishing somebody else's dataset could open, or upload, any file of this machine.

    Raises:
        [`OutsideError`]: If one lies elsewhere or is an address.
    """
    for column in rows.column_names:
        for chunk in rows.data.column(column).chunks:
            for path in _named_files(chunk):
                _check_path(path, folders, name, column)


def _check_path(path: str, folders: Sequence[Path], name: str, column: str) -> None:
    roots = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
    # how a stream names files on the Hub
    is_in_repository = path.split("::")[-1].startswith(f"hf://datasets/{name}@") and ".." not in path
    if not is_in_repository and ("://" in path or not os.path.realpath(path).startswith(roots)):
        raise OutsideError(
            f"{name}, column `{column}`: {shorten(path)} is not in the dataset's folder, {folders[0]}. Copy the file there, "
            "or store its bytes in the dataset."
        )


def _named_files(array: pa.Array) -> Iterator[str]:
    kind = array.type
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        if "path" in names and names <= {"bytes", "path"}:
            paths = pc.struct_field(array, "path")
            if "bytes" in names:
                paths = paths.filter(pc.is_null(pc.struct_field(array, "bytes")))
            yield from (path for path in pc.unique(paths).to_pylist() if isinstance(path, str) and path)
        else:
            for name in names:
                yield from _named_files(pc.struct_field(array, name))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _named_files(array.flatten())


def _named_files_of(value: Any) -> Iterator[str]:
    """Does what [`_named_files`] does, for one cell of a stream."""
    if isinstance(value, Mapping) and "path" in value and value.keys() <= {"bytes", "path"}:
        if value.get("bytes") is None and isinstance(value["path"], str) and value["path"]:
            yield value["path"]
    elif isinstance(value, (list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _named_files_of(item)


def _load(path: Path, config_name: str | None, streaming: bool) -> Any:
    if path.is_file():
        builder = FILE_TYPES[path.suffix.lower()]
        options: dict[str, Any] = _CSV_OPTIONS if builder == "csv" else {}
        return load_dataset(builder, data_files=str(path), streaming=streaming, **options)
    files = list(path.rglob("*"))
    for file in files:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ValueError(f"{file} is not a regular file")  # reading a pipe would block forever
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        _check_saved(path)
        loaded = load_from_disk(path)
        splits = DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded
        return (
            IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
            if streaming
            else splits
        )
    has_configs = _check_card(path)  # datasets does not combine configurations with reader options
    types = {file.suffix.lower() for file in files} & FILE_TYPES.keys()
    options = _CSV_OPTIONS if types == {".csv"} and not has_configs else {}
    if has_configs:  # datasets 5.2 would reuse cached rows of another folder with the same name
        options = {"cache_dir": str(Path(HF_DATASETS_CACHE) / "by_content" / _digest_of(path, files))}
    # absolute, because datasets uses the folder's name, and `.` has none
    return load_dataset(os.path.abspath(path), name=config_name, streaming=streaming, **options)


def _digest_of(folder: Path, files: Sequence[Path]) -> str:
    """Returns a name that changes with the path, size and modification time of any file of a folder."""
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files) if file.is_file()]
    return hashlib.sha256(repr((str(folder.resolve()), facts)).encode()).hexdigest()[:16]


def _check_saved(folder: Path) -> None:
    """Checks that all files that `save_to_disk` listed are in the folder of the list."""
    parts = [folder]
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        _check_names(names, folder / "dataset_dict.json")
        parts = [folder / name for name in names]
    for part in parts:
        state = json.loads((part / "state.json").read_text(encoding="utf-8"))
        _check_names([file["filename"] for file in state["_data_files"]], part / "state.json")


def _check_card(folder: Path) -> bool:
    """
    Checks the file names of the configurations in a card's front matter; returns whether there are any configurations.
    """
    has_configs = False
    for file in (folder / "README.md", folder / ".huggingface.yaml"):
        if not file.is_file():
            continue
        data = metadata_load(file) if file.suffix == ".md" else yaml.safe_load(file.read_text(encoding="utf-8"))
        for config in (data or {}).get("configs") or []:
            has_configs = True
            _check_names(_strings([config.get("data_files"), config.get("data_dir")]), file)
    return has_configs


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _check_names(names: Any, file: Path) -> None:
    for name in names:
        if ":" in name or os.path.isabs(name) or ".." in Path(name).parts:
            raise OutsideError(
                f"{file} names {name!r}, which is not in its folder. Datasets are only read from their folder."
            )


def _explain(path: Path, error: BaseException) -> str:
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in FILE_TYPES)
    )
    for file in files:
        if fault := _find_damage(file):
            return f"{file}{fault}. Repair the file or write it again."
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return f"{path} has no rows."
    reason = " ".join(f"{error}".split()) or type(error).__name__
    return f"{path} cannot be read as a dataset: {reason.removesuffix('.')}."


def _find_damage(file: Path) -> str | None:
    """Says what is wrong with a file, in words that follow its name, or returns `None` if nothing is found."""
    data = file.read_bytes()
    if not data:
        return " is empty"
    if file.suffix.lower() == ".parquet":
        try:
            pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            return f" is damaged ({' '.join(str(error).split()).removesuffix('.')})"
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = 1 + data.count(b"\n", 0, error.start)
        return f", line {number}: is not UTF-8 text"
    if file.suffix.lower() == ".csv":
        return None
    lines = text.split("\n")
    if file.suffix.lower() == ".json":
        try:
            json.loads(text)
            return None
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):  # the error for JSON lines
                return f", line {error.lineno}: {shorten(lines[error.lineno - 1])} is not JSON ({error.msg})"
    for number, line in enumerate(lines, start=1):
        if line.strip() and (fault := _fault_of_line(line)):
            return f", line {number}: {shorten(line)} {fault}"
    return None


def _fault_of_line(line: str) -> str | None:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "contains half of a surrogate pair, which is not a character"
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    return None if isinstance(value, dict) else "is not a JSON object"
