"""An OpenAI-compatible server on loopback, for tests of what asks language models, judges and image models.

    with OpenAIStub() as stub:
        endpoint = Endpoint("any-model", base_url=stub.url)
        stub.next.append(rate_limited(1.0))  # what happens to the next request, before the usual
        ...
    stub.requests  # what came: path, headers, body, time

As a process of its own, `python tests/openai_stub.py --behaviour faulty` prints its address and serves until it is killed.

Unless told otherwise it writes scenes of household things, rewrites and reads them, draws pictures that hide their prompt in
their pixels, and judges such pictures by that prompt. Everything it says depends on the request alone.
"""

import argparse
import base64
import hashlib
import json
import math
import random
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


# The only sentence of each relation, so that what was written can be read.
SENTENCES = {
    "left_of": "The {0} is left of the {1}",
    "right_of": "The {0} is right of the {1}",
    "above": "The {0} hangs above the {1}",
    "below": "The {0} is below the {1}",
    "on": "The {0} stands on the {1}",
    "under": "The {0} is directly under the {1}",
    "inside": "The {0} is inside the {1}",
    "contains": "The {0} contains the {1}",
    "front_of": "The {0} is in front of the {1}",
    "behind": "The {0} is behind the {1}",
    "near": "The {0} is near the {1}",
    "next_to": "The {0} is right beside the {1}",
    "far_from": "The {0} is far from the {1}",
    "between": "The {0} is between the {1} and the {2}",
    "at": "The {0} is at the {1} of the picture",
    "row_order": "From left to right stand {0}",
}
DIMENSIONS = {
    "lateral": ("left_of", "right_of"),
    "vertical": ("above", "below", "on", "under"),
    "depth": ("front_of", "behind"),
    "containment": ("inside", "contains"),
    "distance": ("near", "next_to", "far_from"),
    "between": ("between",),
    "region": ("at",),
    "order": ("row_order",),
}
REGIONS = (
    "top left corner", "top right corner", "bottom left corner", "bottom right corner", "left edge", "right edge",
    "top edge", "bottom edge", "center",
)  # fmt: skip
LOOKS = ("red", "blue", "green", "white", "black", "yellow", "wooden", "striped", "chipped", "brass", "glass", "old")
NOUNS = (
    "mug", "plate", "bowl", "kettle", "lamp", "vase", "clock", "book", "basket", "chair", "stool", "crate", "bucket", "jar",
    "bottle", "teapot", "candle", "radio", "globe", "pillow", "backpack", "suitcase", "ladder", "toaster", "cushion", "drum",
    "violin", "helmet", "lantern", "birdcage", "telescope", "typewriter", "umbrella", "watering-can", "wheelbarrow", "anvil",
    "trumpet", "saddle", "barrel", "easel", "doorbell", "hourglass", "compass", "rocking-horse", "accordion", "sled",
)  # fmt: skip
FILLERS = (
    "Soft daylight falls from one window.", "The walls are plain and the floor is tidy.",
    "Everything is in focus and the colors are natural.", "Nothing else draws the eye in this quiet photograph.",
)  # fmt: skip
SIDE = 64  # of pictures, in pixels


@dataclass
class Request:
    path: str
    headers: dict[str, str]  # names in lower case
    body: dict
    number: int  # of the request, from 0
    time: float = field(default_factory=time.monotonic)

    @property
    def text(self) -> str:
        """All words of the messages."""
        return "\n".join(part["text"] for part in self._parts() if part["type"] == "text")

    @property
    def last(self) -> str:
        """Words of the last message of the user that is not about a fault of an answer."""
        texts = [
            part["text"]
            for part in self._parts(("user",))
            if part["type"] == "text" and not part["text"].startswith("This answer")
        ]
        return texts[-1]

    @property
    def images(self) -> list[bytes]:
        urls = [part["image_url"]["url"] for part in self._parts() if part["type"] == "image_url"]
        return [base64.b64decode(url.partition(",")[2]) for url in urls]

    @property
    def title(self) -> str:
        """Title of the JSON schema, whether it came as one or in words."""
        described = self.body.get("response_format", {}).get("json_schema", {}).get("schema", {}).get("title")
        found = re.search(r'"title": "(\w+)"', self.text)
        return described or (found[1] if found else "")

    def _parts(self, roles=("system", "user", "assistant")):
        for message in self.body.get("messages", ()):
            if message["role"] in roles:
                content = message["content"]
                yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


@dataclass
class Response:
    content: dict | bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    is_cut: bool = False  # the connection closes in the middle


def error(status: int, message: str, code: str = "", parameter: str | None = None, **headers: str) -> Response:
    content = {"error": {"message": message, "type": "error", "code": code or None, "param": parameter}}
    return Response(content, status, headers)


# Behaviours: a request and the usual way to answer it → the response.
Behaviour = Callable[[Request, Callable[[Request], Response]], Response]


def failing(status: int, message: str = "It failed.", code: str = "", **headers: str) -> Behaviour:
    return lambda request, usual: error(status, message, code, **headers)


def rate_limited(seconds: float, *, as_date: bool = False) -> Behaviour:
    def limit(request, usual):
        wish = formatdate(time.time() + seconds, usegmt=True) if as_date else f"{seconds:g}"
        return error(429, "Too many requests.", "rate_limit_exceeded", **{"Retry-After": wish})

    return limit


def slow(seconds: float) -> Behaviour:
    def wait(request, usual):
        response = usual(request)
        response.delay = seconds
        return response

    return wait


def dying(request, usual):
    response = usual(request)
    response.is_cut = True
    return response


def malformed(request, usual):
    return Response(b'{"id": "answer", "choices": [{"mess', headers={"Content-Type": "application/json"})


def html(request, usual):
    return Response(b"<html><body>Bad gateway</body></html>", headers={"Content-Type": "text/html"})


def refusing(request, usual):
    return error(400, "Your request was rejected by our safety system.", "content_policy_violation")


def other_model(request, usual):
    response = usual(request)
    if isinstance(response.content, dict) and "error" not in response.content:
        response.content["model"] = "some-other-model"
    return response


def without_schema(request, usual):
    if "response_format" in request.body:
        return error(400, "This server does not support response_format.", parameter="response_format")
    return usual(request)


def in_prose(request, usual):
    response = usual(request)
    message = response.content["choices"][0]["message"] if "choices" in response.content else {}
    if message.get("content"):
        message["content"] = f"Sure, here it is {{as asked}}:\n```json\n{message['content']}\n```\nAnything else?"
    return response


def faulty(request, usual):
    """Every other request meets one of the faults that pass."""
    faults = (rate_limited(0.02), dying, malformed, failing(503), slow(0.1), html)
    return usual(request) if request.number % 2 else faults[request.number // 2 % len(faults)](request, usual)


def refusing_some(request, usual):
    """Refuses a third of all prompts, always the same."""
    key = request.body.get("prompt") or request.text
    return refusing(request, usual) if _hash(key) % 3 == 0 else usual(request)


def without_logprobs(request, usual):
    if "logprobs" in request.body:
        return error(400, "This model does not support logprobs.", parameter="logprobs")
    return usual(request)


BEHAVIOURS: dict[str, Behaviour] = {
    "default": lambda request, usual: usual(request),
    "faulty": faulty,
    "slow": slow(0.5),
    "refusing": refusing_some,
    "rate_limited": lambda request, usual: (
        rate_limited(0.02)(request, usual) if request.number % 2 else usual(request)
    ),
    "malformed": lambda request, usual: malformed(request, usual) if request.number % 2 else usual(request),
    "dying": lambda request, usual: dying(request, usual) if request.number % 2 else usual(request),
    "other_model": other_model,
    "without_schema": without_schema,
    "without_logprobs": without_logprobs,
    "in_prose": in_prose,
}


def _hash(*parts) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big")


# Scenes


def write_scene(scene: str, num_relations: int, dimensions: list[str], seed: int) -> dict:
    """Things and relations that hold in one arrangement of them, and the prompt that says so."""
    rng = random.Random(_hash(scene, num_relations, dimensions, seed))
    nouns = rng.sample(NOUNS, len(NOUNS))
    names = (f"{rng.choice(LOOKS)} {noun}" for noun in nouns)
    pool = [next(names) for _ in range(4)]  # things of a known place: their order is theirs on every axis
    orders = {axis: rng.sample(pool, len(pool)) for axis in ("lateral", "vertical", "depth")}
    others = list(DIMENSIONS)[:-1]  # of rows, which take many words, one at most
    wanted = [*dimensions, *rng.sample(list(DIMENSIONS), len(DIMENSIONS)), *rng.choices(others, k=num_relations)]
    entities, relations, used = list(pool), [], set()
    for dimension in wanted:
        if len(relations) == num_relations:
            break
        name, arguments = _sample_relation(rng, rng.choice(DIMENSIONS[dimension]), pool, orders, used, names)
        things = arguments[:-1] if name == "at" else arguments
        entities += [thing for thing in things if thing not in entities]
        relations.append({"relation": name, "arguments": arguments})
    mentioned = {argument for relation in relations for argument in relation["arguments"]}
    entities = [thing for thing in entities if thing in mentioned]
    sentences = [verbalize(relation) for relation in relations]
    prompt = " ".join([f"A {scene}.", *(f"{sentence}." for sentence in sentences)])
    for filler in FILLERS:
        if len(prompt.split()) < 45:
            prompt += f" {filler}"
    spans = [relation | {"span_text": sentence} for relation, sentence in zip(relations, sentences, strict=True)]
    return {"entities": entities, "relations": spans, "prompt": prompt}


def _sample_relation(rng, name, pool, orders, used, names):
    """One relation. Two things of the pool are related once; all others are new."""
    if name == "at":
        return name, [next(names), rng.choice(REGIONS)]
    if name == "row_order":
        return name, [next(names), next(names), next(names)]
    if name == "between":
        return name, [next(names), *rng.sample(pool, 2)]
    if name in ("on", "under", "inside", "contains"):
        return name, [next(names), next(names)]
    a, b = rng.sample(pool, 2)
    if name in ("near", "next_to", "far_from"):
        a, b = next(names), next(names)
    elif frozenset((a, b)) in used:
        a, b = next(names), b
    else:
        axis = next(dimension for dimension, kinds in DIMENSIONS.items() if name in kinds)
        first, second = sorted((a, b), key=orders[axis].index)
        a, b = (first, second) if name in ("left_of", "above", "front_of") else (second, first)
    used.add(frozenset((a, b)))
    return name, [a, b]


def verbalize(relation: dict) -> str:
    arguments = relation["arguments"]
    if relation["relation"] == "row_order":
        arguments = [", ".join(f"the {name}" for name in arguments[:-1]) + f" and the {arguments[-1]}"]
    return SENTENCES[relation["relation"]].format(*arguments)


def read_scene(prompt: str) -> list[dict]:
    """The relations that a prompt of [`write_scene`] states."""
    relations = []
    for sentence in prompt.split("."):
        for name, wording in SENTENCES.items():
            pattern = re.sub(r"\\\{\d\\\}", lambda _: r"(.+?)", re.escape(wording))
            if found := re.fullmatch(pattern, sentence.strip()):
                arguments = list(found.groups())
                if name == "row_order":
                    arguments = re.findall(r"the ([\w-]+ [\w-]+)", arguments[0])
                relations.append({"relation": name, "arguments": arguments})
                break
    return relations


def answer_writer(request: Request) -> dict:
    fields = dict(re.findall(r"^(\w[\w ]*): (.+)$", request.last, re.MULTILINE))
    return write_scene(
        fields["Scene"],
        int(fields["Relations"]),
        [] if fields["Kinds"] == "any" else fields["Kinds"].split(", "),
        int(fields["Number"]),
    )


def answer_rewriter(request: Request) -> dict:
    asked = json.loads(request.last[request.last.index("{") :].partition("\n\n")[0])
    prompt, relations = asked["prompt"], asked["relations"]
    for change in asked["changes"]:
        old, new = verbalize(change["before"]), verbalize(change["after"])
        prompt = prompt.replace(old, new)
    return {"prompt": prompt, "relations": [relation | {"span_text": verbalize(relation)} for relation in relations]}


def answer_reader(request: Request) -> dict:
    asked = json.loads(request.last[request.last.index("{") :].partition("\n\n")[0])
    return {"relations": read_scene(asked["prompt"])}


# Pictures


def draw_picture(prompt: str, seed: int) -> bytes:
    """A PNG of colored tiles that hides its prompt in its last rows."""
    rng = np.random.default_rng(_hash(prompt, seed))
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(SIDE // 8, 0).repeat(SIDE // 8, 1)
    hidden = b"stub" + prompt.encode()[: SIDE * SIDE] + b"\0"
    flat = pixels.reshape(-1)
    flat[-len(hidden) :] = np.frombuffer(hidden[::-1], np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def hidden_prompt(picture: bytes) -> str | None:
    flat = np.asarray(Image.open(BytesIO(picture)).convert("RGB")).reshape(-1)[::-1].tobytes()
    return flat[4 : flat.index(b"\0")].decode(errors="replace") if flat.startswith(b"stub") else None


def answer_judge(request: Request) -> dict:
    """Judges a picture of this server by its prompt, with one mistake in 50; of any other, says yes nine times in ten."""
    from trl_spatial.judges.questions import relation_question

    questions = re.findall(r"^\d+\. (.+)$", request.last, re.MULTILINE)
    picture = request.images[0]
    prompt = hidden_prompt(picture)
    key = hashlib.sha256(picture).hexdigest()
    if prompt is None:
        return {"answers": ["no" if _hash(key, question) % 10 == 0 else "yes" for question in questions]}
    true = {relation_question(fact) for fact in read_scene(prompt)}
    answers = []
    for question in questions:
        is_right = _hash(key, question) % 50 != 0
        answers.append("yes" if (question in true) == is_right else "no")
    return {"answers": answers}


ROLES = {"scene": answer_writer, "rewrite": answer_rewriter, "relations": answer_reader, "answers": answer_judge}


def default_chat(request: Request) -> str:
    role = ROLES.get(request.title)
    return json.dumps(role(request)) if role else f"An answer, {_hash(request.body) % 1000:03d}."


def default_probabilities(request: Request) -> dict[str, float]:
    """How likely an answer begins with a token: anything, but always the same."""
    tokens = ("Yes", "yes", " Yes", " yes", "No", "no", " No", "The", *"ABCDE", *"0123456789")
    weights = {token: 1.5 ** (_hash(request.body["messages"], token) % 20) for token in tokens}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


class OpenAIStub:
    """
    The server, as a context or with `start` and `stop`.

    Args:
        behaviour (`str` or `Behaviour`):
            One of `BEHAVIOURS`, or a function.
        chat (`Callable`, *optional*):
            `(request)` → the text of the answer, or a whole [`Response`].
        probabilities (`Callable`, *optional*):
            `(request)` → {token: probability of being the first}, for who asks for log-probabilities.
        port (`int`, *optional*):
            0 for a free one.
    """

    def __init__(self, behaviour="default", *, chat=default_chat, probabilities=default_probabilities, port=0):
        self.behaviour = BEHAVIOURS[behaviour] if isinstance(behaviour, str) else behaviour
        self.chat = chat
        self.probabilities = probabilities
        self.requests: list[Request] = []
        self.next: deque[Behaviour] = deque()
        self.files: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.stub = self
        self.host = f"http://127.0.0.1:{self._server.server_port}"
        self.url = f"{self.host}/v1"

    @property
    def num_calls(self) -> int:
        return len(self.requests)

    def start(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    __enter__ = start

    def __exit__(self, *_):
        self.stop()

    def answer(self, path: str, headers: dict[str, str], body: dict) -> Response:
        with self._lock:
            request = Request(path, headers, body, len(self.requests))
            self.requests.append(request)
            behaviour = self.next.popleft() if self.next else self.behaviour
        return behaviour(request, self._usual)

    def _usual(self, request: Request) -> Response:
        body = request.body
        if request.path == "/v1/images/generations":
            return self._draw(body)
        if request.path != "/v1/chat/completions":
            return error(404, f"There is no {request.path}.")
        said = self.chat(request)
        if isinstance(said, Response):
            return said
        message = {"role": "assistant", "content": said}
        usage = {"prompt_tokens": len(request.text) // 4, "completion_tokens": len(said) // 4}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [self._first_token(request)]}
        return Response(
            {"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}
        )

    def _first_token(self, request: Request) -> dict:
        chances = sorted(self.probabilities(request).items(), key=lambda pair: -pair[1])
        rows = [{"token": token, "logprob": math.log(chance), "bytes": None} for token, chance in chances]
        return {**rows[0], "top_logprobs": rows[: request.body["top_logprobs"]]}

    def _draw(self, body: dict) -> Response:
        picture = draw_picture(body["prompt"], body.get("seed", 0))
        if body.get("response_format") == "url":
            name = f"/files/{hashlib.sha256(picture).hexdigest()}.png"
            self.files[name] = picture
            row = {"url": self.host + name}
        else:
            row = {"b64_json": base64.b64encode(picture).decode()}
        return Response({"created": 0, "model": body["model"], "data": [row]})


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of more than wait here a client hears nothing, and comes back after a second


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._send(self.server.stub.answer(self.path, headers, json.loads(data)))

    def do_GET(self):
        data = self.server.stub.files.get(self.path)
        headers = {"Content-Type": "image/png"}
        self._send(error(404, "There is no such file.") if data is None else Response(data, headers=headers))

    def _send(self, response: Response):
        content = response.content
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        time.sleep(response.delay)
        with suppress(ConnectionError):  # the client may be gone
            self.send_response(response.status)
            for name, value in ({"Content-Type": "application/json"} | response.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if response.is_cut else data)
        if response.is_cut:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server for tests.")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package, for the judge
    parser.add_argument("--behaviour", choices=list(BEHAVIOURS), default="default")
    arguments = parser.parse_args()
    with OpenAIStub(arguments.behaviour, port=arguments.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()
