"""A reward from a server: the scorer's own numbers, waiting, giving up without a number, and mistakes that show at once."""

import logging
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.diffusion_grpo.conftest import make_flux_pipeline, make_pipeline, make_trainer  # noqa: F401
from tests.serving.conftest import TOKEN, scorer, serve, slow, url  # noqa: F401
from trl_spatial.rewards import RemoteReward, load_reward, remote
from trl_spatial.scripts.grpo import make_parser
from trl_spatial.serving.limits import Limits


@pytest.fixture
def make_stub():
    """A function that starts a server that gives the answers of a list, the last one again and again."""
    servers = []

    def make(*answers, health=b'{"needs_token": false}', health_status=200):
        class Handler(BaseHTTPRequestHandler):
            asked = []

            def do_GET(self):
                self.answer(health_status, {"Location": "http://127.0.0.1:9/"}, health)

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.asked.append(time.monotonic())
                answer = answers[min(len(self.asked), len(answers)) - 1]
                if answer is None:  # the connection breaks
                    self.close_connection = True
                else:
                    self.answer(*answer)

            def answer(self, status, headers, body):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", Handler.asked

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


IMAGE = Image.new("RGB", (16, 16), "red")


def test_rewards_are_the_scorer_s(url, scorer, prompts, images):  # noqa: F811
    reward = RemoteReward(url, TOKEN, batch_size=2, num_connections=3)
    rewards = reward(prompts=prompts * 3, images=images * 3, scene=[None] * 15)
    np.testing.assert_allclose(rewards, scorer(prompts=prompts * 3, images=images * 3), atol=1e-6)
    assert all(type(value) is float for value in rewards) and reward.num_failed == 0
    assert reward([], []) == []


def test_large_images_are_sent_in_more_requests(scorer, monkeypatch):  # noqa: F811
    """A request that the server would refuse as a whole is divided; one image that is too large costs itself only."""
    rng = np.random.default_rng(0)
    sizes = (24, 48, 96, 24, 48)
    noise = [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for size in sizes]
    largest = 4 * (3 * 48 * 48 + 500) // 3
    monkeypatch.setattr(remote, "_LARGEST_REQUEST", largest)
    with serve(scorer, limits=Limits(max_bytes=largest + 1000)) as (address, _):
        rewards = RemoteReward(address, batch_size=8)(["a red cup"] * 5, noise)
    assert rewards[2] is None
    kept = [0, 1, 3, 4]
    expected = scorer(["a red cup"] * 4, [noise[row] for row in kept])
    np.testing.assert_allclose([rewards[row] for row in kept], expected, atol=1e-6)
    with serve(scorer, limits=Limits(max_images=3)) as (address, _):
        assert None not in RemoteReward(address, batch_size=8)(["a red cup"] * 5, noise)


def test_modes_and_orientation_are_scored_as_here(url, scorer):  # noqa: F811
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8))
    turned = noise.copy()
    turned.getexif()[0x0112] = 6
    glass, deep = noise.convert("RGBA"), Image.fromarray(np.arange(40 * 24, dtype=np.uint16).reshape(40, 24) * 64)
    glass.putalpha(100)
    file = BytesIO()
    glass.save(file, "PNG")
    images = [turned, noise.convert("CMYK"), glass, noise.convert("L"), noise.convert("P"), deep]
    images += [file.getvalue(), {"bytes": file.getvalue(), "path": None}]
    rewards = RemoteReward(url, TOKEN)(["a blue cube"] * 8, images)
    np.testing.assert_allclose(rewards, scorer(prompts=["a blue cube"] * 8, images=images), atol=1e-6)


def test_named_on_the_command_line(url, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TRL_SPATIAL_SERVER_TOKEN", TOKEN)
    reward = load_reward(f"{url}/")
    assert isinstance(reward, RemoteReward) and reward.url == url and reward.__name__ == "remote_score"
    args, *_ = make_parser().parse_args_and_config(
        ["--dataset", "p.txt", "--rewards", url, "--reward_device", "cuda:1", "--output_dir", "out", "--use_cpu"]
    )
    assert (args.rewards, args.reward_device) == ([url], "cuda:1")


def test_what_the_server_refuses_is_none_in_its_words(scorer, prompts, images, caplog):  # noqa: F811
    limits = Limits(max_pixels=5000, max_prompt_length=100)
    with serve(scorer, limits=limits) as (url, _):  # noqa: F811
        reward = RemoteReward(url)
        first, large, last = reward(prompts[:3], [images[0], Image.new("RGB", (100, 100)), images[2]])
        assert large is None and reward.num_failed == 1 and None not in (first, last)
        assert f"{url} gave no reward to 1 of 3 images (1 so far): images[1] has more than 5000 pixels" in caplog.text
        assert reward(["a" * 101], [IMAGE]) == [None]
        assert "prompts[0] has 101 characters" in caplog.text


def test_an_image_that_nobody_can_read_is_an_error_as_here(url, scorer, prompts, images):  # noqa: F811
    images = [images[0], images[1], Image.new("RGB", (1000, 2))]
    messages = []
    for reward in (scorer, RemoteReward(url, TOKEN, batch_size=2)):
        with pytest.raises(ValueError, match=r"^images\[2\] is too narrow") as error:
            reward(prompts[:3], images)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_it_waits_while_the_queue_is_full(slow, prompts, images, monkeypatch):  # noqa: F811
    with serve(slow, max_queue=1, limits=Limits(max_images=1)) as (url, server):  # noqa: F811
        busy = server.endpoint._busy
        # nothing is scored until the server has sent somebody away
        monkeypatch.setattr(server.endpoint, "_busy", lambda: slow.gate.set() or busy())
        reward = RemoteReward(url, batch_size=1, num_connections=4, max_retries=100)
        rewards = reward(prompts, images)
        assert slow.gate.is_set()
    assert None not in rewards and reward.num_failed == 0
    np.testing.assert_allclose(rewards, slow.scorer(prompts=prompts, images=images), atol=1e-6)


@pytest.mark.parametrize(
    "first", [(503, {"Retry-After": "1"}, b"{}"), (502, {}, b""), (429, {}, b""), (408, {}, b""), None]
)
def test_it_asks_again(make_stub, first):
    url, asked = make_stub(first, (200, {}, b'{"mean": [0.5]}'))  # noqa: F811
    assert RemoteReward(url)(["a"], [IMAGE]) == [0.5]
    assert len(asked) == 2
    if first is not None and "Retry-After" in first[1]:
        assert asked[1] - asked[0] >= 1


@pytest.mark.parametrize(
    ("answer", "words", "num_asked"),
    [
        ((503, {}, b'{"error": "busy"}'), "answers 503, busy", 3),
        (None, "Remote end closed connection", 3),
        ((500, {}, b"oops"), "answers 500", 1),
        ((307, {"Location": "http://127.0.0.1:9/"}, b""), "answers 307", 1),
        ((200, {}, b"oops"), "JSONDecodeError", 1),
        ((200, {}, b'{"mean": [1, 2]}'), "as many numbers as images", 1),
        ((200, {}, b'{"mean": [NaN]}'), "as many numbers as images", 1),
        ((200, {}, b'{"mean": ["0"]}'), "as many numbers as images", 1),
        ((200, {}, b"[0]"), "as many numbers as images", 1),
    ],
    ids=str,
)
def test_it_gives_up_without_a_number(make_stub, caplog, answer, words, num_asked):
    url, asked = make_stub(answer)  # noqa: F811
    reward = RemoteReward(url, max_retries=2)
    assert reward(["a"], [IMAGE]) == [None]
    assert reward.num_failed == 1 and len(asked) == num_asked
    (warning,) = [record.message for record in caplog.records if record.name == "trl_spatial.rewards.remote"]
    assert warning.startswith(f"{url} gave no reward to 1 of 1 images") and words in warning


def test_no_answer_in_time(slow, caplog):  # noqa: F811
    with serve(slow) as (url, _):  # noqa: F811
        reward = RemoteReward(url, max_retries=0)
        reward.timeout = 0.2
        assert reward(["a red cube"], [IMAGE]) == [None]
        slow.gate.set()
    assert re.search(r"timed out.*, after \d+\.\d s\. .*`max_retries`.* s each \(`timeout`\)", caplog.text)


def test_training_goes_on_when_the_server_is_gone(scorer, make_trainer, caplog):  # noqa: F811
    caplog.set_level(logging.WARNING)
    with serve(scorer) as (url, server):  # noqa: F811
        reward = RemoteReward(url, max_retries=1)

        class Both:
            """The first rollout gets rewards, and then the server ends."""

            __name__ = "remote"
            calls = 0

            def __call__(self, prompts, images, **columns):
                self.calls += 1
                if self.calls == 2:
                    server.should_exit = True
                    while server.servers[0].is_serving():
                        time.sleep(0.01)
                return reward(prompts, images)

        trainer = make_trainer(Both(), overlap_rewards=True, max_steps=3)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["rewards/remote/frac_none"] for log in logs] == [0, 1, 1]
    assert "rewards/remote/mean" in logs[0] and "rewards/remote/mean" not in logs[1]
    assert reward.num_failed == 16
    assert f"{url} gave no reward to 8 of 8 images (16 so far)" in caplog.text
    assert "`remote` gave no reward to 8 of the 8 images" in caplog.text


def test_mistakes_show_before_training(url, make_stub):  # noqa: F811
    for token, words in ((None, "needs a token"), ("wrong", "does not know the token")):
        with pytest.raises(ConnectionError, match=words) as error:
            RemoteReward(url, token)
        assert "TRL_SPATIAL_SERVER_TOKEN" in str(error.value)
    with pytest.raises(ConnectionError, match=r"127.0.0.1:9 cannot be reached .*Start it"):
        RemoteReward("http://127.0.0.1:9", max_retries=0)
    for health, status in ((b"<html>", 200), (b"[]", 200), (b"{}", 200), (b"", 404), (b"", 301)):
        other, _ = make_stub(health=health, health_status=status)
        with pytest.raises(ConnectionError, match=f"is not a reward server: its page /health answers {status}"):
            RemoteReward(other)


@pytest.mark.parametrize("address", ["http://", "http://host:port", "ftp://host", "host:8000", "http://host/?a=1"])
def test_what_is_no_address(address):
    with pytest.raises(ValueError, match="not the address of a server"):
        RemoteReward(address)


def test_numbers_and_passwords_are_checked():
    with pytest.raises(ValueError, match="no user and no password") as error:
        RemoteReward("http://me:secret@host")
    assert "secret" not in str(error.value)
    for name, value in {"timeout": 0, "max_retries": -1, "batch_size": 0, "num_connections": 0}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {value}"):
            RemoteReward("http://host", **{name: value})
