"""Answers of a server, and the errors raised when there is none."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


_LEAST_LOGPROB = -9999.0  # servers send this for minus infinity, which JSON cannot express


@dataclass(frozen=True)
class Answer:
    """
    An answer in words.

    Args:
        text (`str`):
            What the model wrote.
        data (`Any`):
            The JSON value in it, if one was asked for.
        served_model (`str`, *optional*):
            The model that answered, as the server names it; `None` if it does not say.
        input_tokens (`int`), output_tokens (`int`):
            Tokens, over all calls that the answer took. Estimated where the server does not count them.
        cost (`float`):
            Price in US dollars; 0 for an answer from the cache.
        is_cached (`bool`):
            Whether no call was made.
        top_logprobs (`Sequence[Mapping[str, float]]`, *optional*):
            For each token of the answer, the most likely tokens → natural logarithm of their probability, if asked for.
    """

    text: str
    data: Any
    served_model: str | None
    input_tokens: int
    output_tokens: int
    cost: float
    is_cached: bool
    top_logprobs: Sequence[Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Drawing:
    """
    An image, or the reason why the server draws none.

    Args:
        image_bytes (`bytes`, *optional*):
            The image file; `None` if the server refuses.
        refusal (`str`, *optional*):
            What the server says of its refusal, shortened.
        served_model (`str`, *optional*):
            The model that drew, as the server names it; `None` if it does not say.
        cost (`float`):
            Price in US dollars; a refusal costs nothing.
        is_flagged (`bool`):
            Whether the server marks the image as not safe for work.
        seed (`int`, *optional*):
            The seed that was sent; `None` if none was given or the server takes none.
    """

    image_bytes: bytes | None
    refusal: str | None
    served_model: str | None
    cost: float
    is_flagged: bool = False
    seed: int | None = None


def clean_text(text: str) -> str:
    """Removes lone surrogates, which no file can store, from a text."""
    return text.encode("utf-8", "replace").decode()


def read_top_logprobs(choice: Mapping[str, Any]) -> list[dict[str, float]] | None:
    """Reads the most likely tokens at each place of a server's answer; `None` if it has none in OpenAI's format."""
    try:
        return [_add_up_tokens(place["top_logprobs"]) for place in choice["logprobs"]["content"]] or None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _add_up_tokens(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns token → log-probability, adding the probabilities of different tokens with the same text."""
    added: dict[str, float] = {}
    for row in rows:
        token, logprob = clean_text(row["token"]), max(float(row["logprob"]), _LEAST_LOGPROB)
        if token in added:
            high, low = max(added[token], logprob), min(added[token], logprob)
            logprob = high + math.log1p(math.exp(low - high))
        added[token] = logprob
    return added


class EndpointError(RuntimeError):
    """Asking a server failed."""


class BudgetReached(EndpointError):
    """As much as allowed has been spent, so no call was made."""


class Stopped(EndpointError):
    """No call was made, because the work that needed it is being stopped."""


class ServerError(EndpointError):
    """
    A server gave no answer, or refused the request.

    Args:
        text (`str`):
            The message.
        status (`int`, *optional*):
            HTTP status of the last try; `None` if the connection failed or the answer was unreadable.
        is_final (`bool`, *optional*, defaults to `False`):
            Whether every other request will fail, too: the key is refused, there is no such model, or no credit.
    """

    def __init__(self, text: str, status: int | None = None, is_final: bool = False):
        super().__init__(text)
        self.status = status
        self.is_final = is_final


class BadAnswer(EndpointError):
    """
    A model did not answer in the form it was asked for, twice.

    Args:
        reason (`str`):
            What is wrong. It holds nothing of the answer.
        raw (`str`, *optional*):
            The last answer.
        served_model (`str`, *optional*):
            The model that gave it.
        cost (`float`, *optional*, defaults to `0.0`):
            What its calls cost, in US dollars.
    """

    def __init__(self, reason: str, raw: str = "", served_model: str | None = None, cost: float = 0.0):
        super().__init__(reason)
        self.raw = raw
        self.served_model = served_model
        self.cost = cost
