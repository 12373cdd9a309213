"""
A process of several machines, which see one folder and have a disk each: what it is told and when.

    machines_worker.py FOLDER
"""

import json
import logging
import os
import resource
import sys
import time
from pathlib import Path
from typing import ClassVar

from accelerate import PartialState

from trl_spatial import waiting
from trl_spatial.training.machines import check_shared_folder, download_on_each_machine
from trl_spatial.training.processes import fail_together


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return str(error)


def main(folder):
    state = PartialState(cpu=True)
    rank, local_rank = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK"))
    machine = rank // int(os.environ["LOCAL_WORLD_SIZE"])
    record = {
        "shared": error_of(check_shared_folder, folder / "shared" / "run"),
        "own": error_of(check_shared_folder, folder / f"disk_{machine}", patience=0.5),
        "not a folder": error_of(check_shared_folder, folder / "file" / "run"),
    }

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if rank == 3:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    record["read-only"] = error_of(check_shared_folder, folder / "read-only")
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def download():
        with (folder / "downloads").open("a") as file:
            file.write(f"{machine} {local_rank}\n")
        time.sleep(0.5)
        (folder / f"downloaded_{machine}").touch()

    def fail():
        raise ConnectionError("no network")

    class Notices(logging.Handler):
        texts: ClassVar[list[str]] = []

        def emit(self, notice):
            self.texts.append(notice.getMessage())
            (folder / "noticed").touch()

    waiting.FIRST_NOTICE = 0.01
    waiting.logger.addHandler(Notices())
    with fail_together("Rewarding images"):
        deadline = time.monotonic() + 120
        while rank == 3 and not (folder / "noticed").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    waiting.FIRST_NOTICE = 1000.0
    record["notices"] = Notices.texts

    download_on_each_machine(download)
    record["was downloaded"] = (folder / f"downloaded_{machine}").exists()
    record["failed download"] = error_of(download_on_each_machine, fail)
    state.wait_for_everyone()
    (folder / f"record_{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
