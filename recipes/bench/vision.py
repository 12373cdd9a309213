"""What is saved by attending to vision windows of one size in one call, and by stopping gradients before a frozen vision tower?

    python recipes/bench/vision.py

Runs random Qwen2.5-VL towers of two sizes, with the released models' windows of 112 pixels, on one CPU core. Compares transformers
with the reward model in a forward pass, and in a forward and a backward pass. Then compares training steps of a reward model, with
LoRA on the language model and checkpointing, with and without gradients through the frozen tower; transformers sends them. The two
variants alternate, and ratios compare median processor times. "calls" counts attention calls in one forward pass. On a GPU, each is
several kernel launches, so they matter more there.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import PreTrainedModel


sys.path.append(str(Path(__file__).parents[1] / "tiny"))

from models import build_qwen2_5_vl, build_tokenizer

from trl_spatial.gaussian_reward import GaussianRewardModel, spatial_score_lora_config
from trl_spatial.gaussian_reward.modeling import GaussianRewardModelConfig
from trl_spatial.gaussian_reward.vision_attention import use_packed_sdpa


PATCH_SIZE, REWARD_TOKEN = 14, "<|box_end|>"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vision_hidden_size": 64, "vision_depth": 3, "vision_heads": 4, "hidden_size": 64, "intermediate_size": 160,
             "num_hidden_layers": 6, "num_attention_heads": 4},
    "20m": {"vision_hidden_size": 320, "vision_depth": 8, "vision_heads": 4, "hidden_size": 256, "intermediate_size": 704,
            "num_hidden_layers": 8, "num_attention_heads": 4},
}  # fmt: skip


def measure(variants: tuple[Callable[[], Any], Callable[[], Any]], num_rounds: int) -> tuple[float, float]:
    """Returns the median processor seconds of the two variants, which alternate, after a warm-up round."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(num_rounds + 1):
        for variant, taken in zip(variants, seconds, strict=True):
            start = time.process_time()
            variant()
            taken.append(time.process_time() - start)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def count_calls(forward: Callable[[], Any]) -> int:
    """Counts the calls of PyTorch's attention."""
    attend, num_calls = F.scaled_dot_product_attention, 0

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return attend(*args, **kwargs)

    F.scaled_dot_product_attention = counted
    try:
        forward()
    finally:
        F.scaled_dot_product_attention = attend
    return num_calls


def compare_windows(sizes: dict[str, Any], num_images: int, image_size: int, num_rounds: int) -> dict[str, Any]:
    """Compares attending to one window at a time with attending to all windows of one size together."""
    plain = build_qwen2_5_vl(
        build_tokenizer(["a"], 1000), patch_size=PATCH_SIZE, vision_window_size=112, initializer_range=0.1, **sizes
    ).model
    packed = copy.deepcopy(plain)
    use_packed_sdpa(packed)
    rows = image_size // PATCH_SIZE // 2 * 2
    grid = torch.tensor([[1, rows, rows]] * num_images)
    patches = torch.randn(num_images * rows**2, 3 * 2 * PATCH_SIZE**2, generator=torch.Generator().manual_seed(0))

    def forward(model: Any) -> Callable[[], torch.Tensor]:
        return lambda: torch.no_grad()(model.visual)(patches, grid_thw=grid).pooler_output

    def train(model: Any) -> Callable[[], None]:
        return lambda: model.visual(patches, grid_thw=grid).pooler_output.sum().backward()

    result: dict[str, Any] = {
        "calls": [count_calls(forward(model)) for model in (plain, packed)],
        "difference": float((forward(plain)() - forward(packed)()).abs().max()),
    }
    for name, make in (("forward", forward), ("forward and backward", train)):
        result[name] = measure((make(plain), make(packed)), num_rounds)
    return result


def compare_gradients(sizes: dict[str, Any], num_images: int, image_size: int, num_rounds: int) -> tuple[float, float]:
    """Compares training steps with and without gradients through the frozen tower."""
    tokenizer = build_tokenizer(["a"], 1000)
    backbone = build_qwen2_5_vl(
        tokenizer, patch_size=PATCH_SIZE, vision_window_size=112, initializer_range=0.1, **sizes
    )
    reward_token_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    config = GaussianRewardModelConfig(
        backbone_config=backbone.config, reward_token_id=reward_token_id, attn_implementation="sdpa"
    )
    rows = image_size // PATCH_SIZE // 2 * 2
    num_tokens = rows**2 // 4
    image = torch.full((num_images, num_tokens), backbone.config.image_token_id)
    text = torch.full((num_images, 48), tokenizer.convert_tokens_to_ids("a"))
    text[:, -1] = reward_token_id
    batch = {
        "input_ids": torch.cat([image, text], dim=1),
        "attention_mask": torch.ones(num_images, num_tokens + 48, dtype=torch.long),
        "mm_token_type_ids": torch.cat([torch.ones_like(image), torch.zeros_like(text)], dim=1),
        "pixel_values": torch.randn(num_images * rows**2, 3 * 2 * PATCH_SIZE**2),
        "image_grid_thw": torch.tensor([[1, rows, rows]] * num_images),
    }

    def make_step(enable: Callable[[GaussianRewardModel], None]) -> Callable[[], None]:
        reward_model = GaussianRewardModel(config, backbone=copy.deepcopy(backbone.model))
        model = get_peft_model(reward_model, spatial_score_lora_config()).train()
        reward_model.gradient_checkpointing_enable({"use_reentrant": False})
        reward_model.disable_input_require_grads()
        enable(reward_model)

        def step() -> None:
            model(**batch).mean.sum().backward()
            model.zero_grad()

        return step

    enablers = (PreTrainedModel.enable_input_require_grads, GaussianRewardModel.enable_input_require_grads)
    return measure((make_step(enablers[0]), make_step(enablers[1])), num_rounds)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="which towers")
    parser.add_argument("--num_images", type=int, nargs="+", default=[1, 4], help="images of a batch")
    parser.add_argument("--image_size", type=int, default=512, help="width and height, in pixels")
    parser.add_argument("--num_rounds", type=int, default=3, help="how often each is measured, after a first round")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    print(f"{'':>16}{'calls':>12}{'forward':>24}{'and backward':>24}{'training step':>24}")
    for size in args.sizes:
        for num_images in args.num_images:
            result = compare_windows(SIZES[size], num_images, args.image_size, args.num_rounds)
            result["training step"] = compare_gradients(SIZES[size], num_images, args.image_size, args.num_rounds)
            results.append({"size": size, "num_images": num_images} | result)
            columns = [
                f"{after / before:.2f} ({after:.2f} / {before:.2f} s)"
                for before, after in (result["forward"], result["forward and backward"], result["training step"])
            ]
            calls = "{} → {}".format(*result["calls"])
            print(
                f"{size + ',':>8}{num_images:>8}{calls:>12}" + "".join(f"{column:>24}" for column in columns),
                flush=True,
            )
    print(json.dumps(vars(args) | {"results": results}))
    return results


if __name__ == "__main__":
    main()
