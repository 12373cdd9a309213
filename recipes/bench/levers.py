"""How much time does each lever save, and is it what the count of evaluations predicts?

    python recipes/bench/levers.py

Trains a FLUX with 21 million random parameters on one CPU core (for guidance, a Qwen-Image of that size): rollouts of 12 images,
6 denoising steps, LoRA. For each lever, runs with and without it alternate, and the processor time of a rollout with its updates is
compared. The prediction counts transformer evaluations per image, one for a forward pass and one for a backward pass:
cfg · (T + 3 · K · kept) for the policy and cfg · K · kept for the reference, with T steps, K trained ones, the share `kept` of the
images, and cfg = 2 with guidance, else 1; without checkpointing, 2 replaces 3. Prints a table like that of README.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback


sys.path.append(str(Path(__file__).parents[1] / "tiny"))

from flux import FLUX_20M, build_flux_pipeline
from qwen_image import build_qwen_image_pipeline

from trl_spatial import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_spatial.diffusion_grpo import attention_lora_config


Row = TypeVar("Row")

NUM_IMAGES, TOP_K, NUM_STEPS = 12, 3, 6
QWEN_20M: dict[str, Any] = {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 64}


@dataclass(frozen=True)
class Lever:
    """
    Settings of [`DiffusionGRPOConfig`] with a lever and without it, on top of the benchmark's own and of `common`; evaluations per
    image with and without it; and whether it was kept.
    """

    given: dict[str, Any]
    without: dict[str, Any]
    evaluations: tuple[float, float]
    verdict: str
    family: str = "flux"
    common: dict[str, Any] = field(default_factory=dict)


def evaluations(trained: float, *, per_trained: float = 3.0, reference: bool = True, cfg: int = 1) -> float:
    """Evaluations per image, with `trained` = K · kept trained steps per image."""
    return cfg * (NUM_STEPS + per_trained * trained + reference * trained)


ALL, PAPER = NUM_STEPS - 1, (NUM_STEPS - 1) * 2 * TOP_K / NUM_IMAGES  # trained steps per image
LEVERS = {
    "filter, 3 best and 3 worst of 12": Lever(
        {}, {"top_k": None, "gradient_accumulation_steps": 6}, (evaluations(PAPER), evaluations(ALL)), "default: the paper's"
    ),
    "window of 2 trained steps": Lever(
        {"sde_window_size": 2}, {}, (evaluations(PAPER * 2 / ALL), evaluations(PAPER)),
        "option; in `grpo_flux_fast`, `grpo_qwen_image`",
    ),
    "no checkpointing": Lever(
        {"gradient_checkpointing": False}, {}, (evaluations(PAPER, per_trained=2), evaluations(PAPER)),
        "option: where memory allows",
    ),
    "activations of the rollout reused": Lever(
        {"gradient_checkpointing_kwargs": {"reuse_activations": True}}, {}, (evaluations(PAPER, per_trained=2), evaluations(PAPER)),
        "option: if memory allows",
    ),
    "no KL": Lever(
        {"beta": 0.0}, {}, (evaluations(PAPER, reference=False), evaluations(PAPER)), "option: the paper has one"
    ),
    "one update per rollout": Lever(
        {"gradient_accumulation_steps": 3}, {"gradient_accumulation_steps": 1},
        (evaluations(PAPER, reference=False), evaluations(PAPER, reference=False) + PAPER * 2 / 3),
        "default: the old policy is the policy, and nothing is evaluated again", common={"beta": 0.0},
    ),
    "no guidance (Qwen-Image)": Lever(
        {"guidance_scale": 1.0}, {"guidance_scale": 4.0}, (evaluations(PAPER), evaluations(PAPER, cfg=2)),
        "option: the images are others", family="qwen_image",
    ),
    "attention backend `_native_flash`": Lever(
        {"attention_backend": "_native_flash"}, {}, (1, 1), "option: PyTorch chooses the same kernel by itself"
    ),
    "regional compile": Lever(
        {"torch_compile": True}, {}, (1, 1), "option: it joins kernels, of which the count knows nothing; a minute to start"
    ),
}  # fmt: skip


class Clock(TrainerCallback):
    """Records the processor time after every update, which does not include that of other processes."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.process_time())


def brightness(prompts, images, **columns) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


def measure(family: str, settings: dict[str, Any], args: argparse.Namespace) -> float:
    """Returns the processor seconds of a rollout with its updates, after a first one that warms up."""
    is_large = args.model == "20m"
    if family == "flux":
        sizes: dict[str, Any] = FLUX_20M if is_large else {}
        pipeline: Any = build_flux_pipeline(**sizes)
    else:
        sizes = QWEN_20M if is_large else {}
        pipeline = build_qwen_image_pipeline(**sizes)
    settings = dict(settings)
    if (backend := settings.pop("attention_backend", None)) is not None:
        pipeline.transformer.set_attention_backend(backend)
    with tempfile.TemporaryDirectory() as folder:
        config = DiffusionGRPOConfig(
            folder,
            **{
                "num_generations": NUM_IMAGES,
                "top_k": TOP_K,
                "num_inference_steps": NUM_STEPS,
                "height": args.image_size,
                "width": args.image_size,
                "max_sequence_length": 32,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 3,
                "steps_per_generation": 3 if settings.get("top_k", TOP_K) else 6,
                "rollout_batch_size": 4,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                **settings,
            },
        )
        num_updates = config.num_updates_per_rollout
        config.max_steps = (1 + args.num_rollouts) * num_updates
        clock = Clock()
        trainer = DiffusionGRPOTrainer(
            pipeline,
            brightness,
            config,
            train_dataset=[{"prompt": "a red circle"}],
            peft_config=attention_lora_config(),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    torch._dynamo.reset()
    return (clock.times[-1] - clock.times[num_updates - 1]) / args.num_rollouts


def measure_lever(lever: Lever, args: argparse.Namespace) -> dict[str, float]:
    """Alternates runs with and without a lever; returns the median seconds of each, their ratio and the prediction."""
    pairs = [
        [measure(lever.family, lever.common | part, args) for part in (lever.given, lever.without)]
        for _ in range(args.repeats)
    ]
    given, without = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    predicted = lever.evaluations[0] / lever.evaluations[1]
    return {"given": given, "without": without, "ratio": given / without, "predicted": predicted}


def to_markdown(results: dict[str, dict[str, float]]) -> str:
    lines = ["| lever | predicted | measured | kept |", "|---|---|---|---|"]
    for name, result in results.items():
        measured = f"{result['ratio']:.2f} ({result['given']:.2f} / {result['without']:.2f} s)"
        lines.append(f"| {name} | {result['predicted']:.2f} | {measured} | {LEVERS[name].verdict} |")
    return "\n".join(lines)


def choose_rows(
    argv: list[str] | None, rows: dict[str, Row], description: str | None, *, num_rollouts: int
) -> tuple[argparse.Namespace, dict[str, Row]]:
    """Parses the options of a program that measures rollouts, and returns them with the rows they select."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only rows whose name has this in it")
    parser.add_argument(
        "--num_rollouts", type=int, default=num_rollouts, help="rollouts that are measured, after a first one"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--image_size", type=int, default=32, help="width and height, in pixels")
    parser.add_argument("--model", choices=["20m", "tiny"], default="20m", help="size of the transformer")
    args = parser.parse_args(argv)
    chosen = {name: row for name, row in rows.items() if args.only in name}
    if not chosen:
        parser.error(f"--only: no row has {args.only!r} in its name; there are: {'; '.join(rows)}")
    return args, chosen


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    args, chosen = choose_rows(argv, LEVERS, __doc__, num_rollouts=2)
    torch.set_num_threads(1)
    results = {}
    for name, lever in chosen.items():
        results[name] = measure_lever(lever, args)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    print(to_markdown(results))
    return results


if __name__ == "__main__":
    main()
