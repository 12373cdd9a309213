"""Questions about relations, and the models that answer them."""

import base64
import json
import shutil
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests import openai_stub as stubs
from tests.openai_stub import OpenAIStub
from tests.vision_models import ByHand
from trl_spatial.endpoints import BudgetReached, Endpoint, ServerError, Spend
from trl_spatial.judges.endpoint_judge import EndpointJudge
from trl_spatial.judges.local_judge import LocalJudge
from trl_spatial.judges.pictures import encode_image
from trl_spatial.judges.questions import negated_question, relation_question, relation_statement
from trl_spatial.scenes import REGIONS, RELATIONS


QUESTIONS = {
    "left_of": "Is the mug to the left of the plate, as the viewer sees it?",
    "right_of": "Is the mug to the right of the plate, as the viewer sees it?",
    "above": "Is the mug above the plate?",
    "below": "Is the mug below the plate?",
    "on": "Is the mug on the plate, resting on it?",
    "under": "Is the mug directly under the plate, with the plate resting on it?",
    "inside": "Is the mug inside the plate?",
    "contains": "Is the mug around the plate, so that the plate is inside it?",
    "front_of": "Is the mug in front of the plate, nearer to the viewer?",
    "behind": "Is the mug behind the plate, farther from the viewer?",
    "near": "Is the mug near the plate?",
    "next_to": "Is the mug right next to the plate?",
    "far_from": "Is the mug far away from the plate?",
    "between": "Is the mug between the plate and the jar?",
    "at": "Is the mug in the top left corner of the picture?",
    "row_order": "Are the mug, the plate and the jar in a row, in this order from left to right, as the viewer sees it?",
}


def record(name, *arguments):
    if not arguments:
        arguments = (
            ("mug", "top left corner") if name == "at" else ("mug", "plate", "jar")[: RELATIONS[name].num_arguments]
        )
    return {"relation": name, "arguments": list(arguments)}


@pytest.mark.parametrize("name", RELATIONS)
def test_every_relation_has_its_question(name):
    assert relation_question(record(name)) == QUESTIONS[name]


def test_a_question_its_statement_and_its_twin_say_the_same():
    for name in RELATIONS:
        question, statement = relation_question(record(name)), relation_statement(record(name))
        assert sorted(question[:-1].lower().split()) == sorted(statement.split())
        assert negated_question(record(name)) == f"Is it false that {statement}?"


def test_no_two_relations_are_asked_alike():
    records = [record(name) for name in RELATIONS] + [record(name, "plate", "mug") for name in RELATIONS if name not in
               ("at", "between", "row_order")]  # fmt: skip
    records += [record("at", "mug", region) for region in REGIONS if region != "top left corner"]
    records.append(record("row_order", "mug", "jar", "plate", "pot"))
    assert len({*map(relation_question, records), *map(negated_question, records)}) == 2 * len(records)


@pytest.mark.parametrize(
    "wrong",
    [record("beside", "a", "b"), record("left_of", "a"), record("between", "a", "b"), record("at", "a", "b", "c")],
)
def test_what_is_no_relation_is_named(wrong):
    with pytest.raises(ValueError, match=r"\w+\(a.* is not a relation"):
        relation_question(wrong)


# Behind a server

RECORDS = [record("left_of"), record("on"), record("at")]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.fixture
def ask(caplog):
    """A function that asks a judge whose model gives a text, and the server it asked."""
    caplog.set_level("DEBUG")
    servers = []

    def ask(text, image=NOISE, relations=RECORDS, **settings):
        stub = OpenAIStub(chat=lambda request: text).start()
        servers.append(stub)
        judge = EndpointJudge(Endpoint("judge", base_url=stub.url), **settings)
        return judge.ask(image, relations), stub

    yield ask
    for server in servers:
        server.stop()
    logged = [caplog.handler.format(record) for record in caplog.get_records("call")]
    assert "mug" not in "\n".join(logged)


def test_one_call_asks_about_all_relations_of_an_image(ask):
    text = json.dumps({"answers": ["yes", "no", "cannot_tell"]})
    judged, stub = ask(text)
    assert [relation.answer for relation in judged] == ["yes", "no", "cannot_tell"]
    assert {(relation.raw, relation.served_model) for relation in judged} == {(text, "judge")}
    (request,) = stub.requests
    assert [line.partition(". ")[2] for line in request.last.splitlines()] == [*map(relation_question, RECORDS)]
    assert np.array_equal(np.asarray(Image.open(BytesIO(request.images[0]))), np.asarray(NOISE))


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ('{"answers": ["yes"]}', ["yes", "cannot_tell", "cannot_tell"]),
        ('{"answers": []}', ["cannot_tell"] * 3),
        ('{"answers": ["yes", "yes", "yes", "no"]}', ["cannot_tell"] * 3),
        ('{"answers": ["yes", "maybe", "no"]}', ["cannot_tell"] * 3),
        ("I see a mug.", ["cannot_tell"] * 3),
        ('```json\n{"answers": ["no", "no", "yes"]}\n```', ["no", "no", "yes"]),
    ],
)
def test_missing_answers_cannot_tell_and_nothing_is_lost(ask, text, answers):
    judged, _ = ask(text)
    assert [relation.answer for relation in judged] == answers
    assert {relation.raw for relation in judged} == {text}


def test_no_relations_need_no_call(ask):
    judged, stub = ask("", relations=[])
    assert judged == [] and stub.num_calls == 0
    with pytest.raises(ValueError, match="not a relation"):
        ask("", relations=[record("beside", "a", "b")])


def test_large_images_are_shrunk():
    wide = Image.effect_noise((1500, 500), 90).convert("RGB")
    url = encode_image(wide, 900)
    assert url.startswith("data:image/jpeg")
    sent = Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.size == (900, 300)
    assert encode_image(Image.new("RGB", (1500, 500)), 900).startswith("data:image/png")
    with pytest.raises(ValueError, match=r"The image .*cannot be opened"):
        encode_image(b"no image", 900)


def test_failures_of_the_server_are_not_answers():
    with OpenAIStub(stubs.failing(404)) as stub:
        with pytest.raises(ServerError):
            EndpointJudge(Endpoint("judge", base_url=stub.url)).ask(NOISE, RECORDS)
        with pytest.raises(BudgetReached):
            EndpointJudge(Endpoint("judge", base_url=stub.url, spend=Spend(0.0))).ask(NOISE, RECORDS)


def test_the_stub_judges_its_own_pictures_by_their_prompts():
    """Draws what a scene says, and asks about it and about what it does not say."""
    num_right = num_asked = 0
    with OpenAIStub() as stub:
        endpoint = Endpoint("any", base_url=stub.url)
        judge = EndpointJudge(endpoint)
        for seed in range(15):
            scene = stubs.write_scene("kitchen", 5, [], seed)
            picture = endpoint.draw(scene["prompt"], seed=seed).image_bytes
            others = stubs.write_scene("kitchen", 5, [], seed + 100)["relations"]
            judged = judge.ask(picture, [*scene["relations"], *others])
            expected = ["yes"] * 5 + ["no"] * 5
            num_right += sum(relation.answer == answer for relation, answer in zip(judged, expected, strict=True))
            num_asked += 10
            assert judge.ask(picture, [*scene["relations"], *others]) == judged
    assert 0.9 < num_right / num_asked < 1.0


# On this machine


def chance_of_yes(by_hand, image, question):
    probabilities = by_hand.probabilities(
        image, f"{question} Left and right are the viewer's, as in the picture. Answer with one word, Yes or No."
    )
    yes, no = (
        sum(probabilities[by_hand.tokenizer.convert_tokens_to_ids(token)] for token in (word, word.lower(), f"Ġ{word}",
            f"Ġ{word.lower()}"))
        for word in ("Yes", "No")
    )  # fmt: skip
    return float(yes / (yes + no))


def test_a_local_judge_compares_yes_and_no(judge_folder, images):
    judge, by_hand = LocalJudge(str(judge_folder), device="cpu", margin=0.02), ByHand(judge_folder)
    seen = set()
    for image in images[:3]:
        for answer, asked in zip(judge.ask(image, RECORDS), RECORDS, strict=True):
            expected = chance_of_yes(by_hand, image, relation_question(asked))
            assert float(answer.raw.removeprefix("P(Yes) = ")) == pytest.approx(expected, abs=1e-3)
            words = "cannot_tell" if abs(expected - 0.5) <= 0.02 else "yes" if expected > 0.5 else "no"
            assert answer.answer == words
            assert answer.served_model == str(judge_folder)
            seen.add(answer.raw)
    assert len(seen) == 9  # image and question both matter


def test_inside_the_margin_a_local_judge_cannot_tell(judge_folder, images):
    sure = LocalJudge(str(judge_folder), device="cpu", margin=0.0)
    unsure = LocalJudge(str(judge_folder), device="cpu", margin=0.4999)
    assert {judged.answer for judged in sure.ask(images[0], RECORDS)} <= {"yes", "no"}
    assert {judged.answer for judged in unsure.ask(images[0], RECORDS)} == {"cannot_tell"}
    with pytest.raises(ValueError, match=r"margin.*0\.5"):
        LocalJudge(str(judge_folder), margin=0.5)


def test_a_local_judge_shrinks_large_images(judge_folder):
    image = Image.effect_noise((400, 200), 90).convert("RGB")
    small = image.resize((40, 20), Image.Resampling.LANCZOS)
    judge = LocalJudge(str(judge_folder), device="cpu", max_side=40)
    assert judge.ask(image, RECORDS) == judge.ask(small, RECORDS)


def test_what_cannot_judge_is_refused(judge_folder, backbone_folder, detector_folder, tmp_path):
    with pytest.raises(ValueError, match="'Yes' is not a token"):
        LocalJudge(str(backbone_folder), device="cpu")
    with pytest.raises(ValueError, match="not a vision-language model"):
        LocalJudge(str(detector_folder), device="cpu")
    bare = shutil.copytree(judge_folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        LocalJudge(str(bare), device="cpu")
    settings = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(ValueError, match="auto_map"):
        LocalJudge(str(bare), device="cpu")
