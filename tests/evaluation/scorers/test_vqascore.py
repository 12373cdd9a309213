"""VQAScore against the published package on the same weights, against its published answers, and against a forward pass."""

import math

import pytest
import torch
from safetensors.torch import save_file

from recipes.bench.parity import save_qwen2_vl
from tests.evaluation.goldens import goldens
from tests.evaluation.scorers.published import Published
from tests.openai_stub import OpenAIStub
from tests.vision_models import ByHand
from trl_spatial.endpoints import Endpoint, Prices, Spend
from trl_spatial.evaluation.scorers import make_scorer
from trl_spatial.evaluation.scorers.vqascore import TEMPLATE, Template, VQAScore
from trl_spatial.judges.vision import EndpointVision
from trl_spatial.scenes import make_preference_dataset


VOCABULARY = ("Yes", "No", "yes", "no", " a", " b", "<eos>", "<pad>", "<bos>", "rest")


def test_the_scores_are_those_of_the_published_package(tmp_path):
    published = Published("vqascore")
    assert published.data["question"] == TEMPLATE.question
    save_qwen2_vl(tmp_path)
    save_file(published.weights(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    scores = make_scorer(f"vqascore:{tmp_path}", device="cpu").score(published.prompts, published.images)
    assert [score.mean for score in scores] == pytest.approx(published.scores, rel=1e-4)


@goldens("vqascore", "token_model")
def test_goldens(golden, images):
    given = golden.given
    if len(given["logits"]) > 1 or "temperature" in given:
        pytest.skip("answers of several tokens, and a temperature, are not offered")
    chances = torch.tensor(given["logits"][0]).double().softmax(0).tolist()
    answer = given.get("answer_template", "Yes").split(" ")[0]  # of two tokens, one step reads the first
    with OpenAIStub(probabilities=lambda request: dict(zip(VOCABULARY, chances, strict=True))) as stub:
        vision = EndpointVision(Endpoint("judge", base_url=stub.url))
        (score,) = VQAScore(vision, Template(TEMPLATE.question, answer)).score([given["text"]], images[:1])
    if golden.official.get(
        "error"
    ):  # there a special token that is likely stops the run; here its rival has its probability
        assert score.mean == pytest.approx(chances[VOCABULARY.index(answer)])
    else:
        assert stub.requests[0].text == golden.official["asked"]
        assert score.mean == pytest.approx(golden.official["score"], abs=1e-6)


@goldens("vqascore", "templates")
def test_the_template_is_that_of_the_models_that_chat(golden):
    if isinstance(questions := golden.official.get("question"), dict):
        assert (
            set(map(tuple, questions.values())) == {(TEMPLATE.question,)}
            and golden.official["answer"] == TEMPLATE.answer
        )


def test_a_score_is_the_models_probability(judge_folder, images):
    by_hand = ByHand(judge_folder)
    prompts = ["a mug left of a plate", "a {} sign", "B"]
    scores = make_scorer(f"vqascore:{judge_folder}", device="cpu").score(prompts, images[:3])
    yes = by_hand.tokenizer.convert_tokens_to_ids("Yes")
    for prompt, image, score in zip(prompts, images, scores, strict=False):
        expected = by_hand.probabilities(image, f'Does this figure show "{prompt}"? Please answer Yes or No.')[yes]
        assert score.mean == pytest.approx(float(expected), rel=1e-4) and score.cost == 0


def test_the_bundled_model_tells_scenes_apart_without_a_network():
    dataset = make_preference_dataset(24, split="test", seed=5)
    scorer = make_scorer("vqascore", device="cpu")
    chosen, rejected = (scorer.score(dataset["prompt"], list(dataset[column])) for column in ("chosen", "rejected"))
    right = [one.mean > other.mean for one, other in zip(chosen, rejected, strict=True)]
    assert sum(right) >= 20


def test_a_server_is_asked_and_paid(images, tmp_path):
    spend = Spend(10.0)
    chances = {str(number): 0.04 for number in range(20)} | {"Yes": 0.01}
    with OpenAIStub(probabilities=lambda request: chances) as stub:
        scorer = make_scorer(f"vqascore:{stub.url}#judge", spend=spend, cache=tmp_path / "answers")
        scores = scorer.score(["a", "b"], images[:2])
        assert scorer.score(["a", "b"], images[:2])[1].mean == scores[1].mean and stub.num_calls == 2
    # not among the 20 that the server names
    assert [score.mean for score in scores] == [0.0, 0.0] and scorer.vision.endpoint.spend is spend


def test_what_a_call_cost_is_said(images):
    with OpenAIStub(probabilities=lambda request: {"Yes": 0.75, "No": 0.25}) as stub:
        vision = EndpointVision(Endpoint("judge", base_url=stub.url, prices=Prices(1e6, 1e6)))
        (score,) = VQAScore(vision).score(["a"], images[:1])
    assert math.isclose(score.mean, 0.75, abs_tol=1e-6) and score.cost > 0 and score.served_model == "judge"


def test_errors_say_what_is_wrong(backbone_folder, judge_folder, images, tmp_path):
    with pytest.raises(ValueError, match=r"http://127.0.0.1:1/v1 names a server, but no model.*#MODEL"):
        make_scorer("vqascore:http://127.0.0.1:1/v1")
    scorer = make_scorer(f"vqascore:{judge_folder}", device="cpu")
    with pytest.raises(ValueError, match=r"'Does it\?' has no \{\}"):
        VQAScore(scorer.vision, Template("Does it?", "Yes"))
    with pytest.raises(ValueError, match=r"writes 'Yes No' as 2 tokens"):
        VQAScore(scorer.vision, Template("{}", "Yes No")).score(["a"], images[:1])
    with pytest.raises(ValueError, match="2 prompts and 1 images"):
        scorer.score(["a", "b"], images[:1])
