"""Agreement between reviewers, and the decision on an item from its votes."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from ...statistics import Interval
from .votes import ReviewItem, preferred_side


NUM_RESAMPLES = 1000


def decide(votes: Sequence[Mapping[str, Any]], needed: int = 2) -> str | None:
    """
    Decides an item by the votes of its reviewers.

    Args:
        votes (`Sequence[Mapping[str, Any]]`):
            The votes on it, one per reviewer.
        needed (`int`, *optional*, defaults to `2`):
            Number of votes before anything is decided.

    Returns:
        `str`, *optional*: what all of them say, as [`preferred_side`] puts it; `"disagree"`; or `None` with too few votes.
    """
    if len(votes) < needed:
        return None
    said = {preferred_side(vote) for vote in votes}
    return said.pop() if len(said) == 1 else "disagree"


def summarize_votes(votes: Iterable[Mapping[str, Any]], items: Iterable[ReviewItem]) -> dict[str, Any]:
    """
    Agreement and speed of reviewers.

    Args:
        votes (`Iterable[Mapping[str, Any]]`):
            The current votes.
        items (`Iterable[ReviewItem]`):
            The items that they are about.

    Returns:
        `dict`: `num_votes`; `alpha`, Krippendorff's for nominal answers, an interval over items as `estimate`, `low`
            and `high`, NaN if no item has two votes; `raw_agreement` of two votes on the same item; `gold_accuracy` on
            items with a known answer; and `reviewers`, name → `num_votes`, `median_seconds` and `gold_accuracy`.
            Undefined values are NaN.

    Raises:
        `ImportError`: If the package `krippendorff` is missing.
    """
    gold = {item.id: item.gold for item in items if item.gold is not None}
    by_item: dict[str, list[str]] = defaultdict(list)
    by_reviewer: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for vote in votes:
        by_item[vote["item"]].append(preferred_side(vote))
        by_reviewer[vote["reviewer"]].append(vote)
    shared = [said for said in by_item.values() if len(said) > 1]
    agreed = [a == b for said in shared for a, b in combinations(said, 2)]
    everything = [vote for given in by_reviewer.values() for vote in given]
    interval = _alpha(shared)
    return {
        "num_votes": len(everything),
        "alpha": {"estimate": interval.estimate, "low": interval.low, "high": interval.high},
        "raw_agreement": _mean(agreed),
        "gold_accuracy": _gold_accuracy(everything, gold),
        "reviewers": {
            name: {
                "num_votes": len(given),
                "median_seconds": median(vote["milliseconds"] for vote in given) / 1000,
                "gold_accuracy": _gold_accuracy(given, gold),
            }
            for name, given in sorted(by_reviewer.items())
        },
    }


def describe_summary(summary: Mapping[str, Any]) -> str:
    """Describes the summary of votes in a sentence, leaving out undefined values."""
    alpha, parts = summary["alpha"], [f"{summary['num_votes']:,} votes by people"]
    if not math.isnan(alpha["estimate"]):
        interval = f"[{alpha['low']:.2f}, {alpha['high']:.2f}]"
        parts.append(f"Krippendorff's alpha {alpha['estimate']:.2f} {interval}")
    for key, text in (("raw_agreement", "raw agreement"), ("gold_accuracy", "right on pairs with a known answer")):
        if not math.isnan(summary[key]):
            parts.append(f"{text} {summary[key]:.1%}")
    return f"{', '.join(parts)}."


def _gold_accuracy(votes: Sequence[Mapping[str, Any]], gold: Mapping[str, str]) -> float:
    return _mean([preferred_side(vote) == gold[vote["item"]] for vote in votes if vote["item"] in gold])


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _alpha(items: Sequence[Sequence[str]]) -> Interval:
    """
    Krippendorff's alpha of the answers per item, with a percentile bootstrap interval that resamples whole items.
    """
    try:
        import krippendorff
    except ImportError as error:
        raise ImportError('Agreement needs krippendorff: pip install "trl-spatial[data]"') from error
    values = sorted({answer for said in items for answer in said})
    if len(values) < 2:  # with one answer, chance agreement is 1 and alpha is 0/0
        estimate = 1.0 if items else float("nan")
        return Interval(estimate, estimate, estimate)
    counts = np.array([[Counter(said)[value] for value in values] for said in items])  # (num_items, num_values)

    def alpha(rows: np.ndarray) -> float:
        if (rows.sum(axis=0) > 0).sum() < 2:
            return 1.0
        return float(krippendorff.alpha(value_counts=rows, level_of_measurement="nominal"))

    rng = np.random.default_rng(0)
    resampled = [alpha(counts[rng.integers(len(counts), size=len(counts))]) for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(alpha(counts), float(low), float(high))
