"""
A process of several machines, which see one folder and have a disk each: what it is told and when.

    machines_worker.py FOLDER
"""

import json
import os
import sys
import time
from pathlib import Path

from accelerate import PartialState

from trl_spatial.training.machines import check_shared_folder, download_on_each_machine


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

    def download():
        with (folder / "downloads").open("a") as file:
            file.write(f"{machine} {local_rank}\n")
        time.sleep(0.5)
        (folder / f"downloaded_{machine}").touch()

    def fail():
        raise ConnectionError("no network")

    download_on_each_machine(download)
    record["was downloaded"] = (folder / f"downloaded_{machine}").exists()
    record["failed download"] = error_of(download_on_each_machine, fail)
    state.wait_for_everyone()
    (folder / f"record_{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
