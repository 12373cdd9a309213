"""Predictions for the rows on an H100, from counts on true-size shapes; nothing here was measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import LEVERS, all_rows


# Floating-point operations per pass, counted on fake tensors
COUNTS = Path(__file__).parents[1] / "bench" / "true_size.json"
# What an H100 can be expected to reach in matrix products, and in memory-bound kernels
FLOPS_PER_SECOND, BYTES_PER_SECOND = 650e12, 2.8e12

# GB per image that kernels other than matrix products and attention read and write, counted on the same tensors. They and the
# operations of the reward model are linear in the number of layers, so for Qwen-Image and the reward model they were extrapolated
# from counts with two small numbers of layers.
MOVED_GB = {
    "grpo_flux": {"sample": 76.7, "reference": 67.6, "train": 255.2, "decode": 6.0},
    "grpo_qwen_image": {"sample": 127.6, "reference": 104.7, "train": 448.3, "decode": 18.9},
}
# Share of a forward pass that checkpointing recomputes; for compiled and quantized models, nearly all of it
RECOMPUTED = {"grpo_flux": 0.633, "grpo_qwen_image": 0.683}
# 1e12 operations per pair in training or per image in scoring, and GB as above
REWARDS = {
    "training, 512²": (41.9, 242.9),
    "scoring, 512²": (7.9, 20.9),
    "training, 1024²": (145.9, 810.0),
    "scoring, 1024²": (28.3, 79.4),
}
# rows, recipe, denoising steps, and the shares of the counted operations and bytes that a pass with 100 tokens instead of 512, or
# without guidance, takes
GENERATORS = (
    ("FLUX.1-dev", "grpo_flux", 6, (1.0, 1.0)),
    ("Qwen-Image, guided", "grpo_qwen_image", 10, (0.714, 0.733)),
    ("Qwen-Image, guided, 512 tokens", "grpo_qwen_image", 10, (1.0, 1.0)),
    ("Qwen-Image, unguided", "grpo_qwen_image", 10, (0.714 / 2, 0.733 / 2)),
)


@dataclass(frozen=True)
class Prediction:
    """
    The predicted result of a row.

    Args:
        flops (`float`):
            Floating-point operations per image or pair.
        rate (`float`, *optional*):
            Images or pairs per second; `None` if compiled, quantized, offloaded or with another attention kernel, where the memory
            traffic is unknown.
    """

    flops: float
    rate: float | None


def predict() -> dict[str, Prediction]:
    """Returns the predictions by row name."""
    counts: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8"))
    found: dict[str, Prediction] = {}
    for prefix, recipe, num_steps, shares in GENERATORS:
        for lever in LEVERS:
            found[f"{prefix}: {lever}"] = _predict_training(counts[recipe], recipe, lever, num_steps, shares)
    for row, (teraflops, gigabytes) in REWARDS.items():
        flops = teraflops * 1e12
        found[f"SpatialScore-7B: {row}"] = Prediction(flops, 1 / _seconds(flops, gigabytes * 1e9))
    return {name: prediction for name, prediction in found.items() if name in all_rows()}


def _predict_training(
    counts: dict[str, Any], recipe: str, lever: str, num_steps: int, shares: tuple[float, float]
) -> Prediction:
    """Predicts a generator's row, per sampled image; with a filter, half of the images are trained on."""
    num_trained = (2 if "window 2" in lever else num_steps - 1) * (0.5 if "filter" in lever else 1.0)
    passes = {"sample": float(num_steps), "reference": num_trained, "train": num_trained, "decode": 1.0}
    flops = moved = 0.0
    for phase, number in passes.items():
        flops_share, moved_share = (1.0, 1.0) if phase == "decode" else shares
        flops += flops_share * number * counts[phase]["flops"] / counts[phase]["images"]
        moved += moved_share * number * MOVED_GB[recipe][phase] * 1e9
    again = RECOMPUTED[recipe]
    if any(word in lever for word in ("compile", "NF4", "8 bits")):
        again = 1.0
    elif "no checkpointing" in lever:
        again = 0.0
    flops += (
        shares[0] * num_trained * (again - RECOMPUTED[recipe]) * counts["sample"]["flops"] / counts["sample"]["images"]
    )
    if "reused" in lever:  # without the forward pass of training; its last layer, of 57, still runs
        flops -= shares[0] * num_trained * counts["sample"]["flops"] / counts["sample"]["images"]
    if again == 0.0 or "reused" in lever:
        moved -= shares[1] * num_trained * MOVED_GB[recipe]["sample"] * 1e9
    is_eager = not any(word in lever for word in ("compile", "NF4", "8 bits", "offloaded", "attention"))
    return Prediction(flops, 1 / _seconds(flops, moved) if is_eager else None)


def _seconds(flops: float, moved: float) -> float:
    return flops / FLOPS_PER_SECOND + moved / BYTES_PER_SECOND
