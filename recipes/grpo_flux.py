"""
Fine-tune FLUX.1-dev with SpatialScore as in the paper, and measure what it changed: rewards of the evaluation prompts before
and after, from the same noise, with 95 % intervals of the change. Name a reward with `--eval_rewards` that is not trained
on: the trained one alone cannot tell progress from exploitation.

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/grpo_flux.py \
        --config recipes/grpo_flux.yaml --dataset ORG/SpatialReward

The training itself is `trl_spatial grpo` with the same YAML file; this script adds the measurement, which it prints and
writes to `before_after.json` in the output folder.
"""

import json
from pathlib import Path

import numpy as np

from trl_spatial.evaluation.statistics import bootstrap_interval
from trl_spatial.scripts.grpo import build_trainer, make_parser, train


def main(script_args, model_args, training_args) -> None:
    trainer = build_trainer(script_args, model_args, training_args)
    if trainer.eval_dataset is None:
        raise SystemExit("This recipe measures: set `eval_strategy`, or train without it by `trl_spatial grpo`.")
    before = trainer.predict(trainer.eval_dataset).predictions  # (num_images, num_funcs)
    train(trainer)
    after = trainer.predict(trainer.eval_dataset).predictions  # (num_images, num_funcs)

    if trainer.is_world_process_zero():
        results = compare(before, after, trainer.eval_reward_functions.names)
        for name, result in results.items():
            low, high = result["interval"]
            print(
                f"{name:<20} before {result['before']:.4f}  after {result['after']:.4f}  "
                f"change {result['change']:+.4f}  [{low:+.4f}, {high:+.4f}]  n = {result['n']}"
            )
        Path(training_args.output_dir, "before_after.json").write_text(json.dumps(results, indent=2) + "\n")


def compare(before: np.ndarray, after: np.ndarray, names: list[str]) -> dict:
    """
    Mean rewards before and after, and the change with its interval over the images, which are paired: both have the same
    prompt and noise.

    Args:
        before, after (`np.ndarray` of shape `(num_images, num_funcs)`):
            Rewards of each image; NaN where a function has no opinion.
        names (`list[str]`):
            Names of the functions.
    """
    results = {}
    for name, old, new in zip(names, before.T, after.T, strict=True):
        known = ~(np.isnan(old) | np.isnan(new))
        if not known.any():
            continue
        old, new = old[known].astype(float), new[known].astype(float)
        change = bootstrap_interval(new - old, rng=np.random.default_rng(0))
        results[name] = {
            "before": float(old.mean()),
            "after": float(new.mean()),
            "change": float(change.estimate),
            "interval": [float(change.low), float(change.high)],
            "n": int(known.sum()),
        }
    return results


if __name__ == "__main__":
    main(*make_parser("grpo_flux.py").parse_args_and_config(is_launched=True))
