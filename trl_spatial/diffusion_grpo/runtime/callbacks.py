"""
Callbacks for the training loop of `transformers.Trainer`, and what its logging integrations, none of which has to be installed,
need to work with diffusion models.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


# name in the logs: name in the progress bar
_SHOWN = {
    "reward": "reward",
    "ratio/mean": "ratio",
    "clip_ratio/low": "clip_low",
    "clip_ratio/high": "clip_high",
    "images_per_second": "images/s",
}


class UpdateCallback(TrainerCallback):
    """Calls one function at the start of training and another after every optimizer step."""

    def __init__(self, at_start: Callable[[], None], after_update: Callable[[], None]):
        self.at_start = at_start
        self.after_update = after_update

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.at_start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.after_update()


class RolloutProgressCallback(ProgressCallback):
    """A progress bar that shows the last reward, ratio, clip shares and speed, and prints no line per step."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if logs is None or "loss" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif self.training_bar is not None:
            # An update without a rollout has no reward of its own: keep showing the last one.
            self.shown |= {short: f"{logs[name]:.6g}" for name, short in _SHOWN.items() if name in logs}
            self.training_bar.set_postfix(self.shown)


class DiffusionTensorBoardCallback(TensorBoardCallback):
    """A [`~transformers.integrations.TensorBoardCallback`] that does not ask the model for a transformers config."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        # The parent calls `model.config.to_json_string()`, which the config of a diffusers model does not have.
        super().on_train_begin(args, state, control, **kwargs)


def adapt_callbacks(trainer: Trainer) -> None:
    """Replaces the callbacks of an initialized trainer that fail with a diffusers model."""
    # By exact type: subclasses, such as the one above, are the caller's choice.
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is TensorBoardCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(DiffusionTensorBoardCallback(callback.tb_writer))


@dataclass
class Samples:
    """
    Images to send to the trackers.

    Args:
        name (`str`):
            Where they were drawn: `"rollout"`, or the prefix of an evaluation's metrics.
        grid (`PIL.Image.Image`):
            One picture of all of them.
        prompts (`list[str]`):
            Prompt of each image.
        images (`list[PIL.Image.Image]`):
            The images.
        columns (`dict[str, list[float]]`):
            Values per image: its rewards, by function name, and in a rollout its `advantage`; NaN where there is none.
    """

    name: str
    grid: Image.Image
    prompts: list[str]
    images: list[Image.Image]
    columns: dict[str, list[float]]


def log_samples(callbacks: Iterable[TrainerCallback], samples: Samples, step: int) -> None:
    """
    Sends images to whichever of TensorBoard, Trackio and Weights & Biases a trainer with these callbacks reports to: the grid as
    `"images/<name>"` and, except in TensorBoard, TRL's table `"completions"` with a row per image, or `"<name>/completions"` for
    an evaluation. Call it on the main process only.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(f"images/{samples.name}", np.asarray(samples.grid), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback) and callback._wandb.run is not None:
            callback._wandb.log(_pictures_and_table(callback._wandb, samples, step))
        elif isinstance(callback, TrackioCallback) and callback._initialized:
            callback._trackio.log(_pictures_and_table(callback._trackio, samples, step))


def _pictures_and_table(tracker: Any, samples: Samples, step: int) -> dict[str, Any]:
    """Makes a log entry from the classes that Trackio and Weights & Biases have in common."""
    columns = [[None if math.isnan(value) else value for value in values] for values in samples.columns.values()]
    pictures = [tracker.Image(image) for image in samples.images]
    rows = zip([step] * len(pictures), samples.prompts, *columns, pictures, strict=True)
    return {
        f"images/{samples.name}": tracker.Image(samples.grid),
        "completions" if samples.name == "rollout" else f"{samples.name}/completions": tracker.Table(
            columns=["step", "prompt", *samples.columns, "image"], data=[list(row) for row in rows]
        ),
        # The callback plots everything against this, not against the logger's own counter.
        "train/global_step": step,
    }
