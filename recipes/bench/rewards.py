"""How much faster is a rollout if its rewards are computed while it is being drawn?

    python recipes/bench/rewards.py

Draws rollouts from a FLUX with 21 million random parameters on the CPU, in batches of 4 images. The reward only waits, as for a
server or another device: half, one and two times as long as drawing an image takes. Each batch is rewarded while the next one is
drawn, so B batches that take s seconds to draw and r seconds to reward should take s + (B - 1) · max(s, r) + r seconds instead of
B · (s + r).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback


sys.path.append(str(Path(__file__).parents[1] / "tiny"))

from flux import FLUX_20M, build_flux_pipeline

from trl_spatial import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_spatial.diffusion_grpo import attention_lora_config


BATCH_SIZE = 4
SHARES = (0.5, 1.0, 2.0)  # time to reward an image over the time to draw it


class WaitingReward:
    """Waits `seconds` per image, then rewards each image by its first pixel."""

    __name__ = "waiting"

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, prompts, images, **columns) -> list[float]:
        time.sleep(self.seconds * len(images))
        return [float(image.getpixel((0, 0))[0]) for image in images]


def measure(seconds: float, overlap_rewards: bool, args: argparse.Namespace) -> tuple[float, float]:
    """Returns the seconds of a rollout and of waiting for its rewards: minima, which other programs disturb least."""
    sizes: dict[str, Any] = FLUX_20M if args.model == "20m" else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = DiffusionGRPOTrainer(
            pipeline=build_flux_pipeline(**sizes),
            reward_funcs=WaitingReward(seconds),
            args=DiffusionGRPOConfig(
                output_dir=folder,
                num_generations=args.num_generations,
                top_k=1,  # little training, since only the rollout is measured
                per_device_train_batch_size=2,
                gradient_accumulation_steps=1,
                rollout_batch_size=BATCH_SIZE,
                overlap_rewards=overlap_rewards,
                height=args.image_size,
                width=args.image_size,
                max_sequence_length=32,
                max_steps=args.num_rollouts + 1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=[{"prompt": "a red circle"}],
            peft_config=attention_lora_config(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "time/step" in entry][1:]  # the first step warms up
    return (
        min(entry["time/sample"] + entry["time/reward"] for entry in logs),
        min(entry["time/reward"] for entry in logs),
    )


def predicted_ratio(num_batches: int, share: float) -> float:
    """Predicted time of a rollout with overlapping rewards over that without, where `share` is r / s."""
    return (1 + (num_batches - 1) * max(1.0, share) + share) / (num_batches * (1 + share))


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rollouts", type=int, default=2, help="rollouts that are measured, after a first one")
    parser.add_argument("--num_generations", type=int, default=24, help="images of a rollout")
    parser.add_argument("--image_size", type=int, default=32, help="width and height, in pixels")
    parser.add_argument("--model", choices=["20m", "tiny"], default="20m", help="size of the transformer")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    num_batches = -(-args.num_generations // BATCH_SIZE)
    drawing, _ = measure(0.0, False, args)
    results = []
    print(f"drawing {args.num_generations} images: {drawing:.2f} s\n{'r / s':>8}{'after':>8}{'during':>8}{'waited':>8}"
          f"{'ratio':>8}{'predicted':>11}")  # fmt: skip
    for share in SHARES:
        seconds = share * drawing / args.num_generations
        after, during = measure(seconds, False, args), measure(seconds, True, args)
        result = {
            "share": share,
            "after": after[0],
            "during": during[0],
            "waited": during[1],
            "ratio": during[0] / after[0],
            "predicted": predicted_ratio(num_batches, share),
        }
        results.append(result)
        print(
            f"{share:>8g}{after[0]:>8.2f}{during[0]:>8.2f}{during[1]:>8.2f}{result['ratio']:>8.2f}{result['predicted']:>11.2f}"
        )
    print(json.dumps(vars(args) | {"results": results}))
    return results


if __name__ == "__main__":
    main()
