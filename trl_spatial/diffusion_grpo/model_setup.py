"""What happens to a pipeline before it is trained: which weights learn, in which dtype."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from ..hub.errors import explain_errors
from ..hub.references import find_reference
from ..hub.safety import check_repository
from .checkpointing import check_exportable, has_adapter
from .config import DiffusionGRPOConfig
from .policies import DiffusionPolicy, SamplingOptions


def load_pipeline(name: str, dtype: torch.dtype, *, revision: str | None = None) -> DiffusionPipeline:
    """
    Loads a pipeline.

    Args:
        name (`str`):
            A folder, `org/name` or `org/name@revision` on the Hub, or `hub/NAME` for one of your own.
        dtype (`torch.dtype`):
            Type of its weights.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Raises:
        `ValueError`: If there is no such folder, or the repository holds pickles or code.
    """
    reference = find_reference(name, kind="model", revision=revision)
    check_repository(reference, kind="model")
    with explain_errors(f"Loading the pipeline {reference}"):
        return DiffusionPipeline.from_pretrained(
            reference.name, revision=reference.revision, dtype=dtype, use_safetensors=True
        )


def sampling_options(args: DiffusionGRPOConfig) -> tuple[SamplingOptions, SamplingOptions]:
    """How images are sampled in training, and in evaluation."""
    guidance_scale, negative_prompt = args.guidance_scale, args.negative_prompt
    return (
        SamplingOptions(args.height, args.width, args.num_inference_steps, guidance_scale, negative_prompt),
        SamplingOptions(
            args.eval_height, args.eval_width, args.eval_num_inference_steps, guidance_scale, negative_prompt
        ),
    )


def prepare_transformer(
    policy: DiffusionPolicy, args: DiffusionGRPOConfig, peft_config: LoraConfig | None
) -> torch.nn.Module:
    """
    Freezes a pipeline but for what is trained: new adapters, the adapters that its transformer already has, or, without
    any, the whole transformer, each without the policy's idle modules. What is trained is in float32, as bfloat16 would
    lose small updates; what is frozen keeps its dtype.

    Args:
        policy ([`DiffusionPolicy`]):
            The policy. Its transformer is changed in place.
        args ([`DiffusionGRPOConfig`]):
            Configuration of the training.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Adapters to add.

    Returns:
        `torch.nn.Module`: the transformer.

    Raises:
        `ValueError`: If the adapters cannot be exported or two sets would be stacked, if there is no reference policy
        for `beta`, or if dropout would move the ratio away from 1.
    """
    transformer = policy.transformer
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    if has_adapter(transformer):
        if peft_config is not None:
            raise ValueError(
                f"`peft_config` is set, but the transformer already has the adapters {transformer.active_adapters()}. "
                "Leave `peft_config=None` to train them further, or merge them first with `pipeline.fuse_lora()` and "
                "`pipeline.unload_lora_weights()`."
            )
        if len(transformer.peft_config) > 1:
            raise ValueError(
                f"The transformer has the adapters {sorted(transformer.peft_config)}. Only one can be trained: merge or "
                "delete the others first."
            )
        for config in transformer.peft_config.values():
            check_exportable(config)
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif peft_config is not None:
        check_exportable(peft_config)
        transformer.add_adapter(peft_config)
    else:
        transformer.requires_grad_(True)
    cast_training_params(transformer, torch.float32)
    freeze_idle_modules(policy)
    _check_dropout(transformer)
    if args.beta > 0 and not has_adapter(transformer):
        raise ValueError(
            f"`beta` is {args.beta}, but without adapters there is no reference policy: all weights are trained. Set "
            "`beta=0.0`, or train LoRA with `peft_config`."
        )
    _redirect_gradient_checkpointing(transformer)
    return transformer


def freeze_idle_modules(policy: DiffusionPolicy) -> None:
    """
    Freezes the modules of the transformer that never get a gradient. To be called again whenever adapters were enabled,
    which makes all of them trainable.

    Args:
        policy ([`DiffusionPolicy`]):
            The policy.
    """
    for name in policy.idle_modules:
        policy.transformer.get_submodule(name).requires_grad_(False)


def _check_dropout(transformer: torch.nn.Module) -> None:
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(
                f"The module `{name}` has dropout {module.p}: sampling and training would not see the same policy, and the "
                "first ratio of a rollout would not be 1. Set it to 0 (`lora_dropout` in `peft_config`)."
            )


def _redirect_gradient_checkpointing(transformer: Any) -> None:
    # `transformers.Trainer` calls one of these, by its version; diffusers has the same under another name.
    def enable(**kwargs: Any) -> None:
        transformer.enable_gradient_checkpointing()

    transformer.activation_checkpointing_enable = transformer.gradient_checkpointing_enable = enable
