"""What the rows should give on an H100, from counts of true-size shapes; nothing here has been measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import LEVERS, all_rows


# Floating-point operations of a pass, counted on fake tensors
COUNTS = Path(__file__).parents[1] / "bench" / "true_size.json"
# What an H100 may reach in matrix products, and in kernels that only read and write
FLOPS_PER_SECOND, BYTES_PER_SECOND = 650e12, 2.8e12

# GB that kernels other than matrix products and attention read and write for an image, counted on the same tensors. They and the
# operations of the reward model grow linearly with the number of layers, so that those of Qwen-Image and of the reward model were
# counted with two small numbers of layers.
MOVED_GB = {
    "grpo_flux": {"sample": 76.7, "reference": 67.6, "train": 255.2, "decode": 6.0},
    "grpo_qwen_image": {"sample": 127.6, "reference": 104.7, "train": 448.3, "decode": 18.9},
}
# 1e12 operations of a pair in training or of an image in scoring, and GB as above
REWARDS = {
    "training, 512²": (41.9, 242.9),
    "scoring, 512²": (7.9, 20.9),
    "training, 1024²": (145.9, 810.0),
    "scoring, 1024²": (28.3, 79.4),
}
# rows, recipe, denoising steps, and shares of a pass's operations and bytes: prompts of 100 tokens, not 512, and no guidance
GENERATORS = (
    ("FLUX.1-dev", "grpo_flux", 6, (1.0, 1.0)),
    ("Qwen-Image, guided", "grpo_qwen_image", 10, (0.714, 0.733)),
    ("Qwen-Image, guided, 512 tokens", "grpo_qwen_image", 10, (1.0, 1.0)),
    ("Qwen-Image, unguided", "grpo_qwen_image", 10, (0.714 / 2, 0.733 / 2)),
)


@dataclass(frozen=True)
class Prediction:
    """
    What a row should give.

    Args:
        flops (`float`):
            Floating-point operations of an image, or of a pair.
        rate (`float`, *optional*):
            Images or pairs per second; none for compiled, quantized and other kernels, whose share of reading and writing is unknown.
    """

    flops: float
    rate: float | None


def predict() -> dict[str, Prediction]:
    """Predictions by the names of rows."""
    counts: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8"))
    found: dict[str, Prediction] = {}
    for prefix, recipe, num_steps, shares in GENERATORS:
        for lever in LEVERS:
            found[f"{prefix}: {lever}"] = _predict_training(counts[recipe], MOVED_GB[recipe], lever, num_steps, shares)
    for row, (teraflops, gigabytes) in REWARDS.items():
        flops = teraflops * 1e12
        found[f"SpatialScore-7B: {row}"] = Prediction(flops, 1 / _seconds(flops, gigabytes * 1e9))
    return {name: prediction for name, prediction in found.items() if name in all_rows()}


def _predict_training(
    counts: dict[str, Any], moved_gb: dict[str, float], lever: str, num_steps: int, shares: tuple[float, float]
) -> Prediction:
    """Of an image that is sampled and, with a filter, trained on every other time."""
    num_trained = (2 if "window 2" in lever else num_steps - 1) * (0.5 if "filter" in lever else 1.0)
    passes = {"sample": float(num_steps), "reference": num_trained, "train": num_trained, "decode": 1.0}
    if "no checkpointing" in lever:
        passes["sample"] -= num_trained  # blocks are not computed again
    flops = moved = 0.0
    for phase, number in passes.items():
        flops_share, moved_share = (1.0, 1.0) if phase == "decode" else shares
        flops += flops_share * number * counts[phase]["flops"] / counts[phase]["images"]
        moved += moved_share * number * moved_gb[phase] * 1e9
    is_eager = not any(word in lever for word in ("compile", "NF4", "8 bits", "offloaded", "attention"))
    return Prediction(flops, 1 / _seconds(flops, moved) if is_eager else None)


def _seconds(flops: float, moved: float) -> float:
    return flops / FLOPS_PER_SECOND + moved / BYTES_PER_SECOND
