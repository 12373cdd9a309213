"""Accuracy on pairs, and the mirrored twin of a pair."""

import numpy as np
import pytest
from datasets import Dataset

from trl_spatial.evaluation.pairs import accuracy_table, mirror_prompt, score_pairs
from trl_spatial.figures.pairs import ScoredPair, draw_pairs
from trl_spatial.scenes import RELATIONS, check_scene, make_preference_dataset, mirror, parse_description


@pytest.fixture(scope="module")
def dataset():
    return make_preference_dataset(40, split="test", seed=5)


def rule_scorer(prompts, images):
    """The exact judge as a scorer: 1 for an image that shows its prompt, 0 for another."""
    correct = [
        check_scene(image, parse_description(prompt)).is_correct for prompt, image in zip(prompts, images, strict=True)
    ]
    return np.array(correct, float), np.ones(len(correct))


def test_a_perfect_scorer_is_right_on_every_pair_and_on_its_mirror_image(dataset):
    for is_mirrored in (False, True):
        scores = score_pairs(rule_scorer, dataset, is_mirrored=is_mirrored)
        assert (scores.correct == 1).all() and (scores.margin == 1).all()


def test_every_score_is_that_of_its_image(dataset):
    """A scorer whose mean and std are functions of the image: each number has to come back beside its image."""

    def score(prompts, images):
        pixels = np.stack([np.asarray(image.convert("RGB"), float) for image in images])
        return pixels.mean((1, 2, 3)), pixels.std((1, 2, 3))

    scores = score_pairs(score, dataset)
    for column, mean, std in (
        ("chosen", scores.chosen_mean, scores.chosen_std),
        ("rejected", scores.rejected_mean, scores.rejected_std),
    ):
        expected = score(dataset["prompt"], dataset[column])
        np.testing.assert_array_equal(mean, expected[0])
        np.testing.assert_array_equal(std, expected[1])
    assert (scores.chosen_std != scores.rejected_std).any() and (scores.chosen_mean != scores.rejected_mean).any()


def test_datasets_of_older_versions_give_the_same_table(dataset):
    def written(relation):
        return f"{relation['relation']}({', '.join(relation['arguments'])})"

    old = [
        [{**operation, "before": written(operation["before"]), "after": "?"} for operation in row]
        for row in dataset["operations"]
    ]
    rows = Dataset.from_dict({"level": dataset["level"][:], "operations": old})
    scores = score_pairs(rule_scorer, dataset)
    assert accuracy_table(scores, rows) == accuracy_table(scores, dataset)
    assert set(accuracy_table(scores, dataset)["relation"]) <= set(RELATIONS)


def test_a_blind_scorer_gets_half(dataset):
    scores = score_pairs(lambda prompts, images: (np.zeros(len(images)), np.ones(len(images))), dataset)
    assert (scores.correct == 0.5).all()


def test_the_groups_of_the_table_partition_the_pairs(dataset):
    table = accuracy_table(score_pairs(rule_scorer, dataset), dataset)
    assert table["all"]["all"].num_pairs == len(dataset)
    assert sum(row.num_pairs for row in table["level"].values()) == len(dataset)
    for group in ("relation", "operation"):
        assert sum(row.num_pairs for row in table[group].values()) == table["level"]["1"].num_pairs
    assert all(row.accuracy.estimate == 1 and row.accuracy.low < 1 for row in table["level"].values())


def test_the_mirrored_prompt_describes_the_mirrored_graph(dataset):
    for prompt in dataset["prompt"]:
        assert parse_description(mirror_prompt(prompt)) == mirror(parse_description(prompt))


def test_a_sheet_shows_the_images_it_is_given(dataset):
    row = dataset[0]
    pair = ScoredPair(row["prompt"], row["chosen"], row["rejected"], (1.0, 0.1), (0.0, 0.1), "changed")
    sheet = np.asarray(draw_pairs([pair] * 3, title="", image_size=64))
    # at their own size images are pasted as they are
    chosen = np.asarray(row["chosen"].convert("RGB"))
    corners = np.argwhere((sheet[:-63, :-63] == chosen[0, 0]).all(axis=2))
    assert sum((sheet[y : y + 64, x : x + 64] == chosen).all() for y, x in corners) == 3
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_pairs([], title="")
