"""The client of OpenAI-compatible servers, against a server on loopback."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests import openai_stub as stubs
from tests.openai_stub import OpenAIStub, Response
from trl_spatial.endpoints import BadAnswer, BudgetReached, Endpoint, Prices, ServerError, Spend
from trl_spatial.endpoints.cache import AnswerCache
from trl_spatial.endpoints.pictures import download
from trl_spatial.endpoints.sending import Failure, parse_retry_after
from trl_spatial.endpoints.structured import check_schema, read_json


REPOSITORY = Path(__file__).parents[1]
KEY = "sk-secret-0123456789abcdef"
PROMPT = "a violet zebra juggling teacups"
SECRET_ANSWER = "the walrus was paid"
MESSAGES = [{"role": "user", "content": PROMPT}]
SCHEMA = {
    "title": "count",
    "type": "object",
    "properties": {
        "count": {"type": "integer"},
        "names": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
    },
    "required": ["count"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def nothing_private(caplog, capfd, monkeypatch):
    """Whatever a test does, neither the key nor prompts nor answers come into the logs, however talkative these are."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    caplog.set_level(logging.DEBUG)
    yield
    logged = [
        caplog.handler.format(record) for record in caplog.get_records("call")
    ]  # `text` holds the teardown's alone
    written = "\n".join([*logged, *capfd.readouterr()])
    for secret in (KEY, PROMPT, SECRET_ANSWER):
        assert secret not in written


@pytest.fixture
def stub():
    with OpenAIStub(chat=lambda request: SECRET_ANSWER) as server:
        yield server


def connect(stub, **settings):
    return Endpoint("test-model", base_url=stub.url, **settings)


def says(*texts):
    """A chat that gives one text after another."""
    left = list(texts)
    return lambda request: left.pop(0)


# Chat


def test_a_chat_gives_text_tokens_price_and_the_served_model(stub, caplog):
    endpoint = connect(stub, prices=Prices(1e6, 2e6), extra_body={"top_k": 3})
    answer = endpoint.chat(MESSAGES, seed=5, temperature=0.5, max_tokens=7)
    num_read, num_written = len(PROMPT) // 4, len(SECRET_ANSWER) // 4
    assert (answer.text, answer.data, answer.served_model) == (SECRET_ANSWER, None, "test-model")
    assert (answer.input_tokens, answer.output_tokens) == (num_read, num_written)
    assert answer.cost == pytest.approx(num_read + 2 * num_written)
    (request,) = stub.requests
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body == {
        "model": "test-model", "messages": MESSAGES, "seed": 5, "temperature": 0.5, "max_tokens": 7, "top_k": 3,
    }  # fmt: skip
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_tokens_that_a_server_does_not_count_still_cost(stub):
    choice = {"message": {"content": "x" * 400}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    stub.chat = lambda request: Response({"choices": [choice]})
    spend = Spend(10.0)
    message = {"role": "user", "content": [{"type": "text", "text": "y" * 800}, picture]}
    answer = connect(stub, prices=Prices(1000.0, 1000.0), spend=spend).chat([message])
    assert answer.output_tokens == 100 and answer.input_tokens > 200 + 500
    assert spend.spent == answer.cost > 0
    assert answer.served_model is None


@pytest.mark.parametrize("behaviour", ["default", "in_prose", "without_schema", "faulty"])
def test_json_comes_whatever_the_server_makes_of_the_schema(behaviour, caplog):
    with OpenAIStub(behaviour, chat=lambda request: '{"count": 3, "names": ["a"]}') as stub:
        endpoint = connect(stub)
        for _ in range(2):
            assert endpoint.chat(MESSAGES, schema=SCHEMA).data == {"count": 3, "names": ["a"]}
        if behaviour == "default":
            described = stub.requests[0].body["response_format"]["json_schema"]
            assert described == {"name": "count", "schema": SCHEMA, "strict": True}
        if behaviour == "without_schema":  # it is asked in words from then on
            assert ["response_format" in request.body for request in stub.requests] == [True, False, False]
            assert json.dumps(SCHEMA) in stub.requests[2].last
            assert sum("response_format" in record.message for record in caplog.records) == 1


def test_a_bad_answer_is_shown_to_the_model_once(stub):
    stub.chat = says('{"count": "three"}', '{"count": 3}')
    endpoint = connect(stub, prices=Prices(0.0, 1e6))
    answer = endpoint.chat(MESSAGES, schema=SCHEMA)
    assert answer.data == {"count": 3}
    assert answer.output_tokens == answer.cost == len('{"count": "three"}') // 4 + len('{"count": 3}') // 4
    *first, shown, fault = stub.requests[1].body["messages"]
    assert first == MESSAGES
    assert shown == {"role": "assistant", "content": '{"count": "three"}'}
    assert "the answer.count must be of type integer" in fault["content"]


def test_a_second_bad_answer_is_an_error_that_keeps_it(stub):
    stub.chat = lambda request: f"[{SECRET_ANSWER}]"
    with pytest.raises(BadAnswer, match="no JSON value") as caught:
        connect(stub, prices=Prices(0.0, 1e6)).chat(MESSAGES, schema=SCHEMA)
    assert stub.num_calls == 2
    assert caught.value.raw == f"[{SECRET_ANSWER}]" and caught.value.cost == 2 * (len(caught.value.raw) // 4)
    assert SECRET_ANSWER not in str(caught.value) and caught.value.served_model == "test-model"


def test_a_refusal_to_answer_is_a_bad_answer(stub):
    message = {"content": None, "refusal": "I will not."}
    stub.chat = lambda request: Response({"model": "test-model", "choices": [{"message": message}]})
    with pytest.raises(BadAnswer, match="refuses") as caught:
        connect(stub).chat(MESSAGES)
    assert caught.value.raw == "I will not."
    stub.next.append(stubs.refusing)
    with pytest.raises(BadAnswer, match="refuses") as caught:
        connect(stub).chat(MESSAGES)
    assert "safety system" in caught.value.raw and stub.num_calls == 2


def test_a_parameter_with_another_name_is_sent_under_that(stub, caplog):
    def modern(request, usual):
        for name in ("max_tokens", "seed"):
            if name in request.body:
                return stubs.error(400, f"Unsupported parameter: '{name}' is not supported with this model.")
        return usual(request)

    stub.behaviour = modern
    endpoint = connect(stub)
    for _ in range(2):
        endpoint.chat(MESSAGES, max_tokens=9, seed=1)
    assert stub.requests[-1].body == {"model": "test-model", "messages": MESSAGES, "max_completion_tokens": 9}
    assert stub.num_calls == 4
    assert len([record for record in caplog.records if "does not take" in record.message]) == 2


GOOD = {"count": 1}


@pytest.mark.parametrize(
    "text",
    [
        '{"count": 1}',
        '  {"count": 1}\n',
        '```json\n{"count": 1}\n```',
        'First {this}, then [that]: {"count": 1}. Done }',
        '<think>{"count": 7} or so?</think>{"count": 1}',
        'Not {"count": "one"} but {"count": 1}',
        '[{"count": 1}]',
        "{" * 50 + '{"count": 1}',
        '{"count": NaN} {"count": 1}',
        '{"count": 5, "names": ["\\ud800"]} {"count": 1}',
    ],
)
def test_json_is_found_in_prose(text):
    assert read_json(text, SCHEMA) == GOOD


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no JSON"), ("count: 1", "no JSON"), ("{}", "lacks count"), ("[" * 100_000, "no JSON"), ('{"a":' * 9000, "no JSON"),
        ('{"count": true}', "count must be of type integer"), ('{"count": 1.5}', "count must be of type integer"),
        ('{"count": 1, "size": 2}', "nothing but count, names"), ('{"count": 1, "names": ["a", 2]}', r"names\[1\] must be of"),
        ('{"count": 1, "names": ["a", "b", "c"]}', "names must have 2 items, not 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text, fault):
    with pytest.raises(ValueError, match=fault):
        read_json(text, SCHEMA)


def test_the_check_of_schemas_agrees_with_jsonschema():
    jsonschema = pytest.importorskip("jsonschema")
    values = [
        None, True, 0, 2, 1.5, "a", "yes", [], ["yes"], ["yes", 1], [["yes"]], {}, {"a": 1}, {"a": "yes", "b": [1]}, {"b": []},
    ]  # fmt: skip
    schemas = [
        {"type": kind} for kind in ("object", "array", "string", "integer", "number", "boolean")
    ] + [
        {"enum": ["yes", 2]},
        {"type": "array", "items": {"type": "string", "enum": ["yes"]}, "minItems": 1},
        {"type": "array", "maxItems": 1},
        {"type": "object", "properties": {"a": {"type": "string"}}},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    ]  # fmt: skip
    for schema in schemas:
        for value in values:
            try:
                check_schema(value, schema)
                is_valid = True
            except ValueError:
                is_valid = False
            assert is_valid == jsonschema.Draft202012Validator(schema).is_valid(value), (schema, value)


def test_a_schema_that_would_not_be_checked_is_refused(stub):
    with pytest.raises(ValueError, match="oneOf"):
        connect(stub).chat(MESSAGES, schema={"type": "object", "properties": {"a": {"oneOf": []}}})
    assert stub.num_calls == 0


# Trying again


@pytest.mark.parametrize(
    "fault",
    [
        stubs.failing(408), stubs.failing(409), stubs.failing(500), stubs.failing(503), stubs.dying, stubs.malformed, stubs.html,
        stubs.failing(429),
        lambda request, usual: Response({"error": {"code": 502, "message": "upstream"}}),
        lambda request, usual: Response({"choices": []}),
    ],
)  # fmt: skip
def test_what_passes_is_tried_again(stub, fault):
    stub.next.append(fault)
    assert connect(stub).chat(MESSAGES).text == SECRET_ANSWER
    assert stub.num_calls == 2
    first, second = stub.requests
    assert first.body == second.body


def test_an_answer_that_does_not_come_in_time_is_asked_for_again(stub, monkeypatch):
    is_tried_again = threading.Event()
    stub.next.append(lambda request, usual: is_tried_again.wait(120) and usual(request))
    endpoint = connect(stub, timeout_s=0.4)

    def wait(seconds):
        if seconds > 0:  # the pause after the first try: the second one has as long as it takes
            endpoint._client.timeout = 120
            is_tried_again.set()

    monkeypatch.setattr(endpoint._stopping, "wait", wait)
    assert endpoint.chat(MESSAGES).text == SECRET_ANSWER
    assert is_tried_again.is_set()
    wait_until(lambda: stub.num_calls == 2)
    first, second = stub.requests
    assert first.body == second.body


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("is_date", [False, True])
def test_retries_wait_as_asked(stub, monkeypatch, is_date):
    seconds = 2.0 if is_date else 1.2  # a date has whole seconds
    stub.next.append(stubs.rate_limited(seconds, as_date=is_date))
    endpoint, pauses = connect(stub), []
    wait = endpoint._stopping.wait
    monkeypatch.setattr(endpoint._stopping, "wait", lambda seconds: pauses.append(seconds) or wait(seconds))
    endpoint.chat(MESSAGES)
    assert stub.requests[1].time - stub.requests[0].time >= (1.0 if is_date else 1.2)
    assert max(pauses) <= 0.1 + 1.1 * seconds


def test_what_a_server_asks_of_one_thread_holds_for_all(stub):
    endpoint = connect(stub, concurrency=2)

    def hold(request, usual):  # the only call that can be on its way when another one is told to wait
        wait_until(lambda: endpoint._resume_at > 0)
        return usual(request)

    stub.next += [stubs.rate_limited(1.0), hold]
    results = list(endpoint.map(lambda item: endpoint.chat(MESSAGES), range(12)))
    assert len(results) == 12 and endpoint._resume_at - stub.requests[0].time >= 1.0
    assert all(request.time >= endpoint._resume_at for request in stub.requests[2:])


def test_a_call_that_waits_is_asked_to_wait_longer(stub, monkeypatch):
    endpoint, pauses = connect(stub), []

    def wait(seconds):
        pauses.append(seconds)
        if len(pauses) == 1:  # meanwhile another thread is told to wait
            endpoint._resume_at = time.monotonic() + 60
        elif seconds > 0:
            endpoint._resume_at = 0.0

    monkeypatch.setattr(endpoint._stopping, "wait", wait)
    endpoint._resume_at = time.monotonic() + 30
    endpoint.chat(MESSAGES)
    first, second, third = pauses
    assert 0 < first <= 30 < second <= 60 and third == 0


def test_pauses_grow(stub, monkeypatch):
    pauses = []
    endpoint = connect(stub, max_attempts=5)
    monkeypatch.setattr(endpoint._stopping, "wait", lambda seconds: pauses.append(seconds) and False)
    stub.behaviour = stubs.failing(503)
    with pytest.raises(ServerError):
        endpoint.chat(MESSAGES)
    grown = [seconds for seconds in pauses if seconds]
    assert len(grown) == 4
    for i, seconds in enumerate(grown):
        assert 0.25 * 2**i <= seconds <= 0.5 * 2**i


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0), ({"retry-after": "0.5"}, 0.5), ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({}, None), ({"retry-after": "soon"}, None), ({"retry-after": "-4"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)  # fmt: skip
def test_retry_after_is_read(headers, seconds):
    assert parse_retry_after(headers) == seconds


def test_it_gives_up_with_a_reason_and_a_way_out(stub):
    stub.behaviour = stubs.failing(503, "No room.\nTry   later.")
    with pytest.raises(ServerError) as caught:
        connect(stub, max_attempts=2).chat(MESSAGES)
    assert str(caught.value) == (
        f"test-model at {stub.url} answers 503, 2 times: No room. Try later. Run the same command again later to "
        "continue."
    )
    assert caught.value.status == 503 and stub.num_calls == 2


@pytest.mark.parametrize(
    ("status", "code", "way_out"),
    [
        (401, "", "OPENAI_API_KEY"), (403, "", "may not use"), (404, "", "/v1"), (400, "", "what it takes"),
        (413, "", "shrink"), (429, "insufficient_quota", "no credit"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_not_tried_again(stub, status, code, way_out):
    stub.behaviour = stubs.failing(status, "Wrong.", code)
    with pytest.raises(ServerError, match=way_out) as caught:
        connect(stub).chat(MESSAGES)
    assert (stub.num_calls, caught.value.status) == (1, status)
    assert caught.value.is_final == (status in (401, 403, 404, 429))


def test_a_long_wait_is_left_to_the_user(stub):
    stub.behaviour = stubs.rate_limited(5000)
    with pytest.raises(ServerError, match="asks to wait 5000 seconds"):
        connect(stub).chat(MESSAGES)
    assert stub.num_calls == 1


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(
        ServerError,
        match=r"http://127.0.0.1:9/v1 gives no answer, 2 times in [\d.]+ s \(`timeout_s` is 120\): .+ Check that the server is running",
    ):
        Endpoint("m", base_url="http://127.0.0.1:9/v1", max_attempts=2).chat(MESSAGES)


def test_errors_repeat_a_short_part_of_the_servers_words_and_never_the_key(stub):
    stub.behaviour = stubs.failing(401, f"Bad key {KEY}. " + "x" * 5000)
    with pytest.raises(ServerError) as caught:
        connect(stub).chat(MESSAGES)
    assert KEY not in str(caught.value) and "Bad key ***" in str(caught.value) and len(str(caught.value)) < 500
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


# Address and key


def test_the_key_comes_from_the_named_variable_alone(stub, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "other")
    connect(stub, api_key_env="OTHER_KEY").chat(MESSAGES)
    connect(stub, api_key_env="NO_KEY").chat(MESSAGES)  # loopback needs none
    assert [request.headers["authorization"] for request in stub.requests] == ["Bearer other", "Bearer none"]
    with pytest.raises(ValueError, match="NO_KEY"):
        Endpoint("m", base_url="https://example.com/v1", api_key_env="NO_KEY")
    assert KEY not in repr(connect(stub))


@pytest.mark.parametrize(
    "address", ["example.com/v1", "ftp://example.com", "http://", "http://a:99999/v1", f"https://user:{KEY}@example.com/v1",
                f"https://example.com/v1?key={KEY}"],
)  # fmt: skip
def test_an_address_is_bare(address):
    with pytest.raises(ValueError, match="base_url") as caught:
        Endpoint("m", base_url=address)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"max_attempts": 0}, {"timeout_s": 0}])
def test_numbers_out_of_range_are_refused(stub, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        connect(stub, **settings)


def test_without_openai_the_extra_is_named():
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from trl_spatial.endpoints import Endpoint\n"
        "try: Endpoint('m', base_url='http://127.0.0.1:1/v1')\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 'pip install "trl-spatial[judge]"' in run.stdout


@pytest.mark.parametrize(
    ("served", "is_warned"),
    [
        ("test-model", False), ("Test-Model-2026-01-31", False), ("some-org/test-model", False), ("test-model@001", False),
        ("test-model-mini", True), ("other", True),
    ],
)  # fmt: skip
def test_another_model_is_recorded_and_warned_of_once(stub, caplog, served, is_warned):
    choice = {"message": {"content": SECRET_ANSWER}}
    stub.chat = lambda request: Response({"model": served, "choices": [choice]})
    endpoint = connect(stub)
    assert [endpoint.chat(MESSAGES).served_model for _ in range(3)] == [served] * 3
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == is_warned
    assert all(served in record.message and "test-model" in record.message for record in warnings)


# Spending


def test_the_budget_stops_before_a_call(stub):
    spend = Spend(0.05)
    prices = Prices(per_image=0.02)
    first, second = connect(stub, prices=prices, spend=spend), connect(stub, spend=spend)
    for endpoint in (first, first, first):
        endpoint.draw(PROMPT)
    assert spend.spent == pytest.approx(0.06)
    for call in (lambda: first.draw(PROMPT), lambda: second.chat(MESSAGES)):
        with pytest.raises(BudgetReached, match=r"\$0.06 of \$0.05"):
            call()
    assert stub.num_calls == 3


def test_what_was_spent_before_counts(stub):
    with pytest.raises(BudgetReached):
        connect(stub, spend=Spend(1.0, spent=1.0)).chat(MESSAGES)
    assert stub.num_calls == 0


def test_spending_counts_every_call_of_many_threads():
    spend = Spend(1e9)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [spend.add(1.0) for _ in range(2000)], range(8)))
    assert spend.spent == 16000.0


@pytest.mark.parametrize("make", [lambda: Prices(-1.0), lambda: Prices(per_image=float("nan")), lambda: Spend(-1.0)])
def test_amounts_are_no_less_than_nothing(make):
    with pytest.raises(ValueError, match="US dollars"):
        make()


# The cache


def test_a_cached_answer_makes_no_call_and_costs_nothing(stub, tmp_path):
    spend = Spend(1.0)
    settings = {"cache": tmp_path / "folder" / "answers.sqlite", "prices": Prices(0.0, 1000.0), "spend": spend}
    first = connect(stub, **settings).chat(MESSAGES)
    spent = spend.spent
    again = connect(stub, **settings).chat(MESSAGES)
    assert (stub.num_calls, spend.spent) == (1, spent)
    assert (again.text, again.served_model, again.output_tokens) == (
        first.text,
        first.served_model,
        first.output_tokens,
    )
    assert (first.is_cached, again.is_cached, again.cost) == (False, True, 0.0) and first.cost > 0


def test_bad_answers_are_cached_too(stub, tmp_path):
    stub.chat = lambda request: "no JSON"
    for _ in range(2):
        with pytest.raises(BadAnswer):
            connect(stub, cache=tmp_path / "answers.sqlite").chat(MESSAGES, schema=SCHEMA)
    assert stub.num_calls == 2


def picture_message(color):
    file = BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    url = f"data:image/png;base64,{__import__('base64').b64encode(file.getvalue()).decode()}"
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def test_only_equal_questions_share_an_answer(stub, tmp_path):
    cache = tmp_path / "answers.sqlite"
    schema = {"title": "count", "type": "object"}
    stub.chat = lambda request: json.dumps({"number": request.number})
    calls = [
        lambda endpoint: endpoint.chat(MESSAGES),
        lambda endpoint: endpoint.chat([*MESSAGES, *MESSAGES]),
        lambda endpoint: endpoint.chat(picture_message("red")),
        lambda endpoint: endpoint.chat(picture_message("blue")),
        lambda endpoint: endpoint.chat(MESSAGES, vote=1),
        lambda endpoint: endpoint.chat(MESSAGES, seed=1),
        lambda endpoint: endpoint.chat(MESSAGES, temperature=0.0),
        lambda endpoint: endpoint.chat(MESSAGES, max_tokens=5),
        lambda endpoint: endpoint.chat(MESSAGES, schema=schema),
    ]
    with OpenAIStub(chat=stub.chat) as other:
        endpoints = [
            connect(stub, cache=cache),
            Endpoint("model-2", base_url=stub.url, cache=cache),
            connect(other, cache=cache),
            connect(stub, cache=cache, extra_body={"top_k": 1}),
        ]
        first = [call(endpoint).text for endpoint in endpoints for call in calls]
        num_calls = stub.num_calls + other.num_calls
        assert num_calls == len(endpoints) * len(calls)
        assert [call(endpoint).text for endpoint in endpoints for call in calls] == first
        assert stub.num_calls + other.num_calls == num_calls


CHILD = """
import sys
from pathlib import Path
from trl_spatial.endpoints import Endpoint

endpoint = Endpoint("test-model", base_url=sys.argv[1], cache=Path(sys.argv[2]))
def ask(i):
    return endpoint.chat([{"role": "user", "content": f"question {i}"}])
for index, answer in endpoint.map(ask, range(10_000)):
    print(index, flush=True)
"""


def test_after_kill_9_no_question_that_was_answered_is_asked_again(stub, tmp_path):
    cache, threads = tmp_path / "answers.sqlite", set(threading.enumerate())
    stub.chat = lambda request: "An answer."
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, stub.url, str(cache)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    answered = [int(process.stdout.readline()) for _ in range(60)]
    process.send_signal(signal.SIGKILL)
    answered += [int(line) for line in process.stdout.read().split()]
    process.wait()
    wait_until(lambda: not set(threading.enumerate()) - threads)  # the stub is busy with what was under way
    num_calls = stub.num_calls
    endpoint = connect(stub, cache=cache)
    assert num_calls < 10_000
    for index in answered:
        assert endpoint.chat([{"role": "user", "content": f"question {index}"}]).is_cached
    assert stub.num_calls == num_calls


def write_many(path, name):
    cache = AnswerCache(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: cache.put(f"{name}-{i}", {"text": f"{name} {i}"}), range(60)))
        list(pool.map(lambda i: cache.put(f"common-{i}", {"text": "common"}), range(60)))


def test_threads_and_processes_share_a_cache(tmp_path):
    path = tmp_path / "answers.sqlite"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(path, name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    write_many(path, "c")
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = AnswerCache(path)
    for name in ("a", "b", "c"):
        assert all(cache.get(f"{name}-{i}") == {"text": f"{name} {i}"} for i in range(60))
    assert all(cache.get(f"common-{i}") == {"text": "common"} for i in range(60))
    assert cache.get("else") is None


def test_a_file_that_is_no_cache_is_named(stub, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("These are notes, and there are more than a few of them. " * 20)
    with pytest.raises(OSError, match=r"notes\.txt cannot be used"):
        connect(stub, cache=path)
    assert path.read_text().startswith("These are notes")


def test_the_cache_holds_no_prompt_and_no_key(stub, tmp_path):
    connect(stub, cache=tmp_path / "answers.sqlite").chat(MESSAGES)
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert SECRET_ANSWER.encode() in content
    assert PROMPT.encode() not in content and KEY.encode() not in content


# Pictures


@pytest.mark.parametrize("extra_body", [{}, {"response_format": "url"}])
def test_a_picture_comes_as_bytes_or_from_an_address(stub, extra_body):
    endpoint = connect(stub, prices=Prices(per_image=0.03), extra_body={"watermark": False})
    drawing = endpoint.draw(PROMPT, size="64x64", seed=3, extra_body=extra_body)
    assert drawing.image_bytes == stubs.draw_picture(PROMPT, 3)
    assert (drawing.refusal, drawing.served_model, drawing.cost) == (None, "test-model", 0.03)
    assert (drawing.seed, drawing.is_flagged) == (3, False)
    assert stub.requests[0].body == {
        "model": "test-model", "prompt": PROMPT, "size": "64x64", "n": 1, "seed": 3, "watermark": False,
    } | extra_body  # fmt: skip


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (stubs.refusing, "safety system"),
        (stubs.failing(403, "Blocked", "moderation_blocked"), "Blocked"),
        (stubs.failing(400, "The input is bad", "InputTextSensitiveContentDetected"), "input is bad"),
        (lambda request, usual: Response({"data": []}), "sent no image"),
        (lambda request, usual: Response({"data": [{"error": {"message": "Not this."}}]}), "Not this."),
    ],
)
def test_a_refusal_is_an_answer(stub, behaviour, said):
    stub.behaviour = behaviour
    spend = Spend(1.0)
    drawing = connect(stub, prices=Prices(per_image=0.03), spend=spend).draw(PROMPT)
    assert drawing.image_bytes is None and said in drawing.refusal
    assert (stub.num_calls, drawing.cost, spend.spent) == (1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("fields", "is_flagged"),
    [
        ({"has_nsfw_concepts": [True]}, True), ({"has_nsfw_concepts": [False]}, False),
        ({"content_filter_results": {"sexual": {"filtered": True}}}, True), ({"content_filter_results": {"hate": {}}}, False),
    ],
)  # fmt: skip
def test_flags_are_recorded(stub, fields, is_flagged):
    def flag(request, usual):
        response = usual(request)
        response.content |= fields
        return response

    stub.behaviour = flag
    assert connect(stub).draw(PROMPT).is_flagged == is_flagged


def test_a_server_without_seeds_draws_without(stub, caplog):
    stub.behaviour = lambda request, usual: (
        stubs.error(400, "Unknown parameter: 'seed'.", parameter="seed") if "seed" in request.body else usual(request)
    )
    endpoint = connect(stub)
    drawings = [endpoint.draw(PROMPT, seed=seed) for seed in (1, 2)]
    assert [drawing.seed for drawing in drawings] == [None, None]
    assert stub.num_calls == 3 and sum("`seed`" in record.message for record in caplog.records) == 1


def picture_at(url):
    return lambda request, usual: Response({"data": [{"url": url}]})


def test_a_picture_is_fetched_from_nowhere_else(stub):
    with OpenAIStub() as other:
        other.files["/a.png"] = stubs.draw_picture("a", 0)
        for url in (
            f"{other.host}/a.png",
            "file:///etc/hostname",
            "http://169.254.169.254/latest",
            "ftp://127.0.0.1/a.png",
        ):
            stub.next.append(picture_at(url))
            with pytest.raises(ServerError, match="neither over https nor at the server itself"):
                connect(stub).draw(PROMPT)


def test_what_is_no_picture_is_an_error(stub, monkeypatch):
    rows = (
        {"b64_json": "aGVsbG8="},
        {"b64_json": "%%%"},
        {"url": f"{stub.host}/hello"},
        {"url": f"{stub.host}/missing"},
    )
    stub.files["/hello"] = b"hello"
    for row, said in zip(rows, ("5 bytes", "Base64", "5 bytes", "404"), strict=True):
        stub.next.append(lambda request, usual, row=row: Response({"data": [row]}))
        with pytest.raises(ServerError, match=f"cannot be fetched.*{said}"):
            connect(stub).draw(PROMPT)
    monkeypatch.setattr("trl_spatial.endpoints.pictures._LARGEST_FILE", 100)
    stub.files["/large"] = stubs.draw_picture("a", 0)
    with pytest.raises(Failure, match="MiB"):
        download(f"{stub.host}/large", stub.url, 5.0)


# Many at a time


def test_map_gives_results_and_errors_as_they_end(stub):
    endpoint = connect(stub, concurrency=4)
    running, most, lock = set(), [0], threading.Lock()
    are_four, is_other_done = threading.Event(), threading.Event()

    def work(item):
        with lock:
            running.add(item)
            most[0] = max(most[0], len(running))
            if len(running) == 4:
                are_four.set()
        assert are_four.wait(60) and (item or is_other_done.wait(60))
        with lock:
            running.discard(item)
        if item % 3 == 1:
            raise KeyError(item)
        return item * item

    results = []
    for result in endpoint.map(work, range(30)):
        results.append(result)
        is_other_done.set()
    assert results[0][0] != 0  # the slow one does not hold the others up
    assert sorted(index for index, _ in results) == list(range(30))
    for index, result in results:
        assert isinstance(result, KeyError) if index % 3 == 1 else result == index * index
    assert most[0] == 4


def test_map_reads_items_as_they_are_needed(stub):
    taken = []
    results = connect(stub, concurrency=2).map(lambda item: item, (taken.append(i) or i for i in range(1000)))
    next(results)
    assert len(taken) <= 8
    results.close()


def test_the_budget_ends_a_map_and_loses_nothing(stub):
    stub.behaviour = stubs.slow(0.02)
    spend = Spend(0.10)
    endpoint = connect(stub, concurrency=4, prices=Prices(per_image=0.01), spend=spend)
    results = []
    with pytest.raises(BudgetReached):
        for result in endpoint.map(lambda i: endpoint.draw(PROMPT, seed=i), range(100)):
            results.append(result)
    assert 10 <= len(results) == stub.num_calls <= 13
    assert all(drawing.image_bytes == stubs.draw_picture(PROMPT, index) for index, drawing in results)
    assert spend.spent == pytest.approx(0.01 * stub.num_calls)


def test_a_refused_key_ends_a_map(stub):
    stub.behaviour = stubs.failing(401)
    endpoint = connect(stub, concurrency=2)
    with pytest.raises(ServerError):
        list(endpoint.map(lambda i: endpoint.chat(MESSAGES), range(100)))
    assert stub.num_calls <= 4


@pytest.fixture
def ctrl_c():
    """A function that presses it. A shell that starts the tests in the background has them ignore it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, usual) is signal.default_int_handler


def test_ctrl_c_ends_a_map_and_loses_nothing(stub, ctrl_c):
    # half of the calls hang in a long pause, which Ctrl-C ends
    stub.behaviour = lambda asked, usual: (
        stubs.rate_limited(500)(asked, usual) if "pause" in asked.text else stubs.slow(0.3)(asked, usual)
    )
    endpoint, pausing = connect(stub, concurrency=4), connect(stub)
    pausing._stopping = endpoint._stopping  # its pauses are not those of the others

    def ask(i):
        text = "pause" if i == 1 else "go"
        return (pausing if i == 1 else endpoint).chat([{"role": "user", "content": text}]).text

    def interrupt():
        wait_until(lambda: stub.num_calls >= 12)
        ctrl_c()

    threading.Thread(target=interrupt).start()
    start, results = time.monotonic(), {}
    with pytest.raises(KeyboardInterrupt):
        for index, result in endpoint.map(ask, range(1000)):
            results[index] = result
    assert time.monotonic() - start < 500
    num_answered = sum("pause" not in asked.text for asked in stub.requests)
    assert len(results) == num_answered >= 6 and set(results.values()) == {SECRET_ANSWER}
    assert endpoint.chat(MESSAGES).text == SECRET_ANSWER  # and the endpoint works as before


def test_nor_does_it_while_a_result_is_kept(stub, ctrl_c):
    endpoint, results = connect(stub, concurrency=4), {}
    with pytest.raises(KeyboardInterrupt):
        for index, result in endpoint.map(lambda i: endpoint.chat(MESSAGES).text, range(1000)):
            if len(results) == 5:
                ctrl_c()
            results[index] = result
    assert 6 <= len(results) == stub.num_calls < 20
    results = endpoint.map(lambda i: endpoint.chat(MESSAGES).text, range(3))
    next(results)
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):  # the second one, wherever it comes
        ctrl_c()
    results.close()


def test_a_map_that_ends_stops_no_other(stub):
    endpoint = connect(stub)
    stub.next.append(stubs.rate_limited(1.0))
    first = endpoint.map(lambda i: endpoint.chat(MESSAGES).text, range(2))
    assert next(first)[1] == SECRET_ANSWER
    assert dict(endpoint.map(str, range(3))) == {0: "0", 1: "1", 2: "2"}
    assert next(first)[1] == SECRET_ANSWER


# The stub


def test_the_stub_serves_as_a_process():
    process = subprocess.Popen(
        [sys.executable, "tests/openai_stub.py", "--behaviour", "faulty"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        endpoint = Endpoint("m", base_url=process.stdout.readline().strip())
        assert [endpoint.draw(PROMPT, seed=seed).image_bytes for seed in range(8)] == [
            stubs.draw_picture(PROMPT, seed) for seed in range(8)
        ]
    finally:
        process.kill()
        process.wait()
