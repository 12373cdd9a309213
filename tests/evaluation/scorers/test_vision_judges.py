"""Judges of pairs: what they are shown, how their words are read, and what happens where there are none."""

import random
from io import BytesIO

import pytest
from PIL import Image

from tests import openai_stub as stubs
from tests.openai_stub import OpenAIStub
from trl_spatial.endpoints import BudgetReached, Endpoint, Prices, ServerError, Spend
from trl_spatial.evaluation.scorers import make_scorer
from trl_spatial.evaluation.scorers.vision_judges import PairwiseJudge, PointwiseJudge, read_score
from trl_spatial.judges.vision import EndpointVision


PROMPT = "a mug left of a {plate}"
DARK, LIGHT = Image.new("RGB", (32, 32), (40, 40, 40)), Image.new("RGB", (32, 32), (200, 200, 200))


def brightness(data):
    return Image.open(BytesIO(data)).convert("L").resize((1, 1)).getpixel((0, 0))


def prefer_the_lighter(request):
    first, second = map(brightness, request.images)
    return f"I looked.\nVerdict: {'tie' if first == second else 1 if first > second else 2}"


def open_judge(judge, stub, **kwargs):
    return judge(EndpointVision(Endpoint("judge", base_url=stub.url, max_attempts=1, **kwargs)))


def test_a_pair_is_shown_in_its_order_with_the_prompt():
    with OpenAIStub(chat=prefer_the_lighter) as stub:
        judge = make_scorer(f"judge-pairwise:{stub.url}#judge")
        answers = [judge.compare(PROMPT, *pair) for pair in ((DARK, LIGHT), (LIGHT, DARK), (DARK, DARK))]
    assert [answer.preferred for answer in answers] == ["second", "first", "tie"]
    assert "I looked." in answers[0].raw and answers[0].served_model == "judge" and judge.is_pairwise
    assert f"Text: {PROMPT}\n" in stub.requests[0].text and stub.requests[0].body["temperature"] == 0


def test_an_image_is_scored_by_itself_in_its_place():
    with OpenAIStub(chat=lambda request: f"Fine.\nScore: {brightness(request.images[0]) / 25:.1f}") as stub:
        judge = make_scorer(f"judge-pointwise:{stub.url}#judge")
        scores = judge.score([PROMPT] * 6, [DARK, LIGHT] * 3)
    assert [score.mean for score in scores] == [1.6, 8.0] * 3
    assert all(len(request.images) == 1 and PROMPT in request.text for request in stub.requests)


@pytest.mark.parametrize(
    ("reply", "preferred"),
    [
        ("Verdict: 1", "first"),
        ("**Verdict:** Image 2", "second"),
        ("verdict : TIE.", "tie"),
        ("Verdict: 1 would be wrong.\nVerdict: 2", "second"),
        ("Image 1 is better", None),
        ("Verdict: 12", None),
        ("Verdict: 3", None),
        ("", None),
    ],
)
def test_verdicts_are_read(reply, preferred):
    assert PairwiseJudge(None).read(reply) == preferred


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 7.0),
        ("**Score:** 7.5/10", 7.5),
        ("Score: 2\nNo.\nscore: 10.", 10.0),
        ("Score: 0", 0.0),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: 3/5", None),
        ("Score: seven", None),
        ("7", None),
    ],
)
def test_scores_are_read(reply, score):
    assert read_score(reply) == score


def test_any_number_in_range_is_read_as_it_was_written():
    generator = random.Random(0)
    for _ in range(200):
        value = round(generator.uniform(0, 10), generator.randrange(4))
        assert read_score(f"Words, 3 of them.\nScore: {value}") == value


def test_words_that_cannot_be_read_are_kept():
    with OpenAIStub(chat=lambda request: "Both are nice.") as stub:
        comparison = open_judge(PairwiseJudge, stub).compare(PROMPT, DARK, LIGHT)
        (score,) = open_judge(PointwiseJudge, stub).score([PROMPT], [DARK])
    assert (comparison.preferred, comparison.raw) == (None, "Both are nice.")
    assert (score.mean, score.raw) == (None, "Both are nice.")


def test_a_call_that_fails_leaves_the_others():
    with OpenAIStub(chat=lambda request: "Score: 5") as stub:
        stub.next.append(stubs.failing(503))
        scores = open_judge(PointwiseJudge, stub, concurrency=1).score([PROMPT] * 3, [DARK] * 3)
        stub.next.append(stubs.failing(503))
        comparison = open_judge(PairwiseJudge, stub).compare(PROMPT, DARK, LIGHT)
    assert [score.mean for score in scores] == [None, 5.0, 5.0] and "503" in scores[0].raw
    assert comparison.preferred is None and "503" in comparison.raw


def test_a_call_after_which_every_other_fails_ends_all():
    with OpenAIStub(stubs.failing(401)) as stub:
        with pytest.raises(ServerError, match="401"):
            open_judge(PairwiseJudge, stub).compare(PROMPT, DARK, LIGHT)
        with pytest.raises(ServerError, match="401"):
            open_judge(PointwiseJudge, stub).score([PROMPT], [DARK])


def test_the_limit_holds():
    with OpenAIStub(chat=lambda request: "Verdict: 1") as stub:
        judge = open_judge(PairwiseJudge, stub, prices=Prices(1000.0, 1000.0), spend=Spend(1e-6))
        with pytest.raises(BudgetReached):
            for _ in range(3):
                judge.compare(PROMPT, DARK, LIGHT)
    assert stub.num_calls <= 1


def test_a_model_on_this_machine_answers(judge_folder):
    judge = make_scorer(f"judge-pairwise:{judge_folder}", device="cpu")
    comparison = judge.compare(PROMPT, DARK, LIGHT)
    assert comparison.preferred is None and comparison.raw and comparison.cost == 0  # of random weights


def test_judges_compare_or_score():
    with pytest.raises(TypeError, match="judge-pairwise compares two images"):
        PairwiseJudge(None).score([PROMPT], [DARK])
    with pytest.raises(ValueError, match=r"judge-pointwise needs a model.*#MODEL"):
        make_scorer("judge-pointwise")
