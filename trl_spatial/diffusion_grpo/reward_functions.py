"""A trainer's reward functions: called by TRL's contract, checked, and combined in one tensor, optionally in a thread."""

import copy
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..hub.functions import errors_of
from ..statistics import bootstrap_interval


# prompts, images, **columns → one number or None per image
RewardFunction = Callable[..., Sequence[float | None] | torch.Tensor | np.ndarray]


class RewardFunctions:
    """
    One or several reward functions with their float32 weights, `(num_funcs,)`, 1.0 each if none are given.

    A reward function is called as `reward_func(prompts=..., images=..., **columns)` and returns one number per image:
    a list, a NumPy array or a tensor on the CPU. `None` in a list means that the function gives that image no reward.
    Every call gets its own copies, which the function may change.

    Each function is logged under its `__name__`, or the name of its class if it has none; functions of one name get a
    number.
    """

    def __init__(
        self, reward_funcs: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None
    ):
        functions: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not functions:
            raise ValueError("`reward_funcs` is empty. Pass at least one reward function.")
        for function in functions:
            if not callable(function):
                raise TypeError(
                    f"`reward_funcs` holds {function!r}, which cannot be called. Pass functions, or objects such as "
                    "`SpatialScore`; load a checkpoint first."
                )
        if weights is None:
            weights = [1.0] * len(functions)
        if len(weights) != len(functions) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"`reward_weights` is {list(weights)} and there are {len(functions)} reward functions. Give each one "
                "finite number, in their order, or leave it `None` for equal weights."
            )
        self.functions = functions
        self.names = _distinct([_name_of(function) for function in functions])
        self.weights = torch.tensor(weights, dtype=torch.float32)  # (num_funcs,)

    def check_columns(self, columns: Collection[str]) -> None:
        """
        Checks before training that the functions can be called with a dataset's columns, all but `prompt`. Raises
        `ValueError` if one needs a missing column or does not accept an existing one.
        """
        taken = {"prompts", "images"} & set(columns)
        if taken:
            raise ValueError(
                f"The dataset has a column {sorted(taken)[0]!r}, the name under which the trainer passes its own values to reward "
                "functions. Rename or remove the column."
            )
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                signature = inspect.signature(function)
            except ValueError:  # some built-in functions have no signature
                continue
            try:
                signature.bind(prompts=[], images=[], **dict.fromkeys(columns))
            except TypeError as error:
                raise ValueError(
                    f"Reward function `{name}{signature}` cannot be called with `prompts`, `images` and the columns "
                    f"{sorted(columns)} of the dataset: {error}. Add the missing column, or let the function "
                    "take `**columns`."
                ) from None

    def __call__(self, prompts: list[str], images: list[Image.Image], **columns: list) -> torch.Tensor:
        """
        Rewards images with all functions: `(n, num_funcs)`, float32, on the CPU, NaN where a function gave no reward.
        Each column holds one value per image. If a function returns anything but one finite number or `None` per image,
        a `ValueError` names it, what it returned, and the fix.
        """
        rewards = torch.empty(len(images), len(self.functions))  # (n, num_funcs)
        for column, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            # Copies, value by value: a function may shrink its images in place or empty a column's value, which must not
            # affect the next function, the next rollout or the saved images.
            own = {key: [copy.deepcopy(value) for value in values] for key, values in columns.items()}
            with errors_of(f"The reward function `{name}` raised this error."):
                output = function(prompts=list(prompts), images=[copy.deepcopy(image) for image in images], **own)
            rewards[:, column] = _as_rewards(output, len(images), name)
        return rewards


class OverlappedRewards:
    """
    Calls reward functions in a thread, one batch of images after the other, in the order they are added, up to the first that
    fails. `prompts` and `columns` are those of all `n` images. `device` is set in the thread, which does not inherit it from the
    process. If drawing `is_collective`, an error is held until all images are drawn: the other processes could not continue
    without this one.
    """

    def __init__(
        self,
        reward_functions: RewardFunctions,
        prompts: list[str],
        columns: Mapping[str, Sequence[Any]],
        device: torch.device,
        *,
        is_collective: bool = False,
    ):
        self._reward_functions = reward_functions
        self._is_collective = is_collective
        self._prompts = prompts
        self._columns = columns
        self._futures: list[Future[torch.Tensor]] = []
        # one thread, so that functions are called in order and need not be thread-safe
        self._executor = ThreadPoolExecutor(1, "rewards", initializer=_use_device, initargs=(device,))

    def __enter__(self) -> "OverlappedRewards":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def add(self, start: int, images: list[Image.Image]) -> None:
        """
        Queues the images of consecutive rows to be rewarded. Raises the error of a reward function for an earlier batch,
        if any, so that nothing more is drawn, unless drawing is collective.
        """
        for future in self._futures:
            if future.done() and not self._is_collective:
                future.result()
        before = self._futures[-1] if self._futures else None
        rows = slice(start, start + len(images))
        columns = {name: list(values[rows]) for name, values in self._columns.items()}

        def reward() -> torch.Tensor:
            if before is not None and before.exception() is not None:
                raise CancelledError  # an error is not followed by calls, which may cost
            return self._reward_functions(self._prompts[rows], images, **columns)

        self._futures.append(self._executor.submit(reward))

    def collect(self) -> torch.Tensor:
        """Waits for the rewards, `(n, num_funcs)`. Raises the error of a reward function, if any, with its traceback."""
        return torch.cat([future.result() for future in self._futures])


def _use_device(device: torch.device) -> None:
    # the current device is per thread, and "cuda" in a reward function must mean this process's GPU
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)


def reward_metrics(rewards: torch.Tensor, combined: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """
    Statistics of the rewards of all processes, `(n, num_funcs)`, and of their weighted sums, `(n,)`, from
    [`~advantages.combine_rewards`], under the names they are logged with: `reward` and `reward_std` of the sum;
    `rewards/<name>/mean`, `rewards/<name>/std` and `rewards/<name>/frac_none` of each function. Means and standard
    deviations are over the images with a reward (not NaN), and left out if there are none, so logs hold no NaN.
    """
    metrics = _mean_and_std(combined, "reward", "reward_std")
    for name, column in zip(names, rewards.unbind(dim=1), strict=True):
        metrics |= _mean_and_std(column, f"rewards/{name}/mean", f"rewards/{name}/std")
        metrics[f"rewards/{name}/frac_none"] = column.isnan().float().mean().item()
    return metrics


def reward_intervals(
    rewards: torch.Tensor, combined: torch.Tensor, names: Sequence[str], prompts: Sequence[str]
) -> dict[str, float]:
    """
    Bounds of the 95 % intervals of the means of [`reward_metrics`]: `reward_low` and `reward_high` of the sum,
    `rewards/<name>/low` and `rewards/<name>/high` of each function. `prompts` are those of the `n` images; whole prompts are
    resampled. Intervals are left out if fewer than two prompts have a reward.
    """
    intervals: dict[str, float] = {}
    for values, prefix in (
        (combined, "reward_"),
        *((column, f"rewards/{name}/") for name, column in zip(names, rewards.unbind(dim=1), strict=True)),
    ):
        known = ~values.isnan().numpy()
        keys = np.asarray(prompts)[known]
        if len(set(keys.tolist())) > 1:
            interval = bootstrap_interval(values.double().numpy()[known], keys, rng=np.random.default_rng(0))
            intervals |= {f"{prefix}low": interval.low, f"{prefix}high": interval.high}
    return intervals


def _mean_and_std(values: torch.Tensor, mean_name: str, std_name: str) -> dict[str, float]:
    values = values[~values.isnan()].double()
    if len(values) == 0:
        return {}
    # One value has no spread: 0, not the NaN of the unbiased estimate.
    std = values.std().item() if len(values) > 1 else 0.0
    return {mean_name: values.mean().item(), std_name: std}


def _name_of(function: Any) -> str:
    function = getattr(function, "func", function)  # the function in a functools.partial
    return str(getattr(function, "__name__", type(function).__name__))


def _distinct(names: list[str]) -> list[str]:
    distinct: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in distinct or (number > 1 and candidate in names):
            number += 1
            candidate = f"{name}_{number}"
        distinct.append(candidate)
    return distinct


def _as_rewards(output: Any, num_images: int, name: str) -> torch.Tensor:
    """Checks a reward function's output and converts it to `(num_images,)`, float32, NaN for `None`."""
    if isinstance(output, torch.Tensor):
        if output.device.type != "cpu":
            raise ValueError(
                f"Reward function `{name}` returned a tensor on the device {output.device}. Return "
                "`rewards.tolist()`, or `rewards.cpu()`."
            )
        output = output.detach().float().numpy()  # NumPy has no bfloat16
    if isinstance(output, np.ndarray):
        if output.ndim != 1:
            raise ValueError(
                f"Reward function `{name}` returned values of shape {tuple(output.shape)}. Return one number per "
                f"image, of shape ({num_images},)."
            )
        output = output.tolist()
    if not isinstance(output, Sequence) or isinstance(output, (str, bytes)):
        raise ValueError(
            f"Reward function `{name}` returned {_describe(output)}. Return a list with one number, or `None`, per "
            "image."
        )
    if len(output) != num_images:
        raise ValueError(
            f"Reward function `{name}` returned {len(output)} rewards for {num_images} images. Return one number per "
            "image, in their order, and `None` for an image without one."
        )
    return torch.tensor([_as_number(value, index, name) for index, value in enumerate(output)], dtype=torch.float32)


def _as_number(value: Any, index: int, name: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.device.type == "cpu":
        value = value.item()
    if not isinstance(value, (Real, np.bool_)):
        raise ValueError(
            f"Reward function `{name}` returned {_describe(value)} for image {index}. Return a Python float, or `None` "
            "for no reward."
        )
    if not abs(float(value)) <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"Reward function `{name}` returned {float(value)} for image {index}. Return a finite number of float32, "
            "or `None` for no reward."
        )
    return float(value)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} on the device {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type `{type(value).__name__}`"
