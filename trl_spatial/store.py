"""Running the parts of a long job one after another, so that it can be interrupted anywhere."""

import json
import time
from collections.abc import Callable, Mapping
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
