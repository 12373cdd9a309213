"""What the machines of one training share: a folder that all of them see, and one download on each."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


def check_shared_folder(folder: str | Path, *, patience: float = 60.0) -> None:
    """
    Makes sure that all processes see the same folder: each has to find a file that the first one writes, within `patience`
    seconds, as a network disk may need a moment. The file is removed again.

    Raises:
        `ValueError`: In all processes, if one of them does not; the message names those.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    answer: list[Any] = [None, None]
    if state.is_main_process:
        path = Path(folder) / f".seen_by_all_{uuid4().hex}"  # a name that no disk remembers as missing
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
    while not (is_seen := (Path(folder) / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = gather_object([None if is_seen else f"process {state.process_index} on {socket.gethostname()}"])
    if state.is_main_process:
        (Path(folder) / name).unlink()
    if blind := [process for process in blind if process is not None]:
        raise ValueError(
            f"`output_dir` is {folder}, but {', '.join(blind)} cannot see what process 0 writes there. Name a folder on a "
            "disk that all machines share."
        )


def download_on_each_machine(download: Callable[[], Any]) -> None:
    """
    Calls `download` in one process of each machine, and the others wait: they find the files in the cache, where each would ask
    the Hub for all of them. If it fails, the others continue, and fail for the same reason. A process alone downloads what it
    loads, and nothing is called.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    try:
        if state.is_local_main_process:
            download()
    finally:
        state.wait_for_everyone()
