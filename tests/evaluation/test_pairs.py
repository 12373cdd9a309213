"""Accuracy on pairs, and the mirrored twin of a pair."""

import numpy as np
import pytest

from trl_spatial.evaluation.pairs import accuracy_table, mirror_prompt, score_pairs
from trl_spatial.figures.pairs import ScoredPair, draw_pairs
from trl_spatial.scenes import check_scene, make_preference_dataset, mirror, parse_description


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


def test_every_score_stands_where_its_image_does(dataset):
    """Each image is scored by its own brightness, so that each of the four numbers of a pair is known."""

    def brightness(images):
        return np.array([np.asarray(image, float).mean() for image in images])

    scores = score_pairs(lambda prompts, images: (brightness(images), brightness(images) ** 2), dataset)
    for column in ("chosen", "rejected"):
        expected = brightness(dataset[column])
        assert np.array_equal(getattr(scores, f"{column}_mean"), expected)
        assert np.array_equal(getattr(scores, f"{column}_std"), expected**2)


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
