"""Which objective is better for the reward model: the expected or the marginal negative log-likelihood?

    python recipes/ablations/objectives.py --output_dir runs/objectives

Trains both from the tiny backbone, with the same pairs, steps and seeds, once on clean labels and once with noisy labels for a
third of the pairs: two in five of those with a long prompt are flipped. On held-out pairs, it prints the accuracy for the true
order, the calibration and likelihood of the labels (noisy ones if the training's are), and how well a pair's std separates the
noisy third from the rest (area under the ROC curve; .5 is chance). Finished runs are kept, so it resumes if restarted.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from datasets import Dataset

from trl_spatial.demo.reward_model import score_pairs, train_reward_model
from trl_spatial.evaluation.scorers.spatialscore import SpatialScorer
from trl_spatial.scenes import make_preference_dataset
from trl_spatial.statistics import area_under_roc_curve, expected_calibration_error


OBJECTIVES = ("expected_nll", "marginal_nll")
FLIP_PROBABILITY = 0.4
LONG_SHARE = 1 / 3


def make_pairs(num_pairs: int, split: str, seed: int) -> Dataset:
    """Make pairs in random order, a third of them with long prompts, without reverse pairs."""
    from datasets import concatenate_datasets

    num_long = round(num_pairs * LONG_SHARE)
    parts = [
        make_preference_dataset(number, split=split, seed=seed + i, length=length, num_proc=2)
        for i, (number, length) in enumerate(((num_pairs - num_long, "short"), (num_long, "long")))
    ]
    is_long = [False] * len(parts[0]) + [True] * len(parts[1])
    return concatenate_datasets(parts).add_column("is_long", is_long).shuffle(seed=seed)


def draw_flips(dataset: Dataset, seed: int) -> np.ndarray:
    """Draw which labels are flipped: `(num_pairs,)`, bool."""
    rng = np.random.default_rng(seed)
    return np.array(dataset["is_long"]) & (rng.random(len(dataset)) < FLIP_PROBABILITY)


def flip_labels(dataset: Dataset, flips: np.ndarray) -> Dataset:
    """Swap the two images of the pairs whose label is flipped."""
    dataset = dataset.add_column("flip", flips.tolist())

    def exchange(row):
        return {"chosen": row["rejected"], "rejected": row["chosen"]} if row["flip"] else {}

    return dataset.map(exchange, desc="Turning labels round").remove_columns("flip")


def run(objective: str, is_noisy: bool, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train one reward model and measure it."""
    name = f"{objective}-{'noisy' if is_noisy else 'clean'}-{seed}"
    result_file = args.output_dir / f"{name}.json"
    if result_file.exists():
        return json.loads(result_file.read_text())
    train, test = make_pairs(args.num_train_pairs, "train", seed), make_pairs(args.num_test_pairs, "test", seed)
    columns = ["prompt", "chosen", "rejected"]
    # without the columns for reverse pairs, which would repeat the label
    labels = draw_flips(train, seed) if is_noisy else np.zeros(len(train), bool)
    folder = args.output_dir / name
    train_reward_model(
        flip_labels(train, labels).select_columns(columns),
        folder,
        max_steps=args.max_steps,
        seed=seed,
        objective=objective,
    )
    scores = score_pairs(SpatialScorer(str(folder)), test, args.output_dir / f"{name}-pairs")
    flips = draw_flips(test, seed + 1) if is_noisy else np.zeros(len(test), bool)
    probability = scores.probability
    probability_of_label = np.where(flips, 1 - probability, probability)
    result = {
        "accuracy": float(((np.sign(scores.margin) + 1) / 2).mean()),
        "calibration_error": expected_calibration_error(probability, (~flips).astype(float)),
        "nll": float(-np.log(probability_of_label.clip(1e-12)).mean()),
        "mean_std": float(np.mean([scores.chosen_std.mean(), scores.rejected_std.mean()])),
    }
    if is_noisy:
        pair_std = np.hypot(scores.chosen_std, scores.rejected_std)
        result["auc_std"] = area_under_roc_curve(pair_std, np.array(test["is_long"]))
    result_file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train_pairs", type=int, default=6000)
    parser.add_argument("--num_test_pairs", type=int, default=2000)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = {}
    for is_noisy in (False, True):
        for objective in OBJECTIVES:
            results = [run(objective, is_noisy, seed, args) for seed in args.seeds]
            table[f"{objective}, {'noisy' if is_noisy else 'clean'}"] = {
                key: {"mean": float(np.mean(values)), "sd": float(np.std(values))}
                for key in results[0]
                for values in [[result[key] for result in results]]
            }
    (args.output_dir / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    print(format_table(table))


def format_table(table: dict) -> str:
    """The results as a Markdown table: mean ± standard deviation over the seeds."""
    keys = ("accuracy", "calibration_error", "nll", "mean_std", "auc_std")
    lines = ["| objective, labels | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in table.items():
        cells = [f"{row[key]['mean']:.3f} ± {row[key]['sd']:.3f}" if key in row else "–" for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
