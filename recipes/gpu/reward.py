"""Rows of the reward model: training SpatialScore on pairs, and scoring images."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from trl_spatial.gaussian_reward.losses import gaussian_bradley_terry_loss
from trl_spatial.gaussian_reward.modeling import GaussianRewardModel, spatial_score_lora_config

from .clock import clock
from .models import REWARD_TOKEN_ID, build_reward_model, quantize


NUM_WORDS = 160  # tokens of the instruction and the prompt
PATCH = 28  # side of an image token, in pixels


@dataclass(frozen=True)
class Way:
    """
    How SpatialScore runs: on images of `size`² pixels; attending to vision windows one by one, as in transformers, or to all
    windows of one size in one call; with gradients through the frozen vision tower, as in transformers' checkpointing, or without.
    """

    size: int
    is_windowed_one_by_one: bool = False
    has_vision_gradients: bool = False
    quantization: str | None = None


def measure_training(
    way: Way, args: argparse.Namespace, device: torch.device, report: Callable[[dict[str, Any]], None]
) -> None:
    """Measures pairs per second: both images of a pair, forward and backward, with LoRA as in the recipe."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the trainer does
    model = _build(way, args, device)
    model.gradient_checkpointing_enable()
    trained = get_peft_model(model, spatial_score_lora_config()).train()
    model.enable_input_require_grads()
    if way.has_vision_gradients:
        PreTrainedModel.enable_input_require_grads(model)
    inputs = _inputs(model, way.size // (8 if args.tiny else 1), 2 * args.batch_size, device)  # chosen, then rejected

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            output = trained(**inputs)
        means, log_stds = output.mean.chunk(2), output.log_std.chunk(2)
        gaussian_bradley_terry_loss(
            means[0], log_stds[0], means[1], log_stds[1], objective="expected_nll", estimator="monte_carlo"
        ).mean().backward()
        trained.zero_grad()

    seconds = clock(step, device, args.repeats)
    report({"pairs_per_second": args.batch_size / seconds, "seconds": {"train": seconds}})


def measure_scoring(
    way: Way, args: argparse.Namespace, device: torch.device, report: Callable[[dict[str, Any]], None]
) -> None:
    """Measures images per second, without preprocessing, which runs on the CPU meanwhile."""
    model = _build(way, args, device).eval()
    num_images = 2 * args.batch_size
    inputs = _inputs(model, way.size // (8 if args.tiny else 1), num_images, device)

    @torch.no_grad()
    def score() -> None:
        model(**inputs)

    seconds = clock(score, device, args.repeats)
    report({"images_per_second": num_images / seconds, "seconds": {"score": seconds}})


def _build(way: Way, args: argparse.Namespace, device: torch.device) -> GaussianRewardModel:
    model = build_reward_model(device, is_tiny=args.tiny)
    if way.is_windowed_one_by_one:
        model.backbone.visual.config._attn_implementation = "sdpa"  # undoes `use_packed_sdpa`
    if way.quantization is not None:
        quantize(model, way.quantization, device)
    return model


def _inputs(model: GaussianRewardModel, size: int, num_images: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Makes the processor's outputs for images of `size`² random pixels with prompts."""
    side = round(size / PATCH)
    config = model.config.backbone_config
    vision = config.vision_config
    ids = torch.full((num_images, side * side + NUM_WORDS), 100, device=device)
    ids[:, 20], ids[:, 21 + side * side] = config.vision_start_token_id, config.vision_end_token_id
    ids[:, 21 : 21 + side * side] = config.image_token_id
    ids[:, -1] = REWARD_TOKEN_ID
    grid = torch.tensor([[1, 2 * side, 2 * side]] * num_images, device=device)
    patch_size = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(int(grid.prod(1).sum()), patch_size, device=device, dtype=torch.bfloat16),
        "image_grid_thw": grid,
    }
