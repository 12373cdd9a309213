"""Rewards of the images that are there, while the next ones are being drawn."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from ..reward_functions import RewardFunctions


class OverlappedRewards:
    """
    Calls reward functions in a thread, one batch of images after the other, in the order in which they are added.
    `prompts` and `columns` are those of all `n` images; a new thread does not know the device of its process.
    """

    def __init__(
        self,
        reward_functions: RewardFunctions,
        prompts: list[str],
        columns: Mapping[str, Sequence[Any]],
        device: torch.device,
    ):
        self._reward_functions = reward_functions
        self._prompts = prompts
        self._columns = columns
        self._futures: list[Future[torch.Tensor]] = []
        # one thread: functions are called in order and need not be safe against each other
        self._executor = ThreadPoolExecutor(1, "rewards", initializer=_use_device, initargs=(device,))

    def __enter__(self) -> "OverlappedRewards":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def add(self, start: int, images: list[Image.Image]) -> None:
        """
        Has the images of consecutive rows rewarded. Raises what a reward function raised for an earlier batch, so that
        nothing more is drawn.
        """
        for future in self._futures:
            if future.done():
                future.result()
        rows = slice(start, start + len(images))
        columns = {name: list(values[rows]) for name, values in self._columns.items()}
        self._futures.append(
            self._executor.submit(self._reward_functions, self._prompts[rows], images, **columns),
        )

    def collect(self) -> torch.Tensor:
        """Waits for the rewards, `(n, num_funcs)`. Raises what a reward function raised, with its traceback."""
        return torch.cat([future.result() for future in self._futures])


def _use_device(device: torch.device) -> None:
    # the current device is a thread's own: a function's "cuda" must be this process's
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)
