"""Code shared by all trainers: a run's folder, complete checkpoints, resuming, finite numbers and signals."""

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, has_length, rotate_checkpoints

from ..hub.cards import Card
from ..store import begin_folder, lock_folder, mark_complete
from .hub import HubTrainer
from .interruption import Interruption
from .machines import check_shared_folder
from .processes import fail_together
from .run_folder import (
    begin_weights,
    find_start,
    last_complete_checkpoint,
    move_weights,
    new_run,
    num_updates_of,
    read_run,
    recorded_adapters,
    recorded_arguments,
    write_run,
)


logger = get_logger(__name__)

_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
_BATCH_ARGUMENTS = ("per_device_train_batch_size", "gradient_accumulation_steps")


class BaseTrainer(HubTrainer):
    """
    A [`~transformers.Trainer`] whose runs can be interrupted anywhere.

    - A run has its own folder, with its identity in `run.json`. A used folder is refused unless the run resumes, and so is
      a second process that writes to it.
    - Checkpoints and final weights are marked when they are complete. Others are never resumed from.
    - A resumed run uses the options that it is given, or refuses them by name. The card states what was used, and when.
    - A loss, gradient or weight that is not finite ends training; such weights are never saved.
    - SIGTERM and SIGINT end training after the current update, with a checkpoint.
    - In its process, PyTorch does not choose cuDNN's attention kernel, whose gradients can be wrong.

    A subclass implements `_resolved_settings`, `_save`, `_save_samples` and `_build_card`.
    """

    # Arguments that a resumed run cannot change: the order of the data and the optimizer's state depend on them.
    # Adapters with another scale or in other places make another model, and so does another chat template.
    # A model's name may change because its folder was renamed, and its quantization to save memory: both cause a warning.
    _fixed_arguments: tuple[str, ...] = (
        "seed", "data_seed", "optim", "optim_args", "train_sampling_strategy", "peft_config", "chat_template",
    )  # fmt: skip
    _run: dict[str, Any] = {}
    _checkpoint: str | None = None
    _steps_in_epoch = 1

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # On Hopper, PyTorch prefers cuDNN's kernel since 2.11. Its backward pass gave NaN on small FLUX transformers, and read out
        # of bounds on the full-size one (H200, PyTorch 2.11). Code that names that kernel still gets it.
        torch.backends.cuda.enable_cudnn_sdp(False)
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
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", None)
        kind = "adapter" if adapters else "full"
        run = read_run(checkpoint) if checkpoint else {}
        if run and run["kind"] != kind:
            raise ValueError(
                f"{checkpoint} is from a training run of kind {run['kind']!r}, not {kind!r}. Keep `peft_config`."
            )
        trainer = type(self).__name__
        if (other := run.get("trainer", trainer)) != trainer:  # runs of version 0.1 do not record it
            raise ValueError(
                f"{checkpoint} was saved by a `{other}`, and this is a `{trainer}`. Resume with that one, or name another "
                "`output_dir`; this one can start from its weights."
            )
        arguments = recorded_arguments(self.args) | recorded_adapters(adapters or {}) | self._resolved_settings()
        if checkpoint and run:
            run["changes"] += self._check_changes(run["arguments"], arguments, num_updates_of(checkpoint))
        run = (run or new_run(folder, kind)) | {"trainer": trainer, "arguments": arguments}
        write_run(folder, run)
        return checkpoint, run

    def _resolved_settings(self) -> dict[str, Any]:
        """
        Settings of the loaded model and data that `args` may leave to defaults, as JSON values keyed by the options that set
        them.
        """
        raise NotImplementedError

    def _check_changes(self, then: dict[str, Any], now: dict[str, Any], step: int) -> list[dict[str, Any]]:
        """Returns the changed arguments with their old values. Raises an error that names one that cannot be changed."""
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
        if has_length(dataloader) and len(dataloader) == 0:
            raise ValueError(
                f"`train_dataset` gives {len(self.train_dataset)} examples, fewer than the {self._train_batch_size} of a batch on each of "
                f"{args.world_size} processes, and `dataloader_drop_last` leaves them out: nothing would be trained. Set it to "
                "False, or lower `per_device_train_batch_size`."
            )
        values = super().set_initial_training_values(args, dataloader)
        num_epochs, updates_per_epoch, num_examples, num_samples, batch_size, self._steps_in_epoch, max_steps = values
        done, self._start = 0, None
        if self._checkpoint is not None:
            done = num_updates_of(self._checkpoint)
            self._start = self._find_start(dataloader, done, updates_per_epoch)
            epoch, batches = self._start
            # Updates it would have taken with the current batch size
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
        """The run's position in its data: the epoch, and how many of its rows all processes together have seen."""
        total = round(self.state.epoch * self._steps_in_epoch)
        is_finite = has_length(self.train_dataset)
        epoch, batches = divmod(total, self._steps_in_epoch) if is_finite else (0, total)
        rows = batches * self._train_batch_size * self.args.world_size
        return {"epoch": epoch, "rows": rows, "num_rows": len(self.train_dataset) if is_finite else None}

    def _find_start(self, dataloader: Any, num_updates: int, updates_per_epoch: int) -> tuple[int, int]:
        """Returns the epoch, and how many of its batches to skip. Counts rows, as the batch size may have changed."""
        position = self._run.get("position")
        if position is None or self.args.ignore_data_skip:
            epoch, updates = divmod(num_updates, updates_per_epoch)
            return epoch, 0 if self.args.ignore_data_skip else updates * self.args.gradient_accumulation_steps
        self._check_num_rows(position["num_rows"])
        batch = self._train_batch_size * self.args.world_size
        if position["rows"] % (batch * self.args.gradient_accumulation_steps):
            sizes = ", ".join(f"`{name}` {getattr(self.args, name)}" for name in _BATCH_ARGUMENTS)
            raise ValueError(
                f"The run stopped after {position['rows']} examples of an epoch, which is not a whole number of updates with "
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
                f"`train_dataset` gives {now} examples and gave {number} in the run so far. Resume with the same dataset."
            )

    # Uses the current configuration, not the one stored with the checkpoint's optimizer.
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
        # With fp16, the gradient scaler skips updates whose gradients overflow.
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
            f"{what} at update {self.state.global_step + 1}. Nothing from it was saved; the last good checkpoint is "
            f"{checkpoint or 'none'}. Lower `learning_rate`, or look for unusual rows and rewards."
        )

    # Saving

    @contextmanager
    def _saving(self, folder: Path) -> Iterator[None]:
        """Context for writing a folder. An error, such as a full disk, names the folder and the last complete checkpoint."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch's and safetensors' writers raise their own
            checkpoint = last_complete_checkpoint(self.args.output_dir)
            raise OSError(
                f"Saving to {folder} failed: {str(error).rstrip('.')}. The last complete checkpoint is {checkpoint or 'none'}. "
                "Make room on the disk, then continue with `resume_from_checkpoint` true."
            ) from error

    def _save_together(
        self, doing: str = "Saving a checkpoint", *, exchanges_weights: bool = False
    ) -> AbstractContextManager:
        """
        Context in which all processes save, see [`~training.processes.fail_together`]. `exchanges_weights` says that weights are
        written, for which processes with sharded weights wait for each other.
        """
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return fail_together(doing, is_collective=exchanges_weights and is_sharded)

    def _save_checkpoint(self, model, trial) -> None:
        args = self.args
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._save_together(), self._saving(folder):
            if args.should_save:
                begin_folder(folder)
        # The parent would upload this checkpoint and delete older ones before it is complete.
        changes: dict[str, Any] = {"save_total_limit": None, "push_to_hub": False}
        if self._interruption.signum:
            changes["save_only_model"] = False
        with self._save_together(exchanges_weights=True), self._saving(folder):
            with _changed(args, changes):
                super()._save_checkpoint(model, trial)
            self._save_training_state(folder)
        self.accelerator.wait_for_everyone()
        with self._save_together(), self._saving(folder):
            if args.should_save:
                if self._run:
                    write_run(folder, self._run | {"position": self._position()})
                mark_complete(folder)
        with self._save_together("Uploading a checkpoint or deleting an older one"):
            if args.push_to_hub:
                self._push_from_checkpoint(str(folder))
            if args.should_save:
                rotate_checkpoints(
                    str(run_dir), args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
                )

    def _save_training_state(self, folder: Path) -> None:
        """Saves whatever else a checkpoint needs. Called by all processes."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model and its card. Weights that were saved there before, in either form, are replaced once the new ones
        are on disk; the folder is then marked complete.
        """
        self._check_finite_weights()
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if _internal_call and output_dir is not None:  # into a checkpoint, which is marked later
            # Of its own, as the parent's next step may be to wait for the others
            with self._save_together("Saving the weights", exchanges_weights=True):
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
            with self._saving(folder):
                self._export(partial)
            if self.args.should_save:
                files = move_weights(partial, folder)
                self._save_card(folder)
                mark_complete(folder, files)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _export(self, folder: Path) -> None:
        """Writes the weights for users. Called by all processes."""
        super().save_model(str(folder), _internal_call=True)

    def _save_samples(self, folder: Path) -> None:
        """Writes the card's picture, if there is one."""
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
        # Not the parent's method: with `save_total_limit=1`, it would delete the checkpoint that was just saved.
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        if self.is_world_process_zero():
            sys.stderr.write("interrupted; run the same command with --resume_from_checkpoint true to continue\n")
        raise SystemExit(128 + self._interruption.signum)


@contextmanager
def _changed(args: TrainingArguments, values: dict[str, Any]) -> Iterator[None]:
    old = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(old)
