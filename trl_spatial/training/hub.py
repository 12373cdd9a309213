"""Uploads of a trainer: the model and its card, during training and at the end."""

from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api

from ..hub.cards import Card
from ..hub.checkpoints import Kind, collect_files, find_kind, is_local_name, lacks_base_model
from ..hub.errors import HubError
from ..hub.references import find_repository
from ..hub.upload import create_repository, push_files
from .processes import fail_together


logger = get_logger(__name__)
_version = cache(version)  # which reads it from a file each time


class HubTrainer(Trainer):
    """
    A [`~transformers.Trainer`] that uploads what it trains.

    It uploads what [`~hub.checkpoints.collect_files`] collects: weights as safetensors, their settings and a card; no pickle,
    no local path, no training state. So training cannot resume from a folder on the Hub, not even `last-checkpoint`, but only
    from a local checkpoint. With `save_total_limit`, saving waits until the previous checkpoint is uploaded, as its folder may
    be deleted.

    A subclass implements `_build_card` and sets `_kinds`, the kinds of folder that it saves.

    Attributes:
        dataset_name (`str`, *optional*):
            Id of the training dataset on the Hub, for the card: a dataset does not know where it is from.
        eval_dataset_name (`str`, *optional*):
            Id of the dataset that is evaluated on.
    """

    dataset_name: str | None = None
    eval_dataset_name: str | None = None
    _is_resumed = False
    _kinds: tuple[Kind, ...]

    def _build_card(self) -> Card:
        """Builds the card with what the subclass knows about the model so far, including `settings` among its values."""
        raise NotImplementedError

    def _card(self) -> Card:
        """Completes the card with what all trainers know."""
        card = self._build_card()
        device = self.args.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        # the time is unknown during training, and after it was resumed
        seconds = next((log["train_runtime"] for log in self.state.log_history if "train_runtime" in log), None)
        values = {
            "settings": {name: value for name, value in card.values["settings"].items() if value is not None},
            "trainer_name": type(self).__name__,
            "hardware": f"{self.args.world_size} × {name}",
            "training_time": None if seconds is None or self._is_resumed else format_seconds(seconds),
            "versions": {package: _version(package) for package in card.values["versions"]},
        }
        tags = sorted({"generated_from_trainer", *card.front_matter.get("tags", ()), *self._tag_names})
        return replace(
            card,
            front_matter=card.front_matter | {"tags": tags},
            values=card.values | values,
            # a local path means nothing to others
            base_model=None if not card.base_model or is_local_name(card.base_model) else card.base_model,
            dataset=self.dataset_name,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        args = self.args
        token = args.hub_token if token is None else token
        private = args.hub_private_repo if private is None else private
        # At the start of all processes; later one may upload by itself
        with fail_together("Creating the repository on the Hub") if args.push_to_hub else nullcontext():
            if self.is_world_process_zero():
                name = args.hub_model_id or Path(args.output_dir).absolute().name
                self.hub_model_id = find_repository(name, kind="model", token=token)
                create_repository(self.hub_model_id, private=private, token=token)
        if args.push_to_hub:
            (self.hub_model_id,) = broadcast_object_list([self.hub_model_id])
        if not self.is_world_process_zero():
            return
        self.push_in_progress = None
        if args.hub_strategy == HubStrategy.CHECKPOINT:
            logger.warning(
                "With `hub_strategy='checkpoint'` the folder `last-checkpoint` on the Hub holds only the model: what "
                "training resumes from is not uploaded. Resume from `output_dir`."
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | Future | None:
        """
        Saves the model and uploads it with its card to the repository `self.hub_model_id`. Further arguments are those of
        [`create_model_card`]; by default token, branch and visibility are those of `args`.

        Returns:
            `str`: address of the commit; a `Future` of it if not `blocking`; `None` on all but the first process.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        job = self._upload(self.args.output_dir, commit_message or "End of training", token=token, revision=revision)
        return job.result() if blocking else job

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, **kwargs: Any) -> None:
        """
        Writes `card.json` and `README.md` with what is known of the model. `model_name` is what users load, by default the name of the
        output folder; `tags` and `license` go into the front matter.
        """
        if not self.is_world_process_zero():
            return
        if dataset_name is not None:
            self.dataset_name = dataset_name
        if unknown := set(kwargs) - {"tags", "license"}:
            raise TypeError(
                f"The card takes `model_name`, `dataset_name`, `tags` and `license`, not {sorted(unknown)}."
            )
        card = self._card()
        tags = [kwargs["tags"]] if isinstance(kwargs.get("tags"), str) else list(kwargs.get("tags") or [])
        card.front_matter["tags"] = sorted({*card.front_matter["tags"], *tags})
        if kwargs.get("license"):
            card.front_matter["license"] = kwargs["license"]
        card.save(self.args.output_dir, model_id=model_name)

    def _upload(
        self,
        folder: str,
        message: str,
        *,
        path_in_repo: str = "",
        token: str | None = None,
        revision: str | None = None,
    ) -> Future:
        files = collect_files(folder, self.hub_model_id, kind=find_kind(folder, self._kinds))
        if lacks_base_model(files):
            logger.warning_once(
                "The model was trained from a local copy of its base model, whose path is not uploaded: anyone who loads it has to "
                "name the base model. `trl_spatial push RUN --base_model ORG/NAME` adds the name."
            )
        return hf_api().run_as_future(
            push_files,
            files,
            self.hub_model_id,
            message=message,
            path_in_repo=path_in_repo,
            private=(Path(self.args.output_dir),),
            token=self.args.hub_token if token is None else token,
            revision=self.args.hub_revision if revision is None else revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The parent uploads from `output_dir`, whose files the next save would change during the upload, and it uploads
        # pickles with the model: the training arguments, the states of the optimizer and of the random generators.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.args.save_total_limit is not None:
            self._finish_current_push()  # its folder may be deleted next
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(checkpoint_folder, message)]
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            jobs.append(self._upload(checkpoint_folder, f"{message}, checkpoint", path_in_repo="last-checkpoint"))
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            folder = Path(checkpoint_folder).name
            jobs.append(self._upload(checkpoint_folder, f"{message}, checkpoint", path_in_repo=folder))
        for job in jobs:
            job.add_done_callback(_warn_of_failed_upload)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress(jobs)
        else:
            self.push_in_progress.jobs.extend(jobs)
        if self.args.save_total_limit == 1 and self.state.best_model_checkpoint is not None:
            self._finish_current_push()  # the end of training deletes every folder but the best one's


def dataset_split(dataset: Any) -> str | None:
    """Name of a dataset's split, or `None`."""
    return str(dataset.split) if isinstance(dataset, Dataset) and dataset.split is not None else None


def format_seconds(seconds: float) -> str:
    """`3725` → `1 h 2 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


def _warn_of_failed_upload(upload: Future) -> None:
    if error := upload.exception():
        reason = error if isinstance(error, (HubError, ValueError)) else f"{type(error).__name__}: {error}"
        logger.warning(f"A checkpoint was not uploaded to the Hub; training continues: {reason}")
