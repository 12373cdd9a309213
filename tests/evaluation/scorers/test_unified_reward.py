"""UnifiedReward: its published example replies, and what is asked."""

import random

import pytest
from PIL import Image

from tests.openai_stub import OpenAIStub
from trl_spatial.evaluation.scorers import make_scorer
from trl_spatial.evaluation.scorers.unified_reward import UnifiedReward, read_mean_rating, read_ratings, read_shares


# the example in the published program
PAIRWISE = """
Alignment Score:
 Image 1: 0.435699999332428
 Image 2: 0.564300000667572

Coherence Score:
 Image 1: 0.4180000126361847
 Image 2: 0.5820000171661377

Style Score:
 Image 1: 0.40790000557899475
 Image 2: 0.5921000242233276
"""
POINTWISE = """
Alignment Score (1-5): 2.694700002670288
Coherence Score (1-5): 2.371500015258789
Style Score (1-5): 2.802500009536743
"""
IMAGES = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]


def write_shares(alignment, coherence, style):
    return "\n\n".join(
        f"{axis} Score:\n Image 1: {share}\n Image 2: {round(1 - share, 6)}"
        for axis, share in (("Alignment", alignment), ("Coherence", coherence), ("Style", style))
    )


def test_the_published_examples_are_read():
    assert read_shares(PAIRWISE) == {
        "Alignment": (0.435699999332428, 0.564300000667572),
        "Coherence": (0.4180000126361847, 0.5820000171661377),
        "Style": (0.40790000557899475, 0.5921000242233276),
    }
    assert read_ratings(POINTWISE) == {
        "Alignment": 2.694700002670288, "Coherence": 2.371500015258789, "Style": 2.802500009536743,
    }  # fmt: skip
    assert read_mean_rating(POINTWISE) == pytest.approx(
        (2.694700002670288 + 2.371500015258789 + 2.802500009536743) / 3
    )


def test_the_image_with_more_of_the_points_is_preferred():
    generator, scorer = random.Random(0), UnifiedReward(None)
    for _ in range(200):
        shares = [round(generator.random(), 3) for _ in range(3)]
        expected = "tie" if abs(sum(shares) - 1.5) < 1e-6 else "first" if sum(shares) > 1.5 else "second"
        assert scorer.read(write_shares(*shares)) == expected
    assert scorer.read(write_shares(0.7, 0.5, 0.3)) == "tie" and scorer.read(PAIRWISE) == "second"


@pytest.mark.parametrize(
    "reply",
    [
        "", "Image 1 is better.", PAIRWISE.replace("Style", "Taste"), PAIRWISE.replace("0.5921", "5.921"),
        PAIRWISE.replace(" Image 2: 0.5643", " Image 2: -0.5643"), POINTWISE,
    ],
)  # fmt: skip
def test_other_replies_to_pairs_have_no_preference(reply):
    assert UnifiedReward(None).read(reply) is None


@pytest.mark.parametrize(
    "reply", ["", POINTWISE.replace("2.8025", "7.8025"), POINTWISE.replace("Coherence", "Sense"), "Score: 4", PAIRWISE]
)
def test_other_replies_to_images_have_no_score(reply):
    assert read_mean_rating(reply) is None


def test_pairs_are_asked_in_the_published_words():
    with OpenAIStub(chat=lambda request: PAIRWISE) as stub:
        scorer = make_scorer(f"unified-reward:{stub.url}#judge")
        comparison = scorer.compare("a {red} mug", *IMAGES)
    text = stub.requests[0].text
    assert comparison.preferred == "second" and comparison.raw == PAIRWISE and len(stub.requests[0].images) == 2
    assert text.startswith("You are presented with two generated images") and text.endswith(
        "Text Caption: [a {red} mug]"
    )


def test_images_are_asked_in_the_published_words():
    with OpenAIStub(chat=lambda request: POINTWISE) as stub:
        scores = make_scorer(f"unified-reward-pointwise:{stub.url}#judge").score(["a", "b"], IMAGES)
    assert [score.mean for score in scores] == [read_mean_rating(POINTWISE)] * 2
    texts = sorted(request.text for request in stub.requests)
    assert [text[-len("Text Caption: [a]") :] for text in texts] == ["Text Caption: [a]", "Text Caption: [b]"]
    assert all(text.startswith("You are presented with a generated image and") for text in texts)
