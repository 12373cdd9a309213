"""What calls cost, and the limit on it."""

import math
import threading
from dataclasses import dataclass

from ..store import RecordLog, SharedLog
from .answers import BudgetReached


@dataclass(frozen=True)
class Prices:
    """
    Prices of a model, in US dollars.

    Args:
        input_per_million (`float`, *optional*, defaults to `0.0`):
            A million tokens that it reads.
        output_per_million (`float`, *optional*, defaults to `0.0`):
            A million tokens that it writes.
        per_image (`float`, *optional*, defaults to `0.0`):
            An image that it draws.
    """

    input_per_million: float = 0.0
    output_per_million: float = 0.0
    per_image: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is no price. Give US dollars, 0 or more.")

    def of_tokens(self, input_tokens: int, output_tokens: int) -> float:
        """Price of a call in US dollars."""
        return (self.input_per_million * input_tokens + self.output_per_million * output_tokens) / 1e6


class Spend:
    """
    A limit on what several endpoints spend together. Nothing is reserved: calls that are running when the limit is reached
    still end, so that the sum may pass it by the price of as many calls as run at once.

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

    def check(self) -> None:
        """
        Call it before a call that costs.

        Raises:
            [`BudgetReached`]: If the limit is reached.
        """
        # ten prices of 0.01 add up to a little less than 0.10
        if self._spent >= self.limit_usd - 1e-9:
            raise BudgetReached(
                f"${self._spent:.2f} of ${self.limit_usd:.2f} have been spent. Raise the limit to continue; what has been "
                "answered is kept."
            )


class RecordedSpend(Spend):
    """
    A limit over several runs: a payment has reached the disk before its answer has, so that none is forgotten.

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
