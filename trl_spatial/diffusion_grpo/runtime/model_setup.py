"""What happens to a pipeline before it is trained: which weights learn, in which dtype."""

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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from ...hub.errors import explain_errors
from ...hub.references import find_reference
from ...hub.safety import check_repository
from ...training.machines import download_on_each_machine
from ...training.quantization import nf4_config
from ..online_config import OnlineConfig
from ..policies import DiffusionPolicy, SamplingOptions
from .adapters import adapt_to_inputs
from .base_config import DiffusionConfig
from .checkpointing import check_exportable, has_adapter
from .processes import is_fsdp_launch
from .recomputation import enable_checkpointing


# Most graphs that a kind of block may be compiled to
_MAX_GRAPHS = 64
# bitsandbytes' classes of quantized weights
_QUANTIZED_WEIGHTS = {"Params4bit", "Int8Params"}


def quantization_config(
    method: str | None, dtype: torch.dtype, *, text_encoders: Iterable[str] = ()
) -> PipelineQuantizationConfig | None:
    """
    Makes the configuration with which diffusers quantizes components while it loads them, by bitsandbytes; `None` if
    it shall not. The VAE stays as it is: it is small.

    The transformer is quantized by `method`: `"nf4"` (4 bits), `"int8"`, or `None`; its layers compute in `dtype`.
    Text encoders, named by [`large_text_encoders`], are quantized to NF4. Not to 8 bits: a model of such layers leaves
    a copy of its weights on the accelerator when it is moved away.

    It is a `ValueError` if there is no such method, a `RuntimeError` if the transformer is to be quantized and there
    is no GPU, on which diffusers does it, and an `ImportError` if bitsandbytes is not installed.
    """
    encoders = list(text_encoders)
    if method not in (None, "nf4", "int8"):
        raise ValueError(f"The quantization is {method!r}. Use 'nf4' or 'int8'.")
    if method is None and not encoders:
        return None
    option = {None: "--load_text_encoders_in_4bit", "nf4": "--load_in_4bit", "int8": "--load_in_8bit"}[method]
    if not is_bitsandbytes_available():
        raise ImportError(f"`{option}` needs bitsandbytes: `pip install 'trl-spatial[quant]'`.")
    # transformers and diffusers each take a class of their own, of the same fields
    mapping: dict[str, Any] = {name: nf4_config(dtype) for name in encoders}
    if method is not None:
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"`{option}` needs a GPU, on which bitsandbytes quantizes the weights; none was found. Drop it."
            )
        mapping["transformer"] = transformer_quantization(method, dtype)
    return PipelineQuantizationConfig(quant_mapping=mapping)


def transformer_quantization(method: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The transformer's part of [`quantization_config`]."""
    return BitsAndBytesConfig(load_in_8bit=True) if method == "int8" else nf4_config(dtype, BitsAndBytesConfig)


def is_large_text_encoder(component: str, class_name: str) -> bool:
    """
    Whether a pipeline's component is a text encoder of billions of weights: any but CLIP's, which have 0.7 at most.
    """
    return component.startswith("text_encoder") and not class_name.startswith("CLIP")


def large_text_encoders(name: str, *, revision: str | None = None) -> list[str]:
    """
    Names the text encoders of a pipeline that are worth quantizing, by its small index alone. It is a `ValueError` if
    there is no such folder or repository, or no such text encoder in it.
    """
    reference = find_reference(name, kind="model", revision=revision)
    with explain_errors(f"Reading the index of {reference}"):
        index = DiffusionPipeline.load_config(reference.name, revision=reference.revision)
    # [library, class], both None where a component is left out
    classes = {key: value[1] for key, value in index.items() if isinstance(value, list) and value[1] is not None}
    encoders = [key for key, class_name in classes.items() if is_large_text_encoder(key, class_name)]
    if not encoders:
        raise ValueError(
            f"{reference} has no text encoder but CLIP's, which are too small to be worth quantizing. Drop "
            "`--load_text_encoders_in_4bit`."
        )
    return encoders


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a model has weights that bitsandbytes has quantized."""
    return any(type(parameter).__name__ in _QUANTIZED_WEIGHTS for parameter in module.parameters())


def loading_device(args: DiffusionConfig) -> torch.device:
    """
    Where [`load_pipeline`] shall put the transformer and the VAE: on the device of this process, or on the CPU where
    FSDP shares the transformer out, which need not fit on one device.
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
    Loads a pipeline: a folder, `org/name` or `org/name@revision` on the Hub, or `hub/NAME` for one of your own. It is
    a `ValueError` if there is none, or the repository holds pickles or code.

    The transformer and the VAE are read onto `device`, file by file. The text encoders come last, onto the CPU. So a process
    holds no more than the text encoders in the host's memory, and not the whole pipeline times the processes of a node.

    `attention_backend` is the attention kernel of the transformer, one of diffusers' `AttentionBackendName` such as
    `"_native_cudnn"` or `"flash"`. If `None`, PyTorch chooses. Kernels without a backward pass, as those of
    SageAttention, cannot train.
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


def sampling_options(args: DiffusionConfig) -> tuple[SamplingOptions, SamplingOptions]:
    """How images are sampled in training, and in evaluation."""
    evaluation = SamplingOptions(
        args.eval_height or args.height,
        args.eval_width or args.width,
        args.eval_num_inference_steps,
        args.guidance_scale,
    )
    # Where no images are drawn to be trained on, only their size and the guidance count
    num_steps = args.num_inference_steps if isinstance(args, OnlineConfig) else args.eval_num_inference_steps
    return replace(evaluation, height=args.height, width=args.width, num_inference_steps=num_steps), evaluation


def prepare_transformer(
    policy: DiffusionPolicy, args: DiffusionConfig, peft_config: LoraConfig | None
) -> torch.nn.Module:
    """
    Freezes a pipeline but for what is trained, and returns its transformer, changed in place. Trained are the new
    adapters of `peft_config`, the adapters that the transformer already has, or, without any, the whole transformer,
    each without the policy's idle modules. What is trained is in float32, as bfloat16 would lose small updates; what
    is frozen keeps its dtype.

    It is a `ValueError` if the adapters cannot be exported or two sets would be stacked, if there is no reference
    policy for `beta`, or if dropout would move the ratio away from 1.
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
    elif is_quantized(transformer):
        raise ValueError(
            "The transformer is quantized, and quantized weights cannot be trained. Set `peft_config` to train LoRA, or load "
            "it without `quantization_config`."
        )
    else:
        transformer.requires_grad_(True)
    cast_training_params(transformer, torch.float32)
    adapt_to_inputs(transformer)
    freeze_idle_modules(policy)
    _check_trained_weights(transformer)
    _check_dropout(transformer)
    if args.beta > 0 and not has_adapter(transformer):
        raise ValueError(
            f"`beta` is {args.beta}, but without adapters there is no reference policy: all weights are trained. Train LoRA "
            "with `peft_config`, or, for a loss that can do without, set `beta=0.0`."
        )
    _redirect_gradient_checkpointing(policy, is_compiled=args.torch_compile)
    if args.torch_compile:
        _compile_blocks(policy, args)
    return transformer


def shard_transformer(transformer: torch.nn.Module, accelerator: Accelerator) -> None:
    """
    Shares out the weights of a transformer, each kind of layer in its `_no_split_modules` by itself, before training
    asks for it: the first evaluation comes earlier, and so does the moving average. Its trainable weights have one
    dtype; quantized ones are a `ValueError`.

    The numbers are those of a transformer that is not sharded: every weight keeps its dtype, and
    `accelerator.autocast` casts. The policy of accelerate's own for bfloat16 would cast the inputs as well, the noise
    level among them.
    """
    if is_quantized(transformer):
        raise ValueError(
            "The launch configuration asks for FSDP2, which cannot share out quantized weights. They are small: use "
            "recipes/accelerate/multi_gpu.yaml, or load the transformer without `load_in_4bit` or `load_in_8bit`."
        )
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    # diffusers loads the weights in every process, so that none has to wait for another's.
    plugin.cpu_ram_efficient_loading = False
    fsdp2_prepare_model(accelerator, transformer)
    assert isinstance(transformer, FSDPModule)
    # Also the outermost layers, and whatever the launch configuration says: what is saved and averaged are the parts, and after
    # a pass without gradient, as those of a rollout are, the parameters would be whole copies in their place.
    transformer.set_reshard_after_forward(True)


def freeze_idle_modules(policy: DiffusionPolicy) -> None:
    """
    Freezes the modules of the transformer that never get a gradient. To be called again whenever adapters were
    enabled, which makes all of them trainable.
    """
    for name in policy.idle_modules:
        policy.transformer.get_submodule(name).requires_grad_(False)


def _check_trained_weights(transformer: torch.nn.Module) -> None:
    for name, parameter in transformer.named_parameters():
        is_packed = type(parameter).__name__ in _QUANTIZED_WEIGHTS
        if parameter.requires_grad and (is_packed or parameter.dtype != torch.float32):
            raise ValueError(
                f"`{name}` would be trained in {'quantized' if is_packed else parameter.dtype} form, which loses small "
                "updates. Only adapters in float32 are trained beside quantized weights."
            )


def _check_dropout(transformer: torch.nn.Module) -> None:
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(
                f"The module `{name}` has dropout {module.p}: sampling and training would not see the same policy, and the "
                "first ratio of a rollout would not be 1. Set it to 0 (`lora_dropout` in `peft_config`)."
            )


def _compile_blocks(policy: DiffusionPolicy, args: DiffusionConfig) -> None:
    # Graphs differ by batch size, adapters and gradients; beyond the limit, by default 8, PyTorch would compile no more.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MAX_GRAPHS)
    # Prompts of a family with a mask have as many lengths as there are. Else all sizes are few, and graphs for one size are faster.
    has_few_sizes = not any(name.endswith("mask") for name in policy.embed_shapes(1))
    # The blocks of every list, and not `compile_repeated_blocks`, which knows none of Stable Diffusion 3. A kind of block is
    # compiled once for all of its instances.
    for blocks in [child for child in policy.transformer.children() if isinstance(child, torch.nn.ModuleList)]:
        for block in blocks:
            block.compile(
                backend=args.torch_compile_backend or "inductor",
                mode=args.torch_compile_mode,
                dynamic=False if has_few_sizes else None,
                fullgraph=True,  # or else what cannot be compiled, and all graphs beyond the limit, would run uncompiled in silence
            )


def _redirect_gradient_checkpointing(policy: DiffusionPolicy, *, is_compiled: bool) -> None:
    # `transformers.Trainer` calls one of these, by its version; diffusers has the same under another name.
    def enable(**kwargs: Any) -> None:
        enable_checkpointing(policy, is_compiled=is_compiled)

    policy.transformer.activation_checkpointing_enable = policy.transformer.gradient_checkpointing_enable = enable
