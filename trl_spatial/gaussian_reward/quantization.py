"""Quantized backbones: which part is quantized, and what transformers records on them."""

import copy

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from ..hub.references import Reference


def quantize_language_model_only(reference: Reference, quantization_config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """Returns a copy of the configuration that skips every part of the model except its language model."""
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(reference.name, revision=reference.revision, trust_remote_code=False)
        )
    language_model = skeleton.base_model.get_decoder()
    inside = [name for name, module in skeleton.base_model.named_children() if module is not language_model]
    outside = [name for name, module in skeleton.named_children() if module is not skeleton.base_model]
    skipped = [f"{skeleton.base_model_prefix}.{name}" for name in inside] + outside
    quantization_config = copy.deepcopy(quantization_config)
    quantization_config.llm_int8_skip_modules = skipped + (quantization_config.llm_int8_skip_modules or [])
    return quantization_config


def copy_loading_state(source: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copies what transformers recorded on the model it loaded, so that trainers and PEFT see it, too."""
    device_map = getattr(source, "hf_device_map", None)
    if device_map is not None:
        model.hf_device_map = device_map
    quantizer = getattr(source, "hf_quantizer", None)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        model.is_quantized = True
        model.quantization_method = source.quantization_method
        model.is_loaded_in_4bit = getattr(source, "is_loaded_in_4bit", False)
        model.is_loaded_in_8bit = getattr(source, "is_loaded_in_8bit", False)
        model.config.quantization_config = source.config.quantization_config
