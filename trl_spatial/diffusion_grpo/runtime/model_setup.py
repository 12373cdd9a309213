"""Prepares a pipeline for training: how it is loaded, which weights are trained, and in which dtype."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.training_utils import cast_training_params
from diffusers.utils import is_bitsandbytes_available
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from ...hub.errors import explain_errors
from ...hub.references import find_reference
from ...hub.safety import check_repository
from ...training.machines import download_on_each_machine
from ...training.quantization import nf4_config
from ...training.run_folder import recorded_name
from ..config import DiffusionGRPOConfig
from ..online_config import OnlineConfig
from ..policies import DiffusionPolicy, SamplingOptions
from .activations import transformer_blocks
from .adapters import adapt_to_inputs
from .base_config import DiffusionConfig
from .checkpointing import check_exportable, has_adapter
from .processes import is_fsdp_launch
from .recomputation import enable_checkpointing


# Maximum number of graphs that a kind of block may be compiled to
_MAX_GRAPHS = 64
# bitsandbytes' classes of quantized weights
_QUANTIZED_WEIGHTS = {"Params4bit", "Int8Params"}


def quantization_config(
    method: str | None, dtype: torch.dtype, *, text_encoders: Iterable[str] = ()
) -> PipelineQuantizationConfig | None:
    """
    Makes the configuration for diffusers to quantize components with bitsandbytes while loading them; `None` if none are to
    be quantized. The VAE never is, because it is small.

    The transformer is quantized by `method`: `"nf4"` (4 bits), `"int8"`, or `None`; its layers compute in `dtype`.
    Text encoders, named by [`large_text_encoders`], are quantized to NF4, not to 8 bits: an 8-bit model leaves a copy of
    its weights on the accelerator when it is moved away.

    Raises `ValueError` if there is no such method, `RuntimeError` if the transformer is to be quantized and there is no
    GPU, which diffusers needs for it, and `ImportError` if bitsandbytes is not installed.
    """
    encoders = list(text_encoders)
    if method not in (None, "nf4", "int8"):
        raise ValueError(f"The quantization is {method!r}. Use 'nf4' or 'int8'.")
    if method is None and not encoders:
        return None
    option = {None: "--load_text_encoders_in_4bit", "nf4": "--load_in_4bit", "int8": "--load_in_8bit"}[method]
    if not is_bitsandbytes_available():
        raise ImportError(f"`{option}` needs bitsandbytes: `pip install 'trl-spatial[quant]'`.")
    # transformers and diffusers each have their own class with the same fields
    mapping: dict[str, Any] = {name: nf4_config(dtype) for name in encoders}
    if method is not None:
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"`{option}` needs a GPU, on which bitsandbytes quantizes the weights; none was found. Drop the option."
            )
        mapping["transformer"] = transformer_quantization(method, dtype)
    return PipelineQuantizationConfig(quant_mapping=mapping)


def transformer_quantization(method: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The transformer's part of [`quantization_config`]."""
    return BitsAndBytesConfig(load_in_8bit=True) if method == "int8" else nf4_config(dtype, BitsAndBytesConfig)


def is_large_text_encoder(component: str, class_name: str) -> bool:
    """
    Returns whether a pipeline's component is a text encoder with billions of weights: any but CLIP's, which have at most
    0.7 billion.
    """
    return component.startswith("text_encoder") and not class_name.startswith("CLIP")


def large_text_encoders(name: str, *, revision: str | None = None) -> list[str]:
    """
    Names the text encoders of a pipeline that are worth quantizing, reading only its small index. Raises `ValueError` if
    there is no such folder or repository, or no such text encoder in it.
    """
    reference = find_reference(name, kind="model", revision=revision)
    with explain_errors(f"Reading the index of {reference}"):
        index = DiffusionPipeline.load_config(reference.name, revision=reference.revision)
    # [library, class], both None if a component is left out
    classes = {key: value[1] for key, value in index.items() if isinstance(value, list) and value[1] is not None}
    encoders = [key for key, class_name in classes.items() if is_large_text_encoder(key, class_name)]
    if not encoders:
        raise ValueError(
            f"{reference} has no text encoder but CLIP's, which are too small to be worth quantizing. Drop "
            "`--load_text_encoders_in_4bit`."
        )
    return encoders


def is_quantized(module: torch.nn.Module) -> bool:
    """Returns whether a model has weights quantized by bitsandbytes."""
    return bool(_weight_types(module) & _QUANTIZED_WEIGHTS)


def _weight_types(module: torch.nn.Module) -> set[str]:
    return {type(parameter).__name__ for parameter in module.parameters()}


def model_settings(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Settings of the loaded components of a pipeline that a run records for resuming, as JSON values under the options' names."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    quantized = {name: sorted(_weight_types(part) & _QUANTIZED_WEIGHTS) for name, part in modules.items()}
    processors = [getattr(module, "processor", None) for module in modules["transformer"].modules()]
    backends = {getattr(processor, "_attention_backend", None) for processor in processors} - {None}
    return recorded_name(pipeline.config.get("_name_or_path")) | {
        "dtype": {name: str(part.dtype).removeprefix("torch.") for name, part in modules.items()},
        "quantization_config": {name: types for name, types in quantized.items() if types} or None,
        "attention_backend": ", ".join(sorted(AttentionBackendName(backend).value for backend in backends)) or None,
    }


def loading_device(args: DiffusionConfig) -> torch.device:
    """
    Device on which [`load_pipeline`] puts the transformer and the VAE: this process's own, or the CPU if FSDP shards the
    transformer, which may not fit on one device.
    """
    return torch.device("cpu") if is_fsdp_launch() else args.device


def load_pipeline(
    name: str,
    dtype: torch.dtype,
    *,
    device: torch.device,
    revision: str | None = None,
    quantization_config: PipelineQuantizationConfig | None = None,
    attention_backend: str | None = None,
) -> DiffusionPipeline:
    """
    Loads a pipeline: a folder, `org/name` or `org/name@revision` on the Hub, or `hub/NAME` for one of your own. Raises
    `ValueError` if there is none, or the repository holds pickles or code.

    The transformer and the VAE are read onto `device`, file by file. The text encoders come last, onto the CPU. So each process
    of a node holds only the text encoders in host memory, not the whole pipeline.

    `attention_backend` is the attention kernel of the transformer, one of diffusers' `AttentionBackendName` such as
    `"_native_flash"` or `"flash"`. If `None`, PyTorch chooses; a trainer rules out cuDNN's. Kernels without a backward
    pass, such as those of SageAttention, cannot train.
    """
    backends = [backend.value for backend in AttentionBackendName]
    if attention_backend is not None and attention_backend not in backends:
        raise ValueError(
            f"`attention_backend` is {attention_backend!r}. Use one of diffusers': {', '.join(map(repr, backends))}."
        )
    reference = find_reference(name, kind="model", revision=revision)
    check_repository(reference, kind="model")
    quantizations = {} if quantization_config is None else quantization_config.quant_mapping
    settings = {"revision": reference.revision, "dtype": dtype, "use_safetensors": True}
    with explain_errors(f"Loading the pipeline {reference}"):
        if not reference.is_local:
            download_on_each_machine(
                lambda: DiffusionPipeline.download(reference.name, revision=reference.revision, use_safetensors=True)
            )
        index = DiffusionPipeline.load_config(reference.name, revision=reference.revision)
        on_device = {
            name: getattr(diffusers, index[name][1]).from_pretrained(
                reference.name,
                subfolder=name,
                device_map={"": device},
                quantization_config=quantizations.get(name),
                **settings,
            )
            for name in ("transformer", "vae")
            if name in index and index[name][0] == "diffusers"
        }
        pipeline = DiffusionPipeline.from_pretrained(
            reference.name, quantization_config=quantization_config, **on_device, **settings
        )
    if attention_backend is not None:
        pipeline.transformer.set_attention_backend(attention_backend)
    return pipeline


def sampling_options(policy: DiffusionPolicy, args: DiffusionConfig) -> tuple[SamplingOptions, SamplingOptions]:
    """
    Returns how images are sampled in training and in evaluation. If training does not draw images, its options only give their
    size, without classifier-free guidance.
    """
    evaluation = SamplingOptions(
        args.eval_height or args.height,
        args.eval_width or args.width,
        args.eval_num_inference_steps,
        args.guidance_scale,
    )
    training = replace(evaluation, height=args.height, width=args.width)
    if isinstance(args, OnlineConfig):
        training = replace(training, num_inference_steps=args.num_inference_steps)
    elif policy.has_classifier_free_guidance:
        training = replace(training, guidance_scale=policy.unguided_scale)
    return training, evaluation


def prepare_transformer(
    policy: DiffusionPolicy, args: DiffusionConfig, peft_config: LoraConfig | None
) -> torch.nn.Module:
    """
    Freezes a pipeline except for the trained weights, and returns its transformer, changed in place. Trained are the new
    adapters of `peft_config`, the adapters that the transformer already has, or, without either, the whole transformer,
    always without the policy's idle modules. Trained weights are in float32, as bfloat16 would lose small updates; frozen
    ones keep their dtype.

    Raises `ValueError` if the adapters cannot be exported or two sets would be stacked, if there is no reference policy
    for `beta`, or if dropout would move the ratio away from 1.
    """
    transformer = policy.transformer
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    if has_adapter(transformer):
        _train_further(transformer, peft_config)
    elif peft_config is not None:
        check_exportable(peft_config)
        transformer.add_adapter(peft_config)
    elif is_quantized(transformer):
        raise ValueError(
            "The transformer is quantized, and quantized weights cannot be trained. Set `peft_config` to train LoRA, or load "
            "it without `quantization_config`."
        )
    else:
        transformer.requires_grad_(True)
    cast_training_params(transformer, torch.float32)
    adapt_to_inputs(transformer, is_compiled=args.torch_compile)
    freeze_idle_modules(policy)
    _check_trained_weights(transformer)
    _check_dropout(transformer)
    if args.beta > 0 and not has_adapter(transformer):
        raise ValueError(
            f"`beta` is {args.beta}, but without adapters there is no reference policy: all weights are trained. Train LoRA "
            "with `peft_config`, or, if the loss does not need one, set `beta=0.0`."
        )
    if isinstance(args, DiffusionGRPOConfig) and args.reuses_activations:
        _check_reuse(policy)
    _redirect_gradient_checkpointing(policy, is_compiled=args.torch_compile)
    if args.torch_compile:
        _compile_blocks(policy, args)
    return transformer


def _train_further(transformer: Any, peft_config: LoraConfig | None) -> None:
    """Makes a transformer's existing adapters trainable, and nothing else."""
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
    if any(isinstance(layer, LoraLayer) and layer.merged for layer in transformer.modules()):
        raise ValueError(
            f"The adapters {transformer.active_adapters()} are fused into the weights. `pipeline.unfuse_lora()` takes them "
            "out, to be trained further; `pipeline.unload_lora_weights()` leaves them in, and `peft_config` trains others."
        )
    for config in transformer.peft_config.values():
        check_exportable(config)
    transformer.enable_adapters()  # or the first rollout would be drawn without them
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)


def shard_transformer(transformer: torch.nn.Module, accelerator: Accelerator) -> None:
    """
    Shards the weights of a transformer, each layer of a class in its `_no_split_modules` separately, before training
    would do so: the first evaluation and the moving average come earlier. Its trainable weights must have one dtype;
    quantized weights raise `ValueError`.

    Results are those of an unsharded transformer: every weight keeps its dtype, and `accelerator.autocast` casts.
    accelerate's own policy for bfloat16 would also cast the inputs, including the noise level.
    """
    if is_quantized(transformer):
        raise ValueError(
            "The launch configuration asks for FSDP2, which cannot shard quantized weights. They are small: use "
            "recipes/accelerate/multi_gpu.yaml, or load the transformer without `load_in_4bit` or `load_in_8bit`."
        )
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    # diffusers loads the weights in every process, so no process has to wait for another's.
    plugin.cpu_ram_efficient_loading = False
    fsdp2_prepare_model(accelerator, transformer)
    assert isinstance(transformer, FSDPModule)
    # Also the outermost layers, and whatever the launch configuration says: the parts are what is saved and averaged, and after a
    # pass without gradient, as in a rollout, the parameters would otherwise be whole copies.
    transformer.set_reshard_after_forward(True)


def freeze_idle_modules(policy: DiffusionPolicy) -> None:
    """
    Freezes the modules of the transformer that never get a gradient. Call it again after enabling adapters, which makes
    all of them trainable.
    """
    for name in policy.idle_modules:
        policy.transformer.get_submodule(name).requires_grad_(False)


def _check_trained_weights(transformer: torch.nn.Module) -> None:
    for name, parameter in transformer.named_parameters():
        is_packed = type(parameter).__name__ in _QUANTIZED_WEIGHTS
        if parameter.requires_grad and (is_packed or parameter.dtype != torch.float32):
            raise ValueError(
                f"`{name}` would be trained in {'quantized' if is_packed else parameter.dtype} form, which loses small "
                "updates. Only float32 adapters are trained on top of quantized weights."
            )


def _check_dropout(transformer: torch.nn.Module) -> None:
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(
                f"The module `{name}` has dropout {module.p}: sampling and training would not see the same policy, and the "
                "first ratio of a rollout would not be 1. Set it to 0 (`lora_dropout` in `peft_config`)."
            )


def _check_reuse(policy: DiffusionPolicy) -> None:
    asked = "`gradient_checkpointing_kwargs` has `reuse_activations`, but"
    if _has_prompt_mask(policy):
        raise ValueError(
            f"{asked} prompts of {policy.pipeline_class} have different lengths, and are not padded alike in a rollout and in "
            "training. Leave it out."
        )
    if is_fsdp_launch():
        raise ValueError(
            f"{asked} the launch configuration asks for FSDP2, which fetches the weights of a block in its forward pass. Leave it "
            "out, or use recipes/accelerate/multi_gpu.yaml."
        )


def _has_prompt_mask(policy: DiffusionPolicy) -> bool:
    return any(name.endswith("mask") for name in policy.embed_shapes(1))


def _compile_blocks(policy: DiffusionPolicy, args: DiffusionConfig) -> None:
    # Graphs differ by batch size, adapters and gradients; beyond the limit, 8 by default, PyTorch would stop compiling.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MAX_GRAPHS)
    # In a family with a mask, prompts can have any length. In others there are few sizes, and graphs for one size are faster.
    has_few_sizes = not _has_prompt_mask(policy)
    # The blocks of every list, instead of `compile_repeated_blocks`, which finds none in Stable Diffusion 3. A kind of block is
    # compiled once for all of its instances.
    for block in transformer_blocks(policy.transformer):
        block.compile(
            backend=args.torch_compile_backend or "inductor",
            mode=args.torch_compile_mode,
            dynamic=False if has_few_sizes else None,
            fullgraph=True,  # or what cannot be compiled, and all graphs beyond the limit, would silently run uncompiled
        )


def _redirect_gradient_checkpointing(policy: DiffusionPolicy, *, is_compiled: bool) -> None:
    # `transformers.Trainer` calls one of these, depending on its version; diffusers has another name for it.
    def enable(**kwargs: Any) -> None:
        enable_checkpointing(policy, is_compiled=is_compiled)

    policy.transformer.activation_checkpointing_enable = policy.transformer.gradient_checkpointing_enable = enable
