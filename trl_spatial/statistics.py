from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


_BLOCK = 2**20  # random numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """An estimate, and the lower and upper end of its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class ReliabilityBins:
    """
    What a reliability plot shows: how often the model is right among the pairs it is equally sure of. `edges`, of shape
    `(num_bins + 1,)`, go from 0.5 to 1; `confidence` (mean), `accuracy` and `counts` (of pairs) have the shape `(num_bins,)`,
    the first two NaN in an empty bin.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray


def accuracy_interval(correct: ArrayLike, confidence: float = 0.95) -> Interval:
    """
    Accuracy with Wilson's score interval, which stays inside `[0, 1]` and does not collapse when everything is right.

    The pairs count as independent. If several share a prompt, use [`bootstrap_interval`] with `clusters`.

    Args:
        correct (array of shape `(num_pairs,)`):
            1 (`True`) where the model is right, 0 (`False`) where it is wrong, 0.5 for a tie.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability that the interval covers the true accuracy.

    Raises:
        `ValueError`: If `correct` is empty or has values outside `[0, 1]`, or if `confidence` is outside `(0, 1)`.
    """
    correct = _fractions("correct", correct)
    _check_confidence(confidence)
    num_pairs, accuracy = len(correct), correct.mean()
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = (accuracy + z**2 / (2 * num_pairs)) / (1 + z**2 / num_pairs)
    half_width = (
        (accuracy * (1 - accuracy) / num_pairs + (z / (2 * num_pairs)) ** 2) ** 0.5 * z / (1 + z**2 / num_pairs)
    )
    # an accuracy of 0 or 1 is itself an end of the interval, which rounding would miss by 1e-17
    return Interval(float(accuracy), float(max(0, center - half_width)), float(min(1, center + half_width)))


def bootstrap_interval(
    values: ArrayLike,
    clusters: Sequence | np.ndarray | None = None,
    *,
    rng: np.random.Generator,
    statistic: Callable[[np.ndarray], float] = np.mean,
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> Interval:
    """
    Percentile bootstrap interval that draws whole clusters.

    Pairs made from one prompt succeed and fail together, so drawing them one by one would give too narrow an interval.
    With few clusters (below about 20) the interval is still too narrow.

    Args:
        values (array of shape `(num_samples,)` or `(num_samples, num_columns)`):
            One row per sample.
        clusters (sequence of length `num_samples`, *optional*):
            Key of the cluster of each sample, for example its prompt. If not set, every sample is its own cluster.
        rng (`np.random.Generator`):
            Source of the resamples.
        statistic (`Callable`, *optional*, defaults to `np.mean`):
            Maps the rows of a resample to a number.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability that the interval covers the true value.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of resamples.

    Returns:
        [`Interval`]:
            Statistic of all the values and its interval.

    Raises:
        `ValueError`: If `values` is empty, `clusters` has another length, `confidence` is outside `(0, 1)`, or
            `num_resamples` is below 1.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_spatial.statistics import area_under_roc_curve, bootstrap_interval

    >>> rng = np.random.default_rng(0)
    >>> is_noisy = rng.random(500) < 0.3
    >>> std = rng.normal(size=500) + 2 * is_noisy
    >>> rows = np.column_stack([std, is_noisy])
    >>> bootstrap_interval(rows, rng=rng, statistic=lambda rows: area_under_roc_curve(*rows.T))
    Interval(estimate=0.9258237740027999, low=0.8980327146315934, high=0.9506251377199834)
    ```
    """
    values = np.asarray(values)
    if len(values) == 0:
        raise ValueError("values is empty: pass at least one sample.")
    keys = _cluster_keys(clusters, len(values))
    _check_confidence(confidence)
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}: use at least 1.")

    _, cluster_of = np.unique(keys, return_inverse=True)  # (num_samples,)
    if statistic is np.mean and values.ndim == 1:
        resampled = _resampled_means(values, cluster_of, rng, num_resamples)
    else:
        num_clusters = cluster_of.max() + 1
        resampled = np.empty(num_resamples)
        for number in range(num_resamples):
            times_drawn = np.bincount(rng.integers(num_clusters, size=num_clusters), minlength=num_clusters)
            resampled[number] = statistic(np.repeat(values, times_drawn[cluster_of], axis=0))
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(statistic(values)), float(low), float(high))


def _resampled_means(
    values: np.ndarray, cluster_of: np.ndarray, rng: np.random.Generator, num_resamples: int
) -> np.ndarray:
    """Computes the resamples' means from cluster sums: a table of many intervals takes a second rather than ten."""
    sums, sizes = np.bincount(cluster_of, values), np.bincount(cluster_of)
    block = max(_BLOCK // len(sums), 1)
    means = []
    for start in range(0, num_resamples, block):
        drawn = rng.integers(len(sums), size=(min(block, num_resamples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def share_interval(values: ArrayLike, clusters: Sequence | np.ndarray | None = None) -> Interval:
    """
    A share with its 95 % interval: Wilson's where all samples are independent; else a bootstrap that draws whole clusters, and
    Wilson's over the clusters where it would collapse: all values are equal, or there is one cluster.

    Args:
        values (array of shape `(num_samples,)`):
            Such as 1 where something is right and 0 where it is wrong.
        clusters (sequence of length `num_samples`, *optional*):
            Key of the cluster of each sample, for example its prompt. If not set, every sample is its own cluster.

    Raises:
        `ValueError`: If `values` is empty or has values outside `[0, 1]`, or `clusters` has another length.
    """
    values = _fractions("values", values)
    keys = _cluster_keys(clusters, len(values))
    num_clusters = len(set(keys.tolist()))
    if num_clusters == len(values):
        return accuracy_interval(values)
    if num_clusters == 1 or values.min() == values.max():
        return accuracy_interval(np.full(num_clusters, values.mean()))
    return bootstrap_interval(values, keys, rng=np.random.default_rng(0))


def paired_permutation_test(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence | np.ndarray | None = None,
    *,
    rng: np.random.Generator,
    num_resamples: int = 9999,
) -> float:
    """
    Two-sided p-value of the mean difference of two paired measurements. If both are alike, the sign of a difference is a
    coin flip; those of one cluster, which succeed and fail together, flip together.

    All signs are tried where there are at most 12 clusters that differ; otherwise they are drawn.

    Args:
        first, second (array of shape `(num_samples,)`):
            The two measurements of each sample, for example whether each of two models is right.
        clusters (sequence of length `num_samples`, *optional*):
            Key of the cluster of each sample. If not set, every sample is its own cluster.
        rng (`np.random.Generator`):
            Source of the signs.
        num_resamples (`int`, *optional*, defaults to `9999`):
            How many signs of all clusters are drawn. The smallest p-value is `1 / (num_resamples + 1)`.

    Raises:
        `ValueError`: If the lengths differ, there are no samples, a value is NaN, or `num_resamples` is below 1.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_spatial.statistics import paired_permutation_test

    >>> paired_permutation_test([1, 1, 1, 1], [0, 0, 0, 0], rng=np.random.default_rng(0))
    0.125
    ```
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise ValueError(f"first has shape {first.shape}, second has shape {second.shape}: pass two equal vectors.")
    difference = first - second
    if np.isnan(difference).any():
        raise ValueError(f"Sample {int(np.isnan(difference).argmax())} has a NaN: drop it, or count it as wrong.")
    keys = _cluster_keys(clusters, len(first))
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}: use at least 1.")

    _, cluster_of = np.unique(keys, return_inverse=True)
    sums = np.bincount(cluster_of, difference)
    sums = sums[np.abs(sums) > 1e-12]  # flipping the sign of 0 changes nothing
    if len(sums) == 0:
        return 1.0
    observed = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # tolerance: rounding depends on the order of summation
    if len(sums) <= 12:
        signs = 1 - 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)
        return float((np.abs(signs @ sums) >= observed).mean())
    block, num_extreme = max(_BLOCK // len(sums), 1), 0
    for start in range(0, num_resamples, block):
        signs = rng.integers(2, size=(min(block, num_resamples - start), len(sums)), dtype=np.int8) * 2 - 1
        num_extreme += int((np.abs(signs @ sums) >= observed).sum())
    return (num_extreme + 1) / (num_resamples + 1)  # the observed signs are one of the possible draws


def holm(p_values: ArrayLike) -> np.ndarray:
    """
    Holm's adjustment of p-values of several tests, of shape `(num_tests,)`: calling those significant whose adjusted value is
    at most 0.05 makes any false call with a probability of at most 0.05, however the tests depend on each other.

    Raises:
        `ValueError`: If a value is outside `[0, 1]`.
    """
    values = np.asarray(p_values, dtype=float)
    if len(values) == 0:
        return values
    values = _fractions("p_values", values)
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(values[order] * np.arange(len(values), 0, -1), 1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted


def paired_change(before: ArrayLike, after: ArrayLike, clusters: Sequence | np.ndarray) -> Interval | None:
    """
    Mean change of samples that were measured twice, with its 95 % interval over clusters.

    Args:
        before, after (array of shape `(num_samples,)`):
            The two measurements of each sample; NaN where there is none.
        clusters (sequence of length `num_samples`):
            Key of the cluster of each sample, for example its prompt.

    Returns:
        [`Interval`]: Of the samples with both measurements; `None` if they are of fewer than two clusters, of which nothing can be
        said.
    """
    change = np.asarray(after, float) - np.asarray(before, float)
    known = ~np.isnan(change)
    keys = np.asarray(clusters)[known]
    if len(set(keys.tolist())) < 2:
        return None
    return bootstrap_interval(change[known], keys, rng=np.random.default_rng(0))


def compare_rewards(
    before: np.ndarray, after: np.ndarray, names: Sequence[str], prompts: Sequence[str]
) -> dict[str, dict]:
    """
    Mean rewards before and after a training, and the change with its 95 % interval over the prompts. Images are paired: both have
    the same prompt and noise.

    Args:
        before, after (`np.ndarray` of shape `(num_images, num_funcs)`):
            Rewards of each image; NaN where a function gave none.
        names (`Sequence[str]` of length `num_funcs`):
            Names of the functions.
        prompts (`Sequence[str]` of length `num_images`):
            Prompts of the images.

    Returns:
        `dict[str, dict]`: For each function that rewarded any image, the `"before"` and `"after"` means, the
        `"change"`, its `"interval"`, `None` for a single prompt, and the number of images, `"n"`; ready for JSON.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_spatial.statistics import compare_rewards

    >>> compare_rewards(np.array([[1.0], [3.0]]), np.array([[2.0], [4.0]]), ["redness"], ["a cat", "a dog"])
    {'redness': {'before': 2.0, 'after': 3.0, 'change': 1.0, 'interval': [1.0, 1.0], 'n': 2}}
    ```
    """
    results = {}
    for name, old, new in zip(names, before.T.astype(float), after.T.astype(float), strict=True):
        known = ~(np.isnan(old) | np.isnan(new))
        if not known.any():
            continue
        change = paired_change(old, new, prompts)
        results[name] = {
            "before": float(old[known].mean()),
            "after": float(new[known].mean()),
            "change": float((new - old)[known].mean()),
            "interval": None if change is None else [change.low, change.high],
            "n": int(known.sum()),
        }
    return results


def reliability_bins(
    probabilities: ArrayLike, outcomes: ArrayLike | None = None, *, num_bins: int = 10
) -> ReliabilityBins:
    """
    Group pairs by how sure the model is of its order, and see how often it is right.

    For P(chosen) the outcome is always 1, so that a bin of small P(chosen) would hold errors only, however calibrated
    the model is. So each pair is folded: its confidence is the probability of the order that the model prefers, and it
    is correct if that is the true order.

    Args:
        probabilities (array of shape `(num_pairs,)`):
            Predicted probability that the first image of a pair is preferred.
        outcomes (array of shape `(num_pairs,)`, *optional*):
            1 where the first image is preferred, 0 where the second is, 0.5 for a tie. By default always 1.
        num_bins (`int`, *optional*, defaults to `10`):
            Number of bins of equal width between 0.5 and 1. A bin includes its upper bound, the first one also 0.5.

    Raises:
        `ValueError`: If the lengths differ, a value is outside `[0, 1]`, or `num_bins` is below 1.
    """
    probabilities = _fractions("probabilities", probabilities)
    outcomes = np.ones_like(probabilities) if outcomes is None else _fractions("outcomes", outcomes)
    if len(outcomes) != len(probabilities):
        raise ValueError(
            f"outcomes has {len(outcomes)} entries but probabilities has {len(probabilities)}: pass one per pair."
        )
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}: use at least 1.")

    confidence = np.maximum(probabilities, 1 - probabilities)
    correct = np.where(probabilities > 0.5, outcomes, 1 - outcomes)
    correct[probabilities == 0.5] = 0.5  # a tie counts half, whichever image comes first
    edges = np.linspace(0.5, 1, num_bins + 1)
    bins = np.searchsorted(edges[1:-1], confidence)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of an empty bin
        return ReliabilityBins(
            edges=edges,
            confidence=np.bincount(bins, confidence, minlength=num_bins) / counts,
            accuracy=np.bincount(bins, correct, minlength=num_bins) / counts,
            counts=counts,
        )


def expected_calibration_error(
    probabilities: ArrayLike, outcomes: ArrayLike | None = None, *, num_bins: int = 10
) -> float:
    """
    Mean distance between confidence and accuracy over the [`reliability_bins`], weighted by their counts, in `[0, 1]`. It
    takes the same arguments.

    Even a calibrated model has an error above 0 on finite data, at most about `0.4 * sqrt(num_bins / num_pairs)`.
    """
    bins = reliability_bins(probabilities, outcomes, num_bins=num_bins)
    gaps = np.abs(bins.confidence - bins.accuracy)
    return float(np.nansum(gaps * bins.counts) / bins.counts.sum())


def area_under_roc_curve(scores: ArrayLike, labels: ArrayLike) -> float:
    """
    Probability that a random positive scores higher than a random negative, a tie counting half: 0.5 for uninformative
    scores. `scores` and `labels` (1 for a positive, 0 for a negative) have the shape `(num_samples,)`.

    Raises:
        `ValueError`: If the lengths differ, a score is NaN, a label is neither 0 nor 1, or one class is missing.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores has shape {scores.shape}, labels has shape {labels.shape}: pass two equal vectors.")
    if np.isnan(scores).any():
        raise ValueError(f"scores[{np.isnan(scores).argmax()}] is NaN: it has no rank. Drop that sample.")
    if not np.isin(labels, [0, 1]).all():
        raise ValueError(f"labels has values {np.unique(labels)[:5]}: use 0 and 1.")
    num_positive = int(labels.sum())
    num_negative = len(labels) - num_positive
    if num_positive == 0 or num_negative == 0:
        raise ValueError(f"labels has {num_positive} positives and {num_negative} negatives: pass some of each.")

    rank_sum = _ranks(scores)[labels == 1].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """
    Spearman's correlation of two scores of the same samples, both `(num_samples,)`: how far they agree on the order, from -1 to
    1. NaN if all values of either are equal, or there are fewer than two.

    Raises:
        `ValueError`: If the lengths differ or a score is NaN.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"first has shape {first.shape}, second has shape {second.shape}: pass two equal vectors.")
    for name, values in (("first", first), ("second", second)):
        if np.isnan(values).any():
            raise ValueError(f"{name}[{np.isnan(values).argmax()}] is NaN: it has no rank. Drop that sample.")
    if min(len(np.unique(first)), len(np.unique(second))) < 2:
        return float("nan")
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 1; equal values share their mean rank."""
    _, value_of, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[value_of]


def _fractions(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} has shape {array.shape}: pass a vector with at least one value.")
    unusable = ~((array >= 0) & (array <= 1))  # NaN too
    if unusable.any():
        index = int(unusable.argmax())
        raise ValueError(f"{name}[{index}] is {array[index]}: use values between 0 and 1.")
    return array


def _cluster_keys(clusters: Sequence | np.ndarray | None, num_samples: int) -> np.ndarray:
    keys = np.arange(num_samples) if clusters is None else np.asarray(clusters)
    if keys.shape != (num_samples,):
        raise ValueError(
            f"clusters has shape {keys.shape} but there are {num_samples} samples: pass one key per sample."
        )
    return keys


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: use a value between 0 and 1, such as 0.95.")
