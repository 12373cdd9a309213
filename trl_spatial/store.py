"""Running the parts of a long job one after another, so that it can be interrupted anywhere."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Stages:
    """
    Runs the stages of a job, says which one is running, and keeps what each returned and how long it took. A stage that
    is finished is not run again; one that was interrupted is, and goes on from what it finds in its own files.

    Args:
        folder (`Path`):
            Where the records are kept, a JSON file per stage.
        titles (`Mapping[str, str]`):
            Name of each stage, and what it does in words, in the order in which they run.
    """

    def __init__(self, folder: Path, titles: Mapping[str, str]):
        self.folder = folder
        self.titles = dict(titles)
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        """
        Run a stage, or give what it returned when it was run.

        Args:
            name (`str`):
                Name of the stage, one of `titles`.
            function (`Callable`):
                Does it. What it returns must be JSON.

        Returns:
            What the function returned, as JSON gives it back.
        """
        number, title = list(self.titles).index(name) + 1, self.titles[name]
        record = self._read(name)
        if "result" in record:
            print(f"{number}/{len(self.titles)}  {title}: done before, in {record['seconds']:.0f} s", flush=True)
            return record["result"]
        print(f"{number}/{len(self.titles)}  {title}", flush=True)
        started = time.perf_counter()
        try:
            record["result"] = function()
        finally:
            record["seconds"] = record.get("seconds", 0.0) + time.perf_counter() - started
            self._write(name, record)
        print(f"     {record['seconds']:.0f} s", flush=True)
        return self._read(name)["result"]

    def times(self) -> list[dict[str, Any]]:
        """`name`, `title` and `seconds` of every stage that has been run, those of its interrupted attempts included."""
        records = {name: self._read(name) for name in self.titles}
        return [
            {"name": name, "title": self.titles[name], "seconds": round(record["seconds"], 1)}
            for name, record in records.items()
            if record
        ]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any]:
        return json.loads(self._file(name).read_text(encoding="utf-8")) if self._file(name).exists() else {}

    def _write(self, name: str, record: dict[str, Any]) -> None:
        partial = self._file(name).with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
        partial.replace(self._file(name))


def new_folder(path: str) -> Path:
    """`path`, if nothing is there yet; an error otherwise, so that a command overwrites nothing."""
    folder = Path(path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; name another one.")
    return folder


# Completeness of a folder

MARKER = "checkpoint.json"
LOCK_FILE = ".lock"
_locked: set[Path] = set()  # folders that this process has locked


def begin_folder(folder: str | Path) -> None:
    """
    Makes an empty folder to be filled. What an earlier run left there is deleted, its marker first, so that old and new
    files never pass for one result. To be called by one process, before any other writes.

    Args:
        folder (`str` or `Path`):
            The folder.
    """
    folder = Path(folder)
    (folder / MARKER).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def mark_complete(folder: str | Path, files: Sequence[str] | None = None) -> None:
    """
    Declares a folder complete: writes `checkpoint.json`, which lists files with their sizes, after they have reached the
    disk. To be called by one process, after all have written.

    Args:
        folder (`str` or `Path`):
            The folder.
        files (`Sequence[str]`, *optional*):
            Names of the files that belong to the result, relative to the folder. Defaults to all files.
    """
    folder = Path(folder)
    sizes = _file_sizes(folder)
    if files is not None:
        sizes = {name: sizes[name] for name in files}
    names = {folder / parent for name in sizes for parent in Path(name).parents}
    for path in [*(folder / name for name in sizes), *names]:
        _flush_to_disk(path)
    write_atomically(folder / MARKER, json.dumps({"files": sizes}, indent=2))


def is_complete(folder: str | Path) -> bool:
    """
    Whether a folder was written to its end: its marker is there, and so is every file that the marker lists, with its
    size.

    Args:
        folder (`str` or `Path`):
            The folder.
    """
    expected, sizes = marked_files(folder), _file_sizes(Path(folder))
    return expected is not None and all(sizes.get(name) == size for name, size in expected.items())


def marked_files(folder: str | Path) -> dict[str, int] | None:
    """Names and sizes of the files that the marker of a folder lists, or `None` if there is no readable marker."""
    try:
        return json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader finds the old content or the new one, also after a crash."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    _flush_to_disk(unfinished)
    unfinished.replace(path)
    _flush_to_disk(path.parent)


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """
    Keeps other processes out of a folder while this one writes to it. The lock ends with the process, however it ends.

    Args:
        folder (`str` or `Path`):
            The folder; it must exist.

    Raises:
        `ValueError`: If another process has locked it.
    """
    folder = Path(folder).resolve()
    if folder in _locked or os.name != "posix":
        yield
        return
    import fcntl

    # Not `flock`: the workers of a data loader would inherit it, and outlive a killed process for some seconds.
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            raise ValueError(
                f"Process {file.read().strip()} is writing to {folder}. Wait until it ends, or name another folder."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        _locked.add(folder)
        try:
            yield
        finally:
            _locked.remove(folder)


def _file_sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _flush_to_disk(path: Path) -> None:
    if os.name != "posix":  # elsewhere folders and files open for reading cannot be flushed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
