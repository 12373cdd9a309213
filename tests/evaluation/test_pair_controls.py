"""Controls of scorers: what the prompts of mirrored images and of other pairs are."""

import numpy as np
import pytest

from trl_spatial.evaluation.pair_controls import exchange_sides, mirror_text, prompts_of, swap_prompts
from trl_spatial.scenes import RELATIONS, check_scene, make_preference_dataset, mirror, parse_description
from trl_spatial.scripts.evaluate_pairs import CONTROLS


TEXTS = [
    ("A mug to the left of a plate.", "A mug to the right of a plate."),
    ("The lamp is right next to the sofa, on its left.", "The lamp is right next to the sofa, on its right."),
    ("LEFT and Right", "RIGHT and Left"),
    ("the rightmost of three jars, the leftmost is red", "the leftmost of three jars, the rightmost is red"),
    ("books in clockwise order", "books in counterclockwise order"),
    ("a door left open behind the left chair", "a door left open behind the right chair"),
    ("on the right behind the table", "on the left behind the table"),
    ("a right angle in the top-left corner", "a right angle in the top-right corner"),
    ("the left-hand side, aligned with its left armrest", "the right-hand side, aligned with its right armrest"),
    ("a bright copyright cleft", "a bright copyright cleft"),
    ("the cat sits right behind the dog", "the cat sits right behind the dog"),
]


@pytest.mark.parametrize(("text", "mirrored"), TEXTS)
def test_left_and_right_are_exchanged_and_twice_is_the_identity(text, mirrored):
    assert exchange_sides(text) == mirror_text(text) == mirrored
    assert exchange_sides(mirrored) == text


def test_descriptions_of_scenes_are_mirrored_by_their_graph():
    rows = make_preference_dataset(40, split="test", seed=3)
    for prompt, image in zip(rows["prompt"], rows["chosen"], strict=True):
        graph, mirrored = parse_description(prompt), parse_description(mirror_text(prompt))
        assert set(mirrored.relations) == set(mirror(graph).relations)
        assert set(parse_description(mirror_text(mirror_text(prompt))).relations) == set(graph.relations)
        assert check_scene(image.transpose(0), mirrored).is_correct  # 0: left and right exchanged
    assert "left_of" in RELATIONS


@pytest.mark.parametrize("seed", range(20))
def test_a_swapped_prompt_is_of_another_cluster_and_each_is_given_once(seed):
    rng = np.random.default_rng(seed)
    clusters = rng.integers(rng.integers(3, 12), size=rng.integers(8, 60))
    prompts = [f"prompt {index} of {cluster}" for index, cluster in enumerate(clusters)]
    swapped = swap_prompts(prompts, clusters.tolist(), rng)
    assert all(text.split()[-1] != str(cluster) for text, cluster in zip(swapped, clusters, strict=True))
    if np.bincount(clusters).max() <= len(clusters) / 2:
        assert sorted(swapped) == sorted(prompts)


def test_a_swap_needs_two_clusters_and_is_always_the_same():
    assert swap_prompts(["a", "b"], [0, 0], np.random.default_rng(0)) is None
    assert prompts_of("prompt_swap", ["a"] * 3, [4] * 3) is None
    texts, clusters = [f"prompt {index}" for index in range(9)], [0, 0, 1, 1, 1, 2, 3, 4, 4]
    assert prompts_of("prompt_swap", texts, clusters) == prompts_of("prompt_swap", texts, clusters)
    lopsided = swap_prompts(["a", "b", "c", "d"], [0, 0, 0, 1], np.random.default_rng(0))
    assert lopsided[:3] == ["d"] * 3 and lopsided[3] != "d"


def test_the_command_knows_every_control():
    from trl_spatial.evaluation import pair_controls

    assert tuple(pair_controls.CONTROLS) == CONTROLS
    assert len(set(prompts_of("image_only", ["a", "b"], [0, 1]))) == 1
    assert prompts_of("given", ["a", "b"], [0, 1]) == ["a", "b"]
