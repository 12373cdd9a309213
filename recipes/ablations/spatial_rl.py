"""Which parts of Spatial-RL matter? The rules of the scenes judge the images.

    trl_spatial demo                                        # trains the reward model
    python recipes/ablations/spatial_rl.py --output_dir runs/ablations --reward_model runs/demo/reward

Trains the demo's tiny FLUX once per variant and seed, and draws held-out prompts with each. Questions are answered in the order of
`STUDIES`, in case time runs out. If restarted, the program resumes; several processes can share a folder, each with its own
`--variants` or `--seeds`. The results so far are in `table.md`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trl_spatial import DiffusionGRPOTrainer
from trl_spatial.demo.generator import (
    draw_images,
    grpo_config,
    judge,
    load_generator,
    make_prompts,
    make_trainer,
    spatial_accuracy,
    train_generator,
)
from trl_spatial.demo.run import make_reward
from trl_spatial.diffusion_grpo.reward_functions import RewardFunction
from trl_spatial.generation.seeds import image_generator


NUM_PROMPTS_PER_UPDATE = 8


class RandomFilterTrainer(DiffusionGRPOTrainer):
    """Trains on as many images of each group as the filter keeps, chosen at random."""

    def _select_kept(self, rewards: torch.Tensor, rollout_index: int) -> torch.Tensor:
        size, num_kept = self.args.num_generations, self.args.num_kept
        # distinct from the images' generators, whose last number is below `size`
        generator = image_generator(self.args.seed, rollout_index, 0, size)
        order = torch.rand(len(rewards) // size, size, generator=generator).argsort(dim=1)[:, :num_kept]
        return (order.sort(dim=1).values + size * torch.arange(len(order))[:, None]).flatten()


def brightness(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float]:
    """A deliberately wrong reward: the mean of the pixels, which says nothing about where things are."""
    return [float(np.asarray(image).mean() / 255) for image in images]


# Variant: settings that differ from the demo's. `_TRAINERS` and `_REWARDS` hold further differences.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no filter": {"top_k": None, "per_device_train_batch_size": NUM_PROMPTS_PER_UPDATE * 24},
    "k = 4": {"top_k": 4, "per_device_train_batch_size": NUM_PROMPTS_PER_UPDATE * 8},
    "12 at random": {},
    "rule as reward": {},
    "brightness as reward": {},
    "advantage over the group": {"advantage_scope": "group"},
    "CPS": {"dynamics": "cps"},
    "window of 2": {"sde_window_size": 2},
    "beta 0.01": {"beta": 0.01},
    "beta 0.0014": {"beta": 0.0014},  # as strong as 0.01 in Flow-GRPO's units
    "beta 0": {"beta": 1e-12},  # no pull, but the divergence is still measured
    # With one update per rollout, the ratio is 1 and nothing is ever clipped; these take two.
    "two updates, clip": {"num_iterations": 2},
    "two updates, ratio normalised": {"num_iterations": 2, "ratio_norm": True},
    "two updates, KL mask": {"num_iterations": 2, "kl_mask": 1e-5},
}
_TRAINERS: dict[str, type[DiffusionGRPOTrainer]] = {"12 at random": RandomFilterTrainer}
_REWARDS: dict[str, RewardFunction] = {"rule as reward": spatial_accuracy, "brightness as reward": brightness}

# Question: the variants that answer it. "default" is SpatialScore, k = 6, advantages over the kept images, Flow-SDE, all steps.
STUDIES: dict[str, list[str]] = {
    "filter": ["no filter", "default", "k = 4", "12 at random"],
    "reward": ["default", "rule as reward", "brightness as reward"],
    "advantage": ["default", "advantage over the group"],
    "dynamics": ["default", "CPS"],
    "window": ["default", "window of 2"],
    "KL divergence": ["default", "beta 0.01", "beta 0.0014", "beta 0"],
    "clip": ["two updates, clip", "two updates, ratio normalised", "two updates, KL mask"],
}


def run(variant: str, seed: int, args: argparse.Namespace) -> None:
    """Train one variant and measure it, unless its result exists."""
    file = result_file(args.output_dir, variant, seed)
    folder = file.parent
    if file.exists():
        return
    print(f"{variant}, seed {seed}", flush=True)
    scorer = make_reward(args.reward_model)
    changes = VARIANTS[variant]
    config = grpo_config(
        folder,
        max_steps=args.max_steps * changes.get("num_iterations", 1),  # the same number of rollouts for every variant
        seed=seed,
        eval_strategy="no",
        eval_on_start=False,
        **changes,
    )
    trainer = make_trainer(
        config,
        _REWARDS.get(variant, scorer),
        trainer_class=_TRAINERS.get(variant, DiffusionGRPOTrainer),
    )
    training = train_generator(trainer)
    result = measure(folder, scorer, args)
    result["kl"] = [log["kl"] for log in trainer.state.log_history if "kl" in log][-1]
    cost = training["cost"]
    result |= {name: cost[name] for name in ("num_policy_passes", "evaluations_per_image", "seconds")}
    file.write_text(json.dumps(result, indent=1) + "\n")


def check_same_runs(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Exit if the folder's results have other values of these arguments: one table must not mix them."""
    file = args.output_dir / "arguments.json"
    settings = {name: str(getattr(args, name)) for name in names}
    if file.exists() and (found := json.loads(file.read_text())) != settings:
        raise SystemExit(f"{args.output_dir} holds runs with {found}, not {settings}. Choose another --output_dir.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")


def measure_base(args: argparse.Namespace) -> None:
    """Measure the shipped generator, once."""
    file = result_file(args.output_dir, "base", 0)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure(None, make_reward(args.reward_model), args), indent=1) + "\n")


def result_file(output_dir: Path, variant: str, seed: int) -> Path:
    """The file with the result of a run."""
    return output_dir / f"{re.sub('[^a-zA-Z0-9]+', '_', variant)}-{seed}" / "result.json"


def collect(output_dir: Path) -> dict[str, list[dict[str, float]]]:
    """Read the results so far: variant → one result per seed."""
    files = {variant: sorted(output_dir.glob(_pattern(variant))) for variant in ("base", *VARIANTS)}
    return {variant: [json.loads(file.read_text()) for file in found] for variant, found in files.items() if found}


def _pattern(variant: str) -> str:
    return str(result_file(Path(), variant, 0)).replace("-0/", "-*/")


def measure(adapter: Path | None, scorer: RewardFunction, args: argparse.Namespace) -> dict[str, float]:
    """Judge images of held-out prompts, with the same prompts and noise for every variant and seed."""
    prompts = make_prompts(args.num_prompts, split="test", seed=0)
    judged = judge(draw_images(load_generator(adapter), prompts, scorer))
    return {
        **{name: judged[name]["estimate"] for name in ("spatial_accuracy", "objects_present")},
        **{name: judged[name] for name in ("reward", "diversity")},
    }


def format_table(results: dict[str, list[dict[str, float]]]) -> str:
    """The results so far as Markdown: mean ± standard deviation (n - 1) over the seeds."""
    columns = {
        "spatial_accuracy": ("spatial accuracy", "{:.3f}"),
        "objects_present": ("objects present", "{:.3f}"),
        "reward": ("SpatialScore", "{:.2f}"),
        "diversity": ("diversity", "{:.3f}"),
        "kl": ("KL divergence", "{:.4f}"),
        "evaluations_per_image": ("evaluations per image", "{:.1f}"),
        "num_policy_passes": ("policy evaluations, thousands", "{:.0f}"),
    }
    titles = " | ".join(title for title, _ in columns.values())
    lines = [f"| question | variant | {titles} | seeds |", "|---" * (len(columns) + 3) + "|"]
    if "base" in results:
        lines.append(_row("", "base, untrained", results["base"], columns))
    for study, variants in STUDIES.items():
        for variant in variants:
            if results.get(variant):
                lines.append(_row(study, variant, results[variant], columns))
            else:
                lines.append(f"| {study} | {variant} | not run" + " |" * (len(columns) + 1))
    return "\n".join(lines) + "\n"


def _row(study: str, variant: str, runs: list[dict[str, float]], columns: dict[str, tuple[str, str]]) -> str:
    cells = []
    for name, (_, form) in columns.items():
        values = [run[name] / (1000 if name == "num_policy_passes" else 1) for run in runs if name in run]
        if not values:
            cells.append("–")
        elif len(values) == 1 or name in ("evaluations_per_image", "num_policy_passes"):
            cells.append(form.format(values[0]))  # equal for all seeds
        else:
            cells.append(f"{form.format(np.mean(values))} ± {form.format(np.std(values, ddof=1))}")
    return f"| {study} | {variant} | {' | '.join(cells)} | {len(runs)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--reward_model", type=Path, required=True, help="folder of a SpatialScore checkpoint")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=100, help="number of rollouts")
    parser.add_argument("--num_prompts", type=int, default=256)
    args = parser.parse_args(argv)
    check_same_runs(args, ("reward_model", "max_steps", "num_prompts"))
    measure_base(args)
    for study in args.studies:
        for seed in args.seeds:
            for variant in STUDIES[study]:
                if variant in args.variants:
                    run(variant, seed, args)
                (args.output_dir / "table.md").write_text(format_table(collect(args.output_dir)))
    print((args.output_dir / "table.md").read_text())


if __name__ == "__main__":
    main()
