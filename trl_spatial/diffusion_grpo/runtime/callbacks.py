"""What happens between the steps of the training loop of `transformers.Trainer`."""

from collections.abc import Callable
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


# name in the logs: how it is called in the progress bar
_SHOWN = {
    "reward": "reward",
    "ratio/mean": "ratio",
    "clip_ratio/low": "clip_low",
    "clip_ratio/high": "clip_high",
    "images_per_second": "images/s",
}


class UpdateCallback(TrainerCallback):
    """
    Calls a function at the start of training and one after every optimizer step.

    Args:
        at_start (`Callable[[], None]`):
            Called when training starts.
        after_update (`Callable[[], None]`):
            Called after an optimizer step.
    """

    def __init__(self, at_start: Callable[[], None], after_update: Callable[[], None]):
        self.at_start = at_start
        self.after_update = after_update

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.at_start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.after_update()


class RolloutProgressCallback(ProgressCallback):
    """A progress bar that shows the last reward, ratio, clip shares and speed, and prints no line per step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif self.training_bar is not None:
            # An update without a rollout has no reward of its own: the last one stays.
            self.shown |= {short: f"{logs[name]:.6g}" for name, short in _SHOWN.items() if name in logs}
            self.training_bar.set_postfix(self.shown)
