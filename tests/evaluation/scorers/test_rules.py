"""The rule on pixels, the control, and GenEval's rule on boxes."""

import numpy as np
import pytest
from PIL import Image

from trl_spatial.evaluation.scorers import make_scorer
from trl_spatial.evaluation.scorers.rules import read_relation
from trl_spatial.judges.geneval import judge
from trl_spatial.rewards import Detection
from trl_spatial.scenes import make_preference_dataset


@pytest.fixture(scope="module")
def dataset():
    return make_preference_dataset(12, split="test", seed=5)


def test_the_rules_know_the_right_picture_of_every_pair(dataset):
    scorer = make_scorer("rules")
    chosen, rejected = (scorer.score(dataset["prompt"], list(dataset[column])) for column in ("chosen", "rejected"))
    assert all(score.mean == 1 for score in chosen) and all(score.mean < 1 for score in rejected)


def test_the_rules_abstain_on_other_prompts(dataset):
    (score,) = make_scorer("rules").score(["a dog in a park"], [dataset[0]["chosen"]])
    assert score.mean is None and "no scene" in score.raw


def test_the_control_sees_brightness_alone():
    images = [Image.new("RGB", (24, 24), (gray, gray, gray)) for gray in (0, 51, 255)]
    means = [score.mean for score in make_scorer("pixels").score(["a", "b", "c"], images)]
    assert means == pytest.approx([0, 0.2, 1])
    assert make_scorer("pixels").score(["d"], images[1:2])[0].mean == means[1]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of a dog left of a cat", ("dog", "left of", "cat")),
        ("An apple is to the right of the bowl.", ("apple", "right of", "bowl")),
        ("the traffic light above a dog", ("traffic light", "above", "dog")),
        ("a dog directly below a bench", ("dog", "below", "bench")),
    ],
)
def test_relations_are_read_from_prompts(prompt, expected):
    subject, relation, target = expected
    first, second = read_relation(prompt).include
    assert (first.class_name, second.class_name) == (target, subject) and second.position == (relation, 0)


@pytest.mark.parametrize("prompt", ["a dog", "two dogs left of a cat", "a dog behind a cat", ""])
def test_other_prompts_have_no_relation(prompt):
    assert read_relation(prompt) is None


def test_a_read_relation_is_judged_by_its_direction():
    boxes = [Detection("dog", 0.9, (0, 0, 10, 10)), Detection("cat", 0.9, (80, 0, 90, 10))]
    settings = {"threshold": 0.3, "counting_threshold": 0.9}
    right, wrong = (judge(read_relation(f"a dog {side} of a cat"), boxes, **settings) for side in ("left", "right"))
    assert right.correct and right.partial == 1 and not wrong.correct and wrong.partial < 1


def test_geneval_scores_what_the_detector_finds_and_abstains_on_what_it_cannot(detector_folder):
    scorer = make_scorer(f"geneval:{detector_folder}", device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    prompts = ["a person left of a dog", "a nice day", "a person above a zebra", "a person right of a dog"]
    found, no_relation, unknown, other = scorer.score(prompts, [image] * 4)
    assert 0 < found.mean <= 1 and 0 < other.mean <= 1
    assert no_relation.mean is None and "their relation" in no_relation.raw
    assert unknown.mean is None and unknown.raw == "the detector does not know zebra"
