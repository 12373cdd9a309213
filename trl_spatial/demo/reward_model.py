"""SpatialScore in the demo: training on pairs of rendered scenes, evaluation on held-out pairs."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .. import GaussianRewardConfig, GaussianRewardTrainer
from ..evaluation.pair_run import PairRun, read_run, replay_pairs
from ..evaluation.pair_set import PairSet
from ..evaluation.pair_tables import PairScores, latest, scores_of, values_of
from ..evaluation.scorers import PairScorer
from ..figures.pairs import ScoredPair, draw_pairs
from ..gaussian_reward import spatial_score_lora_config
from ..scenes import describe_changes, make_preference_dataset
from ..statistics import share_interval
from ..store import is_complete
from .report import save_image


# The tiny Qwen2.5-VL that ships with the package: see its card in the same folder.
TINY_BACKBONE = Path(__file__).parents[1] / "tiny_models" / "qwen2_5_vl"


def load_pairs(folder: Path, num_pairs: int, *, split: str, seed: int) -> Dataset:
    """
    Load preference pairs of rendered scenes, as [`~scenes.make_preference_dataset`] makes them, from a folder, after making them
    if it does not exist.
    """
    if not (folder / "dataset_info.json").exists():
        dataset = make_preference_dataset(num_pairs, split=split, seed=seed, num_proc=2)
        partial = folder.with_suffix(".partial")
        for left in (partial, folder):
            shutil.rmtree(left, ignore_errors=True)
        dataset.save_to_disk(partial)
        partial.rename(folder)
    return Dataset.load_from_disk(folder)


def train_reward_model(
    dataset: Dataset, output_dir: Path, *, max_steps: int, seed: int, objective: str | None = None
) -> None:
    """
    Train a reward model from the tiny backbone, or resume an interrupted run; `output_dir` holds checkpoints and the model.
    `objective` is that of the loss, by default [`GaussianRewardConfig`]'s.
    """
    if not is_complete(output_dir):
        training_args = GaussianRewardConfig(
            output_dir=str(output_dir),
            max_steps=max_steps,
            seed=seed,
            # a tiny model learns with rates that would ruin a large one
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=32,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=10,
            save_steps=100,
            save_total_limit=1,
            report_to="none",
            **({} if objective is None else {"objective": objective}),
        )
        trainer = GaussianRewardTrainer(
            model=str(TINY_BACKBONE),
            args=training_args,
            train_dataset=dataset,
            peft_config=spatial_score_lora_config(rank=16, alpha=32),
        )
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model()


def score_pairs(scorer: PairScorer, dataset: Dataset, folder: Path, controls: Sequence[str] = ()) -> PairScores:
    """
    Score held-out pairs as `trl_spatial evaluate pairs` does, into a folder, whose contents are replaced. `controls` are names
    of [`~evaluation.pair_controls.CONTROLS`].
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = PairRun(folder, PairSet(dataset, folder.name))
    run.measure(scorer.name, scorer, controls, batch_size=64)
    _, pairs, records = read_run(folder)
    scores = scores_of(latest(records[scorer.name]), [pair["pair"] for pair in pairs])
    if num_missing := int(np.isnan(scores.margin).sum()):
        raise ValueError(f"{num_missing} of {len(pairs)} pairs have no score: the records in {folder} say why.")
    return scores


def measure(scorer: PairScorer, dataset: Dataset, folder: Path) -> tuple[dict[str, Any], PairScores]:
    """
    Evaluate a reward model on held-out pairs from [`~scenes.make_preference_dataset`], in a folder: accuracies with intervals,
    calibration and the flip test, as JSON; and the scores.
    """
    scores = score_pairs(scorer, dataset, folder, ["flip"])
    [row] = replay_pairs(folder)["scorers"]
    _, pairs, records = read_run(folder)
    mirrored, _ = values_of(latest(records[scorer.name]), [pair["pair"] for pair in pairs], "flip")
    groups = {
        grouping: {group["name"]: _as_interval(group) for group in row["groups"][grouping]}
        for grouping in ("level", "relation", "operation")
    }
    results = {
        "accuracy": {"all": {"all": row["accuracy"] | {"num_pairs": row["num_pairs"]}}} | groups,
        "expected_calibration_error": row["calibration"]["error"],
        "reliability": [
            {"confidence": bin["predicted"], "accuracy": bin["observed"], "num_pairs": bin["num_pairs"]}
            for bin in row["calibration"]["bins"]
        ],
        "flip_test": {
            "same_order": row["controls"]["flip"],
            "accuracy": asdict(share_interval(mirrored, [pair["cluster"] for pair in pairs])),
        },
    }
    return results, scores


def _as_interval(group: dict[str, Any]) -> dict[str, Any]:
    return {"estimate": group["accuracy"], **{name: group[name] for name in ("low", "high", "num_pairs")}}


def save_examples(dataset: Dataset, scores: PairScores, output_dir: Path, num_pairs: int = 8) -> list[dict[str, Any]]:
    """
    Save pictures of the pairs with the largest margins and of those with the smallest, which include the model's errors, half of
    `num_pairs` each: every picture in the folder `images` of `output_dir`, and a sheet of each half next to that folder.

    Returns:
        `list[dict]`: prompt, files of the images, relative to `output_dir`, scores and change of each pair.
    """
    order, half = np.argsort(-scores.margin, kind="stable"), -(-num_pairs // 2)
    examples = []
    for name, indices in (("best", order[:half]), ("worst", order[::-1][:half])):
        pairs = [scored_pair(dataset[index], scores, index) for index in indices.tolist()]
        draw_pairs(pairs, title=f"Held-out pairs, {name} margins").save(output_dir / f"{name}_pairs.png")
        for pair in pairs:
            files = {role: save_image(getattr(pair, role), output_dir) for role in ("chosen", "rejected")}
            scored = {"chosen_score": pair.chosen_score, "rejected_score": pair.rejected_score}
            examples.append({"prompt": pair.prompt, **files, **scored, "change": pair.caption})
    return examples


def scored_pair(row: dict[str, Any], scores: PairScores, index: int) -> ScoredPair:
    """Returns a pair for drawing, with its scores and its changes."""
    return ScoredPair(
        prompt=row["prompt"],
        chosen=row["chosen"],
        rejected=row["rejected"],
        chosen_score=(float(scores.chosen_mean[index]), float(scores.chosen_std[index])),
        rejected_score=(float(scores.rejected_mean[index]), float(scores.rejected_std[index])),
        caption=describe_changes(row["operations"]),
    )
