"""Intervals and paired tests of benchmark numbers, against enumeration, closed forms and the bootstrap of `statistics`."""

from itertools import product

import numpy as np
import pytest

from trl_spatial.evaluation.benchmarks.base import Evidence, Item, Metric, OfficialError
from trl_spatial.evaluation.intervals import metric_difference, metric_interval, official_intervals
from trl_spatial.statistics import bootstrap_interval


def _metric(values, items, groups=None):
    return Metric("m", np.asarray(values, float), items, groups)


def _items(number):
    return [Item(f"p{i:03}", f"prompt {i}", {}) for i in range(number)]


def test_the_interval_is_a_bootstrap_over_prompts():
    rng = np.random.default_rng(1)
    items = [f"p{i}" for i in range(80) for _ in range(4)]
    skill = np.repeat(rng.random(80), 4)
    values = (rng.random(320) < skill).astype(float)
    found = metric_interval(_metric(values, items))
    expected = bootstrap_interval(values, rng=np.random.default_rng(7), clusters=items, num_resamples=4000)
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(expected.low, abs=0.012)
    assert found.high == pytest.approx(expected.high, abs=0.012)
    independent = bootstrap_interval(values, rng=np.random.default_rng(7), num_resamples=4000)
    assert found.high - found.low > 1.15 * (independent.high - independent.low)


def test_a_mean_over_groups_is_resampled_as_one():
    """Groups of very different sizes: the small one decides how wide the interval is."""
    values, items = [1, 0, 1, 0] + [1, 0] * 200, [f"p{i}" for i in range(404)]
    groups = ["small"] * 4 + ["large"] * 400
    found = metric_interval(_metric(values, items, groups))
    assert found.estimate == 0.5
    assert found.high - found.low > 0.4
    assert metric_interval(_metric(values, items)).high < 0.56


def test_where_all_is_right_the_interval_does_not_collapse():
    found = metric_interval(_metric(np.ones(40), [f"p{i // 4}" for i in range(40)]))
    assert found.estimate == 1
    assert found.low == pytest.approx(10 / (10 + 1.959964**2))  # Wilson's, of 10 prompts
    assert np.isnan(metric_interval(_metric([], [])).estimate)


def test_the_permutation_test_agrees_with_all_permutations():
    before, after = [0, 1, 0, 0, 1, 0, 0, 1], [1, 1, 1, 0, 1, 1, 0, 0]
    items = [f"p{i}" for i in range(8)]
    found = metric_difference(_metric(before, items), _metric(after, items))
    differences = np.subtract(after, before)
    estimate = differences.mean()
    exact = np.mean(
        [abs(np.mean(signs * differences)) >= abs(estimate) - 1e-9 for signs in product((1, -1), repeat=8)]
    )
    assert found.interval.estimate == pytest.approx(estimate)
    assert found.p_value == pytest.approx(exact, abs=0.02)
    back = metric_difference(_metric(after, items), _metric(before, items))
    assert back.interval.estimate == -found.interval.estimate
    assert back.p_value == pytest.approx(found.p_value, abs=0.01)


def test_only_prompts_of_both_runs_are_compared():
    first, second = _metric([0, 0, 1], ["a", "b", "c"]), _metric([1, 1, 1], ["b", "c", "d"])
    found = metric_difference(first, second)
    assert found.num_items == 2
    assert found.interval.estimate == pytest.approx(0.5)
    assert metric_difference(first, _metric([1], ["z"])) is None
    assert metric_difference(first, _metric([1], ["a"])) is None


def test_equal_runs_have_no_difference():
    metric = _metric([0, 1, 1, 0, 1], list("abcde"))
    found = metric_difference(metric, metric)
    assert (found.interval.low, found.interval.estimate, found.interval.high, found.p_value) == (0, 0, 0, 1)


def test_numbers_of_an_unknown_program_get_the_standard_error_of_their_mean():
    items = _items(50)
    values = dict(zip((item.id for item in items), np.random.default_rng(0).normal(size=50), strict=True))

    def official(items, evidence):
        return {"mean": float(np.mean([values[item.id] for item in items])), "undefined": None}

    found = official_intervals(official, items, Evidence({}, {}))
    error = np.std(list(values.values()), ddof=1) / np.sqrt(50)  # with blocks of one prompt, the closed form
    assert found["mean"].high - found["mean"].estimate == pytest.approx(1.959964 * error)
    assert found["undefined"] is None


def test_a_program_that_needs_every_prompt_has_no_interval():
    items = _items(5)

    def official(given, evidence):
        if len(given) < 5:
            raise OfficialError("a prompt is missing")
        return {"all": 3.0}

    found = official_intervals(official, items, Evidence({}, {}))["all"]
    assert found.estimate == 3
    assert np.isnan(found.low)
