"""The output folder of a training run: which run it belongs to, where the run resumes, and which weights it holds."""

import json
import logging
import re
import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hub.cards import CARD_FILE, SAMPLES_FILE, Card
from ..store import MARKER, begin_folder, check_writable, is_complete, marked_files, read_record, write_record
from .machines import check_shared_folder


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_lora_weights.safetensors",
    "transformer",
)
# Arguments for where a run writes, what it shows and how it is measured. A resumed run may change them freely. The number of steps
# in evaluation is not among them, as preference training uses their noise levels.
_FREE = re.compile(
    r"(hub|push|log|report|run|save|eval(?!_num_inference_steps)|do|dataloader|ddp|fsdp|deepspeed|output|project|trackio|disable_tqdm|resume|debug"
    r"|accelerator|parallelism|local_rank|num_logged|load_best|metric|greater|include|remove_unused|skip_memory|use_cpu"
    r"|torch_empty|length_column|dataset_num_proc|average_tokens)"
)


def check_arguments(args: TrainingArguments) -> None:
    """
    Refuses what no trainer of this package supports, before any model is loaded: an `output_dir` that cannot be written to,
    `save_on_each_node`, empty batches, and a negative number of epochs. Switches `logging_nan_inf_filter` off, because a loss
    that is not finite ends training.
    """
    if args.save_on_each_node:
        raise ValueError(
            "`save_on_each_node` is True: on a shared disk several processes would write one checkpoint. Leave it False "
            "and use an `output_dir` that all machines see."
        )
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"`{name}` is {value}. Use at least 1.")
    if args.max_steps < 0 and args.num_train_epochs < 0:
        raise ValueError(
            f"`num_train_epochs` is {args.num_train_epochs}: nothing would be trained. Use a positive number, or set `max_steps`."
        )
    args.logging_nan_inf_filter = False
    try:
        check_writable(args.output_dir)
    except ValueError as error:
        raise ValueError(f"`output_dir` is {args.output_dir}, but {error}. Name another one.") from error


def recorded_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Returns the arguments that affect what is learned, as JSON values."""
    values = {name: value for name, value in args.to_dict().items() if not _FREE.match(name)}
    return json.loads(json.dumps(values, default=str))


def recorded_adapters(adapters: dict[str, PeftConfig]) -> dict[str, Any]:
    """
    Returns the LoRA settings that decide where its weights are and how they are scaled, as the argument `peft_config`, and
    `lora_dropout`, which may change. Empty for a model without LoRA.
    """
    for config in adapters.values():
        if isinstance(config, LoraConfig):
            names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias")
            values: dict[str, Any] = {name: getattr(config, name) for name in names}
            for name in ("target_modules", "modules_to_save", "layers_to_transform"):
                value = getattr(config, name)
                values[name] = sorted(value) if isinstance(value, (set, list)) else value
            return {"peft_config": values, "lora_dropout": config.lora_dropout}
    return {}


def recorded_name(name: str | None) -> dict[str, str]:
    """Returns the name of a loaded model as an argument, without its parent folder, which may move; empty without a name."""
    return {"model_name_or_path": Path(name).name} if name else {}


# Checkpoints


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Path of the latest complete checkpoint in `output_dir`, or `None`. Later, incomplete ones are named in a warning."""
    for _, path in sorted(find_checkpoints(output_dir).items(), reverse=True):
        if is_complete(path):
            return str(path)
        logger.warning(
            "%s is incomplete: the run was stopped while writing it, or a file was lost. It is not resumed from, and can "
            "be deleted.",
            path,
        )
    return None


def find_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Returns the checkpoint folders in `output_dir` by step, complete or not."""
    matches = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*")}
    return {int(match[1]): path for path, match in matches.items() if match and path.is_dir()}


def check_complete(folder: str | Path) -> None:
    """Refuses a checkpoint that was named as the one to resume from but is missing or incomplete."""
    if not is_complete(folder):
        state = "incomplete: the run was stopped while writing it" if Path(folder).is_dir() else "not a folder"
        raise ValueError(
            f"`resume_from_checkpoint` is {str(folder)!r}, which is {state}. Use `resume_from_checkpoint=True` for the "
            "last complete one in `output_dir`."
        )


def num_updates_of(checkpoint: str | Path) -> int:
    """Number of updates after which a checkpoint was saved."""
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


# Start of a run


def find_start(output_dir: str | Path, resume: str | bool | None) -> str | None:
    """
    Returns the checkpoint that a run resumes from, or `None` for the beginning. `resume` is a checkpoint; `True` or `"true"`
    for the last complete one in `output_dir`, or the beginning if nothing was saved there yet; otherwise the beginning.

    Raises:
        `ValueError`: If the folder holds another training, or the checkpoint cannot be resumed from.
    """
    folder = Path(output_dir)
    if not resume or str(resume).lower() == "false":
        if find_checkpoints(folder) or _weights(folder):
            raise ValueError(
                f"`output_dir` is {output_dir}, which already holds a training run. Name another folder, resume that run "
                "with `resume_from_checkpoint` true, or remove it."
            )
        return None
    if str(resume).lower() == "true":
        checkpoint = last_complete_checkpoint(folder)
        if checkpoint is None:
            if _weights(folder) and (is_complete(folder) or not read_run(folder)):
                raise ValueError(
                    f"`resume_from_checkpoint` is True, but {output_dir} holds finished weights and no checkpoint. Name "
                    "another folder, or remove it."
                )
            logger.warning("There is no complete checkpoint in %s: training starts from scratch.", output_dir)
            return None
    else:
        checkpoint = str(resume)
        check_complete(checkpoint)
    _check_resumable(folder, Path(checkpoint))
    return checkpoint


def check_start(args: TrainingArguments) -> None:
    """
    Runs the checks of [`find_start`] before a model is loaded: refuses an `output_dir` that is in use or that not all machines
    see, or an unusable checkpoint.
    """
    if str(args.resume_from_checkpoint).lower() != "true":  # the last complete one is found when training starts
        find_start(args.output_dir, args.resume_from_checkpoint)
    check_shared_folder(args.output_dir)


def _check_resumable(folder: Path, checkpoint: Path) -> None:
    if not any(path.name.startswith("optimizer") for path in checkpoint.iterdir()):
        raise ValueError(
            f"{checkpoint} has no optimizer state: it was saved with `save_only_model`. Training cannot be resumed "
            "exactly from it; load its weights as the model of a new run."
        )
    own, saved = read_run(folder), read_run(checkpoint)
    if own and saved and own["id"] != saved["id"]:
        raise ValueError(
            f"{checkpoint} belongs to run {saved['id']}, but {folder} holds run {own['id']}. Name another `output_dir`."
        )
    step = num_updates_of(checkpoint)
    if later := [
        str(path) for number, path in find_checkpoints(folder).items() if number > step and is_complete(path)
    ]:
        raise ValueError(
            f"{folder} holds later checkpoints than {checkpoint}: {', '.join(sorted(later))}. Remove them, or name another "
            "`output_dir`."
        )


def read_run(folder: str | Path) -> dict[str, Any]:
    """The content of `run.json` in a run's folder or a checkpoint; empty without that file."""
    return read_record(Path(folder) / RUN_FILE)


def write_run(folder: str | Path, run: dict[str, Any]) -> None:
    """Writes `run.json`."""
    write_record(Path(folder) / RUN_FILE, run)


def new_run(folder: str | Path, kind: str) -> dict[str, Any]:
    """Makes the identity of a run, and removes what an earlier attempt left in its folder."""
    folder = Path(folder)
    if read_run(folder):
        card, readme = Card.load(folder), folder / "README.md"
        if card and readme.is_file() and card.has_made(readme):
            readme.unlink()
        for name in (CARD_FILE, SAMPLES_FILE, "before_after.json", MARKER):
            (folder / name).unlink(missing_ok=True)
        for path in (folder / "images", *find_checkpoints(folder).values(), *_weights(folder)):
            _remove(path)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"id": uuid.uuid4().hex, "kind": kind, "started": started, "changes": []}


# Weights


def move_weights(source: Path, folder: Path) -> list[str]:
    """
    Moves newly saved files from `source`, which is then removed, into a folder, in place of those that were saved there before
    in any form, and returns their names. Until it is marked complete, the folder does not count as a result.
    """
    earlier = marked_files(folder) or {}
    files = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    (folder / MARKER).unlink(missing_ok=True)
    for path in (*(folder / name for name in earlier), *_weights(folder)):
        _remove(path)
    for path in source.iterdir():
        _remove(folder / path.name)
        path.replace(folder / path.name)
    source.rmdir()
    return files


def begin_weights(folder: Path) -> Path:
    """
    Makes the folder to which new weights are written before they replace those in `folder`. Refuses to replace weights that
    no trainer of this package wrote.
    """
    if _weights(folder) and not (folder / MARKER).is_file() and not read_run(folder):
        raise ValueError(f"{folder} holds weights that this trainer did not write. Save to another folder.")
    partial = folder / ".partial"
    begin_folder(partial)
    return partial


def _weights(folder: Path) -> list[Path]:
    return [path for pattern in _WEIGHTS for path in folder.glob(pattern)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
