"""The settings of 4-bit weights, shared by the trainers."""

from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import BitsAndBytesConfig


ConfigT = TypeVar("ConfigT")


def nf4_config(
    compute_dtype: str | torch.dtype,
    config_class: Callable[..., ConfigT] = BitsAndBytesConfig,
) -> ConfigT:
    """
    Settings that store weights in NF4 with double quantization, as in [QLoRA](https://huggingface.co/papers/2305.14314), and
    compute in `compute_dtype`. Diffusers takes its own `config_class`, which has the same fields.
    """
    return config_class(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
