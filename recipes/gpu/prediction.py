"""What the rows should give on an H100, from counts of true-size shapes; nothing here has been measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import LEVERS


# Floating-point operations of a pass, counted on fake tensors
COUNTS = Path(__file__).parents[1] / "bench" / "true_size.json"
# What an H100 may reach in matrix products, and in kernels that only read and write
FLOPS_PER_SECOND, BYTES_PER_SECOND = 650e12, 2.8e12

# GB that kernels other than matrix products and attention read and write for an image, counted on the same tensors
MOVED_GB = {
    "grpo_flux": {"sample": 0.0, "reference": 0.0, "train": 0.0, "decode": 0.0},
    "grpo_qwen_image": {"sample": 0.0, "reference": 0.0, "train": 0.0, "decode": 0.0},
    "reward_spatialscore": {"score: 512": 0.0, "score: 1024": 0.0, "train: 512": 0.0, "train: 1024": 0.0},
}
SHORT_PROMPTS = 0.72  # of what a pass of Qwen-Image takes with 512 tokens, with 100
# rows, recipe, denoising steps, share of the counted passes
GENERATORS = (
    ("FLUX.1-dev", "grpo_flux", 6, 1.0),
    ("Qwen-Image, guided", "grpo_qwen_image", 10, SHORT_PROMPTS),
    ("Qwen-Image, guided, 512 tokens", "grpo_qwen_image", 10, 1.0),
    ("Qwen-Image, unguided", "grpo_qwen_image", 10, SHORT_PROMPTS / 2),
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
    if not COUNTS.is_file():
        return {}
    counts: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8"))
    found: dict[str, Prediction] = {}
    for prefix, recipe, num_steps, share in GENERATORS:
        for lever in LEVERS:
            found[f"{prefix}: {lever}"] = _predict_training(counts[recipe], MOVED_GB[recipe], lever, num_steps, share)
    for size in (512, 1024):
        for row, phase, images in (("training", "train", 2), ("scoring", "score", 1)):
            count = counts["reward_spatialscore"][f"{phase}: {size}"]
            flops = count["flops"] / count["images"] * images
            moved = MOVED_GB["reward_spatialscore"][f"{phase}: {size}"] * 1e9 * images
            found[f"SpatialScore-7B: {row}, {size}²"] = Prediction(flops, 1 / _seconds(flops, moved))
    return found


def _predict_training(
    counts: dict[str, Any], moved_gb: dict[str, float], lever: str, num_steps: int, share: float
) -> Prediction:
    """Of an image that is sampled and, with a filter, trained on every other time."""
    num_trained = (2 if "window 2" in lever else num_steps - 1) * (0.5 if "filter" in lever else 1.0)
    passes = {"sample": float(num_steps), "reference": num_trained, "train": num_trained, "decode": 1.0}
    if "no checkpointing" in lever:
        passes["sample"] -= num_trained  # blocks are not computed again
    flops = moved = 0.0
    for phase, number in passes.items():
        of_pass = number if phase == "decode" else number * share
        flops += of_pass * counts[phase]["flops"] / counts[phase]["images"]
        moved += of_pass * moved_gb[phase] * 1e9
    is_eager = not any(word in lever for word in ("compile", "NF4", "8 bits", "offloaded", "attention"))
    return Prediction(flops, 1 / _seconds(flops, moved) if is_eager else None)


def _seconds(flops: float, moved: float) -> float:
    return flops / FLOPS_PER_SECOND + moved / BYTES_PER_SECOND
