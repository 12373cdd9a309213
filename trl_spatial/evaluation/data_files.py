"""A benchmark's data: found in a folder, or downloaded once and checked by its hash."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import requests

from ..store import cache_folder, write_atomically
from ..waiting import WaitNotices
from .benchmarks.base import Benchmark, DataFile


EXAMPLE = "example"  # a few rows of our own, in the benchmark's format
_TIMEOUT = 60.0  # seconds without receiving a byte


def find_data(benchmark: Benchmark, where: str | None = None) -> Path:
    """
    Finds the folder of a benchmark's data.

    Args:
        benchmark ([`~evaluation.benchmarks.base.Benchmark`]):
            The benchmark.
        where (`str`, *optional*):
            A folder with its files; or `"example"`, for a few rows that come with this package and show the format. If not
            set, its files are fetched from where they are published, unless they have been before.

    Raises:
        `ValueError`: If there is no such folder, a file cannot be fetched, or its content is not the published one.
    """
    if where == EXAMPLE:
        module = type(benchmark).__module__.rpartition(".")[2]
        return Path(__file__).parent / "benchmarks" / "examples" / module
    if where is not None:
        if not Path(where).is_dir():
            raise ValueError(f"There is no folder {where} with the data of {benchmark.title}.")
        return Path(where)
    folder = cache_folder() / "benchmarks" / benchmark.name
    for file in benchmark.files:
        if not (folder / file.name).is_file():
            _fetch(file, folder, benchmark)
    return folder


def _fetch(file: DataFile, folder: Path, benchmark: Benchmark) -> None:
    way_out = f"Fetch it yourself ({file.url}, license: {benchmark.license}), put it into a folder as {file.name}, and name the folder with --data."
    if not file.sha256:
        raise ValueError(
            f"The hash of {file.name} of {benchmark.title} is not known to this version, so it is not downloaded. {way_out}"
        )
    try:
        notices = WaitNotices(file.url, f"The download is given up if nothing arrives for {_TIMEOUT:g} s.")
        with notices.request(), requests.get(file.url, timeout=_TIMEOUT) as response:
            response.raise_for_status()
            content = response.content
    except requests.RequestException as error:
        raise ValueError(f"The data of {benchmark.title} cannot be fetched: {error}. {way_out}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise ValueError(
            f"{file.url} is not the file that this version knows: its SHA-256 is {found}, not {file.sha256}. {way_out}"
        )
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def hash_data(folder: Path) -> str:
    """SHA-256 over the names and contents of the files in a folder of data."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return _hash_of(
        {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest() for path in paths}
    )


def published_hash(files: Iterable[DataFile]) -> str:
    """Returns what [`hash_data`] gives for a folder with exactly these files, as published."""
    return _hash_of({file.name: bytes.fromhex(file.sha256) for file in files})


def _hash_of(digests: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(name.encode() + b"\0" + digests[name])
    return total.hexdigest()
