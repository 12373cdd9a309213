"""The folder of a reward model: finding, checking, loading and saving it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from ..hub.errors import call_with_retries, explain_errors
from ..hub.references import Reference, UnknownReferenceError, find_reference
from ..hub.safety import PICKLE_SUFFIXES, check_repository
from .modeling import GaussianRewardModel, GaussianRewardModelConfig, keep_input_types
from .processing import SpatialScoreProcessor
from .weights import check_finite, check_types


ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
)
_NAME_BACKBONE = "Name that model with `backbone=`, or `--backbone` of `trl_spatial score`, `serve` or `merge`."


def find_checkpoint(name_or_path: str | Path, revision: str | None = None) -> Path:
    """
    Finds the folder of a reward model, `hub/NAME` included, downloads it if it is on the Hub, and checks that all files that
    loading needs are there and can be read.

    Raises:
        `ValueError`: If it is not the folder of a reward model, or a file is missing or damaged.
        [`~hub.safety.UnsafeRepositoryError`]: If it holds pickles or code.
        `HubError`: If a repository is not there, may not be read, or cannot be reached.
    """
    reference = find_reference(name_or_path, kind="model", revision=revision)
    check_repository(reference, kind="model")
    folder = Path(reference.name) if reference.is_local else _download(reference, ["*.json", "*.jinja"])
    if not folder.is_dir():
        raise ValueError(f"{name_or_path} is a file. Name the folder of a checkpoint.")
    _check_small_files(reference.name, folder)
    if not reference.is_local:
        # only the downloaded settings show whether they name code
        check_repository(Reference(str(folder), None, is_local=True), kind="model")
        folder = _download(reference, ["*.json", "*.jinja", "*.safetensors"])
    _check_weight_files(name_or_path, folder)
    return folder


def _download(reference: Reference, patterns: list[str]) -> Path:
    with explain_errors(f"Downloading {reference}"):
        folder = call_with_retries(
            snapshot_download,
            reference.name,
            revision=reference.revision,
            allow_patterns=patterns,
            local_files_only=constants.is_offline_mode(),
            has_fallback=True,  # the cache
        )
    return Path(folder)


def _check_small_files(name_or_path: str | Path, folder: Path) -> None:
    missing = [name for name in SMALL_FILES if not (folder / name).is_file()]
    config = {} if "config.json" in missing else _read_json(folder / "config.json")
    if config.get("model_type", "") not in ("", GaussianRewardModelConfig.model_type):
        raise ValueError(
            f"{name_or_path} is a {config['model_type']} model, not a reward model. Train one on it with `trl_spatial "
            "reward`."
        )
    if missing:
        raise ValueError(f"{name_or_path} is not the folder of a reward model: it lacks {', '.join(missing)}.")
    for name in (*SMALL_FILES, "adapter_config.json"):
        if name.endswith(".json") and (folder / name).is_file():
            _read_json(folder / name)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # invalid JSON or UTF-8
        raise ValueError(f"{file} is damaged: {error}. Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(content).__name__}, not an object. Copy it again.")
    return content


def _check_weight_files(name_or_path: str | Path, folder: Path) -> None:
    index_file = folder / WEIGHTS_INDEX
    if (folder / "adapter_config.json").is_file():
        needed = [ADAPTER_WEIGHTS]
    elif index_file.is_file():
        needed = sorted(set(_read_json(index_file)["weight_map"].values()))
    else:
        needed = [WEIGHTS]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        found = f" It holds {', '.join(pickles)}, but pickle files can run code and are never read." if pickles else ""
        raise ValueError(f"{name_or_path} lacks {', '.join(missing)}.{found} Save the model again as safetensors.")
    check_types(folder / name for name in needed)


def fingerprint(folder: Path, *settings: str) -> str:
    """
    A short identifier of a checkpoint and of further settings that affect its scores, so that scores of two models are never
    mistaken for those of one. Only both ends of each weight file are read, as training changes weights everywhere.
    """
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in sorted(path for pattern in ("*.safetensors", "*config.json") for path in folder.glob(pattern)):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
            file.seek(-min(path.stat().st_size, 2**20), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:12]


def load_adapter(folder: Path, config: Any, backbone: str | Path | None, **loading: Any) -> PeftModel:
    """
    Loads the adapter in a folder from [`find_checkpoint`] on its backbone: the one that is given, or that it was trained on.
    `loading` holds arguments of [`GaussianRewardModel.from_backbone`]: dtype, devices, attention and quantization.

    Raises:
        `ValueError`: If the backbone cannot be loaded, or the weights are not finite or of another model.
    """
    peft_config = PeftConfig.from_pretrained(folder, inference_mode=True)
    recorded = peft_config.base_model_name_or_path
    if backbone is None and recorded is None:
        raise ValueError(f"The adapter does not say which model it was trained on. {_NAME_BACKBONE}")
    try:
        if backbone is None:
            reference = find_reference(recorded, kind="model", revision=config.backbone_revision)
        else:
            reference = find_reference(backbone, kind="model")
        peft_config.base_model_name_or_path = reference.name
        model = GaussianRewardModel.from_backbone(
            reference.name,
            reward_token_id=config.reward_token_id,
            revision=reference.revision,
            head_hidden_sizes=config.head_hidden_sizes,
            head_dropout=config.head_dropout,
            log_std_min=config.log_std_min,
            log_std_max=config.log_std_max,
            **loading,
        )
    except (OSError, UnknownReferenceError) as error:
        if backbone is not None:
            raise
        raise ValueError(
            f"The adapter was trained on {recorded}, which cannot be loaded from here ({error}) {_NAME_BACKBONE}"
        ) from error
    model = get_peft_model(model, peft_config)
    file = folder / ADAPTER_WEIGHTS
    tensors = load_file(file)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{file} lacks {len(missing)} weights ({', '.join(missing[:5])}) and holds {len(unexpected)} that do not "
            f"belong ({', '.join(unexpected[:5])}): it is damaged or belongs to another model."
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{file} does not fit its backbone {reference}: {name} has the shape {tuple(tensor.shape)}, not "
                f"{tuple(expected[name].shape)}, so it was trained on another model. {_NAME_BACKBONE}"
            )
    check_finite(file, tensors.items())
    set_peft_model_state_dict(model, tensors)
    keep_input_types(model)
    return model


def save_checkpoint(
    model: GaussianRewardModel | PeftModel,
    processor: SpatialScoreProcessor,
    folder: str | Path,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    Writes the folder that [`SpatialScore.from_pretrained`] loads: config, weights as safetensors, processor. For a PEFT model,
    only the adapter, the head and the reward token are written. `state_dict` holds weights gathered from several processes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.get_base_model().config.save_pretrained(folder)
        readme = folder / "README.md"
        text = readme.read_bytes() if readme.is_file() else None
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        # PEFT writes an unfilled template as the card, with the backbone's local path in it
        readme.unlink(missing_ok=True)
        if text is not None:
            readme.write_bytes(text)
    else:
        model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)
