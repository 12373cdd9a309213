"""Client for language models, judges and image models behind an OpenAI-compatible server."""

from .answers import Answer, BadAnswer, BudgetReached, Drawing, EndpointError, ServerError
from .client import Endpoint
from .spending import Prices, RecordedSpend, Spend


__all__ = [
    "Answer",
    "BadAnswer",
    "BudgetReached",
    "Drawing",
    "Endpoint",
    "EndpointError",
    "Prices",
    "RecordedSpend",
    "ServerError",
    "Spend",
]
