"""Reviewing: who sees what, no vote is lost or counted twice, and the page works by keyboard and on a telephone."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from itertools import product
from shutil import which

import numpy as np
import psutil
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.ports import free_port
from trl_spatial.data.review import (
    ANSWERS,
    ReviewItem,
    VoteLog,
    create_review_app,
    decide,
    from_label_studio,
    preferred_side,
    summarize_votes,
    to_label_studio,
)


TOKENS = {"token-of-ada": "Ada", "token-of-ben": "Ben", "token-of-cyd": "Cyd"}
PROMPT = "A red box is left of a blue ball. The blue ball is near a green can."


def make_items(folder, number, num_gold=0):
    """Pairs with pictures of one color: the original ones are red, the edited ones blue."""
    folder.mkdir(exist_ok=True)
    for side, color in (("original", "red"), ("edited", "blue")):
        Image.new("RGB", (40, 40), color).save(folder / f"{side}.png")
    images = {side: folder / f"{side}.png" for side in ("original", "edited")}
    relations = ["red box is left of blue ball", "blue ball is near green can"]
    return [
        ReviewItem(f"{i:06d}:original", PROMPT, [(0, 32), (34, 67)], relations, images, "original" if i < num_gold else None)
        for i in range(number)
    ]  # fmt: skip


@pytest.fixture
def desk(tmp_path):
    """The app over 12 pairs of which 2 have a known answer, with its log, and a client of each reviewer."""
    votes = VoteLog(tmp_path / "votes.jsonl")
    app = create_review_app(make_items(tmp_path / "images", 12, num_gold=2), votes, reviewers=TOKENS, seed=3)
    clients = {}
    for token, name in TOKENS.items():
        clients[name] = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)
        answer = clients[name].get("/", params={"token": token})
        assert answer.status_code == 303 and answer.headers["location"] == "/"  # the token leaves the address
    return votes, clients


def vote(client, item, answer="left", number=0, **more):
    return client.post("/api/votes", json={"id": f"vote-{number:04d}-{item}", "item": item, "answer": answer} | more)


def open_ids(client):
    return [item["id"] for item in client.get("/api/next", params={"number": 8}).json()["items"]]


class TestDesk:
    def test_an_item_is_seen_by_two_reviewers_and_a_known_one_by_all(self, desk):
        _, clients = desk
        seen = Counter()
        for name, client in clients.items():
            while ids := open_ids(client):
                for item in ids:
                    assert vote(client, item, number=ord(name[0])).status_code == 200
                    seen[item] += 1
        assert [seen[f"{i:06d}:original"] for i in range(12)] == [3, 3] + [2] * 10
        assert all(client.get("/api/next").json()["progress"]["left"] == 0 for client in clients.values())

    def test_orders_and_sides_are_of_each_reviewer_and_stay(self, desk):
        _, clients = desk
        orders = {name: open_ids(client) for name, client in clients.items()}
        assert len({tuple(order) for order in orders.values()}) == 3
        assert orders == {name: open_ids(client) for name, client in clients.items()}
        sides = {(name, item): self.left(client, item) for name, client in clients.items() for item in orders["Ada"]}
        assert set(sides.values()) == {"original", "edited"}

    @staticmethod
    def left(client, item):
        image = Image.open(io.BytesIO(client.get("/image", params={"id": item, "side": "left"}).content))
        return "original" if image.getpixel((5, 5))[0] > 100 else "edited"

    def test_what_is_recorded_is_what_was_shown(self, desk):
        votes, clients = desk
        for item in open_ids(clients["Ada"]):
            ticks = {"0": {"left": True, "right": False}}
            vote(clients["Ada"], item, "left", ticks=ticks, milliseconds=1234)
            kept = votes.current()[item, "Ada"]
            assert preferred_side(kept) == kept["order"][0] == self.left(clients["Ada"], item)
            assert (kept["ticks"], kept["milliseconds"]) == (ticks, 1234)

    def test_nothing_tells_which_side_is_which(self, desk):
        _, clients = desk
        shown = clients["Ada"].get("/api/next").text
        assert "edited" not in shown.replace(":edited", "") and "gold" not in shown and "png" not in shown

    def test_a_vote_that_is_sent_twice_counts_once_and_one_can_be_taken_back(self, desk):
        votes, clients = desk
        item = open_ids(clients["Ada"])[0]
        assert vote(clients["Ada"], item).json() == vote(clients["Ada"], item).json()
        assert len(list(votes)) == 1 and item not in open_ids(clients["Ada"])
        assert vote(clients["Ada"], item, None, number=1).status_code == 200
        assert len(list(votes)) == 2 and votes.current() == {} and open_ids(clients["Ada"])[0] == item

    @pytest.mark.parametrize(
        "content",
        [
            b"{", b"[]", b"7", b"[" * 30000, b'{"id": "12345678"}', b'{"id": "12345678", "item": "nowhere", "answer": "left"}',
            b'{"id": "12345678", "item": "000003:original", "answer": "up"}',
            b'{"id": "1", "item": "000003:original", "answer": "left"}',
            b'{"id": "12345678", "item": "000003:original", "answer": "left", "milliseconds": -1}',
            b'{"id": "12345678", "item": "000003:original", "answer": "left", "milliseconds": true}',
            b'{"id": "12345678", "item": "000003:original", "answer": "left", "ticks": {"7": {"left": true}}}',
            b'{"id": "12345678", "item": "000003:original", "answer": "left", "ticks": {"0": {"left": 1}}}',
        ],
    )  # fmt: skip
    def test_what_is_no_vote_is_refused_in_words(self, desk, content):
        votes, clients = desk
        answer = clients["Ada"].post("/api/votes", content=content)
        assert answer.status_code == 422 and answer.json()["error"] and list(votes) == []

    def test_strangers_see_nothing(self, desk, tmp_path):
        _, clients = desk
        stranger = TestClient(clients["Ada"].app, base_url="http://127.0.0.1")
        for path in (
            "/",
            "/api/next",
            "/image?id=000003:original&side=left",
            "/?token=x",
        ):
            answer = stranger.get(path)
            assert answer.status_code == 401 and str(tmp_path) not in answer.text
        assert stranger.post("/api/votes", json={}).status_code == 401
        other_name = TestClient(clients["Ada"].app, base_url="http://rebound.example", cookies=clients["Ada"].cookies)
        assert other_name.get("/api/next").status_code == 400
        for path in (
            "/image?id=../../etc/passwd&side=left",
            "/image?id=000003:original&side=../x",
            "/docs",
            "/openapi.json",
        ):
            assert clients["Ada"].get(path).status_code == 404
        assert clients["Ada"].post("/api/votes", content=b" " * 70000).status_code == 413

    def test_of_two_reviewers_in_one_browser_neither_votes_for_the_other(self, desk):
        votes, clients = desk
        item, browser = open_ids(clients["Ada"])[0], clients["Ada"]
        browser.get("/", params={"token": "token-of-ben"})
        content = {"id": "vote-0001", "item": item, "answer": "left"}
        assert browser.post("/api/votes", json=content, headers={"X-Reviewer": "Ada"}).status_code == 409
        assert browser.get("/image", params={"id": item, "side": "left", "by": "Ada"}).status_code == 409
        assert list(votes) == []
        assert browser.post("/api/votes", json=content, headers={"X-Reviewer": "Ben"}).status_code == 200
        assert browser.get("/api/next?number=x").json()["error"]

    def test_the_page_loads_nothing_from_elsewhere(self, desk):
        _, clients = desk
        page = clients["Ada"].get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "http" not in page.text.replace("http-equiv", "")


def test_what_was_answered_is_kept_when_the_server_is_killed(tmp_path):
    """Each vote that the server has confirmed is there after kill -9, whatever was on its way."""
    port, rng = free_port(), random.Random(0)
    make_items(tmp_path / "images", 1)
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.data.test_review import TOKENS, make_items\n"
        "from trl_spatial.data.review import VoteLog, create_review_app, serve_review\nfolder = Path(sys.argv[1])\n"
        "app = create_review_app(make_items(folder / 'images', 400), VoteLog(folder / 'votes.jsonl'), reviewers=TOKENS)\n"
        "serve_review(app, port=int(sys.argv[2]))\n"
    )
    import httpx

    sent, confirmed = [], set()

    def send(client):
        with suppress(httpx.TransportError):  # of the vote that is on its way
            while True:
                sent.append(f"vote-{len(sent):06d}")
                vote = {"id": sent[-1], "item": f"{len(sent) % 400:06d}:original", "answer": "left"}
                assert client.post("/api/votes", json=vote).status_code == 200
                confirmed.add(vote["id"])

    for wanted in (20, 40):
        server = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(port)], env=os.environ)
        wait_for_server(server, port)
        with (
            httpx.Client(
                base_url=f"http://127.0.0.1:{port}", cookies={"review_token": "token-of-ada"}, timeout=120
            ) as client,
            ThreadPoolExecutor(1) as executor,
        ):
            sending = executor.submit(send, client)
            while len(confirmed) < wanted and not sending.done():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.01))
            server.send_signal(signal.SIGKILL)
            server.wait()
            sending.result()
        with (tmp_path / "votes.jsonl").open("ab") as file:
            file.write(b'{"id": "half a li')  # as a kill in the middle of writing leaves it
    kept = {record["id"] for record in VoteLog(tmp_path / "votes.jsonl")}
    assert len(confirmed) >= 40 and confirmed <= kept <= set(sent)


def wait_for_server(server, port):
    """Until it listens."""
    while True:
        assert server.poll() is None
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


class TestAgreement:
    @staticmethod
    def votes(*rows):
        """Votes of reviewers `0`, `1`, ... on items: a row per item, `None` for no vote."""
        order = ["original", "edited"]
        return [
            {"item": f"{i}", "reviewer": f"{j}", "answer": said, "order": order, "milliseconds": 1000 * (j + 1)}
            for i, row in enumerate(rows)
            for j, said in enumerate(row)
            if said is not None
        ]

    def test_alpha_is_krippendorffs(self):
        """The example with nominal data of two observers and ten units: Krippendorff, "Computing alpha", 2011, part B."""
        first, second = "abbcaccbbb", "abbcabcabb"  # 8 of 10 agree; from the coincidences by hand
        names = {"a": "left", "b": "right", "c": "neither"}
        votes = self.votes(*((names[a], names[b]) for a, b in zip(first, second, strict=True)))
        counts = Counter(first + second)
        observed = sum(a == b for a, b in zip(first, second, strict=True)) / 10
        expected = sum(n * (n - 1) for n in counts.values()) / (20 * 19)
        summary = summarize_votes(votes, [])
        assert summary["alpha"]["estimate"] == pytest.approx((observed - expected) / (1 - expected), abs=1e-9)
        assert summary["alpha"]["low"] < summary["alpha"]["estimate"] < summary["alpha"]["high"]
        assert summary["raw_agreement"] == pytest.approx(0.8)

    def test_sides_count_and_not_what_was_left_or_right(self):
        votes = self.votes(("left", "right")) + self.votes(("right", "left"))
        votes[1]["order"] = votes[3]["order"] = ["edited", "original"]
        assert [preferred_side(vote) for vote in votes] == ["original", "original", "edited", "edited"]
        assert decide(votes[:2]) == "original" and decide(votes[2:]) == "edited"

    @pytest.mark.parametrize("answers", list(product(ANSWERS[2:], ANSWERS[2:])))
    def test_two_votes_decide_if_they_agree(self, answers):
        votes = self.votes(answers)
        assert decide(votes) == (answers[0] if answers[0] == answers[1] else "disagree")
        assert decide(votes[:1]) is None and decide(votes[:1], needed=1) == answers[0]

    def test_known_answers_and_seconds_are_per_reviewer(self, tmp_path):
        items = [ReviewItem(f"{i}", "", [], [], {}, "original") for i in range(4)]
        summary = summarize_votes(
            self.votes(("left", "left"), ("left", "right"), ("left", "both"), ("left", None)), items
        )
        assert summary["reviewers"]["0"] == {"num_votes": 4, "median_seconds": 1, "gold_accuracy": 1}
        assert summary["reviewers"]["1"]["gold_accuracy"] == pytest.approx(1 / 3)
        assert summary["gold_accuracy"] == pytest.approx(5 / 7)


def test_label_studio_gives_back_what_it_got(tmp_path):
    items = make_items(tmp_path, 4)
    log = VoteLog(tmp_path / "votes.jsonl")
    for number, (item, answer) in enumerate(zip(items, ("left", "right", "both", "cannot_tell"), strict=True)):
        log.append({"id": f"vote-{number}", "item": item.id, "reviewer": "Ada", "answer": answer, "ticks": {},
                    "order": ["edited", "original"], "milliseconds": 1500})  # fmt: skip
    tasks = json.loads(json.dumps(to_label_studio(items, log.current().values())))
    for number, task in enumerate(tasks):
        task["id"] = number
    votes = from_label_studio(tasks)
    assert [preferred_side(vote) for vote in votes] == [preferred_side(vote) for vote in log]
    assert [(vote["item"], vote["reviewer"], vote["milliseconds"]) for vote in votes] == [
        (item.id, "Ada", 1500) for item in items
    ]
    tasks[2]["annotations"][0]["result"][0]["value"]["choices"] = ["maybe"]
    with pytest.raises(ValueError, match=r"Task 2 has the answer \['maybe'\]"):
        from_label_studio(tasks)
    with pytest.raises(ValueError, match="Task 9 has no `item`"):
        from_label_studio([{"id": 9, "data": {"text": "of another project"}}])


CHROMIUM = next(filter(None, map(which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page over 10,000 pairs."""
    if find_spec("playwright") is None or CHROMIUM is None:
        pytest.skip("needs `pip install playwright` and a Chromium, e.g. `apt install chromium`")
    folder = tmp_path_factory.mktemp("served")
    port = free_port()
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.data.test_review import TOKENS, make_items\n"
        "from trl_spatial.data.review import VoteLog, create_review_app, serve_review\nfolder = Path(sys.argv[1])\n"
        "app = create_review_app(make_items(folder / 'images', 10_000), VoteLog(folder / 'votes.jsonl'), reviewers=TOKENS)\n"
        "serve_review(app, port=int(sys.argv[2]))\n"
    )
    server = subprocess.Popen([sys.executable, "-c", program, str(folder), str(port)])
    wait_for_server(server, port)
    yield f"http://127.0.0.1:{port}/?token=token-of-ada", folder / "votes.jsonl", psutil.Process(server.pid)
    server.terminate()
    server.wait(timeout=120)


@pytest.fixture
def page(served):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 740})
        page.set_default_timeout(120_000)
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        yield page
        browser.close()


def until(page, condition):
    """Waits for an expression of the page, or a function here, to hold. Playwright's own way needs `eval`, which the page forbids."""
    deadline = time.monotonic() + 120
    while not (condition() if callable(condition) else page.evaluate(condition)):
        assert time.monotonic() < deadline, (condition, page.inner_text("main"))
        page.wait_for_timeout(10)


def open_page(page, address):
    """Opens it, and gives how many pairs the reviewer has done."""
    page.goto(address)
    page.wait_for_selector("#work:not([hidden])")
    return number_done(page)


def number_done(page):
    return int(page.inner_text("#count").split()[0])


def answer(page, *keys):
    """Presses the keys of answers, each when a pair is there."""
    for key in keys:
        page.wait_for_selector("#work:not([hidden])")
        page.keyboard.press(key)


def test_the_page_by_keyboard_on_a_telephone(served, page):
    address, path, _ = served
    done = open_page(page, address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert "token" not in page.url
    assert [mark.inner_text() for mark in page.query_selector_all("mark")] == [PROMPT[:32], PROMPT[34:67]]
    before = VoteLog(path).current() if path.exists() else {}
    answer(page, "1", "Shift+2", "ArrowLeft", "ArrowRight", "ArrowUp", "n", "c", "u")
    until(page, f"document.getElementById('count').textContent.startsWith('{done + 4} of')")
    until(page, "localStorage.length === 0")
    votes = [record for record in VoteLog(path) if record["item"] not in {item for item, _ in before}]
    assert [record["answer"] for record in votes] == ["left", "right", "both", "neither", "cannot_tell", None]
    assert votes[0]["ticks"] == {"0": {"left": True, "right": False}, "1": {"left": False, "right": True}}
    page.keyboard.press("z")
    assert page.is_visible("#zoom")
    page.keyboard.press("Escape")
    until(page, "!document.getElementById('zoom').open")
    for _ in range(30):  # every control can be reached
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.answer") == "both":
            break
    page.keyboard.press("Enter")
    until(page, f"document.getElementById('count').textContent.startsWith('{done + 5} of')")
    assert page.problems == []


class TestSlowConnection:
    """What is answered faster than the server takes it is kept, counted and in its order."""

    def test_every_key_on_a_pair_is_a_vote(self, served, page):
        address, path, _ = served
        done = open_page(page, address)
        number = len(list(VoteLog(path))) if path.exists() else 0
        slow = {"offline": False, "latency": 300, "downloadThroughput": -1, "uploadThroughput": -1}
        page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
        answer(page, *(["ArrowLeft", "ArrowRight", "n"] * 4))
        assert number_done(page) == done + 12
        until(page, "localStorage.length === 0")
        votes = list(VoteLog(path))[number:]
        assert [record["answer"] for record in votes] == ["left", "right", "neither"] * 4
        assert len({record["item"] for record in votes}) == 12 and number_done(page) == done + 12

    def test_it_is_not_the_end_while_answers_are_on_their_way(self, served, page):
        """The server has only those to give that are answered here, of which it does not know."""
        done, held = open_page(page, served[0]), []
        page.route("**/api/votes", lambda route: route.continue_() if held else held.append(route))
        answer(page, *["ArrowLeft"] * 8)
        until(page, "!isFetching")
        until(page, lambda: held)
        assert page.is_visible("#wait") and not page.is_visible("#end")
        assert page.inner_text("main").splitlines()[-1].strip() == "left. Next pair."
        held[0].continue_()
        answer(page, "ArrowLeft")
        assert number_done(page) == done + 9 and not page.is_visible("#wait")
        until(page, "localStorage.length === 0")

    def test_pairs_that_were_answered_before_they_came_are_not_the_last(self, served, page):
        """The page asks for others at once, though the answers are still on their way."""
        asked, held, votes = [], [], []

        def hold_the_second(route):
            asked.append(route)
            held.append((route, route.fetch())) if len(asked) == 2 else route.continue_()

        page.route("**/api/next*", hold_the_second)
        page.route("**/api/votes", lambda route: votes.append(route))
        open_page(page, served[0])
        until(page, lambda: held)
        while page.evaluate("!!current"):
            page.keyboard.press("ArrowLeft")
        assert page.is_visible("#wait")
        route, response = held[0]
        route.fulfill(response=response)
        page.wait_for_selector("#work:not([hidden])")
        until(page, lambda: votes)
        page.unroute("**/api/votes")
        votes[0].continue_()
        until(page, "localStorage.length === 0")

    def test_an_old_answer_of_the_server_takes_no_vote_from_the_count(self, served, page):
        """The page asks a second time once its first pair is shown, and again when it has read an old answer."""
        asked, held = [], []

        def hold_all_but_the_first(route):
            asked.append(route)
            held.append((route, route.fetch())) if len(asked) > 1 else route.continue_()

        page.route("**/api/next*", hold_all_but_the_first)
        done = open_page(page, served[0])
        until(page, lambda: held)
        answer(page, "ArrowLeft")
        until(page, "localStorage.length === 0")
        route, response = held[0]
        route.fulfill(response=response)
        until(page, lambda: len(asked) == 3)
        assert number_done(page) == done + 1

    def test_what_is_taken_back_stays_so_when_the_page_is_opened_again(self, served, page):
        address, path, _ = served
        done = open_page(page, address)
        number = len(list(VoteLog(path))) if path.exists() else 0
        page.route("**/api/votes", lambda route: route.abort())
        answer(page, *["ArrowLeft", "u"] * 4, "ArrowRight")
        page.reload()
        page.unroute("**/api/votes")
        page.evaluate("dispatchEvent(new Event('online'))")
        until(page, "localStorage.length === 0")
        votes = list(VoteLog(path))[number:]
        assert [record["answer"] for record in votes] == ["left", None] * 4 + ["right"]
        assert len({record["item"] for record in votes}) == 1
        until(page, f"document.getElementById('count').textContent.startsWith('{done + 1} of')")


def test_a_lost_connection_loses_no_vote(served, page):
    address, path, _ = served
    open_page(page, address)
    until(page, "queue.length > 1")
    picture = "performance.getEntriesByName(location.origin + source(item, side)).length"
    until(page, f"[current, ...queue].every((item) => ['left', 'right'].every((side) => {picture}))")
    page.context.set_offline(True)
    known = {record["id"] for record in VoteLog(path)} if path.exists() else set()
    page.keyboard.press("ArrowLeft")
    until(page, "document.getElementById('state').textContent.includes('1 answer is kept')")
    page.keyboard.press("ArrowRight")
    until(page, "document.getElementById('state').textContent.includes('2 answers are kept')")
    held, states = [], []
    # those of the first answer pass, of which there may be some before the connection is back
    page.route(
        "**/api/votes",
        lambda route: held.append(route) if route.request.post_data_json["answer"] == "right" else route.continue_(),
    )
    page.context.set_offline(False)
    until(page, lambda: held)
    states.append(page.inner_text("#state"))
    held[0].continue_()
    until(page, "localStorage.length === 0 && !isSending")
    states.append(page.inner_text("#state"))
    assert ["everything is saved" in state for state in states] == [False, True]
    assert [record["answer"] for record in VoteLog(path) if record["id"] not in known] == ["left", "right"]


def test_an_answer_that_is_rejected_is_not_called_saved(served, page):
    """The server knows its item no more. The message stays while other answers are taken."""
    done = open_page(page, served[0])
    page.evaluate("current.id = 'of another dataset'")
    answer(page, "ArrowLeft", "ArrowRight")
    until(page, f"localStorage.length === 0 && progress.done === {done + 1}")
    assert "`item` is not one of the items here. Reload the page." in page.inner_text("#state")
    assert "saved" not in page.inner_text("#state")
    page.reload()
    until(page, f"document.getElementById('count').textContent.startsWith('{done + 1} of')")
    assert page.inner_text("#state") == ""


def test_a_key_that_is_held_and_the_last_pair(tmp_path, served, page):
    """Of a held key one vote is taken; after the last pair the server is left alone."""
    address, path, _ = served
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.route("**/api/next*", lambda route: route.fulfill(json={"items": [], "progress": {"done": 7, "left": 0}}))
    page.goto(address)
    page.wait_for_selector("#end:not([hidden])")
    page.wait_for_timeout(500)
    assert len(requests) < 10 + page.evaluate("performance.now()") / 1000
    page.unroute("**/api/next*")
    page.reload()
    page.wait_for_selector("#work:not([hidden])")
    until(page, "queue.length > 1")
    number = len(list(VoteLog(path)))
    for is_repeat in (False, True, True, True):
        page.evaluate(
            f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowLeft', repeat: {str(is_repeat).lower()}}}))"
        )
    until(page, "localStorage.length === 0")
    assert len(list(VoteLog(path))) == number + 1


def test_ten_thousand_pairs_are_as_quick_as_ten(served, page):
    """
    Far above the times that are measured (see recipes/data/README.md), as the machine may be busy; the processor time of the
    server is what more pairs would add to.
    """
    address, _, server = served
    start = sum(server.cpu_times()[:2])
    open_page(page, address)
    until(page, "queue.length > 1")
    elapsed = page.evaluate(
        "async () => { const times = []; for (let i = 0; i < 20; i++) { const start = performance.now();"
        " document.querySelector('[data-answer=left]').click();"
        " await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));"
        " times.push(performance.now() - start); await new Promise((done) => setTimeout(done, 60)); } return times; }"
    )
    until(page, "localStorage.length === 0")
    assert np.median(elapsed) < 10_000
    assert sum(server.cpu_times()[:2]) - start < 10
