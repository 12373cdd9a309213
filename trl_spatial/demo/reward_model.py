"""`trl_spatial demo`: from rendered scenes to a trained and measured reward model, on a laptop."""

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .utils import SpatialParser


if TYPE_CHECKING:
    from datasets import Dataset

    from ..evaluation.pairs import PairScores
    from ..gaussian_reward.scoring import SpatialScore


EXAMPLES = """\
  # everything, about five minutes on two cores
  trl_spatial demo

  # a glance: a few steps and pairs, into another folder
  trl_spatial demo --max_steps 5 --num_train_pairs 64 --num_test_pairs 60 --output_dir runs/glance
"""

# The tiny Qwen2.5-VL that is shipped with the package: see its card beside it.
TINY_BACKBONE = Path(__file__).parents[1] / "tiny_models" / "qwen2_5_vl"


@dataclass
class DemoArguments:
    """
    Arguments of the demo.

    Args:
        output_dir (`str`, *optional*, defaults to `"runs/demo"`):
            Folder of the model, the numbers and the pictures. An interrupted run in it goes on.
        num_train_pairs (`int`, *optional*, defaults to `8000`):
            Number of pairs to train on; each is used in both directions.
        num_test_pairs (`int`, *optional*, defaults to `3000`):
            Number of held-out pairs to measure on.
        max_steps (`int`, *optional*, defaults to `250`):
            Number of updates.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pairs and of training.
    """

    output_dir: str = field(
        default="runs/demo", metadata={"help": "Folder of the model, the numbers and the pictures."}
    )
    num_train_pairs: int = field(default=8000, metadata={"help": "Number of pairs to train on."})
    num_test_pairs: int = field(default=3000, metadata={"help": "Number of held-out pairs to measure on."})
    max_steps: int = field(default=250, metadata={"help": "Number of updates."})
    seed: int = field(default=0, metadata={"help": "Seed of the pairs and of training."})

    def __post_init__(self):
        for name in ("num_train_pairs", "num_test_pairs", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. Use a positive number.")


def make_parser(prog: str = "trl_spatial demo") -> SpatialParser:
    return SpatialParser(
        DemoArguments,
        prog=prog,
        description="Train a spatial reward model on rendered scenes, from the tiny backbone in the package, and measure "
        "how often it ranks held-out pairs rightly.",
        examples=EXAMPLES,
    )


def main(args: DemoArguments) -> None:
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _check_same_run(args, output_dir)
    started = time.perf_counter()
    print("1/3  Scenes: rendering pairs of images that differ in one to three relations", flush=True)
    train_dataset = _load_pairs(output_dir / "pairs" / "train", args.num_train_pairs, "train", args.seed)
    test_dataset = _load_pairs(output_dir / "pairs" / "test", args.num_test_pairs, "test", args.seed)
    print("2/3  SpatialScore: training the reward model", flush=True)
    scorer = train_reward_model(train_dataset, output_dir / "reward", max_steps=args.max_steps, seed=args.seed)
    print("3/3  Measuring on held-out pairs", flush=True)
    results, scores = measure(scorer, test_dataset)
    results["seconds"] = round(time.perf_counter() - started)
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name in ("best", "worst"):
        draw_sheet(test_dataset, scores, name).save(output_dir / f"{name}_pairs.png")
    report = format_results(results)
    (output_dir / "results.md").write_text(report)
    print(
        f"\n{report}\nWritten to {output_dir}: results.md, results.json, best_pairs.png, worst_pairs.png, reward/",
        flush=True,
    )


def _check_same_run(args: DemoArguments, output_dir: Path) -> None:
    """An interrupted run goes on with its own arguments; other arguments belong into another folder."""
    file = output_dir / "arguments.json"
    arguments = asdict(args) | {"output_dir": None}
    if file.exists() and (found := json.loads(file.read_text())) != arguments:
        changed = {key: (found.get(key), value) for key, value in arguments.items() if found.get(key) != value}
        raise ValueError(
            f"{output_dir} holds a run with other arguments (there, here): {changed}. Choose another --output_dir or "
            "remove that folder."
        )
    file.write_text(json.dumps(arguments, indent=2) + "\n")


def _load_pairs(folder: Path, num_pairs: int, split: str, seed: int) -> "Dataset":
    from datasets import Dataset

    from ..scenes import make_preference_dataset

    if not folder.exists():
        dataset = make_preference_dataset(num_pairs, split=split, seed=seed, num_proc=2)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        dataset.save_to_disk(partial)
        partial.rename(folder)
    return Dataset.load_from_disk(folder)


def train_reward_model(
    dataset: "Dataset", output_dir: Path, *, max_steps: int, seed: int, objective: str | None = None
) -> "SpatialScore":
    """
    Train a reward model from the tiny backbone, or go on with an interrupted training.

    Args:
        dataset (`Dataset`):
            Preference pairs.
        output_dir (`Path`):
            Folder of the checkpoints and the trained model.
        max_steps (`int`):
            Number of updates.
        seed (`int`):
            Seed of training.
        objective (`str`, *optional*):
            Objective of the loss. Defaults to [`GaussianRewardConfig`]'s.

    Returns:
        [`SpatialScore`]: the trained model.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from .. import GaussianRewardConfig, GaussianRewardTrainer, SpatialScore
    from ..gaussian_reward import spatial_score_lora_config

    if not (output_dir / "adapter_model.safetensors").exists():
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
        checkpoint = get_last_checkpoint(output_dir) if output_dir.exists() else None
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    return SpatialScore.from_pretrained(output_dir)


def measure(scorer: "SpatialScore", dataset: "Dataset") -> tuple[dict, "PairScores"]:
    """
    Measure a reward model on held-out pairs.

    Args:
        scorer ([`SpatialScore`]):
            The model.
        dataset (`Dataset`):
            Pairs from [`make_preference_dataset`].

    Returns:
        `tuple[dict, PairScores]`: accuracies with intervals, calibration and the flip test; and the scores.
    """
    import numpy as np

    from ..evaluation.pairs import accuracy_table, score_pairs
    from ..evaluation.statistics import accuracy_interval, expected_calibration_error

    def score(prompts, images):
        return scorer.score(prompts, images, batch_size=128)

    scores, mirrored = score_pairs(score, dataset), score_pairs(score, dataset, is_mirrored=True)
    results = {
        "accuracy": {
            group: {name: {**asdict(row.accuracy), "num_pairs": row.num_pairs} for name, row in rows.items()}
            for group, rows in accuracy_table(scores, dataset).items()
        },
        "expected_calibration_error": expected_calibration_error(preference(scores)),
        "flip_test": {
            "same_order": asdict(accuracy_interval(np.sign(scores.margin) == np.sign(mirrored.margin))),
            "accuracy": asdict(accuracy_interval(mirrored.correct)),
        },
    }
    return results, scores


def preference(scores: "PairScores"):
    """P(chosen ≻ rejected) of every pair, `(num_pairs,)`."""
    import torch

    from ..gaussian_reward.losses import preference_probability

    fields = (scores.chosen_mean, scores.chosen_std, scores.rejected_mean, scores.rejected_std)
    chosen_mean, chosen_std, rejected_mean, rejected_std = (torch.as_tensor(values).float() for values in fields)
    return preference_probability(chosen_mean, chosen_std.log(), rejected_mean, rejected_std.log()).numpy()


def draw_sheet(dataset: "Dataset", scores: "PairScores", which: str, num_pairs: int = 8):
    """Draw the pairs with the largest (`which="best"`) or smallest (`"worst"`) margin."""
    import numpy as np

    from ..evaluation.figures import ScoredPair, draw_pairs

    order = np.argsort(-scores.margin if which == "best" else scores.margin, kind="stable")
    pairs = []
    for index in order[:num_pairs].tolist():
        row = dataset[index]
        changes = "; ".join(f"{o['before']} to {o['after']}" for o in row["operations"])
        pairs.append(
            ScoredPair(
                prompt=row["prompt"],
                chosen=row["chosen"],
                rejected=row["rejected"],
                chosen_score=(float(scores.chosen_mean[index]), float(scores.chosen_std[index])),
                rejected_score=(float(scores.rejected_mean[index]), float(scores.rejected_std[index])),
                caption=f"changed: {changes}",
            )
        )
    return draw_pairs(pairs, title=f"Held-out pairs, {which} margins")


def format_results(results: dict) -> str:
    """The results as Markdown tables."""
    lines = ["| held-out pairs | accuracy | 95 % interval | pairs |", "|---|---|---|---|"]
    titles = {"all": "all", "level": "changes: {}", "relation": "one change, {}", "operation": "one change by {}"}
    for group, title in titles.items():
        for name, row in results["accuracy"][group].items():
            lines.append(
                f"| {title.format(name)} | {row['estimate']:.3f} | {row['low']:.3f} – {row['high']:.3f} | {row['num_pairs']} |"
            )
    flip = results["flip_test"]
    lines += [
        "",
        f"Calibration of P(chosen): expected calibration error {results['expected_calibration_error']:.3f}",
        f"Flip test: order kept when image and text are mirrored, {flip['same_order']['estimate']:.3f} of pairs; accuracy "
        f"on the mirrored pairs {flip['accuracy']['estimate']:.3f}",
        f"Time: {results['seconds'] // 60} min {results['seconds'] % 60} s",
        "",
    ]
    return "\n".join(lines)
