"""The endpoint over real HTTP, with a real tiny model: scores, limits, the token, and what is told."""

import logging
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from PIL import Image

from tests.ports import free_port
from tests.serving.conftest import TOKEN, ask, encode, serve
from tests.space.conftest import REPOSITORY, wait_for_answer
from trl_spatial import __version__
from trl_spatial.cli import main
from trl_spatial.serving.app import create_app
from trl_spatial.serving.limits import Limits


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_scores_are_those_of_the_scorer(url, scorer, prompts, images):
    expected = scorer.score(prompts, images)
    assert np.ptp(expected.mean) > 0.01  # else any order would pass
    answer = ask(url, prompts, [encode(image) for image in images]).json()
    np.testing.assert_allclose(answer["mean"], expected.mean, atol=1e-6)
    np.testing.assert_allclose(answer["std"], expected.std, atol=1e-6)
    assert answer["errors"] == [None] * 5
    webp = ask(url, prompts[:1], [encode(images[0], "WEBP", lossless=True)]).json()
    np.testing.assert_allclose(webp["mean"], expected.mean[:1], atol=1e-6)
    assert ask(url, [], []).json() == {"mean": [], "std": [], "errors": []}


def test_many_ask_at_once_and_get_their_own(url, scorer, prompts, images):
    expected = scorer.score(prompts, images).mean

    def score(number):
        rows = [number % 5, (number + 2) % 5]
        means = ask(url, [prompts[row] for row in rows], [encode(images[row]) for row in rows]).json()["mean"]
        np.testing.assert_allclose(means, expected[rows], atol=1e-6)

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(score, range(24)))


def test_requests_share_batches(slow, prompts, images):
    with serve(slow, max_batch_size=4) as (url, server), ThreadPoolExecutor(7) as executor:
        image = encode(images[0])
        answers = [executor.submit(ask, url, prompts[:1], [image])]
        assert slow.entered.wait(120)
        answers += [executor.submit(ask, url, prompts[:1], [image]) for _ in range(6)]
        wait_until(lambda: server.endpoint.batcher.num_waiting == 6)
        slow.gate.set()
        assert len({tuple(answer.result().json()["mean"]) for answer in answers}) <= 7
        assert slow.sizes == [1, 4, 2]
        health = requests.get(f"{url}/health", timeout=120).json()
    assert (health["requests"], health["images"], health["batches"]) == (7, 7, 3)


def test_a_full_queue_asks_to_come_back(slow, prompts, images):
    image = encode(images[0])
    with serve(slow, max_queue=2, limits=Limits(max_images=2)) as (url, server), ThreadPoolExecutor(2) as executor:
        first = executor.submit(ask, url, prompts[:1], [image])
        assert slow.entered.wait(120)
        second = executor.submit(ask, url, prompts[:2], [image] * 2)
        wait_until(lambda: server.endpoint.batcher.num_waiting == 2)
        refused = ask(url, prompts[:1], [image])
        assert refused.status_code == 503 and "2 images are already waiting" in refused.json()["error"]
        assert int(refused.headers["Retry-After"]) >= 1
        slow.gate.set()
        assert first.result().status_code == second.result().status_code == 200


def test_a_bad_row_costs_no_other_its_score(scorer, prompts, images):
    """Whatever is wrong with the others, the good row has the score that it has alone."""
    good = encode(images[0])
    expected = scorer.score(prompts[:1], images[:1]).mean[0]
    bad_rows = [
        (prompts[1], encode(images[1])[: len(encode(images[1])) // 8 * 4], "images[1] "),
        (prompts[1], "no base64!", "images[2] is not base64"),
        (prompts[1], encode(Image.new("RGB", (1000, 2))), "images[3] is too narrow"),
        (prompts[1], encode(Image.new("RGB", (64, 64))), "images[4] has more than 4000 pixels"),
        (prompts[1], encode(Image.new("1", (14_000, 14_000))), "images[5] "),
        (prompts[1], "A" * 54_000, "images[6] is larger than 40000 bytes"),
        (prompts[1], None, "images[7] is a NoneType"),
        ("x" * 101, good, "prompts[8] has 101 characters"),
        (None, good, "prompts[9] is missing"),
        (5, good, "prompts[10] is a int"),
        ("\ufeff \n", good, "prompts[11] is empty"),
        ("half a pair: \ud800", good, "prompts[12] contains half of a surrogate pair"),
    ]
    limits = Limits(max_image_bytes=40_000, max_pixels=4000, max_prompt_length=100)
    with serve(scorer, limits=limits) as (url, _):
        rows = [(prompts[0], good), *(row[:2] for row in bad_rows), ("x" * 100, good)]
        answer = ask(url, *map(list, zip(*rows, strict=True))).json()
        assert answer["mean"][0] == pytest.approx(expected, abs=1e-6)
        assert answer["mean"][-1] is not None and answer["errors"][0] is answer["errors"][-1] is None
        assert answer["mean"][1:-1] == answer["std"][1:-1] == [None] * len(bad_rows)
        for error, (_, _, words) in zip(answer["errors"][1:-1], bad_rows, strict=True):
            assert error.startswith(words)
        # base64 as browsers and `base64` write it
        lines = "\n".join(good[start : start + 76] for start in range(0, len(good), 76))
        for text in (f"data:image/png;base64,{good}", lines):
            assert ask(url, prompts[:1], [text]).json()["mean"] == pytest.approx([expected], abs=1e-6)


def test_what_is_no_request_is_refused(scorer, prompts, images):
    image = encode(images[0])
    with serve(scorer, limits=Limits(max_images=2, max_bytes=80_000)) as (url, _):
        for status, words, rows in (
            (413, "3 images: send at most 2", (prompts[:1] * 3, [image] * 3)),
            (413, "larger than 80000 bytes", (prompts[:1], ["A" * 80_000])),
            (422, "1 prompts and 2 images", (prompts[:1], [image] * 2)),
            (422, "two lists of strings", ("abc", [image])),
        ):
            answer = ask(url, *rows)
            assert answer.status_code == status, answer.text
            assert re.search(words, answer.json()["error"]), answer.text
        for body in (b"", b"{", b"[" * 20_000, b"[1]", b"{}", b"\xff"):
            assert requests.post(f"{url}/score", data=body, timeout=120).status_code == 422
        chunks = (b"x" * 25_000 for _ in range(4))  # of no declared length
        assert requests.post(f"{url}/score", data=chunks, timeout=120).status_code == 413


def test_settings_that_cannot_work_are_refused(scorer):
    with pytest.raises(ValueError, match="`max_images` is 64 and `max_queue` is 8"):
        create_app(scorer, model_name="tiny", max_queue=8)
    with pytest.raises(ValueError, match="`max_bytes` must be at least 1, got 0"):
        Limits(max_bytes=0)


def test_the_token(url, prompts, images, caplog):
    caplog.set_level(logging.DEBUG)
    rows = (prompts[:1], [encode(images[0])])
    for token in (None, "wrong", TOKEN[:-1], TOKEN + "x", "größe".encode().decode("latin-1")):
        answer = ask(url, *rows, token=token)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert "token" in answer.json()["error"]
    assert ask(url, *rows).status_code == 200
    for path in ("/health", "/"):
        assert requests.get(url + path, timeout=120).status_code == 200
        for token, status in (("wrong", 401), (TOKEN, 200)):
            headers = {"Authorization": f"Bearer {token}"}
            assert requests.get(url + path, headers=headers, timeout=120).status_code == status
    assert TOKEN not in caplog.text and "wrong" not in caplog.text


def test_health_and_page(url, prompts, images):
    before = requests.get(f"{url}/health", timeout=120).json()
    ask(url, prompts[:2], [encode(images[0]), "AAAA"])
    health = requests.get(f"{url}/health", timeout=120).json()
    assert health["status"] == "ok" and health["model"] == "tiny" and health["version"] == __version__
    assert health["needs_token"] is True and health["queue"] == 0
    assert (health["requests"] - before["requests"], health["images"] - before["images"]) == (1, 1)
    assert health["seconds_per_image"] > 0
    page = requests.get(url, timeout=120)
    assert page.headers["Content-Type"].startswith("text/html")
    assert "<h1>tiny</h1>" in page.text and "seconds per image" in page.text and "POST /score" in page.text
    assert "http://" not in page.text and "https://" not in page.text  # nothing is loaded from elsewhere
    for path in ("/docs", "/openapi.json", "/nothing"):
        assert requests.get(url + path, timeout=120).status_code == 404


# The command, whose model waits for a file, so that the signal comes before the scores, and which waits as long as it takes.
GATED = """
import sys, time
from pathlib import Path
from trl_spatial import SpatialScore, cli
from trl_spatial.serving import server

def score_behind_a_gate(self, *args, **kwargs):
    while not Path(sys.argv[1]).exists():
        time.sleep(0.01)
    return score_batches(self, *args, **kwargs)

score_batches, SpatialScore.score_batches = SpatialScore.score_batches, score_behind_a_gate
server.ANSWER_TIME = server._GRACE = server.HEAD_TIMEOUT = 600
raise SystemExit(cli.main(sys.argv[2:]))
"""


def test_the_command_serves_and_finishes_what_it_took(scorer, prompts, images, tmp_path):
    folder, port, log, gate = tmp_path / "tiny <reward>", free_port(), tmp_path / "log", tmp_path / "gate"
    scorer.save_pretrained(folder)
    (tmp_path / "token.txt").write_text(f"{TOKEN}\n")
    command = [sys.executable, "-c", GATED, gate, "serve", "--model", folder, "--port", port, "--dtype", "float32"]
    command += ["--token-file", tmp_path / "token.txt", "--max_batch_size", 1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for_answer(f"{url}/health", process, log)
        assert "<h1>tiny &lt;reward&gt;</h1>" in requests.get(url, timeout=120).text
        with ThreadPoolExecutor(1) as executor:
            asked = executor.submit(ask, url, prompts[:1] * 8, [encode(images[0])] * 8)
            wait_until(lambda: requests.get(f"{url}/health", timeout=120).json()["queue"] > 0)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not is_listening(port))
            gate.touch()
            process.wait(120)
    finally:
        process.kill()
        process.wait()
    expected = scorer.score(prompts[:1], images[:1]).mean[0]
    np.testing.assert_allclose(asked.result().json()["mean"], [expected] * 8, atol=1e-6)
    text = log.read_text()
    assert "POST /score" in text and TOKEN not in text and "Traceback" not in text


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_mistakes_of_the_command(tmp_path, capsys):
    (tmp_path / "empty").write_text("\n")
    assert main(["serve", "--model", "nowhere", "--token-file", str(tmp_path / "empty")]) == 1
    assert "should hold the token" in capsys.readouterr().err
    assert main(["serve", "--model", "nowhere", "--port", str(free_port())]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["serve", "--model", "nowhere", "--port", str(free_port()), "--max_images", "0"]) == 1
    assert "`max_images` must be at least 1" in capsys.readouterr().err
