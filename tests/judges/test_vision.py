"""Vision-language models, here and behind a server, against a forward pass written out and a server on loopback."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests import openai_stub as stubs
from tests.openai_stub import OpenAIStub, Response
from tests.vision_models import ByHand
from trl_spatial.endpoints import BadAnswer, Endpoint, Prices, ServerError
from trl_spatial.endpoints.cache import AnswerCache, hash_request
from trl_spatial.judges.loading import ModelSettings
from trl_spatial.judges.vision import EndpointVision, LocalVision, load_vision


QUESTION = "Is the mug to the left of the plate?"


@pytest.fixture(scope="module")
def vision(judge_folder):
    return LocalVision(str(judge_folder), device="cpu")


@pytest.fixture(scope="module")
def by_hand(judge_folder):
    return ByHand(judge_folder)


# On this machine


def test_the_most_likely_answer_is_the_models_own(vision, by_hand, images):
    answers = set()
    for image in images[:3]:
        tokens = []
        while len(tokens) < 8 and by_hand.tokenizer.eos_token_id not in tokens:
            tokens.append(int(by_hand.probabilities(image, QUESTION, tokens).argmax()))
        answer = vision.answer(image, QUESTION, max_tokens=8, temperature=0.0)
        assert answer.text == by_hand.tokenizer.decode(tokens, skip_special_tokens=True)
        assert (answer.served_model, answer.output_tokens, answer.cost) == (vision.name, len(tokens), 0.0)
        answers.add(answer.text)
    assert len(answers) > 1


def test_votes_are_drawn_anew_and_the_same_again(vision, images):
    def ask(vote, image=images[0]):
        return vision.answer(image, QUESTION, max_tokens=3, temperature=5.0, vote=vote).text

    votes = [ask(vote) for vote in range(5)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert [ask(vote) for vote in range(5)] == votes and len(set(votes)) == 5
    assert torch.equal(torch.get_rng_state(), state)


def test_probabilities_are_of_the_whole_vocabulary(vision, by_hand, images):
    expected = by_hand.probabilities(images[0], QUESTION)
    spellings = ["Yes", " Yes", "Yes No", "plate"]
    answer = vision.probabilities(images[0], QUESTION, spellings)
    assert set(answer.data) == {"probabilities", "tokens"}
    assert answer.data["tokens"] == {
        "Yes": ["Yes"], " Yes": [" Yes"], "Yes No": ["Yes", " No"], "plate": ["plat", "e"],
    }  # fmt: skip
    given = answer.data["probabilities"]
    tokenizer = by_hand.tokenizer
    for token in ("Yes", " Yes", "plat"):
        number = tokenizer.convert_tokens_to_ids(token.replace(" ", "Ġ"))
        assert given[token] == pytest.approx(float(expected[number]), rel=1e-4)
    wanted = {*expected.topk(50).indices.tolist(), *map(tokenizer.convert_tokens_to_ids, ("Yes", "ĠYes", "plat"))}
    assert set(given) == {tokenizer.decode([number]) for number in wanted}
    assert sum(given.values()) == pytest.approx(float(expected[list(wanted)].sum()), rel=1e-4)
    assert answer.text == tokenizer.decode([int(expected.argmax())])


def test_several_images_are_shown_in_their_order(vision, by_hand, images):
    first, second = images[0].resize((32, 32)), images[1].resize((32, 32))
    both, swapped = (vision.first_logits(pair, QUESTION)[1] for pair in ([first, second], [second, first]))
    shown = f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>"
    ids = torch.tensor([by_hand.tokenizer(
        f"<|im_start|>user\n{shown}{shown}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )["input_ids"]])  # fmt: skip
    types = (ids == by_hand.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    features = by_hand.image_processor([first, second], return_tensors="pt")
    with torch.no_grad():
        expected = by_hand.model(input_ids=ids, mm_token_type_ids=types, **features).logits[0, -1]
    assert torch.allclose(both, expected, atol=1e-4) and not torch.allclose(swapped, expected, atol=1e-2)


def test_items_are_asked_in_order_and_faults_are_theirs(vision, images):
    results = list(vision.map(lambda image: vision.answer(image, QUESTION, max_tokens=1), [images[0], "nowhere.png"]))
    assert [index for index, _ in results] == [0, 1]
    assert results[0][1].output_tokens == 1 and "cannot be opened" in str(results[1][1])


# Behind a server


def test_a_server_is_shown_the_image_then_the_question(tmp_path, images):
    with OpenAIStub(chat=lambda request: "B") as stub:
        endpoint = Endpoint("judge", base_url=stub.url, cache=tmp_path / "answers", prices=Prices(0.0, 1e6))
        vision = EndpointVision(endpoint, max_side=24)
        answers = [vision.answer(images[0], QUESTION, max_tokens=3, temperature=0.5, vote=vote) for vote in (0, 1, 0)]
    assert [answer.text for answer in answers] == ["B"] * 3 and vision.name == "judge"
    assert [answer.is_cached for answer in answers] == [False, False, True]
    body = stub.requests[0].body
    (message,) = body["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"] and stub.requests[0].text == QUESTION
    assert Image.open(BytesIO(stub.requests[0].images[0])).size == (16, 24)
    assert (body["max_tokens"], body["temperature"], "logprobs" in body) == (3, 0.5, False)
    with pytest.raises(ValueError, match=r"max_side.*0"):
        EndpointVision(endpoint, max_side=0)


def test_a_server_is_shown_several_images_in_their_order(images):
    with OpenAIStub(chat=lambda request: "1") as stub:
        vision = EndpointVision(Endpoint("judge", base_url=stub.url))
        vision.answer([images[0], images[2]], QUESTION)
    sizes = [Image.open(BytesIO(data)).size for data in stub.requests[0].images]
    assert sizes == [images[0].size, images[2].size] and stub.requests[0].text == QUESTION


def test_probabilities_of_a_server_are_those_it_names(tmp_path, images):
    chances = {"Yes": 0.5, " Yes": 0.25, "No": 0.125} | {str(number): 0.001 for number in range(40)}
    with OpenAIStub(probabilities=lambda request: chances) as stub:
        vision = EndpointVision(Endpoint("judge", base_url=stub.url, cache=tmp_path / "answers"))
        first, again = (vision.probabilities(images[0], QUESTION, ["Yes", "ten"]) for _ in range(2))
    assert first.data == again.data and again.is_cached and stub.num_calls == 1
    assert first.data["tokens"] == {"Yes": ["Yes"], "ten": ["ten"]}
    given = first.data["probabilities"]
    assert len(given) == 20 and {token: given[token] for token in ("Yes", " Yes", "No")} == pytest.approx(
        {"Yes": 0.5, " Yes": 0.25, "No": 0.125}
    )
    sent = stub.requests[0].body
    assert (sent["logprobs"], sent["top_logprobs"], sent["max_tokens"], sent["temperature"]) == (True, 20, 1, 0.0)


def replying(content, text="Yes"):
    choice = {"message": {"content": text}, "logprobs": content}
    return lambda request: Response({"model": "judge", "choices": [choice]})


def test_tokens_that_are_written_alike_count_together(images):
    rows = [
        {"token": "\ufffd", "logprob": -1.0},
        {"token": "\ufffd", "logprob": -2.0},
        {"token": "x", "logprob": -1e9},
    ]
    with OpenAIStub(chat=replying({"content": [{"top_logprobs": rows}]})) as stub:
        answer = EndpointVision(Endpoint("judge", base_url=stub.url)).probabilities(images[0], QUESTION, [])
    assert answer.data["probabilities"] == pytest.approx({"\ufffd": np.exp(-1) + np.exp(-2), "x": 0.0})


@pytest.mark.parametrize("content", [None, {}, {"content": None}, {"content": []}, {"content": [{"token": "Yes"}]}])
def test_a_server_without_logprobs_is_told_from_one_with(content, tmp_path, images):
    with OpenAIStub(chat=replying(content)) as stub:
        vision = EndpointVision(Endpoint("judge", base_url=stub.url, cache=tmp_path / "answers"))
        for _ in range(2):  # nothing is kept
            with pytest.raises(ServerError, match=r"judge at .* gives no log-probabilities.*vLLM") as caught:
                vision.probabilities(images[0], QUESTION, ["Yes"])
            assert caught.value.is_final
        stub.chat = replying(content, text="")
        with pytest.raises(BadAnswer, match="neither words nor"):
            vision.probabilities(images[0], QUESTION, ["Yes"])
        stub.behaviour = stubs.without_logprobs
        with pytest.raises(ServerError, match="no log-probabilities: This model does not support logprobs"):
            vision.probabilities(images[0], QUESTION, ["Yes"])
        assert vision.answer(images[0], QUESTION).text == ""


def test_answers_that_were_kept_before_there_were_logprobs_are_found(tmp_path):
    messages = [{"role": "user", "content": "How many?"}]
    with OpenAIStub() as stub:
        endpoint = Endpoint("judge", base_url=stub.url, cache=tmp_path / "answers")
        settings = {"seed": None, "temperature": 0.5, "max_tokens": None, "vote": 0}
        key = hash_request(
            {"address": stub.url, "model": "judge", "messages": messages, "schema": None, "extra_body": {}, **settings}
        )
        kept = {"text": "Three.", "served_model": "judge", "input_tokens": 1, "output_tokens": 1}
        AnswerCache(tmp_path / "answers").put(key, kept)
        assert endpoint.chat(messages, temperature=0.5).text == "Three."
        assert stub.num_calls == 0


def test_a_function_of_the_users_answers(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(
        "def size(image, text):\n    return f'{text} {image.width}'\n"
        "def chances(image, text):\n    return {'Yes': 0.75}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    picture = Image.new("RGB", (7, 5))
    words, chances = (load_vision(f"my_judges:{name}", ModelSettings()) for name in ("size", "chances"))
    assert words.answer(picture, "width:").text == "width: 7"
    assert chances.probabilities(picture, "?", ["Yes"]).data == {
        "probabilities": {"Yes": 0.75},
        "tokens": {"Yes": ["Yes"]},
    }
    with pytest.raises(ValueError, match=r"my_judges:chances returned .*, which is not text"):
        chances.answer(picture, "?")
    with pytest.raises(ValueError, match=r"my_judges:size returned .*, not a mapping of tokens"):
        words.probabilities(picture, "?", ["Yes"])
