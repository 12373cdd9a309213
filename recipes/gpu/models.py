"""Models in their true architectures with random weights, built on their device, with the tokenizers of recipes/tiny."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from trl_spatial.diffusion_grpo.runtime.architectures import Architecture, load_architecture
from trl_spatial.gaussian_reward.modeling import GaussianRewardModel, GaussianRewardModelConfig


sys.path.append(str(Path(__file__).parents[1] / "tiny"))

from flux import build_clip_tokenizer, build_corpus, build_t5_tokenizer
from qwen_image import build_qwen_tokenizer


FLUX, QWEN = "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"
# The classes of the released tokenizers with fewer words, so none of their files are needed
TOKENIZERS: dict[str, Callable[[list[str]], Any]] = {
    "CLIPTokenizer": build_clip_tokenizer,
    "T5TokenizerFast": build_t5_tokenizer,
    "Qwen2Tokenizer": build_qwen_tokenizer,
}
REWARD_TOKEN_ID = 151665  # past the vocabulary of Qwen2.5-VL's tokenizer
# Settings of a tiny model; everything else, including all code, is as at true size
TINY: dict[str, dict[str, Any]] = {
    "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1, "base_dim": 8, "num_res_blocks": 1},
    "text_encoder": {"num_hidden_layers": 1, "vocab_size": 4096},
    "text_encoder_2": {"num_layers": 1, "num_heads": 2, "d_ff": 64, "vocab_size": 4096},
    "text_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
    "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
                      "fullatt_block_indexes": [1]},
}  # fmt: skip


def architecture_of(name: str, *, is_tiny: bool) -> Architecture:
    """Returns the architecture of a model of architectures.json, or a tiny one with the same classes."""
    return {
        component: part if component == "_class_name" else (*part[:2], _shrink(component, part[2], is_tiny))
        for component, part in load_architecture(name).items()
    }


def build_pipeline(name: str, device: torch.device, *, has_encoders: bool, is_tiny: bool) -> Any:
    """Builds the pipeline of a model of architectures.json in bfloat16, with text encoders if `has_encoders`."""
    architecture = architecture_of(name, is_tiny=is_tiny)
    diffusers, corpus = import_module("diffusers"), build_corpus()
    components: dict[str, Any] = {}
    for component, (library, class_name, config) in (
        (key, value) for key, value in architecture.items() if key != "_class_name"
    ):
        component_class = getattr(import_module(library), class_name)
        if component.startswith("tokenizer"):
            components[component] = TOKENIZERS[class_name](corpus)
        elif component == "scheduler":
            components[component] = component_class.from_config(config)
        elif component.startswith("text_encoder") and not has_encoders:
            components[component] = None
        else:
            components[component] = _build_model(component_class, config, device)
    pipeline = getattr(diffusers, architecture["_class_name"])(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_reward_model(device: torch.device, *, is_tiny: bool) -> GaussianRewardModel:
    """Builds SpatialScore on the architecture of Qwen2.5-VL-7B, in bfloat16 except for its head and reward token."""
    _, _, config = load_architecture(QWEN)["text_encoder"]  # the same model
    backbone_config = transformers.Qwen2_5_VLConfig.from_dict(_shrink("text_encoder", config, is_tiny))

    def build() -> GaussianRewardModel:
        config = GaussianRewardModelConfig(
            backbone_config=backbone_config, reward_token_id=REWARD_TOKEN_ID, attn_implementation="sdpa"
        )
        return GaussianRewardModel(
            config, transformers.AutoModel.from_config(backbone_config, attn_implementation="sdpa")
        )

    model = on_device(build, device)
    model.backbone.get_input_embeddings().reset_reward_token()
    return model


def on_device(build: Callable[[], Any], device: torch.device) -> Any:
    """Builds a model on its device in bfloat16: in float32, or on the CPU first, it would not fit."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return build().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def quantize(model: Any, method: str, device: torch.device) -> None:
    """Replaces linear layers with bitsandbytes' in `"nf4"` or `"int8"`, except in a vision tower or a head."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or "visual" in name or name.startswith("head"):
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        weight = layer.weight.data.cpu()  # packed on its way to the device
        packed: Any
        if method == "nf4":
            packed = bitsandbytes.nn.Linear4bit(*sizes, torch.bfloat16, quant_type="nf4")
            packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            packed = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            packed.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        packed.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.to(device))
    setattr(model, "is_loaded_in_4bit" if method == "nf4" else "is_loaded_in_8bit", True)  # PEFT reads it


def _build_model(component_class: Any, config: dict[str, Any], device: torch.device) -> nn.Module:
    if issubclass(component_class, transformers.PreTrainedModel):
        return on_device(lambda: component_class(component_class.config_class.from_dict(config)), device).eval()
    return on_device(lambda: component_class.from_config(config), device)


def _shrink(component: str, config: dict[str, Any], is_tiny: bool) -> dict[str, Any]:
    if not is_tiny:
        return config
    small = {key: value for key, value in TINY.get(component, {}).items() if key in config}
    nested = {
        key: {**config.get(key, {}), **TINY[key]}
        for key in ("text_config", "vision_config")
        if "text_config" in config
    }
    return {**config, **small, **nested}
