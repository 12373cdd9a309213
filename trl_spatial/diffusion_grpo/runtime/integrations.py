"""What transformers' logging integrations need to work with diffusion models. None of them has to be installed."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


class DiffusionTensorBoardCallback(TensorBoardCallback):
    """A [`~transformers.integrations.TensorBoardCallback`] that does not ask the model for a transformers config."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        # The parent calls `model.config.to_json_string()`, which the config of a diffusers model does not have.
        super().on_train_begin(args, state, control, **kwargs)


def adapt_callbacks(trainer: Trainer) -> None:
    """
    Replaces the callbacks of a trainer that fail with a diffusers model.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, after its initialisation.
    """
    # By exact type: subclasses, such as the one above, are their owners' choice.
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is TensorBoardCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(DiffusionTensorBoardCallback(callback.tb_writer))


def log_image(callbacks: Iterable[TrainerCallback], image: Image.Image, name: str, step: int) -> None:
    """
    Hands a picture to TensorBoard, trackio and Weights & Biases, as far as a trainer reports to them. To be called by
    the main process.

    Args:
        callbacks (`Iterable[TrainerCallback]`):
            Callbacks of the trainer: `trainer.callback_handler.callbacks`.
        image (`Image.Image`):
            The picture.
        name (`str`):
            Under which name it is shown, such as `"eval/images"`.
        step (`int`):
            Optimizer steps so far.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback) and callback._wandb.run is not None:
            # The callback shows everything over `train/global_step`, not over the logger's own counter.
            callback._wandb.log({name: callback._wandb.Image(image), "train/global_step": step})
        elif isinstance(callback, TrackioCallback) and callback._initialized:
            callback._trackio.log({name: callback._trackio.Image(image), "train/global_step": step})
