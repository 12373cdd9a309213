"""Writes the results of the demo into the cards of the models that it trained."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from ..evaluation.pair_tables import PairScores
from ..figures.pairs import draw_pairs
from ..hub.cards import SAMPLES_FILE, Card, Result
from .reward_model import scored_pair


NUM_SAMPLES = 4


def update_reward_card(folder: Path, measured: dict[str, Any], pairs: Dataset, scores: PairScores) -> None:
    """
    Writes the measured accuracies and a picture of held-out `pairs` into the card of the reward model in a folder. `measured` and
    `scores` are from [`~demo.reward_model.measure`].
    """
    card = Card.load(folder)
    if card is None:
        return
    titles = {
        "all": {"all": "accuracy"},
        "level": {"1": "accuracy, one change", "2": "two changes", "3": "three changes"},
    }
    results = [
        Result(
            metric=titles[group][name],
            value=row["estimate"],
            num_samples=row["num_pairs"],
            unit="pairs",
            interval=(row["low"], row["high"]),
            dataset="pairs of rendered scenes",
            split="test",
        )
        for group in titles
        for name, row in measured["accuracy"][group].items()
        if name in titles[group]
    ]
    # the first pairs, whatever their scores
    first = [scored_pair(pairs[index], scores, index) for index in range(min(NUM_SAMPLES, len(pairs)))]
    draw_pairs(first, title="The first held-out pairs").save(folder / SAMPLES_FILE)
    notes = (
        f"Expected calibration error of P(chosen): {measured['expected_calibration_error']:.3f}. The model was trained and measured "
        "on the rendered shapes of `trl_spatial demo` and cannot judge any other images."
    )
    card.with_results(results, notes=notes).save(folder)


def update_generator_card(folder: Path, before: dict[str, Any], after: dict[str, Any], num_images: int) -> None:
    """
    Writes the verdicts of the scenes' rules and the mean reward into the card of the LoRA weights in a folder: those of `num_images`
    images without the weights (`before`) and with them (`after`), from [`~demo.generator.judge`].
    """
    card = Card.load(folder)
    if card is None:
        return
    judged = {
        "spatial_accuracy": "spatial accuracy, by the rules of the scenes (not trained on)",
        "objects_present": "objects present, by the rules (not trained on)",
    }
    where = ("captions of rendered scenes", None, "test")
    results = [
        Result(title, after[name]["estimate"], num_images, "images", (after[name]["low"], after[name]["high"]), *where)
        for name, title in judged.items()
    ]
    results.append(Result("mean SpatialScore (trained on)", after["reward"], num_images, "images", None, *where))
    earlier = {title: before[name]["estimate"] for name, title in judged.items()}
    card.with_results(
        results,
        before=earlier | {"mean SpatialScore (trained on)": before["reward"]},
        metrics_step=None,
        notes="The noise is the same before and after; the intervals resample whole prompts. Trained and measured on the "
        "rendered shapes of `trl_spatial demo`; the base model is the tiny FLUX that ships with the package.",
    ).save(folder)
