"""The server against clients that keep it waiting, over real sockets: a good client does not notice them."""

import asyncio
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import requests
from starlette.requests import Request

from recipes.bench import server as bench
from tests.serving.conftest import ask, encode, serve
from tests.serving.test_app import wait_until
from trl_spatial.serving import intake, server
from trl_spatial.serving.limits import Limits


HALF_HEAD = b"POST /score HTTP/1.1\r\nHost: a\r\n"


def head(length):
    return HALF_HEAD + f"Content-Length: {length}\r\n\r\n".encode()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The server waits for clients of a slow machine as long as it takes, unless a test says otherwise."""
    monkeypatch.setattr(server, "HEAD_TIMEOUT", 1000.0)
    monkeypatch.setattr(server, "_GRACE", 1000)
    monkeypatch.setattr(intake, "BODY_TIMEOUT", 1000.0)


@pytest.fixture
def connect():
    """Opens connections that send what they are given, and nothing more."""
    with ExitStack() as stack:

        def open_one(url, data=b""):
            host, port = url.removeprefix("http://").split(":")
            client = stack.enter_context(socket.create_connection((host, int(port)), timeout=120))
            client.sendall(data)
            return client

        yield open_one


def is_closed(client):
    """Whether the server has ended a connection without an answer."""
    client.settimeout(0.01)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def answer_of(client):
    client.settimeout(120)
    data = b""
    try:
        while chunk := client.recv(2**16):
            data += chunk
    except ConnectionError:
        pass
    return data


def test_half_open_connections_and_slow_bodies_shut_nobody_out(scorer, prompts, images, connect, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 60)
    with serve(scorer) as (url, running):
        slow = [connect(url, head(10**6) + b"{") for _ in range(10)]
        silent = [connect(url, (HALF_HEAD, b"", b"G")[number % 3]) for number in range(100)]
        for _ in range(3):
            assert ask(url, prompts[:1], [encode(images[0])]).status_code == 200
        wait_until(lambda: len(running.server_state.connections) <= 60)
        # those that have waited longest have made room, and those in the middle of a body have not
        wait_until(lambda: is_closed(silent[0]))
        assert not is_closed(silent[-1])
        assert not any(map(is_closed, slow))


def test_a_client_has_so_long_for_its_head(scorer, prompts, images, connect, monkeypatch, caplog):
    with serve(scorer) as (url, running):
        start = time.monotonic()
        silent, half = connect(url), connect(url, HALF_HEAD)
        after = connect(url, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" + HALF_HEAD)
        assert after.recv(12) == b"HTTP/1.1 200"
        wait_until(lambda: len(running.server_state.connections) == 3)
        monkeypatch.setattr(server, "HEAD_TIMEOUT", 0.5)
        assert answer_of(silent) == answer_of(half) == b""
        assert time.monotonic() - start > 0.5
        answer_of(after)
        wait_until(lambda: not running.server_state.connections)
        monkeypatch.setattr(server, "HEAD_TIMEOUT", 1000.0)
        assert ask(url, prompts[:1], [encode(images[0])]).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_a_client_has_so_long_for_its_body(scorer, prompts, images, connect, monkeypatch, caplog):
    monkeypatch.setattr(intake, "BODY_TIMEOUT", 0.5)
    with serve(scorer) as (url, running):
        start = time.monotonic()
        assert b"408" in answer_of(connect(url, head(10**6) + b"{"))
        assert time.monotonic() - start > 0.5
        wait_until(lambda: not running.server_state.connections)
        assert running.endpoint._intake.num_bytes == 0
        monkeypatch.setattr(intake, "BODY_TIMEOUT", 1000.0)
        assert ask(url, prompts[:1], [encode(images[0])]).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_bodies_are_bounded_together_and_the_slowest_makes_room(scorer, prompts, images, connect):
    limits = Limits(max_bytes=400_000, max_held_bytes=1_000_000)
    with serve(scorer, limits=limits) as (url, running):
        held, body_intake = [], running.endpoint._intake
        for number in range(3):
            held.append(connect(url, head(390_000) + b"x" * 250_000))
            wait_until(lambda number=number: body_intake.num_bytes == 250_000 * (number + 1))
            for hold in body_intake._arriving:
                hold.start -= 1000  # on a slow machine, the body of the good client may take its time as well
        answer = ask(url, prompts[:1], [encode(images[0]) + " " * 330_000])
        assert answer.status_code == 200, answer.text
        assert b"503" in answer_of(held[0])
        assert body_intake.num_bytes <= 750_000
        # images that would never fit are refused for good
        large = {"prompts": ["a"], "images": [encode(images[0].resize((600, 600)), "JPEG")]}
        assert requests.post(f"{url}/score", json=large, timeout=120).status_code == 413


def test_a_body_makes_room_in_the_moment_in_which_its_time_is_up():
    async def arrive(bodies, parts):
        request = Request({"type": "http", "headers": []}, parts.get)
        with bodies.hold() as hold, pytest.raises(intake.Refusal) as refusal:
            await bodies.read_body(request, hold)
        return refusal.value.status

    async def add(bodies, hold):
        bodies.add(hold, 6)

    async def overflow():
        bodies, parts = intake.Intake(Limits(max_bytes=10, max_held_bytes=10)), asyncio.Queue()
        parts.put_nowait({"type": "http.request", "body": b"123456", "more_body": True})
        arriving = asyncio.create_task(arrive(bodies, parts))
        while not bodies.num_bytes:
            await asyncio.sleep(0)
        (first,) = bodies._arriving
        first.timeout.reschedule(0)  # in the next turn of the loop; its task hears of it in the one after
        with bodies.hold() as hold:
            await asyncio.create_task(add(bodies, hold))
            assert bodies.num_bytes == 6
            return await arriving

    assert asyncio.run(overflow()) == 503


def test_images_of_a_client_that_hung_up_are_not_scored(slow, prompts, images, connect, caplog):
    body = json.dumps({"prompts": prompts[:1] * 3, "images": [encode(images[0])] * 3}).encode()
    with serve(slow, max_batch_size=1) as (url, running), ThreadPoolExecutor(1) as executor:
        first = executor.submit(ask, url, prompts[:1], [encode(images[0])])
        assert slow.entered.wait(120)
        client = connect(url, head(len(body)) + body)
        wait_until(lambda: running.endpoint.batcher.num_waiting == 3)
        client.close()
        wait_until(lambda: running.endpoint.batcher.num_waiting == 0)
        slow.gate.set()
        assert first.result().status_code == 200
        assert ask(url, prompts[:1], [encode(images[0])]).status_code == 200
    assert slow.sizes == [1, 1]
    assert not [record for record in caplog.records if record.exc_info]


def test_broken_requests_leave_no_traceback_and_queries_no_trace(scorer, connect, caplog):
    caplog.set_level(logging.INFO)
    chunked = HALF_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    with serve(scorer, token="secret-of-the-server") as (url, running):
        for name in ("uvicorn", "uvicorn.access"):
            logging.getLogger(name).propagate = True
        for data in (
            b"\x16\x03\x01garbage\r\n\r\n",
            chunked + b"zz\r\n",
            chunked + b"5\r\n{",
            head(5) + b"12345\x00\x00",
        ):
            connect(url, data).close()
        connect(url, head(100) + b"{").close()
        address = f"{url}/health?token=secret-of-the-server"
        assert requests.get(address, timeout=120).status_code == 200
        assert b" 400 " in answer_of(connect(url, HALF_HEAD + b"a: " + b"b" * 40_000))
        wait_until(lambda: len(running.server_state.connections) <= 1)
    assert "GET /health HTTP" in caplog.text and "secret" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_it_ends_in_time_whatever_clients_do(slow, prompts, images, connect, monkeypatch, caplog):
    monkeypatch.setattr(server, "ANSWER_TIME", 0.5)
    with ThreadPoolExecutor(1) as executor:
        with serve(slow) as (url, running):
            asked = executor.submit(ask, url, prompts[:1], [encode(images[0])])
            assert slow.entered.wait(120)  # and is never done
            clients = [connect(url), connect(url, HALF_HEAD), connect(url, head(1000) + b"{")]
            wait_until(lambda: len(running.server_state.connections) == 4)
        # at its end `serve` waits for the thread of the server, with a limit
        assert asked.result().status_code == 503 and "shutting down" in asked.result().json()["error"]
        assert all(answer_of(client) == b"" for client in clients)
    assert not [record for record in caplog.records if record.exc_info]


def test_the_bench_measures_and_names_what_is_not_as_it_should_be(scorer):
    with serve(scorer) as (url, running):
        port = int(url.rpartition(":")[2])
        with bench.BadClients(port, num_half_open=20, num_slow=3) as bad:
            assert bench.ask(port) < float("inf")
            wait_until(lambda: len(running.server_state.connections) >= 23)
            assert bad.num_opened == 23 and running.endpoint._intake.num_bytes >= 3
        wait_until(lambda: not running.server_state.connections)
    assert bench.ask(port) == float("inf")  # nobody is there
    good = {
        "idle": {"p95_s": 0.1, "failed": 0},
        "attacked": {"p95_s": 0.2, "failed": 0},
        "load": {"failed": 0, "megabytes_before": 600.0, "megabytes_after": 610.0},
        "end_s": 3.0,
    }
    assert bench.shortcomings(good) == []
    bad_results = {
        "idle": good["idle"],
        "attacked": {"p95_s": 0.7, "failed": 0},
        "load": {"failed": 2, "megabytes_before": 600.0, "megabytes_after": 700.0},
        "end_s": 12.0,
    }
    assert len(bench.shortcomings(bad_results)) == 4
