"""
What happens between the steps of the training loop of `transformers.Trainer`, and what its logging integrations, none of
which has to be installed, need to work with diffusion models.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


# name in the logs: how it is called in the progress bar
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
            # An update without a rollout has no reward of its own: the last one stays.
            self.shown |= {short: f"{logs[name]:.6g}" for name, short in _SHOWN.items() if name in logs}
            self.training_bar.set_postfix(self.shown)


class DiffusionTensorBoardCallback(TensorBoardCallback):
    """A [`~transformers.integrations.TensorBoardCallback`] that does not ask the model for a transformers config."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        # The parent calls `model.config.to_json_string()`, which the config of a diffusers model does not have.
        super().on_train_begin(args, state, control, **kwargs)


def adapt_callbacks(trainer: Trainer) -> None:
    """Replaces the callbacks of an initialised trainer that fail with a diffusers model."""
    # By exact type: subclasses, such as the one above, are their owners' choice.
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is TensorBoardCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(DiffusionTensorBoardCallback(callback.tb_writer))


@dataclass
class Samples:
    """
    Images to show to the trackers.

    Args:
        name (`str`):
            What they were drawn in: `"rollout"`, or the prefix of an evaluation's metrics.
        grid (`PIL.Image.Image`):
            One picture of all of them.
        prompts (`list[str]`):
            Prompt of each image.
        images (`list[PIL.Image.Image]`):
            The images.
        rewards (`dict[str, list[float]]`):
            Rewards of each image, by the name of the function; NaN where it gave none.
    """

    name: str
    grid: Image.Image
    prompts: list[str]
    images: list[Image.Image]
    rewards: dict[str, list[float]]


def log_samples(callbacks: Iterable[TrainerCallback], samples: Samples, step: int) -> None:
    """
    Shows images to TensorBoard, Trackio and Weights & Biases, as far as a trainer with these callbacks reports to them: the
    grid as `"images/<name>"`, and, but for TensorBoard, TRL's table `"completions"` with a row per image, for an evaluation
    `"<name>/completions"`. To be called by the main process.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(f"images/{samples.name}", np.asarray(samples.grid), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback) and callback._wandb.run is not None:
            callback._wandb.log(_pictures_and_table(callback._wandb, samples, step))
        elif isinstance(callback, TrackioCallback) and callback._initialized:
            callback._trackio.log(_pictures_and_table(callback._trackio, samples, step))


def _pictures_and_table(tracker: Any, samples: Samples, step: int) -> dict[str, Any]:
    """The entry of a log, in the classes that Trackio has in common with Weights & Biases."""
    rewards = [[None if math.isnan(value) else value for value in values] for values in samples.rewards.values()]
    pictures = [tracker.Image(image) for image in samples.images]
    rows = zip([step] * len(pictures), samples.prompts, *rewards, pictures, strict=True)
    return {
        f"images/{samples.name}": tracker.Image(samples.grid),
        "completions" if samples.name == "rollout" else f"{samples.name}/completions": tracker.Table(
            columns=["step", "prompt", *samples.rewards, "image"], data=[list(row) for row in rows]
        ),
        # The callback shows everything over this, not over the logger's own counter.
        "train/global_step": step,
    }
