"""How often a reward model ranks the two images of a pair correctly, overall and by kind of pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import ImageOps

from ..scenes import describe_scene, mirror, parse_description
from ..statistics import Interval, accuracy_interval


Scorer = Callable[[Sequence[str], Sequence[Any]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class PairScores:
    """Mean and standard deviation of the scores of the two images of every pair, each of shape `(num_pairs,)`."""

    chosen_mean: np.ndarray
    chosen_std: np.ndarray
    rejected_mean: np.ndarray
    rejected_std: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        """Difference of the means, `(num_pairs,)`; positive where the order is right."""
        return self.chosen_mean - self.rejected_mean

    @property
    def correct(self) -> np.ndarray:
        """1 where the chosen image has the higher mean, 0 where the rejected has, 0.5 for a tie: `(num_pairs,)`."""
        return (np.sign(self.margin) + 1) / 2


@dataclass(frozen=True)
class GroupAccuracy:
    """Share of correctly ordered pairs of a group, with its 95 % interval, and the number of pairs."""

    accuracy: Interval
    num_pairs: int


def score_pairs(scorer: Scorer, dataset: Dataset, *, is_mirrored: bool = False) -> PairScores:
    """
    Score all images of a preference dataset. `scorer` maps prompts and images to mean and std, each of shape `(n,)`, as
    `SpatialScore.score` does. With `is_mirrored`, left and right are exchanged in images and prompts, which must be descriptions
    of scenes.
    """
    prompts, images = list(dataset["prompt"]), [*dataset["chosen"], *dataset["rejected"]]
    if is_mirrored:
        prompts = [mirror_prompt(prompt) for prompt in prompts]
        images = [ImageOps.mirror(image) for image in images]
    mean, std = (np.asarray(values) for values in scorer(prompts * 2, images))
    num_pairs = len(prompts)
    return PairScores(mean[:num_pairs], std[:num_pairs], mean[num_pairs:], std[num_pairs:])


def mirror_prompt(prompt: str) -> str:
    """The description of the mirrored scene, of the same length; its wording is drawn anew."""
    graph = parse_description(prompt)
    is_long = prompt.count(".") > len(graph.relations)
    return describe_scene(mirror(graph), seed=len(prompt), length="long" if is_long else "short")


def accuracy_table(scores: PairScores, dataset: Dataset) -> dict[str, dict[str, GroupAccuracy]]:
    """
    Pair accuracy by group: `"all"`, `"level"` (number of changed relations), `"relation"` and `"operation"` (of the pairs with one
    change) → name of the group → [`GroupAccuracy`]. The dataset has the columns `level` and `operations`.
    """
    levels = np.array(dataset["level"])
    first = [operations[0] for operations in dataset["operations"]]
    relations = np.array([relation_of(operation["before"]) for operation in first])
    operations = np.array([operation["operation"] for operation in first])
    is_single = levels == 1

    def group(members: np.ndarray) -> GroupAccuracy:
        return GroupAccuracy(accuracy_interval(scores.correct[members]), int(members.sum()))

    def table(values: np.ndarray, among: np.ndarray) -> dict[str, GroupAccuracy]:
        names = sorted(set(values[among].tolist()))
        return {str(name): group(among & (values == name)) for name in names}

    return {
        "all": {"all": group(np.ones(len(levels), dtype=bool))},
        "level": table(levels, np.ones(len(levels), dtype=bool)),
        "relation": table(relations, is_single),
        "operation": table(operations, is_single),
    }


def relation_of(changed: Mapping[str, Any] | str) -> str:
    """Name of the relation `before` or `after` a change. Older datasets hold strings, as `left_of(red circle, blue square)`."""
    return changed.partition("(")[0] if isinstance(changed, str) else changed["relation"]
