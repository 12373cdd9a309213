"""The scenes' rules as a reward: what the renderer drew is the oracle."""

import numpy as np
import pytest
from PIL import Image

from trl_spatial.rewards import SceneRules
from trl_spatial.scenes import (
    Entity,
    SceneGraph,
    make_preference_dataset,
    make_prompt_dataset,
    parse_description,
    render_scene,
)


@pytest.fixture(scope="module")
def pairs():
    return make_preference_dataset(40, seed=5)


@pytest.fixture(scope="module")
def rules():
    return SceneRules()


def test_an_image_of_the_prompt_gets_one_and_every_changed_relation_costs_its_share(rules, pairs):
    assert rules(pairs["prompt"][:], pairs["chosen"][:]) == [1.0] * len(pairs)
    expected = [1 - row["level"] / len(row["relations"]) for row in pairs]
    assert len(set(expected)) > 3
    np.testing.assert_allclose(rules(pairs["prompt"][:], pairs["rejected"][:]), expected, atol=1e-12)


def test_noise_and_blank_images_get_nothing(rules, pairs):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    blank = Image.new("RGB", (64, 64), (200, 200, 200))
    assert rules(pairs["prompt"][:2], [noise, blank]) == [0.0, 0.0]


def test_the_column_with_the_scene_wins_over_the_prompt(rules, pairs):
    photographs = [f"a photograph, picture {i}" for i in range(4)]
    images = pairs["chosen"][:4]
    assert rules(photographs, images) == [None] * 4
    scene = [pairs[0]["prompt"], None, pairs[2]["perturbed_prompt"], pairs[3]["prompt"]]
    rewards = rules(photographs, images, scene=scene, level=[1] * 4)  # other columns are ignored
    assert rewards == [1.0, None, 1 - pairs[2]["level"] / len(pairs[2]["relations"]), 1.0]


def test_without_relations_the_objects_count(rules):
    circle, square, triangle = Entity("red", "circle"), Entity("blue", "square"), Entity("green", "triangle")
    image = render_scene(SceneGraph((circle, square)), seed=0)
    prompts = [
        "There is a red circle and a blue square in the picture.",
        "There is a red circle and a green triangle in the picture.",
        f"There is a {triangle} in the picture.",
        "There is a purple circle, a red circle, a blue square and a green triangle in the picture.",
    ]
    assert rules(prompts, [image] * 4) == [1.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize("text", ["a cat on a mat", "Nothing else is in the picture.", ""])
def test_an_unreadable_scene_is_an_error_and_an_unreadable_prompt_no_opinion(rules, text):
    image = Image.new("RGB", (64, 64))
    assert rules([text], [image]) == [None]
    with pytest.raises(ValueError, match=r"scene\[1\] is .*describe_scene"):
        rules(["x", "y"], [image] * 2, scene=[None, text])


def test_prompts_of_scenes_are_scenes_of_their_split(rules):
    prompts = make_prompt_dataset(60, split="test", seed=3)
    assert prompts.column_names == ["prompt", "scene"]
    graphs = [parse_description(row["prompt"]) for row in prompts]
    assert graphs == [parse_description(row["scene"]) for row in prompts]
    assert {graph.split for graph in graphs} == {"test"}
    assert {len(graph.entities) for graph in graphs} == {2, 3, 4}
    assert {len(graph.relations) for graph in graphs} == {1, 2, 3, 4}
    assert any(row["prompt"] != row["scene"] for row in prompts)
    # every one can be drawn
    images = [render_scene(graph, seed=0) for graph in graphs[:20]]
    assert rules(prompts["prompt"][:20], images, scene=prompts["scene"][:20]) == [1.0] * 20


def test_a_prompt_depends_on_seed_split_and_index_only():
    prompts = make_prompt_dataset(8, seed=3)["prompt"][:]
    assert make_prompt_dataset(3, seed=3)["prompt"][:] == prompts[:3]
    others = [
        make_prompt_dataset(8, seed=4)["prompt"][:],
        make_prompt_dataset(8, seed=3, split="validation")["prompt"][:],
    ]
    assert all(not set(prompts) & set(other) for other in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"num_prompts": 1, "split": "best"}, "split='best'.*train"),
    ],
)
def test_bad_options_of_prompts_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_prompt_dataset(**options)
