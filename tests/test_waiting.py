"""A server that hangs is named while it is waited for, once for all requests and ever more rarely; one that answers is not."""

import logging
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from PIL import Image

from tests.openai_stub import OpenAIStub
from tests.serving.conftest import scorer, serve, slow  # noqa: F401
from trl_spatial import waiting
from trl_spatial.cli import run_command
from trl_spatial.endpoints import Endpoint
from trl_spatial.rewards import RemoteReward


PATIENCE = 120  # seconds, for what must come
MESSAGES = [{"role": "user", "content": "Is it red?"}]


class Notices(logging.Handler):
    """Collects notices; `reached` is set when there are as many as `number`."""

    def __init__(self, number):
        super().__init__()
        self.number, self.texts, self.reached = number, [], threading.Event()

    def emit(self, record):
        self.texts.append(record.getMessage())
        if len(self.texts) == self.number:
            self.reached.set()


@pytest.fixture
def watch(monkeypatch):
    """A function that begins to collect notices, which come after 10 ms at first."""
    monkeypatch.setattr(waiting, "FIRST_NOTICE", 0.01)
    handlers = []

    def begin(number):
        handlers.append(Notices(number))
        waiting.logger.addHandler(handlers[-1])
        return handlers[-1]

    yield begin
    for handler in handlers:
        waiting.logger.removeHandler(handler)


def test_notices_are_for_all_requests_and_come_at_doubling_times(watch):
    notices, server = watch(3), waiting.WaitNotices("the server http://h", "It has 7 s.")
    held, start = threading.Event(), time.monotonic()

    def ask(_):
        with server.request():
            assert held.wait(PATIENCE)

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        assert notices.reached.wait(PATIENCE)
        with server._lock:
            due = server._due
        held.set()
        for answer in asked:
            answer.result()
    assert due >= 0.01 * 2**3 and len(notices.texts) <= math.log2((time.monotonic() - start) / 0.01) + 1
    assert all(
        re.fullmatch(r"Waiting for the server http://h, for \d+ s so far\. It has 7 s\.", t) for t in notices.texts
    )


def test_a_server_that_answers_is_not_waited_for(watch, monkeypatch):
    """Each answer starts the time anew, and nobody watches a server that is asked nothing."""
    notices, server = watch(1), waiting.WaitNotices("the server", "")
    now, delays = [0.0], []
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(waiting.WaitNotices, "_watch", lambda self, seconds: delays.append(seconds))
    monkeypatch.setattr(waiting, "FIRST_NOTICE", 5.0)
    with server.request():
        now[0] = 4.0
        with server.request():
            now[0] = 8.0
        now[0] = 12.9  # 4.9 seconds after the last answer
        server._look()
        assert notices.texts == [] and delays[-1] == pytest.approx(0.1)
        now[0] = 13.0
        server._look()
        assert notices.texts == ["Waiting for the server, for 5 s so far. "] and delays[-1] == pytest.approx(5.0)
    number = len(delays)
    server._look()
    assert len(delays) == number and not server._is_watched


def test_a_reward_server_that_hangs_is_named(slow, watch):  # noqa: F811
    notices = watch(2)
    with serve(slow) as (url, _):
        reward = RemoteReward(url)
        threading.Thread(target=lambda: notices.reached.wait(PATIENCE) and slow.gate.set(), daemon=True).start()
        assert None not in reward(["a red cube"] * 3, [Image.new("RGB", (16, 16))] * 3)
    assert all(f"the reward server {url}, for " in text for text in notices.texts)
    assert all("1 + 5 times (`max_retries`) for 120 s each (`timeout`)" in text for text in notices.texts)


def test_a_judge_that_hangs_is_named(watch):
    notices = watch(1)

    def hang(request, usual):
        assert notices.reached.wait(PATIENCE)
        return usual(request)

    with OpenAIStub(chat=lambda request: "yes") as stub:
        stub.behaviour = hang
        assert Endpoint("judge", base_url=stub.url).chat(MESSAGES).text == "yes"
        assert f"Waiting for judge at {stub.url}, for " in notices.texts[0]
    assert "6 times (`max_attempts`) for 120 s each (`timeout_s`)" in notices.texts[0]


def test_a_file_of_the_hub_s_cache_that_is_locked_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "FILELOCK_LOG_EVERY_SECONDS", 0.01)
    other = FileLock(tmp_path / "model.lock", thread_local=False)
    other.acquire()
    shown = Notices(1)
    library = logging.getLogger("huggingface_hub")
    library.addHandler(shown)
    threading.Thread(target=lambda: shown.reached.wait(PATIENCE) and other.release(), daemon=True).start()

    def load():
        with WeakFileLock(tmp_path / "model.lock", timeout=PATIENCE):
            pass

    try:
        assert run_command("trl_spatial score", load) == 0
    finally:
        library.removeHandler(shown)
    assert f"waiting to acquire lock on {tmp_path}/model.lock" in shown.texts[0]


def test_a_warning_does_not_break_the_progress_bar(capsys):
    """It is on a line of its own, and the bar is drawn again below it."""
    from tqdm import tqdm

    def work():
        with tqdm(total=2, desc="Rollouts") as bar:
            bar.update()
            logging.getLogger("trl_spatial.of_no_other_test").warning("Waiting for the server")

    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # those of pytest
    try:
        assert run_command("trl_spatial grpo", work) == 0
    finally:
        root.handlers = handlers
    shown = capsys.readouterr().err
    pieces = re.split(r"[\r\n]", shown)
    assert "Waiting for the server" in pieces and "Rollouts" in shown.partition("the server\n")[2]
