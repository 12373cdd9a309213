"""Loads, checks and prepares a model for training."""

from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoConfig, BitsAndBytesConfig

from ..hub.references import find_reference
from ..hub.safety import check_repository
from ..training.machines import download_on_each_machine
from ..training.run_folder import recorded_name
from .config import GaussianRewardConfig
from .data import PreferencePairs
from .modeling import GaussianRewardModel, GaussianRewardModelConfig
from .processing import SpatialScoreProcessor, load_processor


def resolve_model(
    model: str | GaussianRewardModel | PeftModel,
    args: GaussianRewardConfig,
    processor: SpatialScoreProcessor | None,
    *,
    is_adapted: bool,
    quantization_config: BitsAndBytesConfig | None = None,
) -> tuple[GaussianRewardModel | PeftModel, SpatialScoreProcessor]:
    """
    Loads the model if it was given by name, as a backbone or a whole reward model, and its processor if none was given. With
    `is_adapted`, the model will get adapters, so its own weights may keep their dtype.

    Raises:
        `TypeError`: If the model or the processor is of another class.
        `ValueError`: If there is no such model, it holds pickles or code, it is an adapter, it does not fit the processor, or
        a setting is given twice.
    """
    name, revision = (model.config._name_or_path, None) if not isinstance(model, str) else _find_model(model, args)
    if processor is None:
        if not name:
            raise ValueError(
                "The model has no name or path to load its processor from. Pass `processing_class`, the processor it was "
                "built with."
            )
        processor = load_processor(name, revision=revision, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    elif not isinstance(processor, SpatialScoreProcessor):
        raise TypeError(
            f"`processing_class` must be a `SpatialScoreProcessor`, got `{type(processor).__name__}`. Load one with "
            "`load_processor(model_name)`, or leave it `None`."
        )
    elif args.min_pixels is not None or args.max_pixels is not None:
        raise ValueError(
            f"`min_pixels` is {args.min_pixels} and `max_pixels` is {args.max_pixels}, but the processor you passed has "
            "its own limits. Set them where you load it: `load_processor(..., min_pixels=, max_pixels=)`."
        )
    if isinstance(model, str):
        kwargs = {**(args.model_init_kwargs or {}), "revision": revision}
        if kwargs.get("dtype") is None:
            # Full training in bfloat16 would lose the small updates.
            kwargs["dtype"] = "auto" if is_adapted else "float32"
        if quantization_config is not None:
            if kwargs.get("quantization_config") is not None:
                raise ValueError(
                    "You set `quantization_config` both as a trainer argument and in `args.model_init_kwargs`. "
                    "Please set it in only one place, preferably as a trainer argument."
                )
            kwargs["quantization_config"] = quantization_config
        model = _load_model(name, kwargs, reward_token_id=processor.reward_token_id, seed=args.seed)
    _check_model(model, processor)
    return model, processor


def _find_model(name: str, args: GaussianRewardConfig) -> tuple[str, str | None]:
    """Returns the folder or Hub id, and the revision, of a named model."""
    revision = (args.model_init_kwargs or {}).get("revision")
    # `--model_revision` defaults to "main", which must not contradict ORG/NAME@REVISION
    reference = find_reference(name, kind="model", revision=None if revision == "main" else revision)
    check_repository(reference, kind="model")
    return reference.name, reference.revision or revision


def _load_model(name: str, kwargs: dict[str, Any], *, reward_token_id: int, seed: int) -> GaussianRewardModel:
    """Builds a reward model on a backbone, or loads a whole reward model."""
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} holds an adapter. To train it further, pass the model with the adapter on it: "
            "`PeftModel.from_pretrained(GaussianRewardModel.from_backbone(...), adapter_folder, is_trainable=True)`."
        )
    if not Path(name).exists():
        patterns = ["*.json", "*.jinja", "*.safetensors", "*.txt"]
        download_on_each_machine(lambda: snapshot_download(name, revision=kwargs["revision"], allow_patterns=patterns))
    config = AutoConfig.from_pretrained(name, revision=kwargs["revision"], trust_remote_code=False)
    if isinstance(config, GaussianRewardModelConfig):
        return GaussianRewardModel.from_pretrained(name, **kwargs)
    return GaussianRewardModel.from_backbone(name, reward_token_id=reward_token_id, seed=seed, **kwargs)


def _check_model(model: Any, processor: SpatialScoreProcessor) -> None:
    """Checks that the model is a reward model and reads its score where the processor writes the reward token."""
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base_model, GaussianRewardModel):
        raise TypeError(
            f"`model` must be a name, a `GaussianRewardModel` or a `PeftModel` of one, got "
            f"`{type(base_model).__name__}`. Build one with `GaussianRewardModel.from_backbone`."
        )
    if base_model.config.reward_token_id != processor.reward_token_id:
        raise ValueError(
            f"The model reads its score at token {base_model.config.reward_token_id}, but the processor writes token "
            f"{processor.reward_token_id}. Pass the processor the model was built with."
        )


def copy_trained_parameters(model: GaussianRewardModel | PeftModel) -> dict[str, torch.Tensor]:
    """Copies the trainable parameters of an already trained adapter, for [`restore_fp32`]."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def resolved_settings(
    model: GaussianRewardModel | PeftModel,
    processor: SpatialScoreProcessor,
    train_dataset: PreferencePairs | IterableDataset,
    *,
    num_workers: int,
) -> dict[str, Any]:
    """Settings that a run records for resuming (see [`~training.base.BaseTrainer`]), read from the loaded objects."""
    base_model: GaussianRewardModel = model.get_base_model() if isinstance(model, PeftModel) else model
    config, size = base_model.config, processor.image_processor.size
    bits = next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)
    settings = recorded_name(config._name_or_path) | {
        "dtype": str(base_model.backbone.dtype).removeprefix("torch."),
        "quantization_config": bits and f"{bits} bits",
        "attn_implementation": base_model.backbone.config._attn_implementation,
        "chat_template": processor.chat_template,
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "head_hidden_sizes": list(config.head_hidden_sizes),
        "log_std_min": config.log_std_min,
        "log_std_max": config.log_std_max,
    }
    if isinstance(train_dataset, PreferencePairs):
        return settings | {"use_reverse_pairs": train_dataset.use_reverse_pairs}
    # Workers divide the shards of a stream and take turns; with 0 workers, the main process is the only reader.
    return settings | {"dataloader_num_workers": max(1, min(num_workers, train_dataset.num_shards))}


@torch.no_grad()
def restore_fp32(model: GaussianRewardModel | PeftModel, trained: dict[str, torch.Tensor]) -> None:
    """
    Undoes TRL's cast of a quantized model's trainable parameters to bfloat16, with their values from
    [`copy_trained_parameters`]. An update at a learning rate of 2e-6 is smaller than bfloat16 can add to a weight of 1e-3, so
    nothing would be learned.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.data = param.data.float()
            if name in trained:
                param.copy_(trained[name])
