"""What the trainer does with a model before it trains it."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, BitsAndBytesConfig

from ..hub.references import find_reference
from ..hub.safety import check_repository
from .modeling import GaussianRewardModel, GaussianRewardModelConfig
from .processing import SpatialScoreProcessor


def find_model(name: str, model_init_kwargs: dict[str, Any]) -> tuple[str, str | None]:
    """
    Says which folder or repository a model's name means, see [`~hub.references.find_reference`].

    Returns:
        `tuple[str, str | None]`: folder or Hub id, and revision.

    Raises:
        `ValueError`: If the name says nothing, or the repository holds pickles or code.
    """
    revision = model_init_kwargs.get("revision")
    # the default of `--model_revision` is not an opinion
    reference = find_reference(name, kind="model", revision=None if revision == "main" else revision)
    check_repository(reference, kind="model")
    return reference.name, reference.revision or revision


def load_trainable_model(
    name: str,
    model_init_kwargs: dict[str, Any],
    *,
    reward_token_id: int,
    seed: int,
    is_adapted: bool,
    quantization_config: BitsAndBytesConfig | None = None,
) -> GaussianRewardModel:
    """
    Builds a reward model on a backbone, or loads a whole reward model.

    Args:
        name (`str`):
            Folder or Hub id.
        model_init_kwargs (`dict[str, Any]`):
            Keyword arguments of [`GaussianRewardModel.from_backbone`].
        reward_token_id (`int`):
            Id of the reward token.
        seed (`int`):
            Seed of the head's initial weights.
        is_adapted (`bool`):
            Whether the model will get adapters, so that its own weights are not trained and may keep their type.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantizes the language model.

    Raises:
        `ValueError`: If there are two quantization configurations, or the folder holds an adapter.
    """
    kwargs = dict(model_init_kwargs)
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
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} holds an adapter. To train it further, pass the model with the adapter on it: "
            "`PeftModel.from_pretrained(GaussianRewardModel.from_backbone(...), adapter_folder, is_trainable=True)`."
        )
    config = AutoConfig.from_pretrained(name, revision=kwargs.get("revision"))
    if isinstance(config, GaussianRewardModelConfig):
        return GaussianRewardModel.from_pretrained(name, **kwargs)
    return GaussianRewardModel.from_backbone(name, reward_token_id=reward_token_id, seed=seed, **kwargs)


def check_model(model: Any, processor: SpatialScoreProcessor) -> None:
    """
    Checks that the model is a reward model and fits the processor.

    Raises:
        `TypeError`: If it is another model.
        `ValueError`: If the two disagree about the reward token.
    """
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
    """Copies the trainable parameters of an adapter that was trained before, for [`restore_fp32`]."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


@torch.no_grad()
def restore_fp32(model: GaussianRewardModel | PeftModel, trained: dict[str, torch.Tensor]) -> None:
    """
    Undoes the cast of a quantized model's trainable parameters to bfloat16, as TRL does it. An update at a learning
    rate of 2e-6 is smaller than what bfloat16 can add to a weight of 1e-3: training would stand still.

    Args:
        model ([`GaussianRewardModel`] or [`~peft.PeftModel`]):
            The model; one that is not quantized is left as it is.
        trained (`dict[str, torch.Tensor]`):
            Values before the cast, from [`copy_trained_parameters`].
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.data = param.data.float()
            if name in trained:
                param.copy_(trained[name])
