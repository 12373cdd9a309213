"""One client for every OpenAI-compatible server: language models, judges, and image models."""

import ipaddress
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..waiting import WaitNotices
from .answers import Answer, BadAnswer, Drawing, ServerError, Stopped, clean_text, read_top_logprobs
from .cache import AnswerCache, hash_request
from .pictures import decode_picture, download, is_flagged, is_policy_refusal
from .sending import Failure, advise, check_address, persist, read_answer, read_failure, shorten
from .spending import Prices, Spend, count_tokens
from .structured import add_text, ask_for_json, check_keywords, describe_schema
from .threads import map_on_threads


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_LONGEST_CONNECT = 15.0  # seconds


class Endpoint:
    """
    A model behind an OpenAI-compatible server.

    A call that fails is made again, with growing pauses or after the time that the server asks for, when the connection
    breaks, the answer is unreadable, or the status is 408, 409, 429 or 5xx. Neither prompts nor answers nor the key are
    logged.

    Args:
        model (`str`):
            Name of the model at the server.
        base_url (`str`, *optional*):
            Address of the server's API, such as `http://127.0.0.1:8000/v1`. If not set, `OPENAI_BASE_URL` or OpenAI's own.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the key. A server on loopback needs none.
        cache (`Path`, *optional*):
            SQLite file in which answers in words are kept: see [`~endpoints.cache.AnswerCache`]. Images are not.
        prices (`Prices`, *optional*):
            What calls cost. If not set, nothing.
        spend (`Spend`, *optional*):
            A limit, which endpoints may share.
        concurrency (`int`, *optional*, defaults to `8`):
            Calls at one time in [`~Endpoint.map`].
        timeout_s (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for an answer.
        max_attempts (`int`, *optional*, defaults to `6`):
            How often a call is made before it fails.
        extra_body (`dict`, *optional*):
            Further fields of every request, such as `{"watermark": False}`.

    Attributes:
        address (`str`):
            Address of the server.

    Raises:
        `ValueError`: If the address is invalid, a number is out of its range, or the key is missing.
        `ImportError`: If the `openai` package is missing.
        `OSError`: If the cache cannot be used.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        cache: Path | None = None,
        prices: Prices | None = None,
        spend: Spend | None = None,
        concurrency: int = 8,
        timeout_s: float = 120.0,
        max_attempts: int = 6,
        extra_body: Mapping[str, Any] | None = None,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError('A model behind a server needs openai: pip install "trl-spatial[judge]"') from error
        for name, value, minimum in (("concurrency", concurrency, 1), ("max_attempts", max_attempts, 1)):
            if value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
        if not timeout_s > 0:
            raise ValueError(f"`timeout_s` must be positive, got {timeout_s}.")
        self.model = model
        self.address = check_address(base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        self.api_key_env = api_key_env
        self.prices = prices or Prices()
        self.spend = spend
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.max_attempts = max_attempts
        self.extra_body = dict(extra_body or {})
        self._cache = None if cache is None else AnswerCache(Path(cache))
        self._key = _find_key(api_key_env, self.address)
        timeout = openai.Timeout(timeout_s, connect=min(timeout_s, _LONGEST_CONNECT))
        # No retries by openai: its pauses are at most 8 seconds, and Ctrl-C does not interrupt them.
        self._client: Any = openai.OpenAI(api_key=self._key, base_url=self.address, timeout=timeout, max_retries=0)
        self._errors = (openai.APIStatusError, openai.APIConnectionError)
        self._rng = random.Random()  # jitter of the pauses
        self._lock = threading.Lock()
        self._resume_at = 0.0  # `time.monotonic()` until which the server asked not to be called
        self._stopping = threading.Event()
        limit = f"It is asked up to {max_attempts} times (`max_attempts`) for {timeout_s:g} s each (`timeout_s`)."
        self._notices = WaitNotices(f"{model} at {self.address}", limit)
        self._refused: set[str] = set()  # parameters that the server does not accept
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, base_url={self.address!r})"

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        schema: Mapping[str, Any] | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        vote: int = 0,
        top_logprobs: int | None = None,
    ) -> Answer:
        """
        Asks the model.

        Args:
            messages (`Sequence[Mapping[str, Any]]`):
                Messages as OpenAI's API takes them, with images as data URLs.
            schema (`Mapping[str, Any]`, *optional*):
                JSON schema of the answer, an object with a `title`; see [`~endpoints.structured.check_schema`]. A server
                that takes no schema is asked in words. An answer that does not match is shown to the model once, with what
                is wrong.
            seed (`int`, *optional*), temperature (`float`, *optional*), max_tokens (`int`, *optional*):
                Sampling settings. If not set, the server's.
            vote (`int`, *optional*, defaults to `0`):
                Number of the answer, where the same is asked several times: only equal votes share an answer in the cache.
            top_logprobs (`int`, *optional*):
                How many of the most likely tokens to name at every place of the answer. Servers allow 20 at most.

        Returns:
            [`Answer`]: The answer.

        Raises:
            [`BadAnswer`]: If the model refuses, or does not answer as the schema asks.
            [`ServerError`]: If the server gives no answer, or no log-probabilities although they are asked for.
            [`BudgetReached`]: If the limit is reached.
        """
        settings = {"seed": seed, "temperature": temperature, "max_tokens": max_tokens, "vote": vote}
        if top_logprobs is not None:  # left out otherwise, so that cache keys without it stay the same
            settings |= {"logprobs": True, "top_logprobs": top_logprobs}
        if schema is None:
            return self._ask(messages, None, settings)
        check_keywords(schema)
        return ask_for_json(lambda shown: self._ask(shown, schema, settings), messages, schema)

    def draw(
        self,
        prompt: str,
        *,
        size: str = "1024x1024",
        seed: int | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> Drawing:
        """
        Asks the model for one image. Images are not cached.

        Args:
            prompt (`str`):
                What to draw.
            size (`str`, *optional*, defaults to `"1024x1024"`):
                Width and height in pixels.
            seed (`int`, *optional*):
                Seed of the image. Some servers take none: the drawing says whether it was sent.
            extra_body (`Mapping[str, Any]`, *optional*):
                Further fields of the request, before those of the endpoint.

        Returns:
            [`Drawing`]: The image, or the refusal: a server that objects to a prompt is not asked again.

        Raises:
            [`ServerError`]: If the server gives no answer, or what it sends is not an image.
            [`BudgetReached`]: If the limit is reached.
        """
        body = {"model": self.model, "prompt": prompt, "size": size, "n": 1, **self.extra_body, **(extra_body or {})}
        if seed is not None:
            body["seed"] = seed
        try:
            sent, answer = self._send_adapted("images/generations", body)
        except Failure as failure:
            if is_policy_refusal(failure):
                return Drawing(None, failure.message, None, 0.0)
            raise self._error(failure) from None
        served = self._note_served(answer)
        rows = answer.get("data")
        row = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], Mapping) else {}
        if not (row.get("b64_json") or row.get("url")):
            said = row.get("error") or answer.get("error") or row.get("revised_prompt") or "it sent no image"
            refusal = said if isinstance(said, str) else json.dumps(said)
            return Drawing(None, shorten(refusal, self._key), served, 0.0)
        self._count(self.prices.per_image)
        image = self._fetch_picture(row)
        return Drawing(image, None, served, self.prices.per_image, is_flagged(answer, row), sent.get("seed"))

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result | Exception]]:
        """
        Runs a function, which calls this endpoint, for many items at one time.

        Ctrl-C, a limit that is reached, and an error that every call would meet (a refused key, an unknown model) end the
        work: no further item is begun, running calls end, what they gave is yielded, then the error is raised. A second
        Ctrl-C does not wait for them.

        Args:
            function (`Callable`):
                Called with an item, on one of `concurrency` threads.
            items (`Iterable`):
                The items, read as they are needed.

        Yields:
            `tuple[int, Result | Exception]`: Number of the item, and what the function returned or raised for it, in the
            order in which they end.
        """
        return map_on_threads(function, items, self.concurrency, self._stopping)

    def _ask(
        self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any] | None, settings: Mapping[str, Any]
    ) -> Answer:
        """Gets one answer, from the cache or else from the server."""
        key = ""
        if self._cache is not None:
            request = {"messages": list(messages), "schema": schema, "extra_body": self.extra_body, **settings}
            key = hash_request({"address": self.address, "model": self.model, **request})
            if (kept := self._cache.get(key)) is not None:
                return Answer(**kept, data=None, cost=0.0, is_cached=True)
        body = {"model": self.model, "messages": list(messages), **self.extra_body}
        body |= {name: value for name, value in settings.items() if value is not None and name != "vote"}
        if schema is not None:
            described = {"name": schema.get("title", "answer"), "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        try:
            _, content = self._send_adapted("chat/completions", body)
        except Failure as failure:
            if is_policy_refusal(failure):
                raise BadAnswer("The server refuses the request.", failure.message) from None
            if "logprobs" in body and "logprobs" in f"{failure.parameter} {failure.message}".lower():
                raise self._no_logprobs(failure.message, failure.status) from None
            raise self._error(failure) from None
        served = self._note_served(content)
        message = content["choices"][0]["message"]
        text = clean_text(message.get("content") or message.get("refusal") or "")
        tokens = count_tokens(content, messages, text)
        cost = self.prices.of_tokens(*tokens)
        self._count(cost)
        if message.get("refusal") or content["choices"][0].get("finish_reason") == "content_filter":
            raise BadAnswer("The model refuses to answer.", text, served, cost)
        answer: dict[str, Any] = {
            "text": text,
            "served_model": served,
            "input_tokens": tokens[0],
            "output_tokens": tokens[1],
        }
        if "logprobs" in body:
            answer["top_logprobs"] = read_top_logprobs(content["choices"][0])
            if answer["top_logprobs"] is None and not text:
                raise BadAnswer("The model gives neither words nor log-probabilities.", "", served, cost)
            if answer["top_logprobs"] is None:
                raise self._no_logprobs("Its answer holds none")
        if self._cache is not None:
            self._cache.put(key, answer)
        return Answer(**answer, data=None, cost=cost, is_cached=False)

    def _send_adapted(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Sends a request, dropping or adapting parameters that the server turns out to refuse. Returns the body as sent
        and the answer.
        """
        while True:
            sent = self._adapt(body)
            try:
                return sent, self._persist(partial(self._post, path, sent))
            except Failure as failure:
                if (name := _find_refused(failure, sent)) is None:
                    raise
                with self._lock:
                    is_new = name not in self._refused
                    self._refused.add(name)
                if is_new:
                    logger.warning(f"{self.model} at {self.address} does not take `{name}`; {_ADAPTED[name]}.")

    def _adapt(self, body: dict[str, Any]) -> dict[str, Any]:
        sent = dict(body)
        for name in self._refused & sent.keys():
            value = sent.pop(name)
            if name == "max_tokens":
                sent["max_completion_tokens"] = value
            elif name == "response_format":
                schema = value["json_schema"]["schema"]
                sent["messages"] = add_text(sent["messages"], describe_schema(schema))
        return sent

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Sends one request and returns the JSON object of the answer."""
        while True:  # meanwhile the server may ask another thread to wait longer
            seconds = self._resume_at - time.monotonic()
            self._wait(seconds, False)
            if seconds <= 0:
                break
        if self.spend is not None:
            self.spend.check()
        fields = dict(body)
        try:
            if path == "chat/completions":
                send = self._client.chat.completions.with_raw_response.create
                response = send(model=self.model, messages=fields.pop("messages"), extra_body=fields)
            else:
                send = self._client.images.with_raw_response.generate
                response = send(model=self.model, prompt=fields.pop("prompt"), extra_body=fields)
        except self._errors as error:
            raise read_failure(error, self._key) from None
        return read_answer(response.text, path, self._key)

    def _fetch_picture(self, row: Mapping[str, Any]) -> bytes:
        try:
            if encoded := row.get("b64_json"):
                return decode_picture(encoded)
            return self._persist(partial(download, str(row["url"]), self.address, self.timeout_s))
        except Failure as failure:
            raise ServerError(
                f"The image that {self.model} at {self.address} drew cannot be fetched: {failure.message}.",
                failure.status,
            ) from None

    def _persist(self, call: Callable[[], Result]) -> Result:
        start = time.monotonic()
        try:
            with self._notices.request():
                return persist(call, max_attempts=self.max_attempts, wait=self._wait, rng=self._rng)
        except Failure as failure:
            failure.seconds = time.monotonic() - start
            raise

    def _wait(self, seconds: float, is_asked: bool) -> None:
        """
        Waits; raises [`Stopped`] if the work is being stopped. A pause that the server asked for (`is_asked`) holds
        for all threads.
        """
        if is_asked:
            with self._lock:
                self._resume_at = max(self._resume_at, time.monotonic() + seconds)
        if self._stopping.wait(max(seconds, 0.0)):
            raise Stopped("The work is being stopped.")

    def _count(self, cost: float) -> None:
        if self.spend is not None:
            self.spend.add(cost)

    def _note_served(self, answer: Mapping[str, Any]) -> str | None:
        """Returns the name of the model that answered; warns once for each that is not the requested one."""
        served = answer.get("model")
        if not isinstance(served, str) or not served:
            return None
        served = clean_text(shorten(served, self._key))
        if not _is_same_model(self.model, served):
            with self._lock:
                is_new = served not in self._warned
                self._warned.add(served)
            if is_new:
                logger.warning(f"{self.address} was asked for {self.model} and answers with {served}.")
        return served

    def _no_logprobs(self, reason: str, status: int | None = None) -> ServerError:
        return ServerError(
            f"{self.model} at {self.address} gives no log-probabilities: {reason.rstrip('.')}. Take a model and a server that "
            "do, such as an open model behind vLLM or SGLang.",
            status, is_final=True,
        )  # fmt: skip

    def _error(self, failure: Failure) -> ServerError:
        what = "gives no answer" if failure.status is None else f"answers {failure.status}"
        tries = f", {self.max_attempts} times" if failure.is_transient else ""
        if failure.status is None:
            tries += f" in {failure.seconds:.1f} s (`timeout_s` is {self.timeout_s:g})"
        return ServerError(
            f"{self.model} at {self.address} {what}{tries}: {failure.message.rstrip('.')}. {advise(failure, self.api_key_env)}",
            failure.status, failure.is_final,
        )  # fmt: skip


_ADAPTED = {
    "response_format": "the schema is described in words instead",
    "max_tokens": "`max_completion_tokens` is sent instead",
    "seed": "it is left out",
}
_SCHEMA_WORDS = ("response_format", "response format", "json_schema", "structured output", "guided")


def _find_refused(failure: Failure, sent: Mapping[str, Any]) -> str | None:
    """Returns the parameter that the server refused, if the request can be sent without it."""
    if failure.status not in (400, 422, 501):
        return None
    said = f"{failure.parameter} {failure.message}".lower()
    if "response_format" in sent and any(word in said for word in _SCHEMA_WORDS):
        return "response_format"
    return next((name for name in ("max_tokens", "seed") if name in sent and re.search(rf"\b{name}\b", said)), None)


def _is_same_model(asked: str, served: str) -> bool:
    """
    Whether two model names are the same, apart from an owner before either and a date or version after the served one.
    """
    asked, served = (name.rpartition("/")[2].lower() for name in (asked, served))
    return served == asked or re.fullmatch(re.escape(asked) + r"[-@:]\d[\d-]*", served) is not None


def _find_key(variable: str, address: str) -> str:
    if key := os.environ.get(variable, "").strip():
        return key
    host = urlsplit(address).hostname or ""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost" or host.endswith(".localhost")
    if is_loopback:
        return "none"
    raise ValueError(
        f"{address} needs a key in the environment variable {variable}, which is not set. If the server asks for none, set "
        "it to any word."
    )
