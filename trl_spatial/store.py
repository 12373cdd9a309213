"""Storage that survives interruptions: atomic writes, records, content-addressed files, and the stages of a job."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any


# Rank of this process among those that accelerate launched.
PROCESS = int(os.environ.get("RANK", "0"))


def cache_folder() -> Path:
    """Returns the folder for files that can be recreated, in `XDG_CACHE_HOME` or `~/.cache`; creates it if missing."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_spatial"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """
    Writes a file, text as UTF-8, so that at any moment `path` holds either its old content or all of the new one, even if the disk
    is full or the process ends. The folder must exist.
    """
    path = Path(path)
    # in the same folder, because replacing a file is atomic only within a file system; processes of two containers may have the
    # same number
    partial = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Removes what writes that were killed have left in a folder. To be called while no process writes there."""
    for path in folder.glob(".[0-9]*-*.partial"):
        path.unlink()


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON object to a file, atomically."""
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def read_record(path: str | Path) -> dict[str, Any]:
    """
    Reads the JSON object that [`write_record`] wrote. It is empty if there is no file, or if it is damaged, which is reported on
    stderr.
    """
    try:
        record = json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError):  # invalid JSON or UTF-8, or nested too deeply
        record = None
    if not isinstance(record, dict):
        print(f"{path} is not a whole JSON object. It is treated as missing.", file=sys.stderr, flush=True)
        return {}
    return record


class ContentStore:
    """
    A folder, created if missing, of files that are named by the SHA-256 of their content, so that a name never stands for other
    content and equal files are stored once.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes, suffix: str = "") -> str:
        """Stores a file, unless it is there already, and returns its name, which ends in `suffix`."""
        name = hashlib.sha256(data).hexdigest() + suffix
        path = self.folder / name
        if not (path.is_file() and path.read_bytes() == data):
            write_atomically(path, data)
        return name

    def get(self, name: str) -> bytes:
        """Reads a file; a `ValueError` if its content is not what was stored."""
        path = self.folder / name
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != name.split(".")[0]:
            raise ValueError(f"{path} has changed since it was written. Delete it and run the same command again.")
        return data


class RecordLog:
    """
    An append-only file of JSON records, one per line. A last line that an interruption cut off is dropped.

    Args:
        path (`Path`):
            The file. It is made when the first record is added.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """
        Adds records; they are on disk when the call returns. If the disk is full, none of them is kept. To be called
        by one process at a time.
        """
        if not records:
            return
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode()
        with self.path.open("a+b") as file:
            size = _whole_lines(file)
            try:
                file.truncate(size)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """
        Yields the records in the order in which they were added.

        Raises:
            `ValueError`: If a line is damaged; the message names it.
        """
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{self.path}, line {number} is damaged ({error}). Restore the file, or remove that line: its "
                        "work is then redone."
                    ) from None


class SharedLog:
    """
    A log to which several processes add records, each to a file of its own.

    Args:
        folder (`Path`):
            Folder of the files.
        name (`str`):
            Prefix of their names.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._own = RecordLog(folder / (f"{name}.jsonl" if PROCESS == 0 else f"{name}-{PROCESS}.jsonl"))

    @property
    def is_begun(self) -> bool:
        """Whether any process has added a record."""
        return any(self.folder.glob(f"{self.name}*.jsonl"))

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """See [`RecordLog.append`]."""
        self._own.append(records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the records of all processes."""
        for path in sorted(self.folder.glob(f"{self.name}*.jsonl")):
            yield from RecordLog(path)


def _whole_lines(file: IO[bytes]) -> int:
    """Returns the size of a file up to the end of its last complete line."""
    end = file.seek(0, os.SEEK_END)
    start = end
    while start > 0:
        start = max(start - 2**16, 0)
        file.seek(start)
        found = file.read(min(2**16, end - start)).rfind(b"\n")
        if found >= 0:
            return start + found + 1
    return 0


class Stages:
    """
    Runs the stages of a job one after another, so that the job can be interrupted anywhere. A stage is finished when its
    record is written; a finished stage is not run again. An interrupted one is, and continues from its own files.

    Args:
        folder (`Path`):
            Folder of the job, created if missing. The records are in its folder `stages`.
        titles (`Mapping[str, str]`):
            Name of each stage and a description, in the order in which they run.
        arguments (`Mapping[str, Any]`):
            Everything that determines the result, as JSON.

    Raises:
        `ValueError`: If the folder holds a job with other arguments or something else, or if another process is running
            in it.
    """

    def __init__(self, folder: Path, titles: Mapping[str, str], arguments: Mapping[str, Any]):
        self.folder, self.titles = folder / "stages", dict(titles)
        found = read_record(folder / "arguments.json")
        if not found and folder.is_dir() and any(name[0] != "." and name != "stages" for name in os.listdir(folder)):
            raise ValueError(f"{folder} is not empty and holds no run that can be continued. Name another folder.")
        if found and found != arguments:
            names = sorted(name for name in {**found, **arguments} if found.get(name) != arguments.get(name))
            changes = ", ".join(f"{name} was {found.get(name)} and is {arguments.get(name)}" for name in names)
            raise ValueError(
                f"{folder} holds a run with other arguments: {changes}. Name another folder or remove it."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        self._lock.enter_context(lock_folder(folder))
        write_record(folder / "arguments.json", arguments)

    def run(self, name: str, function: Callable[[], Any], *, outputs: Sequence[Path] = ()) -> Any:
        """
        Runs a stage, or returns what it returned when it was run, as read back from JSON. If one of the files `outputs` is missing, the
        stage is run again.
        """
        names = list(self.titles)
        title = f"{names.index(name) + 1}/{len(names)}  {self.titles[name]}"
        record = read_record(self._file(name))
        missing = [path for path in outputs if not path.exists()]
        if "result" in record and not missing:
            print(f"{title}: already done, in {record.get('seconds', 0):.0f} s", flush=True)
            return record["result"]
        print(f"{title}: repeated, because {missing[0]} is missing" if "result" in record else title, flush=True)
        for later in names[names.index(name) :]:  # later stages used the result that this stage now replaces
            if "result" in (known := read_record(self._file(later))):
                write_record(self._file(later), {"seconds": known.get("seconds", 0.0)})
        started = time.perf_counter()
        record = {"seconds": record.get("seconds", 0.0)}
        try:
            record["result"] = function()
        finally:
            record["seconds"] += time.perf_counter() - started
            write_record(self._file(name), record)
        print(f"     {record['seconds']:.0f} s", flush=True)
        return read_record(self._file(name))["result"]

    def times(self) -> list[dict[str, Any]]:
        """`name`, `title` and `seconds` of every stage that has been run; interrupted attempts count."""
        records = {name: read_record(self._file(name)) for name in self.titles}
        return [
            {"name": name, "title": self.titles[name], "seconds": round(record.get("seconds", 0.0), 1)}
            for name, record in records.items()
            if record
        ]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def check_writable(folder: str | Path) -> None:
    """
    Checks that files can be written to a folder or, if it does not exist yet, that it can be created. Leaves nothing behind.

    Raises:
        `ValueError`: If not; the message names the existing folder or file that prevents it.
    """
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise ValueError(f"{existing} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):  # `os.access` does not know what a file system refuses
            pass
    except OSError as error:
        raise ValueError(f"{existing} cannot be written to ({error.strerror})") from error


def new_folder(path: str) -> Path:
    """Returns `path`, or raises an error if it exists and is not an empty folder, so that nothing is overwritten."""
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
    """
    folder = Path(folder)
    (folder / MARKER).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def mark_complete(folder: str | Path, files: Sequence[str] | None = None) -> None:
    """
    Declares a folder complete: writes `checkpoint.json`, which lists files (names relative to the folder; by default all) with
    their sizes, after they have reached the disk. To be called by one process, after all have written.
    """
    folder = Path(folder)
    sizes = _file_sizes(folder)
    if files is not None:
        sizes = {name: sizes[name] for name in files}
    parents = {folder / parent for name in sizes for parent in Path(name).parents}
    if os.name == "posix":  # other systems cannot flush folders, or files opened for reading
        for path in [*(folder / name for name in sizes), *parents]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    write_record(folder / MARKER, {"files": sizes})


def is_complete(folder: str | Path) -> bool:
    """
    Whether a folder was written completely: its marker exists, and every file that it lists, with the listed size.
    """
    expected, sizes = marked_files(folder), _file_sizes(Path(folder))
    return expected is not None and all(sizes.get(name) == size for name, size in expected.items())


def marked_files(folder: str | Path) -> dict[str, int] | None:
    """Names and sizes of the files that the marker of a folder lists, or `None` if there is no readable marker."""
    files = read_record(Path(folder) / MARKER).get("files")
    return files if isinstance(files, dict) else None


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """
    Keeps other processes out of an existing folder while this one writes to it, or raises a `ValueError` if another one has
    locked it. The lock ends with the process, however it ends.
    """
    folder = Path(folder).resolve()
    if folder in _locked or os.name != "posix":
        yield
        return
    import fcntl

    # Not `flock`: the workers of a data loader would inherit the lock, and outlive a killed process by some seconds.
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            raise ValueError(
                f"Another process ({file.read().strip()}) is running in {folder}. Wait until it ends, or name another folder."
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
