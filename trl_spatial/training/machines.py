"""Training on several machines: a folder that all of them see, and one download on each."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..waiting import WaitNotices


def check_shared_folder(folder: str | Path, *, patience: float = 60.0) -> None:
    """
    Checks that all processes see the same folder: each has to find a file that the first one writes, within `patience`
    seconds, as a network disk may need a moment, and be able to write to it. The file is then removed.

    Raises:
        `ValueError`: In all processes, if one of them does not or cannot; the message names those.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    answer: list[Any] = [None, None]
    if state.is_main_process:
        path = Path(folder) / f".seen_by_all_{uuid4().hex}"  # a new name, which no disk has cached as missing
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            answer[0] = path.name
        except OSError as error:  # raised below, by all processes
            answer[1] = f"`output_dir` is {folder}, which cannot be written to: {error}"
    name, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise ValueError(refusal)
    deadline = time.monotonic() + patience
    with WaitNotices(f"a file of process 0 in {folder}", f"It may take {patience:g} s to appear.").request():
        while not (is_seen := (Path(folder) / name).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
    here, found = f"process {state.process_index} on {socket.gethostname()}", None
    if not is_seen:
        found = f"{here} cannot see what process 0 writes there"
    else:
        try:
            (Path(folder) / name).open("a").close()
        except OSError as error:
            found = f"{here} cannot write there: {error}"
    problems = [problem for problem in gather_object([found]) if problem is not None]
    if state.is_main_process:
        (Path(folder) / name).unlink()
    if problems:
        raise ValueError(
            f"`output_dir` is {folder}, but {'; '.join(problems)}. Name a folder on a disk that all machines share and can "
            "write to."
        )


def download_on_each_machine(download: Callable[[], Any]) -> None:
    """
    Calls `download` in one process per machine while the others wait, so that they find the files in the cache instead of each
    asking the Hub for all of them. If it fails, the others continue, and fail for the same reason. A single process downloads what
    it loads anyway, so nothing is called.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    try:
        if state.is_local_main_process:
            download()
    finally:
        state.wait_for_everyone()
