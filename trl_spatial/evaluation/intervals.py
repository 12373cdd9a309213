"""Intervals and paired tests for benchmark metrics. Resamples whole prompts, whose images succeed or fail together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..statistics import Interval, accuracy_interval
from .benchmarks.base import Evidence, Item, Metric, OfficialError


NUM_RESAMPLES = 2000
_NUM_PERMUTATIONS = 10_000
_NUM_BLOCKS = 50  # blocks of prompts that the jackknife leaves out in turn
_FEWEST_ITEMS = 10  # prompts; with fewer, a jackknife means nothing
_Z = 1.959963984540054  # for 95 %


@dataclass(frozen=True)
class Difference:
    """
    The difference between two runs in a metric.

    Args:
        interval ([`~statistics.Interval`]):
            The second minus the first, with its 95 % interval.
        p_value (`float`):
            p-value of the permutation test that exchanges the two runs prompt by prompt.
        num_items (`int`):
            Prompts that both runs have.
    """

    interval: Interval
    p_value: float
    num_items: int


def metric_interval(metric: Metric) -> Interval:
    """
    A metric with its 95 % interval: a bootstrap over prompts; Wilson's, over prompts, where all values are 0 or all are 1, since a
    bootstrap would collapse. NaN if there are no values; its ends are NaN if all are of one prompt.
    """
    if len(metric.values) == 0:
        return Interval(np.nan, np.nan, np.nan)
    if metric.values.max() <= 0 or metric.values.min() >= 1:
        if not np.isin(metric.values, (0, 1)).all():  # chance-corrected values are not shares
            return Interval(metric.estimate, metric.estimate, metric.estimate)
        return accuracy_interval(np.full(len(set(metric.items)), metric.values[0]))
    if len(set(metric.items)) < 2:
        return Interval(metric.estimate, np.nan, np.nan)
    (sums, counts), _ = _by_item(metric, sorted(set(metric.items)))
    low, high = np.nanquantile(_ratios(_draws(len(sums)), sums, counts), [0.025, 0.975])
    return Interval(metric.estimate, float(low), float(high))


def metric_difference(first: Metric, second: Metric) -> Difference | None:
    """Returns the difference of two runs in a metric, over their common prompts; `None` for fewer than two."""
    items = sorted(set(first.items) & set(second.items))
    if len(items) < 2:
        return None
    names = sorted(set(_groups(first)) | set(_groups(second)))
    (sums_1, counts_1), (sums_2, counts_2) = (_by_item(metric, items, names)[0] for metric in (first, second))
    everything = np.ones((1, len(items)))
    estimate = (_ratios(everything, sums_2, counts_2) - _ratios(everything, sums_1, counts_1))[0]
    draws = _draws(len(items))
    low, high = np.nanquantile(_ratios(draws, sums_2, counts_2) - _ratios(draws, sums_1, counts_1), [0.025, 0.975])
    exchanged = np.random.default_rng(0).integers(2, size=(_NUM_PERMUTATIONS, len(items)))
    kept = 1 - exchanged
    differences = _ratio(kept @ sums_2 + exchanged @ sums_1, kept @ counts_2 + exchanged @ counts_1) - _ratio(
        kept @ sums_1 + exchanged @ sums_2, kept @ counts_1 + exchanged @ counts_2
    )
    # tolerance: sums in a different order differ in the last bits
    as_large = np.count_nonzero(np.abs(differences) >= abs(estimate) - 1e-12)
    p_value = (1 + as_large) / (1 + _NUM_PERMUTATIONS)
    return Difference(Interval(float(estimate), float(low), float(high)), float(p_value), len(items))


def official_intervals(
    official: Callable[[Sequence[Item], Evidence], dict[str, float | None]],
    items: Sequence[Item],
    evidence: Evidence,
) -> dict[str, Interval | None]:
    """
    Returns the numbers of an official program with 95 % intervals, by a jackknife that leaves out blocks of prompts in
    turn: it treats the program as a black box.

    Args:
        official (`Callable`):
            See [`~evaluation.benchmarks.base.Benchmark.official`].
        items (`Sequence[Item]`), evidence ([`~evaluation.benchmarks.base.Evidence`]):
            Its arguments.

    Returns:
        `dict`: Name → interval, whose ends are NaN where there are fewer than 10 prompts or the program does not run on a part of them;
        `None` where the number is undefined.

    Raises:
        [`~evaluation.benchmarks.base.OfficialError`]: If the official program would stop.
    """
    numbers = official(items, evidence)
    num_blocks = min(_NUM_BLOCKS, len(items)) if len(items) >= _FEWEST_ITEMS else 0
    block_of = np.random.default_rng(0).permutation(len(items)) % max(num_blocks, 1)
    replicates: list[dict[str, Any]] = []
    for block in range(num_blocks):
        kept = [item for item, number in zip(items, block_of, strict=True) if number != block]
        try:
            replicates.append(official(kept, evidence_of(kept, evidence)))
        except OfficialError:
            return {name: _around(value, None) for name, value in numbers.items()}
    return {name: _around(value, [found.get(name) for found in replicates]) for name, value in numbers.items()}


def evidence_of(items: Sequence[Item], evidence: Evidence) -> Evidence:
    """Returns the part of the evidence that is about these items."""
    ids = {item.id for item in items}
    return Evidence(
        {key: file for key, file in evidence.images.items() if key[0] in ids},
        {key: replies for key, replies in evidence.replies.items() if key[0] in ids},
    )


def _around(value: float | None, replicates: Sequence[float | None] | None) -> Interval | None:
    if value is None:
        return None
    if not replicates or any(found is None or not np.isfinite(found) for found in replicates):
        return Interval(float(value), np.nan, np.nan)
    spread = np.asarray(replicates, float)
    half = _Z * float(np.sqrt((len(spread) - 1) * spread.var()))
    return Interval(float(value), float(value) - half, float(value) + half)


def _groups(metric: Metric) -> Sequence[str]:
    return [""] * len(metric.values) if metric.groups is None else metric.groups


def _by_item(
    metric: Metric, items: Sequence[str], names: Sequence[str] | None = None
) -> tuple[tuple[np.ndarray, np.ndarray], Sequence[str]]:
    """
    Returns the sums and the counts of the values of each item in each group, both `(num_items, num_groups)`, and the
    names of the groups.
    """
    names = sorted(set(_groups(metric))) if names is None else names
    row_of, column_of = ({name: i for i, name in enumerate(known)} for known in (items, names))
    sums, counts = np.zeros((len(items), len(names))), np.zeros((len(items), len(names)))
    for value, item, group in zip(metric.values, metric.items, _groups(metric), strict=True):
        if (row := row_of.get(item)) is not None:
            sums[row, column_of[group]] += value
            counts[row, column_of[group]] += 1
    return (sums, counts), names


def _draws(num_items: int) -> np.ndarray:
    """
    Returns how often each resample draws each item, `(num_resamples, num_items)`; equal for equal numbers of items.
    """
    chances = np.full(num_items, 1 / num_items)
    return np.random.default_rng(0).multinomial(num_items, chances, size=NUM_RESAMPLES)


def _ratios(draws: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return _ratio(draws @ sums, draws @ counts)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    Returns the mean of the groups' means, over the groups with values: `(num_rows,)`, NaN for rows without values.
    """
    with np.errstate(invalid="ignore"):
        means = sums / counts
    is_known = counts > 0
    num_groups = is_known.sum(axis=1)
    totals = np.where(is_known, means, 0.0).sum(axis=1)
    return np.where(num_groups > 0, totals / np.maximum(num_groups, 1), np.nan)
