"""The cost of calls, and a limit on it."""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..store import RecordLog, SharedLog
from .answers import BudgetReached


CHARACTERS_PER_TOKEN, TOKENS_PER_IMAGE = 4, 1000  # estimates, for servers that do not report usage


@dataclass(frozen=True)
class Prices:
    """
    Prices of a model, in US dollars.

    Args:
        input_per_million (`float`, *optional*, defaults to `0.0`):
            Price of a million input tokens.
        output_per_million (`float`, *optional*, defaults to `0.0`):
            Price of a million output tokens.
        per_image (`float`, *optional*, defaults to `0.0`):
            Price of an image.
    """

    input_per_million: float = 0.0
    output_per_million: float = 0.0
    per_image: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is not a price. Give US dollars, 0 or more.")

    def of_tokens(self, input_tokens: int, output_tokens: int) -> float:
        """Price of a call in US dollars."""
        return (self.input_per_million * input_tokens + self.output_per_million * output_tokens) / 1e6


class Spend:
    """
    A limit on what several endpoints spend together. Nothing is reserved: calls that are running when the limit is reached
    still end, so the total may exceed it by the price of all calls that run at once.

    Args:
        limit_usd (`float`):
            The limit in US dollars.
        spent (`float`, *optional*, defaults to `0.0`):
            What an earlier run has spent of it.
    """

    def __init__(self, limit_usd: float, spent: float = 0.0):
        for name, value in (("limit_usd", limit_usd), ("spent", spent)):
            if not value >= 0:
                raise ValueError(f"`{name}` is an amount of US dollars, 0 or more, got {value}.")
        self.limit_usd = limit_usd
        self._spent = spent
        self._lock = threading.Lock()

    @property
    def spent(self) -> float:
        """What has been spent so far, in US dollars."""
        return self._spent

    def add(self, cost: float) -> None:
        """Counts the price of a call."""
        with self._lock:
            self._spent += cost

    @property
    def is_reached(self) -> bool:
        """Whether the limit is reached."""
        return self._spent >= self.limit_usd - 1e-9  # ten prices of 0.01 add up to a little less than 0.10

    def check(self) -> None:
        """
        Checks that the limit is not reached; to be called before each call that costs money.

        Raises:
            [`BudgetReached`]: If the limit is reached.
        """
        if self.is_reached:
            raise BudgetReached(
                f"${self._spent:.2f} of ${self.limit_usd:.2f} have been spent. Raise the limit to continue; what has been "
                "answered is kept."
            )


class RecordedSpend(Spend):
    """
    A limit over several runs: each payment is on disk before its answer is, so that none is lost.

    Args:
        limit_usd (`float`):
            The limit in US dollars.
        payments ([`~store.RecordLog`] or [`~store.SharedLog`]):
            Log of payments, each with its `cost` in US dollars.
        **labels (`str`):
            What else is recorded with a payment. Only payments with the same labels count.
    """

    def __init__(self, limit_usd: float, payments: RecordLog | SharedLog, **labels: str):
        earlier = (record for record in payments if labels.items() <= record.items())
        super().__init__(limit_usd, float(sum(record["cost"] for record in earlier)))
        self._payments, self._labels, self._write_lock = payments, labels, threading.Lock()

    def add(self, cost: float) -> None:
        """Counts and records the price of a call."""
        super().add(cost)
        if cost:
            with self._write_lock:
                self._payments.append([{**self._labels, "cost": cost}])


def count_tokens(answer: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], text: str) -> tuple[int, int]:
    """
    Counts the tokens of a call: the server's count, or an estimate if it reports none, so that a spending limit never
    silently stops working.

    Args:
        answer (`Mapping[str, Any]`):
            The server's answer.
        messages (`Sequence[Mapping[str, Any]]`), text (`str`):
            The messages that were sent, and the text that came back.

    Returns:
        `tuple[int, int]`: Numbers of input and output tokens.
    """
    usage = answer.get("usage")
    if isinstance(usage, Mapping):
        read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(read, int) and isinstance(written, int) and min(read, written) >= 0:
            return read, written
    parts = [message["content"] for message in messages]
    parts = [part for content in parts for part in ([content] if isinstance(content, str) else content)]
    texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
    num_images = sum(isinstance(part, Mapping) and part.get("type") == "image_url" for part in parts)
    num_read = sum(map(len, texts)) // CHARACTERS_PER_TOKEN + num_images * TOKENS_PER_IMAGE
    return num_read, -(-len(text) // CHARACTERS_PER_TOKEN)
