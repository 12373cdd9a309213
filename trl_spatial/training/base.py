"""What both trainers share: a run's folder, complete checkpoints, resuming, finite numbers and signals."""

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, has_length, rotate_checkpoints

from ..hub.cards import Card
from ..store import begin_folder, lock_folder, mark_complete
from .hub import HubTrainer
from .interruption import Interruption
from .machines import check_shared_folder
from .run_folder import (
    begin_weights,
    find_start,
    last_complete_checkpoint,
    move_weights,
    new_run,
    num_updates_of,
    read_run,
    recorded_arguments,
    write_run,
)


logger = get_logger(__name__)

_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
_BATCH_ARGUMENTS = ("per_device_train_batch_size", "gradient_accumulation_steps")


class BaseTrainer(HubTrainer):
    """
    A [`~transformers.Trainer`] whose runs can be interrupted anywhere.

    - A run has a folder of its own, with its identity in `run.json`. A used folder is refused unless the run resumes, and
      so is a second process that writes to it.
    - Checkpoints and final weights are marked when they are complete. Others are never resumed from.
    - A resumed run uses the options that it is given, or refuses them by name. The card states what was used, and when.
    - A loss, gradient or weight that is not finite ends the training; such weights are never saved.
    - SIGTERM and SIGINT end the training after the current update, with a checkpoint.

    A subclass gives `_save`, `_save_samples` and `_build_card`.
    """

    # Arguments that a resumed run cannot change: the order of the data and the optimizer's state depend on them.
    _fixed_arguments: tuple[str, ...] = ("seed", "data_seed", "optim", "optim_args", "train_sampling_strategy")
    _run: dict[str, Any] = {}
    _checkpoint: str | None = None
    _steps_in_epoch = 1

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._interruption = Interruption(self._largest)
        self.add_callback(self._interruption)

    def _largest(self, number: int) -> int:
        if self.args.world_size == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.args.device)).max())

    # Start

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Trains from the beginning or from a checkpoint: `resume_from_checkpoint` is one, or `True` for the last complete one in
        `output_dir` (the beginning if there is none yet).

        Raises:
            `ValueError`: If `output_dir` holds another training, or an option cannot be changed on resuming.
        """
        with ExitStack() as stack:
            answer: list[Any] = [None, None, None]
            if self.is_world_process_zero():
                try:
                    Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
                    stack.enter_context(lock_folder(self.args.output_dir))
                    answer = [*self._start_run(resume_from_checkpoint), None]
                except (OSError, ValueError) as error:  # raised below, by all processes
                    answer[2] = str(error)
            self._checkpoint, self._run, refusal = broadcast_object_list(answer)
            if refusal is not None:
                raise ValueError(refusal)
            check_shared_folder(self.args.output_dir)
            self._is_resumed = self._checkpoint is not None
            stack.enter_context(self._interruption)
            return super().train(self._checkpoint, trial, ignore_keys_for_eval)

    def _start_run(self, resume: str | bool | None) -> tuple[str | None, dict[str, Any]]:
        folder = self.args.output_dir
        checkpoint = find_start(folder, resume)
        kind = "adapter" if getattr(self.accelerator.unwrap_model(self.model), "peft_config", None) else "full"
        run = read_run(checkpoint) if checkpoint else {}
        if run and run["kind"] != kind:
            raise ValueError(
                f"{checkpoint} is of a training of kind {run['kind']!r}, not {kind!r}. Keep `peft_config`."
            )
        arguments = recorded_arguments(self.args)
        if checkpoint and run:
            run["changes"] += self._check_changes(run["arguments"], arguments, num_updates_of(checkpoint))
        run = (run or new_run(folder, kind)) | {"arguments": arguments}
        write_run(folder, run)
        return checkpoint, run

    def _check_changes(self, then: dict[str, Any], now: dict[str, Any], step: int) -> list[dict[str, Any]]:
        """The changed arguments with their old values, or an error that names one that cannot be changed."""
        changed = [name for name in now if name in then and then[name] != now[name]]
        is_stateful = any(values.get("lr_scheduler_type") in _STATEFUL_SCHEDULES for values in (then, now))
        fixed = {*self._fixed_arguments, *(("learning_rate", "lr_scheduler_type") if is_stateful else ())}
        for name in changed:
            if name in fixed or (name == "head_learning_rate" and None in (then[name], now[name])):
                raise ValueError(
                    f"`{name}` was {then[name]!r} in the run so far and is {now[name]!r} now. It cannot be changed on "
                    "resuming: use the old value, or start a new run."
                )
            logger.warning(f"`{name}` is {now[name]!r} from update {step} on; it was {then[name]!r} before.")
        return [{"name": name, "value": then[name], "until": step} for name in changed]

    # Position in the data

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        num_epochs, updates_per_epoch, num_examples, num_samples, batch_size, self._steps_in_epoch, max_steps = values
        done, self._start = 0, None
        if self._checkpoint is not None:
            done = num_updates_of(self._checkpoint)
            self._start = self._find_start(dataloader, done, updates_per_epoch)
            epoch, batches = self._start
            # Updates it would have taken with the batches of today
            seen = epoch * updates_per_epoch + batches // args.gradient_accumulation_steps
            if args.max_steps < 0:
                max_steps += done - seen
            elif has_length(dataloader):
                num_epochs = math.ceil((max_steps - done + seen) / updates_per_epoch)
        if done >= max_steps:
            num_epochs = 0  # the parent would make one more update
        return num_epochs, updates_per_epoch, num_examples, num_samples, batch_size, self._steps_in_epoch, max_steps

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, *args: Any) -> tuple[int, int]:
        start = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args)
        return start if self._start is None else self._start

    def _position(self) -> dict[str, Any]:
        """Where the run is in its data: the epoch, and how many of its rows all processes have seen."""
        total = round(self.state.epoch * self._steps_in_epoch)
        is_finite = has_length(self.train_dataset)
        epoch, batches = divmod(total, self._steps_in_epoch) if is_finite else (0, total)
        rows = batches * self._train_batch_size * self.args.world_size
        return {"epoch": epoch, "rows": rows, "num_rows": len(self.train_dataset) if is_finite else None}

    def _find_start(self, dataloader: Any, num_updates: int, updates_per_epoch: int) -> tuple[int, int]:
        """Epoch and number of batches of it to skip. Rows are counted, as the batch size may have changed."""
        position = self._run.get("position")
        if position is None or self.args.ignore_data_skip:
            epoch, updates = divmod(num_updates, updates_per_epoch)
            return epoch, 0 if self.args.ignore_data_skip else updates * self.args.gradient_accumulation_steps
        self._check_num_rows(position["num_rows"])
        batch = self._train_batch_size * self.args.world_size
        if position["rows"] % (batch * self.args.gradient_accumulation_steps):
            sizes = ", ".join(f"`{name}` {getattr(self.args, name)}" for name in _BATCH_ARGUMENTS)
            raise ValueError(
                f"The run stopped after {position['rows']} rows of an epoch, which is no whole number of updates with "
                f"{sizes} and {self.args.world_size} processes{self._old_sizes(_BATCH_ARGUMENTS)}. Use the old values."
            )
        return position["epoch"], position["rows"] // batch

    def _old_sizes(self, names: tuple[str, ...]) -> str:
        changes = [change for change in self._run["changes"] if change["name"] in names]
        return "".join(f"; `{change['name']}` was {change['value']}" for change in changes)

    def _check_num_rows(self, number: int | None) -> None:
        now = len(self.train_dataset) if has_length(self.train_dataset) else None
        if number != now:
            raise ValueError(
                f"`train_dataset` has {now} rows and had {number} in the run so far. Resume with the same dataset."
            )

    # What is configured now is used, and not what the checkpoint's optimizer remembers.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        groups = self.optimizer.param_groups
        configured = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return
        schedule = self.lr_scheduler
        groups = self.optimizer.param_groups
        schedule.base_lrs = [group["initial_lr"] for group in configured]
        schedule._last_lr = [
            base * function(schedule.last_epoch)
            for base, function in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, values, rate in zip(groups, configured, schedule._last_lr, strict=True):
            group.update(values | {"lr": rate})

    # Finite numbers

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 the gradient scaler leaves out updates whose gradients overflow.
        if not self.args.fp16 and norm is not None and not math.isfinite(norm):
            self._stop_not_finite(f"The norm of the gradient is {float(norm)}")
        if not torch.isfinite(self._tr_loss):
            self._stop_not_finite(f"The loss is {self._tr_loss.item()}")
        return norm

    def _check_finite_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                if not torch.isfinite(part).all():
                    self._stop_not_finite(f"The weight {name} is not finite")

    def _stop_not_finite(self, what: str) -> None:
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        raise ValueError(
            f"{what} at update {self.state.global_step + 1}. Nothing was saved of it; the last good checkpoint is "
            f"{checkpoint or 'none'}. Lower `learning_rate`, or look for odd rows and rewards."
        )

    # Saving

    def _save_checkpoint(self, model, trial) -> None:
        args = self.args
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if args.should_save:
            begin_folder(folder)
        self.accelerator.wait_for_everyone()
        # The parent would upload this checkpoint and delete older ones before it is complete.
        changes: dict[str, Any] = {"save_total_limit": None, "push_to_hub": False}
        if self._interruption.signum:
            changes["save_only_model"] = False
        with _changed(args, changes):
            super()._save_checkpoint(model, trial)
        self._save_training_state(folder)
        self.accelerator.wait_for_everyone()
        if args.should_save:
            if self._run:
                write_run(folder, self._run | {"position": self._position()})
            mark_complete(folder)
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            rotate_checkpoints(str(run_dir), args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_training_state(self, folder: Path) -> None:
        """Saves what else a checkpoint needs. All processes call it."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model and its card. Weights that were saved there before, in this form or the other, are replaced when
        the new ones are on disk; the folder is then marked complete.
        """
        self._check_finite_weights()
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if _internal_call and output_dir is not None:  # into a checkpoint, which is marked later
            self._export(folder)
            if self.args.should_save:
                self._save_card(folder)
            return
        with ExitStack() as stack:
            partial = folder / ".partial"
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_folder(folder))
                partial = begin_weights(folder)
            self._export(partial)
            if self.args.should_save:
                files = move_weights(partial, folder)
                self._save_card(folder)
                mark_complete(folder, files)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _export(self, folder: Path) -> None:
        """Writes the weights for users. All processes call it."""
        super().save_model(str(folder), _internal_call=True)

    def _save_samples(self, folder: Path) -> None:
        """Writes the picture of the card, if there is one."""
        raise NotImplementedError

    def _save_card(self, folder: Path) -> None:
        self._save_samples(folder)
        self._card().save(folder, model_id=Path(self.args.output_dir).absolute().name)

    def _card(self) -> Card:
        card = super()._card()
        for change in self._run.get("changes", []):
            card.values["settings"][f"{change['name']} until update {change['until']}"] = change["value"]
        return card

    # End

    def _finalize_training(self, trial, num_train_samples, start_time) -> TrainOutput:
        if not self._interruption.signum:
            return super()._finalize_training(trial, num_train_samples, start_time)
        # Not the parent's way: with `save_total_limit=1` it would delete the checkpoint that was just saved.
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        if self.is_world_process_zero():
            sys.stderr.write("interrupted; the same command with --resume_from_checkpoint true continues\n")
        raise SystemExit(128 + self._interruption.signum)


@contextmanager
def _changed(args: TrainingArguments, values: dict[str, Any]) -> Iterator[None]:
    old = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(old)
