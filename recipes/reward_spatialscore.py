"""
Train SpatialScore as in the paper, keep the best checkpoint on held-out pairs, and evaluate it on them: accuracy by the
number of changed relations (column `level`) with 95 % intervals, and calibration.

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/reward_spatialscore.py \
        --config recipes/reward_spatialscore.yaml --dataset ORG/SpatialReward

Training is the same as `trl_spatial reward` with that YAML file; this script adds the evaluation, which it prints and writes
to `held_out.json` in the output folder.
"""

import json
from pathlib import Path

import numpy as np
import torch

from trl_spatial.cli import run_command
from trl_spatial.evaluation.pair_set import find_clusters
from trl_spatial.gaussian_reward import GaussianRewardTrainer, preference_probability
from trl_spatial.scripts.datasets import load_dataset_dict, pick_split
from trl_spatial.scripts.reward import build_trainer, make_parser
from trl_spatial.statistics import expected_calibration_error, share_interval


def main(script_args, model_args, training_args) -> None:
    trainer = build_trainer(script_args, model_args, training_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    splits = load_dataset_dict(script_args.dataset, config_name=script_args.dataset_config)
    held_out = pick_split(splits, script_args.dataset_test_split, script_args.dataset, option="--dataset_test_split")
    results = measure(trainer, held_out)
    if trainer.is_world_process_zero():
        for name, result in results["accuracy"].items():
            low, high = result["interval"]
            print(f"{name:<20} accuracy {result['estimate']:.3f}  [{low:.3f}, {high:.3f}]  n = {result['n']}")
        print(f"expected calibration error {results['calibration_error']:.3f}")
        Path(training_args.output_dir, "held_out.json").write_text(json.dumps(results, indent=2) + "\n")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset)


def measure(trainer: GaussianRewardTrainer, held_out) -> dict:
    """Accuracy, by level if the dataset has that column, and calibration on pairs the trainer has not seen."""
    trainer.args.use_reverse_pairs, trainer.args.skip_bad_rows = False, False  # one prediction per row
    outputs = trainer.predict(held_out).predictions
    chosen_mean, _, rejected_mean, _ = outputs  # each (num_pairs,)
    correct = (np.sign(chosen_mean - rejected_mean) + 1) / 2  # (num_pairs,)
    has_perturbed = "perturbed_prompt" in held_out.column_names
    perturbed = held_out["perturbed_prompt"] if has_perturbed else [None] * len(correct)
    clusters = np.array(find_clusters(list(held_out["prompt"]), list(perturbed)))  # (num_pairs,)
    groups = {"all pairs": np.ones(len(correct), dtype=bool)}
    if "level" in held_out.column_names:
        levels = np.array(held_out["level"])
        groups |= {f"{level} changed": levels == level for level in np.unique(levels)}
    accuracy = {}
    for name, rows in groups.items():
        interval = share_interval(correct[rows], clusters[rows])
        accuracy[name] = {
            "estimate": float(interval.estimate),
            "interval": [float(interval.low), float(interval.high)],
            "n": int(rows.sum()),
        }
    probabilities = preference_probability(*map(torch.from_numpy, outputs)).numpy()  # (num_pairs,)
    return {"accuracy": accuracy, "calibration_error": float(expected_calibration_error(probabilities))}


if __name__ == "__main__":
    parser = make_parser("reward_spatialscore.py")
    raise SystemExit(run_command(parser.prog, lambda: main(*parser.parse_args_and_config(is_launched=True))))
