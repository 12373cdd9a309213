"""Which method is best at equal cost? The rules of the scenes judge the images.

    trl_spatial demo                                        # trains the reward model
    python recipes/ablations/methods.py --output_dir runs/methods --reward_model runs/demo/reward

Trains the demo's tiny FLUX with every method, on the same budget of passes through its transformer: drawing, training and reference
passes all count. A run ends with the update that reaches the budget, and is evaluated on validation prompts along the way. If
restarted, the program resumes; several processes can share a folder, each with its own `--methods` or `--seeds`. The results so far
are in `table.md`, and accuracy against passes is plotted in `curves.png`.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback


sys.path.append(str(Path(__file__).parent))

from curves import draw_curves
from spatial_rl import NUM_PROMPTS_PER_UPDATE, RandomFilterTrainer, brightness, check_same_runs, result_file

from trl_spatial import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
)
from trl_spatial.demo.generator import (
    IMAGES_PER_PROMPT,
    LORA_RANK,
    NUM_MONITORED_PROMPTS,
    SAMPLING,
    draw_images,
    load_generator,
    make_prompts,
    objects_present,
    read_graphs,
    spatial_accuracy,
    training_config,
)
from trl_spatial.demo.run import make_reward
from trl_spatial.diffusion_grpo.online_config import OnlineConfig
from trl_spatial.diffusion_grpo.online_trainer import OnlineTrainer
from trl_spatial.diffusion_grpo.policies.lora import attention_lora_config
from trl_spatial.diffusion_grpo.reward_functions import RewardFunction
from trl_spatial.diffusion_grpo.runtime.base_trainer import DiffusionTrainer
from trl_spatial.generation.drawing import draw_rows
from trl_spatial.generation.generators import PipelineGenerator
from trl_spatial.generation.seeds import image_generator
from trl_spatial.judges.scenes import check_images, has_objects, pairwise_distance
from trl_spatial.statistics import bootstrap_interval


# Preference pairs are the best and worst of this many images per prompt, which the policy draws in this many steps, without noise
NUM_PAIR_IMAGES, NUM_PAIR_STEPS = 8, 6
# With the default beta, the loss saturates before these few latents have moved; at 20, the images fall apart.
DPO = {"beta": 200.0, "learning_rate": 1e-3}


@dataclass(frozen=True)
class Method:
    """
    A training method: settings that differ from the demo's, the trainer and its configuration, the reward unless it is the reward
    model, and the share of the budget that preference training takes first.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    trainer: type[OnlineTrainer] = DiffusionGRPOTrainer
    config: type[OnlineConfig] = DiffusionGRPOConfig
    reward: RewardFunction | None = None
    dpo_share: float = 0.0


GRPO = {"noise_level": 0.7}  # the demo's
NFT: dict[str, Any] = {"beta": 1e-2}
SCOUTS = {"num_scouts": 96, "scout_steps": 2}
METHODS: dict[str, Method] = {
    "k = 6": Method(GRPO),  # the demo's, and the paper's: Flow-SDE, all steps, advantages over the kept images
    "no filter": Method(GRPO | {"top_k": None, "per_device_train_batch_size": NUM_PROMPTS_PER_UPDATE * 24}),
    "k = 4": Method(GRPO | {"top_k": 4, "per_device_train_batch_size": NUM_PROMPTS_PER_UPDATE * 8}),
    "12 at random": Method(GRPO, RandomFilterTrainer),
    "window of 2": Method(GRPO | {"sde_window_size": 2}),
    "scouts": Method(GRPO | SCOUTS),
    "NFT": Method(NFT, DiffusionNFTTrainer, DiffusionNFTConfig),
    "NFT, scouts": Method(NFT | SCOUTS, DiffusionNFTTrainer, DiffusionNFTConfig),
    "DPO → GRPO": Method(GRPO, dpo_share=0.25),
    "CPS": Method({"dynamics": "cps", "noise_level": 0.8}),
    "Precise": Method({"dynamics": "precise", "noise_level": 1.5}),
    "advantage over the group": Method(GRPO | {"advantage_scope": "group"}),
    "rule as reward": Method(GRPO, reward=spatial_accuracy),
    "brightness as reward": Method(GRPO, reward=brightness),
}
BASELINE = "k = 6"
# Panel of the plot: the methods it compares with the baseline
PANELS: dict[str, list[str]] = {
    "filter": ["no filter", "k = 6", "k = 4", "12 at random"],
    "cost": ["k = 6", "window of 2", "scouts", "NFT", "NFT, scouts", "DPO → GRPO"],
    "sampler and advantage": ["k = 6", "CPS", "Precise", "advantage over the group"],
    "reward": ["k = 6", "rule as reward", "brightness as reward"],
}


class Budget(TrainerCallback):
    """Ends training with the update that reaches `num_passes`, and evaluates then and about every `every` passes."""

    def __init__(self, trainer: DiffusionTrainer, num_passes: int, every: int, num_before: int = 0):
        self.trainer, self.num_passes, self.every, self.num_before = trainer, num_passes, every, num_before
        self.at_start_of_update = 0

    def count(self) -> int:
        """Passes so far, including those of an earlier stage."""
        totals = self.trainer._metrics.totals
        return self.num_before + sum(number for name, number in totals.items() if name.endswith("_passes"))

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.at_start_of_update = self.count()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = self.count()
        if now >= self.num_passes:
            control.should_training_stop = True
        if now >= self.num_passes or now // self.every > self.at_start_of_update // self.every:
            control.should_evaluate = True


def run(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train with one method and measure it, unless its result exists."""
    file = result_file(args.output_dir, name, seed)
    if file.exists():
        return
    print(f"{name}, seed {seed}", flush=True)
    method, folder, scorer = METHODS[name], file.parent, make_reward(args.reward_model)
    pipeline, curve = load_generator(), []
    peft_config = attention_lora_config(rank=LORA_RANK, alpha=2 * LORA_RANK)
    if method.dpo_share:
        curve = train_on_preferences(pipeline, scorer, folder, seed, round(method.dpo_share * args.budget), args)
        peft_config = None  # the pipeline already has adapters, which are trained further
    trainer = method.trainer(
        pipeline=pipeline,
        reward_funcs=method.reward or scorer,
        args=make_config(method, folder, seed, args),
        train_dataset=make_prompts(2048, split="train", seed=seed),
        peft_config=peft_config,
        **validation(seed, args),
    )
    curve = curve[:-1] + train(trainer, args.budget, args, curve)  # the second stage begins where the first ends
    trainer.save_model()
    result = measure(folder, scorer, args) | {"curve": curve} | {key: curve[-1][key] for key in ("passes", "seconds")}
    file.write_text(json.dumps(result, indent=1) + "\n")


def make_config(method: Method, folder: Path, seed: int, args: argparse.Namespace) -> OnlineConfig:
    """The demo's configuration with the method's settings, for as many updates as the budget could allow."""
    # Every update takes at least one pass per prompt.
    max_steps = math.ceil(args.budget / NUM_PROMPTS_PER_UPDATE)
    own = {"eval_strategy": "no", "save_steps": 10}
    return training_config(method.config, folder, max_steps=max_steps, seed=seed, **(own | method.settings))


def validation(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trainer arguments for evaluation along the way, on prompts used neither in training nor in the measurement."""
    return {
        "eval_dataset": make_prompts(args.num_validation_prompts, split="validation", seed=seed),
        "eval_reward_funcs": [spatial_accuracy, objects_present],
    }


def train(
    trainer: DiffusionTrainer, num_passes: int, args: argparse.Namespace, before: list[dict[str, float]]
) -> list[dict[str, float]]:
    """Train until `num_passes` are used up, including those of the curve `before`, and return this stage's curve."""
    start = before[-1] if before else {"passes": 0, "seconds": 0.0}
    every = math.ceil(args.budget / args.num_points)
    trainer.add_callback(Budget(trainer, num_passes, every, int(start["passes"])))
    trainer.train(resume_from_checkpoint=True)
    points, seconds, passes = {}, start["seconds"], start["passes"]
    for log in trainer.state.log_history:
        if "loss" in log:
            seconds += log["time/step"]
            passes = int(start["passes"]) + sum(log[key] for key in log if key.endswith("_passes"))
        elif "eval_rewards/spatial_accuracy/mean" in log:
            shares = {key: log[f"eval_rewards/{key}/mean"] for key in ("spatial_accuracy", "objects_present")}
            # a resumed run evaluates again where it resumes
            points[passes] = {"passes": passes, "seconds": seconds, **shares}
    return list(points.values())


def train_on_preferences(
    pipeline: Any, scorer: RewardFunction, folder: Path, seed: int, num_passes: int, args: argparse.Namespace
) -> list[dict[str, float]]:
    """
    Train the pipeline on preferences between its own images, with the noise that each was drawn from, and return the curve. Half of
    the passes draw the images. The adapters stay in the pipeline.
    """
    num_prompts = max(1, num_passes // 2 // (NUM_PAIR_IMAGES * NUM_PAIR_STEPS))
    pairs, seconds = make_pairs(pipeline, scorer, num_prompts, seed)
    drawn = {"passes": num_prompts * NUM_PAIR_IMAGES * NUM_PAIR_STEPS, "seconds": seconds}
    num_pairs = min(32, len(pairs))
    # a forward and a backward pass of the policy, and one of the reference, for both images of a pair
    max_steps = math.ceil((num_passes - drawn["passes"]) / (num_pairs * 2 * 3))
    config = DiffusionDPOConfig(
        str(folder / "dpo"), max_steps=max_steps, seed=seed, **DPO,
        per_device_train_batch_size=num_pairs, dataloader_drop_last=True, gradient_accumulation_steps=1, per_device_eval_batch_size=192, ema_decay=0.0,
        gradient_checkpointing=False, height=SAMPLING["height"], width=SAMPLING["width"],
        max_sequence_length=SAMPLING["max_sequence_length"], eval_num_inference_steps=SAMPLING["num_inference_steps"],
        save_steps=10, save_total_limit=1, eval_on_start=True, report_to="none",
    )  # fmt: skip
    trainer = DiffusionDPOTrainer(
        pipeline=pipeline,
        args=config,
        train_dataset=pairs,
        peft_config=attention_lora_config(rank=LORA_RANK, alpha=2 * LORA_RANK),
        **validation(seed, args),
    )
    return train(trainer, num_passes, args, [drawn])


def make_pairs(
    pipeline: Any, scorer: RewardFunction, num_prompts: int, seed: int
) -> tuple[list[dict[str, Any]], float]:
    """Draw images, pair the best and the worst of each prompt, and return the preference rows and the seconds taken."""
    start = time.perf_counter()
    prompts = make_prompts(num_prompts, split="train", seed=seed)
    generator = PipelineGenerator(pipeline, **(SAMPLING | {"num_inference_steps": NUM_PAIR_STEPS}))
    images = [
        image
        for batch in draw_rows(generator, prompts, batch_size=192, seed=seed, num_images=NUM_PAIR_IMAGES)
        for image in batch.images
    ]
    names = [name for name in prompts["prompt"] for _ in range(NUM_PAIR_IMAGES)]
    rewards = torch.tensor(scorer(prompts=names, images=images)).view(-1, NUM_PAIR_IMAGES)
    size = {"pipeline": type(pipeline).__name__, "width": SAMPLING["width"], "height": SAMPLING["height"]}
    rows = []
    for row, prompt in enumerate(prompts["prompt"]):
        pair: dict[str, Any] = {"prompt": prompt}
        for side, index in (("chosen", int(rewards[row].argmax())), ("rejected", int(rewards[row].argmin()))):
            noise = {"torch_seed": image_generator(seed, row, index).initial_seed(), "generator_device": "cpu"}
            pair |= {side: images[row * NUM_PAIR_IMAGES + index], f"{side}_recipe": json.dumps(size | noise)}
        if rewards[row].max() > rewards[row].min():  # equal rewards give no preference
            rows.append(pair)
    return rows, time.perf_counter() - start


def measure(adapter: Path | None, scorer: RewardFunction, args: argparse.Namespace) -> dict[str, Any]:
    """Judge images of held-out prompts, with the same prompts and noise for every method and seed; shares also by prompt."""
    drawn = draw_images(load_generator(adapter), make_prompts(args.num_prompts, split="test", seed=0), scorer)
    images = list(drawn["image"])
    checks = check_images(images, read_graphs(drawn["scene"]))
    by_prompt = {
        "spatial_accuracy": np.reshape([check.is_correct for check in checks], (-1, IMAGES_PER_PROMPT)).mean(1),
        "objects_present": np.reshape([has_objects(check) for check in checks], (-1, IMAGES_PER_PROMPT)).mean(1),
    }
    return {
        "by_prompt": {name: values.tolist() for name, values in by_prompt.items()},
        **{name: float(values.mean()) for name, values in by_prompt.items()},
        "reward": float(np.mean(drawn["score"])),
        "diversity": pairwise_distance(images, IMAGES_PER_PROMPT),
    }


def measure_base(args: argparse.Namespace) -> None:
    """Measure the shipped generator, once."""
    file = result_file(args.output_dir, "base", 0)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure(None, make_reward(args.reward_model), args), indent=1) + "\n")


def collect(output_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the results so far: method → one result per seed."""
    results = {}
    for name in ("base", *METHODS):
        files = sorted(output_dir.glob(str(result_file(Path(), name, 0)).replace("-0/", "-*/")))
        if files:
            results[name] = [json.loads(file.read_text()) for file in files]
    return results


def format_table(results: dict[str, list[dict[str, Any]]]) -> str:
    """
    The results so far as Markdown. The 95 % intervals resample prompts, each averaged over the seeds, because a prompt tends to
    succeed or fail with all of them. Differences from the baseline are paired by prompt. The column "at ... s" is the accuracy on
    validation prompts after as many seconds as the fastest run took.
    """
    trained = [run for name, runs in results.items() if name != "base" for run in runs]
    horizon = min((run["seconds"] for run in trained), default=math.nan)
    columns = [
        "method", "spatial accuracy", f"difference from {BASELINE}", "objects present", "SpatialScore", "diversity",
        "passes, thousands", "seconds", f"at {horizon:.0f} s", "seeds",
    ]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in ("base", *METHODS):
        runs = results.get(name)
        if runs is None:
            lines.append(f"| {name} | not run" + " |" * (len(columns) - 1))
            continue
        cells = [
            name,
            _interval(runs),
            _difference(runs, results[BASELINE]) if BASELINE in results and name != BASELINE else "",
            *(f"{_mean(runs, key):{form}}" for key, form in (("objects_present", ".3f"), ("reward", ".2f"), ("diversity", ".3f"))),
            *(["0", "", ""] if name == "base" else [f"{_mean(runs, 'passes') / 1000:.0f}", f"{_mean(runs, 'seconds'):.0f}",
                                                     f"{np.mean([_at(run['curve'], horizon) for run in runs]):.3f}"]),
            str(len(runs)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([run[key] for run in runs]))


def _by_prompt(runs: list[dict[str, Any]]) -> np.ndarray:
    return np.mean([run["by_prompt"]["spatial_accuracy"] for run in runs], axis=0)


def _interval(runs: list[dict[str, Any]]) -> str:
    interval = bootstrap_interval(_by_prompt(runs), rng=np.random.default_rng(0))
    values = [run["spatial_accuracy"] for run in runs]
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{interval.estimate:.3f}{spread} [{interval.low:.3f}, {interval.high:.3f}]"


def _difference(runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
    interval = bootstrap_interval(_by_prompt(runs) - _by_prompt(baseline), rng=np.random.default_rng(0))
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _at(curve: list[dict[str, float]], seconds: float) -> float:
    """The spatial accuracy after `seconds`, interpolated linearly between the points of a curve."""
    return float(
        np.interp(seconds, [point["seconds"] for point in curve], [point["spatial_accuracy"] for point in curve])
    )


def report(args: argparse.Namespace) -> None:
    """Write the table and the plot of the results so far."""
    results = collect(args.output_dir)
    (args.output_dir / "table.md").write_text(format_table(results))
    curves = {name: [run["curve"] for run in runs] for name, runs in results.items() if name != "base"}
    if curves:
        draw_curves(args.output_dir / "curves.png", curves, PANELS, BASELINE, args.num_validation_prompts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--reward_model", type=Path, required=True, help="folder of a SpatialScore checkpoint")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=120_000, help="passes through the transformer of each training")
    parser.add_argument("--num_points", type=int, default=8, help="evaluations on the way")
    parser.add_argument("--num_prompts", type=int, default=256, help="of the measurement, with 4 images each")
    parser.add_argument("--num_validation_prompts", type=int, default=NUM_MONITORED_PROMPTS)
    args = parser.parse_args(argv)
    check_same_runs(args, [name for name in vars(args) if name not in ("output_dir", "methods", "seeds")])
    measure_base(args)
    for seed in args.seeds:
        for name in args.methods:
            run(name, seed, args)
            report(args)
    print((args.output_dir / "table.md").read_text())


if __name__ == "__main__":
    main()
