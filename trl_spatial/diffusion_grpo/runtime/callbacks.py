"""
What happens between the steps of the training loop of `transformers.Trainer`, and what its logging integrations, none of
which has to be installed, need to work with diffusion models.
"""

from collections.abc import Callable, Iterable
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


def log_image(callbacks: Iterable[TrainerCallback], image: Image.Image, name: str, step: int) -> None:
    """
    Hands a picture to TensorBoard, trackio and Weights & Biases, as far as a trainer with these callbacks reports to
    them, under a name such as `"images/eval"`. To be called by the main process.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback) and callback._wandb.run is not None:
            # The callback shows everything over `train/global_step`, not over the logger's own counter.
            callback._wandb.log({name: callback._wandb.Image(image), "train/global_step": step})
        elif isinstance(callback, TrackioCallback) and callback._initialized:
            callback._trackio.log({name: callback._trackio.Image(image), "train/global_step": step})
