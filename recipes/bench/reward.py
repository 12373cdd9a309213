"""How many pairs per second does a reward model train on, how many images does it score, and what do shared prefixes save?

    python recipes/bench/reward.py

Runs random Qwen2.5-VL reward models of two sizes on one CPU core: `tiny`, like the demo's, with images of 64 × 64 pixels, and
`mid` with images of 512 × 512. Training uses micro-batches of four pairs, two rows and their reverses: LoRA on the language model,
with checkpointing. Scoring takes 32 images, each with a prompt, at several batch sizes. Both alternate with the plain way: every
row with its own image and all of its tokens, padded to the longest, and the whole batch in one forward pass. Ratios compare median
processor times.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image


sys.path.append(str(Path(__file__).parents[1] / "tiny"))

from models import build_processor, build_qwen2_5_vl, build_tokenizer

from trl_spatial import SpatialScore
from trl_spatial.gaussian_reward import GaussianRewardModel, spatial_score_lora_config
from trl_spatial.gaussian_reward.losses import gaussian_bradley_terry_loss
from trl_spatial.gaussian_reward.modeling import GaussianRewardModelConfig
from trl_spatial.gaussian_reward.processing import DEFAULT_INSTRUCTION


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8,
             "vision_hidden_size": 64, "vision_depth": 2, "vision_heads": 4},
    "mid": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 2, "patch_size": 14, "vision_hidden_size": 256, "vision_depth": 4, "vision_heads": 8,
            "vision_window_size": 112},
}  # fmt: skip
IMAGE_SIZES = {"tiny": 64, "mid": 512}
PROMPTS = (
    "a red cube to the left of a blue sphere, and the lamp behind both",
    "a blue sphere to the left of a red cube, and the lamp in front of both of them",
)
NUM_ROWS, NUM_SCORED = 2, 32


def build_scorer(size: str) -> SpatialScore:
    tokenizer = build_tokenizer([*PROMPTS, DEFAULT_INSTRUCTION], 1000)
    processor = build_processor(tokenizer, patch_size=SIZES[size]["patch_size"], max_pixels=IMAGE_SIZES[size] ** 2)
    backbone = build_qwen2_5_vl(tokenizer, initializer_range=0.05, **SIZES[size])
    config = GaussianRewardModelConfig(
        backbone_config=backbone.config,
        reward_token_id=processor.reward_token_id,
        head_dropout=0.0,
        attn_implementation="sdpa",
    )
    return SpatialScore(GaussianRewardModel(config, backbone=backbone.model), processor)


def draw_images(size: str, number: int) -> list[Image.Image]:
    shape = (number, IMAGE_SIZES[size], IMAGE_SIZES[size], 3)
    return [Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)]


def measure(plain: Callable[[], Any], ours: Callable[[], Any], num_rounds: int) -> tuple[float, float]:
    """Returns the median processor seconds of both, which alternate, after a warm-up round."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(num_rounds + 1):
        for run, taken in zip((plain, ours), seconds, strict=True):
            start = time.process_time()
            run()
            taken.append(time.process_time() - start)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def compare(name: str, num: int, plain: Callable[[], Any], ours: Callable[[], Any], num_rounds: int) -> dict[str, Any]:
    """Returns the rates of both ways and the largest difference between their results."""
    difference = float((plain() - ours()).abs().max())
    seconds, seconds_of_ours = measure(plain, ours, num_rounds)
    result = {"name": name, "plain": num / seconds, "ours": num / seconds_of_ours, "difference": difference}
    print(f"{name:>24}{result['plain']:>12.2f}{result['ours']:>12.2f}{seconds / seconds_of_ours:>8.2f}", flush=True)
    return result


def attends_with(scorer: SpatialScore) -> Any:
    """The configuration that holds the language model's attention implementation."""
    return scorer.model.backbone.get_decoder().config


def compare_training(size: str, num_rounds: int) -> dict[str, Any]:
    scorer = build_scorer(size)
    config, own = attends_with(scorer), attends_with(scorer)._attn_implementation
    scorer.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    model = get_peft_model(scorer.model, spatial_score_lora_config(rank=16, dropout=0.0))
    images = draw_images(size, 2 * NUM_ROWS)
    prompts = [prompt for _ in range(NUM_ROWS) for prompt in PROMPTS] * 2
    chosen_first = images + [images[place ^ 1] for place in range(2 * NUM_ROWS)]  # rows alternate with their reverses

    def train(attention: str, rows: list[Image.Image]) -> torch.Tensor:
        config._attn_implementation = attention
        output = model(**scorer.processor(prompts, rows))
        statistics_of_pairs = [part for values in (output.mean, output.log_std) for part in values.chunk(2)]
        chosen, rejected, chosen_std, rejected_std = statistics_of_pairs
        gaussian_bradley_terry_loss(chosen, chosen_std, rejected, rejected_std).mean().backward()
        gradients = [param.grad.flatten() for param in model.parameters() if param.grad is not None]
        model.zero_grad()
        return torch.cat(gradients)

    return compare(
        f"{size}, train, pairs/s",
        2 * NUM_ROWS,
        lambda: train("sdpa", [image.copy() for image in chosen_first]),
        lambda: train(own, chosen_first),
        num_rounds,
    )


def compare_scoring(size: str, batch_size: int, num_rounds: int) -> dict[str, Any]:
    scorer = build_scorer(size)
    config, own = attends_with(scorer), attends_with(scorer)._attn_implementation
    images = draw_images(size, NUM_SCORED)
    prompts = [PROMPTS[place % 2] for place in range(NUM_SCORED)]

    @torch.inference_mode()
    def score_plainly() -> torch.Tensor:
        config._attn_implementation = "sdpa"
        batches = [slice(start, start + batch_size) for start in range(0, NUM_SCORED, batch_size)]
        return torch.cat([scorer.model(**scorer.processor(prompts[rows], images[rows])).mean for rows in batches])

    def score() -> torch.Tensor:
        config._attn_implementation = own
        return torch.from_numpy(scorer.score(prompts, images, batch_size=batch_size).mean)

    return compare(f"{size}, score {batch_size}, images/s", NUM_SCORED, score_plainly, score, num_rounds)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="which models")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="of scoring")
    parser.add_argument("--num_rounds", type=int, default=3, help="how often each is measured, after a first round")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{'':>24}{'plain':>12}{'ours':>12}{'ratio':>8}")
    results = []
    for size in args.sizes:
        results.append(compare_training(size, args.num_rounds))
        results += [compare_scoring(size, batch_size, args.num_rounds) for batch_size in args.batch_sizes]
    print(json.dumps(vars(args) | {"results": results}))
    return results


if __name__ == "__main__":
    main()
