"""Prompts by a language model: what is asked, what is taken, what is dropped. And the logic of relations behind it."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from models import build_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests import openai_stub as stubs
from tests.openai_stub import OpenAIStub
from trl_spatial.data.building.language import Draft, Dropped, LanguageWriter, Reading, word_limits
from trl_spatial.endpoints import BadAnswer, Endpoint, Prices
from trl_spatial.endpoints.local_chat import LocalChat
from trl_spatial.scenes import RELATIONS, Phrase, Relation, SceneGraph, perturb, sample_graph
from trl_spatial.scenes.consistency import canonical_relation, is_consistent, say_the_same


DIMENSIONS = sorted({kind.dimension for kind in RELATIONS.values()})


@pytest.fixture
def connect(caplog):
    """A function that starts a server and gives a writer that asks it. Nothing of what is written gets into the logs."""
    caplog.set_level("DEBUG")
    servers = []

    def connect(behaviour="default", chat=stubs.default_chat, reader_chat=None):
        stub = OpenAIStub(behaviour, chat=chat).start()
        servers.append(stub)
        endpoint = Endpoint("writer", base_url=stub.url, prices=Prices(0.0, 1e6))
        reader = None
        if reader_chat is not None:
            servers.append(OpenAIStub(chat=reader_chat).start())
            reader = Endpoint("reader", base_url=servers[-1].url)
        return LanguageWriter(endpoint, reader=reader), stub

    yield connect
    for server in servers:
        server.stop()
    logged = "\n".join(caplog.handler.format(record) for record in caplog.get_records("call"))
    assert "A kitchen" not in logged and "red mug" not in logged


def possible(graphs, rng):
    return all(map(is_consistent, graphs))


def stated(relation):
    """What the server writes for a relation."""
    arguments = [str(thing) for thing in relation.arguments] + ([relation.region] if relation.region else [])
    return stubs.verbalize({"relation": relation.name, "arguments": arguments})


# Writing


@pytest.mark.parametrize("num_relations", range(3, 13))
def test_a_draft_is_what_was_asked_for(connect, num_relations):
    writer, stub = connect()
    dimensions = (DIMENSIONS * 2)[num_relations : num_relations + 3]
    draft = writer.write("kitchen", num_relations, dimensions, seed=num_relations)
    assert isinstance(draft, Draft)
    assert (draft.scene, draft.writer, len(draft.graph.relations)) == ("kitchen", "writer", num_relations)
    kinds = Counter(RELATIONS[relation.name].dimension for relation in draft.graph.relations)
    assert not Counter(dimensions) - kinds
    assert [draft.prompt[start:end] for start, end in draft.spans] == [*map(stated, draft.graph.relations)]
    fewest, most = word_limits(num_relations)
    assert 40 == fewest <= len(draft.prompt.split()) <= most <= 134
    assert draft.cost > 0 and stub.num_calls == 1
    asked = stub.requests[0]
    assert asked.body["seed"] == num_relations and f"Kinds: {', '.join(dimensions)}" in asked.last


def test_another_seed_gives_another_scene(connect):
    writer, _ = connect()
    drafts = [writer.write("garage", 4, [], seed) for seed in (1, 2, 1)]
    assert drafts[0] == drafts[2] != drafts[1]


def test_the_model_is_told_every_relation(connect):
    writer, stub = connect()
    writer.write("garage", 4, [], 0)
    system = stub.requests[0].body["messages"][0]["content"]
    assert all(f"- {name} [" in system for name in RELATIONS)
    assert "left_of [" in system and "the a is to the left of the b, as the viewer sees it" in system


@pytest.mark.parametrize(
    "wrong", [dict(num_relations=2, dimensions=["depth"] * 3), dict(num_relations=3, dimensions=["time"])]
)
def test_what_cannot_be_asked_is_refused(connect, wrong):
    writer, stub = connect()
    with pytest.raises(ValueError, match="dimensions"):
        writer.write("kitchen", seed=0, **wrong)
    assert stub.num_calls == 0


GOOD = {
    "entities": ["red mug", "the blue plate", "old lamp"],
    "relations": [
        {"relation": "left_of", "arguments": ["red mug", "blue plate"], "span_text": "left of a blue plate"},
        {"relation": "behind", "arguments": ["an old lamp", "Red mug"], "span_text": "an old lamp stands behind it"},
        {"relation": "at", "arguments": ["old lamp", "Top edge"], "span_text": "near the top edge"},
    ],
    "prompt": (
        "On a scrubbed kitchen table a red mug is left of a blue plate, and an old lamp stands behind it, near the top edge of the "
        "picture. Soft morning light comes from one side, the wall is plain, and a few crumbs on the table tell of breakfast."
    ),
}


def changed(**fields):
    return json.loads(json.dumps(GOOD)) | fields


def with_relation(number, **fields):
    answer = changed()
    answer["relations"][number] |= fields
    return answer


FAULTS = {
    "length": changed(prompt=GOOD["prompt"].partition(" Soft")[0]),
    "things of one name": changed(entities=[*GOOD["entities"], "Red Mug"]),
    "thing not in the prompt": changed(entities=[*GOOD["entities"], "green jar"]),
    "unknown arguments": with_relation(0, arguments=["red mug", "yellow plate"]),
    "unknown arguments ": with_relation(0, arguments=["red mug"]),
    "unknown arguments  ": with_relation(2, arguments=["old lamp", "ceiling"]),
    "unknown arguments   ": with_relation(0, arguments=["red mug", "red mug"]),
    "span not in the prompt": with_relation(0, span_text="to the left of a blue plate"),
    "span not in the prompt ": with_relation(0, span_text=""),
    "number of relations": changed(relations=GOOD["relations"][:2]),
    "repeated relations": with_relation(2, relation="right_of", arguments=["blue plate", "red mug"]),
    "contradiction": with_relation(2, relation="right_of", arguments=["red mug", "blue plate"]),
    "kinds of relations": with_relation(1, relation="near"),
}


def test_articles_and_capitals_do_not_matter(connect):
    writer, _ = connect(chat=lambda request: json.dumps(GOOD))
    draft = writer.write("kitchen", 3, ["depth"], 0)
    mug, plate, lamp = map(Phrase, ("red mug", "blue plate", "old lamp"))
    relations = (
        Relation("left_of", (mug, plate)),
        Relation("behind", (lamp, mug)),
        Relation("at", (lamp,), "top edge"),
    )
    assert draft.graph == SceneGraph((mug, plate, lamp), relations)
    assert [draft.prompt[start:end] for start, end in draft.spans] == [r["span_text"] for r in GOOD["relations"]]


@pytest.mark.parametrize("reason", FAULTS)
def test_a_fault_is_shown_once_and_then_the_prompt_is_dropped(connect, reason):
    answers = [FAULTS[reason], GOOD, FAULTS[reason], FAULTS[reason]]
    writer, stub = connect(chat=lambda request: json.dumps(answers[request.number]))
    assert isinstance(writer.write("kitchen", 3, ["depth"], 0), Draft)
    *_, shown, fault = stub.requests[1].body["messages"]
    assert json.loads(shown["content"]) == FAULTS[reason] and fault["content"].startswith("This answer cannot be used")
    dropped = writer.write("kitchen", 3, ["depth"], 0)
    assert dropped == Dropped(reason.strip(), json.dumps(FAULTS[reason]), dropped.cost)
    assert dropped.cost == sum(len(json.dumps(answer)) // 4 for answer in answers[2:])
    assert stub.num_calls == 4


def test_an_answer_of_another_form_is_dropped(connect):
    unknown = with_relation(0, relation="beside")
    writer, _ = connect(chat=lambda request: json.dumps(unknown))
    dropped = writer.write("kitchen", 3, [], 0)
    assert (dropped.reason, dropped.raw) == ("no usable answer", json.dumps(unknown))
    writer, _ = connect(stubs.refusing)
    assert writer.write("kitchen", 3, [], 0).reason == "no usable answer"


@pytest.mark.parametrize("behaviour", ["faulty", "in_prose", "without_schema"])
def test_servers_with_faults_write_the_same(connect, behaviour):
    expected, _ = connect()
    writer, _ = connect(behaviour)
    for seed in range(3):
        draft, other = (each.write("patio", 5, ["depth"], seed) for each in (expected, writer))
        assert (draft.graph, draft.prompt, draft.spans) == (other.graph, other.prompt, other.spans)


# Rewriting and reading


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_a_rewritten_prompt_says_the_edited_graph_and_keeps_the_rest(connect, dimension):
    writer, stub = connect()
    for num_changes in (1, 2, 3):
        draft = writer.write("study", 6, [dimension], num_changes)
        rng = np.random.default_rng(num_changes)
        after, operations = perturb(draft.graph, rng, num_changes, dimension=dimension, is_possible=possible)
        num_calls = stub.num_calls
        rewritten = writer.rewrite(draft, after, operations, seed=7)
        assert isinstance(rewritten, Draft)
        assert rewritten.graph == after and stub.num_calls == num_calls + 2
        assert [rewritten.prompt[start:end] for start, end in rewritten.spans] == [*map(stated, after.relations)]
        before_words, after_words = draft.prompt.split(". "), rewritten.prompt.split(". ")
        assert sum(a != b for a, b in zip(before_words, after_words, strict=True)) == num_changes
        assert rewritten.cost > 0


@pytest.fixture
def edit(connect):
    """A draft, and what to make of it."""
    writer, _ = connect()
    draft = writer.write("study", 4, ["lateral"], 1)
    after, operations = perturb(draft.graph, np.random.default_rng(0), 1, dimension="lateral", is_possible=possible)
    return draft, after, operations


def test_what_is_read_may_be_said_the_other_way_round(connect, edit):
    draft, after, operations = edit

    def read(request):
        relations = stubs.answer_reader(request)["relations"]
        for relation in relations:
            if inverse := RELATIONS[relation["relation"]].inverse:
                relation.update(relation=inverse, arguments=relation["arguments"][::-1])
        return json.dumps({"relations": relations[::-1]})

    writer, stub = connect(reader_chat=read)
    rewritten = writer.rewrite(draft, after, operations, 0)
    assert isinstance(rewritten, Draft) and stub.num_calls == 1  # the reader is another


@pytest.mark.parametrize("misread", [lambda relations: relations[1:], lambda relations: [
    {"relation": "near", "arguments": relations[0]["arguments"][:2]}, *relations]])  # fmt: skip
def test_what_is_read_differently_is_dropped(connect, edit, misread):
    def read(request):
        return json.dumps({"relations": misread(stubs.answer_reader(request)["relations"])})

    dropped = connect(reader_chat=read)[0].rewrite(*edit, 0)
    assert dropped.reason == "read differently" and json.loads(dropped.raw)["relations"]


def test_a_prompt_that_was_not_changed_is_read_differently(connect, edit):
    """The writer claims to have changed it; the reader sees that it has not."""
    draft, after, operations = edit
    lie = {"prompt": draft.prompt.replace("A study.", "One study."), "relations": []}
    for relation in after.relations:
        record = stubs.read_scene(stated(relation))[0]
        found = stated(relation) if stated(relation) in draft.prompt else stated(operations[0].before)
        lie["relations"].append(record | {"span_text": found})
    writer, _ = connect(
        chat=lambda request: json.dumps(lie) if request.title == "rewrite" else stubs.default_chat(request)
    )
    assert writer.rewrite(draft, after, operations, 0).reason == "read differently"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda answer, draft: answer | {"prompt": draft.prompt, "relations": answer["relations"]}, "span not in the prompt"),
        (lambda answer, draft: answer | {"relations": answer["relations"][1:]}, "other relations"),
        (lambda answer, draft: answer | {"prompt": " ".join(
            [relation["span_text"] + "." for relation in reversed(answer["relations"])] + ["So it is and it was and will be."] * 2
        )}, "too much changed"),
    ],
)  # fmt: skip
def test_a_bad_rewriting_is_dropped(connect, edit, change, reason):
    draft, after, operations = edit

    def chat(request):
        return json.dumps(change(stubs.answer_rewriter(request), draft))

    writer, stub = connect(chat=chat)
    assert writer.rewrite(draft, after, operations, 0).reason == reason
    assert stub.num_calls == 2


def test_reading_gives_the_relations(connect):
    writer, _ = connect()
    draft = writer.write("study", 7, [], 3)
    reading = writer.read(draft.prompt, [str(thing) for thing in draft.graph.entities])
    assert isinstance(reading, Reading) and say_the_same(reading.relations, draft.graph.relations)
    assert writer.read(draft.prompt, ["other thing"]).reason == "unknown arguments"


# The logic of relations

A, B, C, D = map(Phrase, "abcd")


def graph(*relations):
    made = []
    for name, *things in relations:
        region = things.pop() if name == "at" else None
        made.append(Relation(name, tuple(things), region))
    return SceneGraph((A, B, C, D), tuple(made))


CONTRADICTIONS = [
    [("left_of", A, B), ("right_of", A, B)],
    [("left_of", A, B), ("left_of", B, C), ("left_of", C, A)],
    [("right_of", A, B), ("left_of", A, C), ("row_order", B, D, C), ("left_of", C, B)],
    [("front_of", A, B), ("behind", A, B)],
    [("front_of", A, B), ("front_of", B, C), ("behind", A, C)],
    [("above", A, B), ("above", B, A)],
    [("on", A, B), ("above", B, C), ("below", A, C)],
    [("on", A, B), ("on", B, A)],
    [("on", A, B), ("on", A, C)],
    [("on", A, B), ("under", C, A)],
    [("on", A, B), ("far_from", B, A)],
    [("on", A, B), ("inside", A, B)],
    [("inside", A, B), ("inside", B, A)],
    [("inside", A, B), ("contains", A, B)],
    [("inside", A, B), ("inside", A, C)],
    [("inside", A, B), ("left_of", B, A)],
    [("inside", A, B), ("contains", C, B), ("far_from", A, C)],
    [("inside", A, B), ("next_to", A, B)],
    [("inside", A, B), ("left_of", B, C), ("right_of", A, C)],
    [("inside", A, B), ("inside", C, D), ("behind", B, D), ("front_of", A, C)],
    [("near", A, B), ("far_from", B, A)],
    [("next_to", A, B), ("far_from", A, B)],
    [("between", A, B, C), ("left_of", A, B), ("left_of", A, C)],
    [("between", A, B, C), ("row_order", B, C, A)],
    [("between", A, B, C), ("behind", A, B), ("behind", A, D), ("behind", D, C)],
    [("between", A, B, C), ("between", B, A, C)],
    [("row_order", A, B, C), ("right_of", A, C)],
    [("row_order", A, B, C), ("row_order", C, D, A)],
    [("at", A, "left edge"), ("at", A, "right edge")],
    [("at", A, "left edge"), ("at", B, "top right corner"), ("right_of", A, B)],
    [("at", A, "bottom left corner"), ("at", B, "center"), ("above", A, B)],
]
CONSISTENT = [
    [],
    [("left_of", A, B), ("right_of", B, A), ("left_of", B, C), ("left_of", A, C)],
    [("left_of", A, B), ("behind", B, A), ("above", B, A), ("near", A, B)],
    [("on", A, B), ("on", C, B), ("left_of", A, C), ("on", B, D)],
    [("on", A, B), ("inside", A, C)],
    [("inside", A, B), ("inside", B, C), ("inside", A, C), ("on", C, D)],
    [("inside", A, C), ("inside", B, C), ("left_of", A, B), ("right_of", C, D)],
    [("near", A, B), ("near", B, C), ("far_from", A, C)],
    [("between", A, B, C), ("between", A, C, B), ("left_of", B, A), ("left_of", A, C)],
    [("between", A, B, C), ("left_of", A, B), ("behind", A, C), ("above", D, A)],
    [("row_order", A, B, C), ("row_order", B, C, D), ("left_of", A, D)],
    [("at", A, "left edge"), ("at", B, "top edge"), ("left_of", B, A)],
    [("at", A, "left edge"), ("at", B, "left edge"), ("left_of", B, A)],
]


@pytest.mark.parametrize("relations", CONTRADICTIONS, ids=str)
def test_contradictions_are_found_and_every_part_of_them_is_consistent(relations):
    assert not is_consistent(graph(*relations))
    assert is_consistent(graph(*relations[:1])) and is_consistent(graph(*relations[-1:]))


@pytest.mark.parametrize("relations", CONSISTENT, ids=str)
def test_what_can_hold_together_is_consistent(relations):
    assert is_consistent(graph(*relations))


def test_orders_are_consistent_exactly_if_some_arrangement_shows_them():
    """Against all arrangements of four things in a row."""
    rng = np.random.default_rng(0)
    verdicts = set()
    for _ in range(300):
        relations = []
        for _ in range(rng.integers(2, 5)):
            name = ("left_of", "right_of", "row_order")[rng.integers(3)]
            things = [(A, B, C, D)[i] for i in rng.permutation(4)[: 3 if name == "row_order" else 2]]
            relations.append((name, *things))
        is_shown = any(
            all(
                (places := [row.index(thing) for thing in things])
                == sorted(places, reverse=name == "right_of")
                for name, *things in relations
            )
            for row in itertools.permutations((A, B, C, D))
        )  # fmt: skip
        assert is_consistent(graph(*relations)) == is_shown, relations
        verdicts.add(is_shown)
    assert verdicts == {True, False}


def test_what_a_renderer_can_place_is_consistent():
    for seed in range(60):
        scene = sample_graph(np.random.default_rng(seed), num_objects=4, num_relations=3)
        assert is_consistent(scene), scene


def test_one_form_stands_for_all_that_say_the_same():
    same = [
        [("left_of", A, B), ("right_of", B, A)], [("on", A, B), ("under", B, A)], [("inside", A, B), ("contains", B, A)],
        [("near", A, B), ("near", B, A)], [("between", A, B, C), ("between", A, C, B)],
    ]  # fmt: skip
    different = [("left_of", B, A), ("near", A, C), ("next_to", A, B), ("between", B, A, C), ("row_order", A, B, C),
                 ("row_order", C, B, A), ("at", A, "center"), ("at", A, "left edge"), ("above", A, B)]  # fmt: skip
    forms = [{canonical_relation(relation) for relation in graph(*group).relations} for group in same]
    assert all(len(form) == 1 for form in forms)
    others = {canonical_relation(relation) for relation in graph(*different).relations}
    assert len(set().union(*forms, others)) == len(same) + len(different)


# A model on this machine


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = build_tokenizer(["A red mug", '{"count": 1}'], 1000)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_local_model_chats_as_an_endpoint_does(chat_folder):
    model = LocalChat(str(chat_folder), device="cpu")
    messages = [{"role": "user", "content": "A red mug"}]

    def ask(**settings):
        return model.chat(messages, **{"temperature": 1.0, "max_tokens": 12, "seed": 1, **settings})

    first = ask()
    assert first == ask() and first.text
    assert len({ask(seed=2).text, ask(vote=1).text, first.text}) == 3
    assert ask(temperature=0.0, seed=1).text == ask(temperature=0.0, seed=2).text
    assert (first.output_tokens, first.cost, first.is_cached, first.served_model) == (12, 0.0, False, str(chat_folder))
    parts = [{"role": "user", "content": [{"type": "text", "text": "A red mug"}]}]
    assert model.chat(parts, temperature=1.0, max_tokens=12, seed=1) == first
    assert next(model.map(lambda item: 1 // item, [1, 0])) == (0, 1)
    assert isinstance(next(model.map(lambda item: 1 // item, [0]))[1], ZeroDivisionError)
    with pytest.raises(BadAnswer):
        ask(schema={"type": "object"})
    with pytest.raises(ValueError, match="image"):
        model.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_a_writer_takes_a_local_model(chat_folder):
    model = LocalChat(str(chat_folder), device="cpu")
    model.chat = lambda *args, max_tokens=None, **settings: LocalChat.chat(model, *args, max_tokens=8, **settings)
    assert LanguageWriter(model).write("kitchen", 3, [], 0).reason == "no usable answer"


def test_a_model_of_another_kind_does_not_chat(detector_folder):
    with pytest.raises(ValueError, match="not a language model"):
        LocalChat(str(detector_folder), device="cpu")
