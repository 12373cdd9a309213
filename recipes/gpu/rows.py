"""The measurements by name, in order of priority."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import generator, models, reward
from .generator import Generator, Lever
from .reward import Way


Measure = Callable[[argparse.Namespace, torch.device, generator.Report], None]


@dataclass(frozen=True)
class Row:
    """How a row is measured, and the minutes it may take on an H100, including building and compiling the models."""

    measure: Measure
    minutes: float


FLUX = Generator(models.FLUX, "grpo_flux.yaml", num_tokens=512)
GUIDED = Generator(models.QWEN, "grpo_qwen_image.yaml", num_tokens=100)
GUIDED_LONG = Generator(models.QWEN, "grpo_qwen_image.yaml", num_tokens=512)
UNGUIDED = Generator(models.QWEN, "grpo_qwen_image.yaml", num_tokens=100, settings={"guidance_scale": 1.0})

ALL_STEPS: dict[str, Any] = {"sde_window_size": None}
ALL_IMAGES: dict[str, Any] = {"top_k": None}
WINDOW: dict[str, Any] = {"sde_window_size": 2}
LEVERS = {
    "filter, window 2": Lever(WINDOW),
    "filter, window 2, compile": Lever({**WINDOW, "torch_compile": True}),
    "filter": Lever(ALL_STEPS),
    "window 2": Lever({**WINDOW, **ALL_IMAGES}),
    "all images, all steps": Lever({**ALL_STEPS, **ALL_IMAGES}),
    "filter, window 2, NF4": Lever(WINDOW, quantization="nf4"),
    "filter, window 2, 8 bits": Lever(WINDOW, quantization="int8"),
    "filter, window 2, VAE offloaded": Lever(WINDOW, is_offloaded=True),
    "filter, window 2, no checkpointing": Lever({**WINDOW, "gradient_checkpointing": False}),
    "filter, window 2, activations reused": Lever(
        {**WINDOW, "gradient_checkpointing_kwargs": {"reuse_activations": True}}
    ),
    "filter, window 2, attention _native_flash": Lever(WINDOW, attention_backend="_native_flash"),
    # with some versions of PyTorch, it reads out of bounds, after which the process cannot use the device
    "filter, window 2, attention _native_cudnn": Lever(WINDOW, attention_backend="_native_cudnn"),
}


def all_rows() -> dict[str, Row]:
    """Returns the rows by name, in the order they are measured."""
    rows: dict[str, Row] = {}

    def add(prefix: str, trained: Generator, minutes: float, *levers: str) -> None:
        for lever in levers:
            measure = partial(generator.measure_training, trained, LEVERS[lever])
            rows[f"{prefix}: {lever}"] = Row(measure, minutes + 2 * ("compile" in lever))

    add("FLUX.1-dev", FLUX, 0.5, "filter, window 2", "filter, window 2, compile")
    add("Qwen-Image, guided", GUIDED, 2.0, "filter, window 2", "filter, window 2, compile")
    ways: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("512²", 512, {}),
        ("1024²", 1024, {}),
        ("1024², windows one by one", 1024, {"is_windowed_one_by_one": True}),
        ("1024², gradients through the vision tower", 1024, {"has_vision_gradients": True}),
        ("512², windows one by one", 512, {"is_windowed_one_by_one": True}),
    )
    for name, size, way in ways:
        rows[f"SpatialScore-7B: training, {name}"] = Row(partial(reward.measure_training, Way(size, **way)), 0.3)
        if "gradients" not in name:
            rows[f"SpatialScore-7B: scoring, {name}"] = Row(partial(reward.measure_scoring, Way(size, **way)), 0.2)
    rows["FLUX.1-dev: a real update, evaluated, saved and resumed"] = Row(partial(generator.measure_update, FLUX), 6.0)
    add("FLUX.1-dev", FLUX, 0.5, "filter", "filter, window 2, NF4", "filter, window 2, 8 bits")
    add("FLUX.1-dev", FLUX, 0.5, "filter, window 2, VAE offloaded")
    add("Qwen-Image, guided, 512 tokens", GUIDED_LONG, 2.5, "filter, window 2")
    add("Qwen-Image, guided", GUIDED, 3.0, "filter, window 2, NF4")
    nf4 = Way(1024, quantization="nf4")
    rows["SpatialScore-7B: training, 1024², NF4"] = Row(partial(reward.measure_training, nf4), 1.5)
    rows["FLUX.1-dev: encoding and decoding"] = Row(partial(generator.measure_parts, FLUX), 1.5)
    rows["Qwen-Image: encoding and decoding"] = Row(partial(generator.measure_parts, GUIDED), 2.0)
    add("FLUX.1-dev", FLUX, 0.7, "window 2", "all images, all steps", "filter, window 2, no checkpointing")
    add("FLUX.1-dev", FLUX, 0.7, "filter, window 2, activations reused")
    add("Qwen-Image, unguided", UNGUIDED, 1.5, "filter, window 2")
    add("Qwen-Image, guided", GUIDED, 4.0, "all images, all steps")
    add("FLUX.1-dev", FLUX, 0.5, *(lever for lever in LEVERS if "attention" in lever))
    return rows
