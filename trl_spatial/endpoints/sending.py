"""Retries: which failures are transient, how long to wait, and the final error message."""

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit


Result = TypeVar("Result")

_TRANSIENT = (408, 409, 429)
_FINAL = (401, 403, 404)
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds, unless the server asks for a time
_LONGEST_WISH = 600.0  # seconds; the longest wait that a server may ask for
_EXCERPT = 200  # characters shown of a server's message
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")


@dataclass
class Failure(Exception):
    """
    One try that failed.

    Args:
        message (`str`):
            The server's own message or that of the connection, shortened.
        status (`int`, *optional*):
            HTTP status; `None` if there is no answer.
        code (`str`, *optional*):
            The server's name for the failure.
        parameter (`str`, *optional*):
            The parameter that the server objects to.
        retry_after (`float`, *optional*):
            Seconds that the server asks to wait.
        seconds (`float`, *optional*, defaults to `0.0`):
            How long all tries took, pauses included.
    """

    message: str
    status: int | None = None
    code: str = ""
    parameter: str = ""
    retry_after: float | None = None
    seconds: float = 0.0

    @property
    def has_no_credit(self) -> bool:
        return self.code in _NO_CREDIT

    @property
    def is_transient(self) -> bool:
        """Whether trying again can help."""
        if self.has_no_credit or (self.retry_after or 0.0) > _LONGEST_WISH:
            return False
        return self.status is None or self.status in _TRANSIENT or self.status >= 500

    @property
    def is_final(self) -> bool:
        """Whether every other request will fail, too."""
        return self.has_no_credit or self.status in _FINAL


def persist(
    call: Callable[[], Result], *, max_attempts: int, wait: Callable[[float, bool], None], rng: random.Random
) -> Result:
    """
    Makes a call until it succeeds, with growing pauses, or after the time that the server asks for.

    Args:
        call (`Callable`):
            The call; it raises a [`Failure`].
        max_attempts (`int`):
            How often it is made at most.
        wait (`Callable`):
            `(seconds, is_asked)`: waits, where `is_asked` says whether the server named the time.
        rng (`random.Random`):
            Spreads the pauses, so that calls that failed together do not come back together.

    Returns:
        What the call returns.

    Raises:
        [`Failure`]: The last one.
    """
    for attempt in range(1, max_attempts + 1):
        try:
            return call()
        except Failure as failure:
            if attempt == max_attempts or not failure.is_transient:
                raise
            asked = failure.retry_after
        if asked is not None:
            wait(asked + rng.uniform(0.0, 0.1 + 0.1 * asked), True)
        else:
            wait(min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT) * rng.uniform(0.5, 1.0), False)
    raise AssertionError("unreachable")


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """
    Reads how long a server asks to wait.

    Args:
        headers (`Mapping[str, str]`):
            Headers of an answer, with names in any case.

    Returns:
        `float`: Seconds from now, 0 or more; `None` if it does not ask, or in an unknown format.
    """
    try:
        if value := headers.get("retry-after-ms", ""):
            return max(float(value) / 1000, 0.0)
        value = headers.get("retry-after", "").strip()
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def read_failure(error: Any, secret: str) -> Failure:
    """
    The failure behind an exception of the `openai` package.

    Args:
        error (`openai.APIError`):
            The exception.
        secret (`str`):
            The key, which some servers repeat.
    """
    response = getattr(error, "response", None)
    if response is None:
        cause = error.__cause__
        text = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        return Failure(shorten(text, secret))
    body = error.body if isinstance(error.body, Mapping) else {}
    message = body.get("message") or body.get("detail") or error.body or response.reason_phrase
    return Failure(
        shorten(message if isinstance(message, str) else json.dumps(message), secret),
        status=response.status_code,
        code=str(body.get("code") or body.get("type") or ""),
        parameter=str(body.get("param") or ""),
        retry_after=parse_retry_after(response.headers),
    )


def read_answer(text: str, path: str, secret: str) -> dict[str, Any]:
    """
    The JSON object of an answer of status 200.

    Args:
        text (`str`):
            The answer.
        path (`str`):
            Path of the request; for `"chat/completions"`, a message is expected.
        secret (`str`):
            The key, which some servers repeat.

    Raises:
        [`Failure`]: If it is not a JSON object, or reports an error, as some routers do with status 200.
    """
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise Failure("its answer is no JSON object")
    error = answer.get("error")
    if path != "chat/completions":
        is_whole = isinstance(answer.get("data"), list) or error is not None
    else:
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        is_whole = isinstance(message, dict) and all(
            isinstance(message.get(name), str | None) for name in ("content", "refusal")
        )
    if is_whole:
        return answer
    if isinstance(error, dict):
        code = error.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else None
        raise Failure(shorten(str(error.get("message")), secret), status=status, code=str(code or ""))
    raise Failure("its answer does not have the format of OpenAI's API")


def shorten(text: str, secret: str = "", length: int = _EXCERPT) -> str:
    """One line of a server's message without the key."""
    text = " ".join(text.split())
    if secret:
        text = text.replace(secret, "***")
    return text if len(text) <= length else f"{text[:length]}..."


def advise(failure: Failure, key_variable: str) -> str:
    """What a user can do about a failure."""
    if failure.has_no_credit:
        return f"The account of the key in {key_variable} has no credit left."
    if (failure.retry_after or 0.0) > _LONGEST_WISH:
        return f"It asks to wait {failure.retry_after:.0f} seconds. Then run the same command again to continue."
    return {
        None: "Check that the server is running and that its address is correct.",
        400: "Check the name of the model and what it takes.",
        401: f"Set {key_variable} to a key of this server.",
        403: f"The key in {key_variable} may not use this model; ask for access or name another.",
        404: "There is no such model, or the address is not that of its API, which usually ends in /v1.",
        413: "The request is too large: shrink the images.",
        422: "Check the name of the model and what it takes.",
        429: "Lower `concurrency`, or wait; then run the same command again to continue.",
    }.get(failure.status, "Run the same command again later to continue.")


def check_address(address: str) -> str:
    """
    Checks the address of a server.

    Returns:
        `str`: The address without a slash at its end.

    Raises:
        `ValueError`: If it is invalid, or holds a user, a password or a query, which would end up in messages and
            logs.
    """
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        is_address = False
    if not is_address:
        raise ValueError(f"base_url={address!r} is not the address of a server. Write https://HOST/v1.")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            f"base_url of {parts.hostname} holds a user, a query or a fragment. Write the bare address, such as "
            "https://HOST/v1; the key is read from the environment."
        )
    return address.rstrip("/")
