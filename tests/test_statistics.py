"""Oracles: scipy.stats, closed forms, coverage of known truths, and symmetries."""

import numpy as np
import pytest
import scipy.stats

from trl_spatial.statistics import (
    accuracy_interval,
    area_under_roc_curve,
    bootstrap_interval,
    compare_rewards,
    expected_calibration_error,
    holm,
    paired_change,
    paired_permutation_test,
    rank_correlation,
    reliability_bins,
    share_interval,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class TestAccuracyInterval:
    @pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
    @pytest.mark.parametrize(("num_correct", "num_pairs"), [(0, 1), (0, 50), (7, 20), (1900, 2000), (50, 50)])
    def test_equals_scipy(self, num_correct, num_pairs, confidence):
        interval = accuracy_interval(np.arange(num_pairs) < num_correct, confidence)
        theirs = scipy.stats.binomtest(num_correct, num_pairs).proportion_ci(confidence, method="wilson")
        assert interval.estimate == num_correct / num_pairs
        assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        assert 0 <= interval.low <= interval.estimate <= interval.high <= 1

    def test_a_tie_counts_half(self):
        assert accuracy_interval([0.5, 0.5, 1, 0]) == accuracy_interval([0, 1, 1, 0])

    @pytest.mark.parametrize(
        ("correct", "confidence", "message"),
        [
            ([], 0.95, r"correct has shape \(0,\)"),
            ([[1, 0]], 0.95, r"correct has shape \(1, 2\)"),
            ([1, 2], 0.95, r"correct\[1\] is 2.0: use values between 0 and 1"),
            ([1, np.nan], 0.95, r"correct\[1\] is nan"),
            ([1, 0], 95, "confidence is 95: use a value between 0 and 1"),
        ],
    )
    def test_unusable_argument(self, correct, confidence, message):
        with pytest.raises(ValueError, match=message):
            accuracy_interval(correct, confidence)


class TestBootstrapInterval:
    def test_of_a_mean_equals_the_normal_interval(self, rng):
        values = rng.normal(3.0, 2.0, size=2000)
        interval = bootstrap_interval(values, rng=rng)
        half_width = 1.96 * values.std() / np.sqrt(2000)
        assert interval.estimate == values.mean()
        assert interval.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
        assert interval.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)

    def test_copies_of_a_sample_tell_nothing_new(self, rng):
        values = rng.normal(size=200)
        prompts = [f"prompt {i}" for i in range(200)]
        once = bootstrap_interval(values, prompts, rng=np.random.default_rng(1))
        copied = bootstrap_interval(np.tile(values, 5), prompts * 5, rng=np.random.default_rng(1))
        assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-12)

    def test_covers_the_truth_as_often_as_it_says(self, rng):
        # 40 prompts of unequal size whose pairs share the prompt's offset: the true mean is 0
        hits = 0
        for _ in range(200):
            prompts = np.repeat(np.arange(40), rng.integers(1, 6, size=40))
            values = rng.normal(size=40)[prompts] + 0.3 * rng.normal(size=len(prompts))
            interval = bootstrap_interval(values, prompts, rng=rng, confidence=0.8, num_resamples=200)
            hits += interval.low <= 0 <= interval.high
        assert scipy.stats.binomtest(hits, 200, 0.78).pvalue > 0.001  # a percentile interval is slightly narrow

    def test_any_statistic(self, rng):
        rows = np.column_stack([rng.normal(size=300), rng.random(300) < 0.4])
        interval = bootstrap_interval(rows, rng=rng, statistic=lambda rows: np.median(rows[:, 0]), num_resamples=500)
        theirs = scipy.stats.bootstrap(
            (rows[:, 0],), np.median, method="percentile", n_resamples=500, rng=np.random.default_rng(2)
        )
        assert interval.estimate == np.median(rows[:, 0])
        assert interval.low == pytest.approx(theirs.confidence_interval.low, abs=0.05)
        assert interval.high == pytest.approx(theirs.confidence_interval.high, abs=0.05)

    def test_is_drawn_from_the_generator(self):
        values = np.arange(30.0)
        same = [bootstrap_interval(values, rng=np.random.default_rng(3), num_resamples=50) for _ in range(2)]
        assert same[0] == same[1]
        assert same[0] != bootstrap_interval(values, rng=np.random.default_rng(4), num_resamples=50)

    @pytest.mark.parametrize(
        ("values", "kwargs", "message"),
        [
            ([], {}, "values is empty"),
            ([1, 2], {"clusters": ["a"]}, r"clusters has shape \(1,\) but there are 2 samples"),
            ([1, 2], {"clusters": [("a", 0), ("b", 0)]}, r"clusters has shape \(2, 2\) but there are 2 samples"),
            ([1, 2], {"confidence": 1.0}, "confidence is 1.0"),
            ([1, 2], {"num_resamples": 0}, "num_resamples is 0"),
        ],
    )
    def test_unusable_argument(self, values, kwargs, message, rng):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(values, rng=rng, **kwargs)


class TestCalibration:
    def test_equals_counting_each_pair_in_both_orders(self, rng):
        # the textbook error over 20 bins of [0, 1] of the pairs (p, y) and (1 - p, 1 - y)
        p = rng.random(1000)
        y = rng.random(1000) < p**2
        both_p, both_y = np.concatenate([p, 1 - p]), np.concatenate([y, ~y])
        textbook = 0.0
        for low in np.arange(20) / 20:
            inside = (both_p > low) & (both_p <= low + 0.05)
            textbook += abs(both_p[inside].sum() - both_y[inside].sum()) / 2000
        assert expected_calibration_error(p, y, num_bins=10) == pytest.approx(textbook, abs=1e-12)

    def test_swapping_pairs_changes_nothing(self, rng):
        p = np.concatenate([rng.integers(0, 65, size=300) / 64, [0.0, 0.5, 0.5, 1.0]])  # 1 - p is exact
        y = (rng.random(304) < 0.6).astype(float)
        swap = rng.random(304) < 0.5
        swapped = expected_calibration_error(np.where(swap, 1 - p, p), np.where(swap, 1 - y, y))
        assert swapped == pytest.approx(expected_calibration_error(p, y), abs=1e-12)

    def test_a_calibrated_model_has_a_small_error(self, rng):
        p = rng.random(20_000)
        p_chosen = np.where(rng.random(20_000) < p, p, 1 - p)  # name the winner "chosen", as a preference dataset does
        assert expected_calibration_error(p_chosen) < 0.4 * np.sqrt(10 / 20_000)
        assert abs(1 - p_chosen.mean()) > 0.3  # the unfolded gap to the outcome 1

    @pytest.mark.parametrize(("accuracy", "confidence"), [(0.6, 0.99), (0.9, 0.55), (0.75, 0.75)])
    def test_is_the_gap_of_a_constant_confidence(self, accuracy, confidence):
        p_chosen = np.where(np.arange(100) < 100 * accuracy, confidence, 1 - confidence)
        assert expected_calibration_error(p_chosen) == pytest.approx(abs(accuracy - confidence), abs=1e-12)

    def test_bins(self):
        bins = reliability_bins([0.5, 0.9, 0.1, 0.8, 1.0], num_bins=5)
        np.testing.assert_allclose(bins.edges, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        np.testing.assert_array_equal(bins.counts, [1, 0, 1, 2, 1])
        np.testing.assert_allclose(bins.confidence, [0.5, np.nan, 0.8, 0.9, 1.0])
        np.testing.assert_allclose(bins.accuracy, [0.5, np.nan, 1.0, 0.5, 1.0])

    @pytest.mark.parametrize("function", [reliability_bins, expected_calibration_error])
    @pytest.mark.parametrize(
        ("args", "num_bins", "message"),
        [
            (([],), 10, "probabilities has shape"),
            (([0.5, 1.1],), 10, r"probabilities\[1\] is 1.1"),
            (([0.5], [-1]), 10, r"outcomes\[0\] is -1.0"),
            (([0.5, 0.6], [1]), 10, "outcomes has 1 entries but probabilities has 2"),
            (([0.5],), 0, "num_bins is 0"),
        ],
    )
    def test_unusable_argument(self, function, args, num_bins, message):
        with pytest.raises(ValueError, match=message):
            function(*args, num_bins=num_bins)


class TestAreaUnderROCCurve:
    @pytest.mark.parametrize("num_values", [2, 10, 10**6])  # many ties to none
    def test_equals_the_mann_whitney_statistic(self, num_values, rng):
        scores = rng.integers(num_values, size=500)
        labels = rng.random(500) < 0.2
        statistic = scipy.stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
        assert area_under_roc_curve(scores, labels) == pytest.approx(statistic / (labels.sum() * (~labels).sum()))

    def test_limits(self):
        assert area_under_roc_curve([1.0, 2.0, 3.0, np.inf], [0, 0, 1, 1]) == 1
        assert area_under_roc_curve([3.0, 2.0, 1.0], [0, 0, 1]) == 0
        assert area_under_roc_curve([7.0] * 5, [0, 1, 0, 1, 1]) == 0.5

    @pytest.mark.parametrize(
        ("scores", "labels", "message"),
        [
            ([1.0, 2.0], [1], r"scores has shape \(2,\), labels has shape \(1,\)"),
            ([1.0, np.nan], [0, 1], r"scores\[1\] is NaN"),
            ([1.0, 2.0], [0, 2], "labels has values"),
            ([1.0, 2.0], [1, 1], "2 positives and 0 negatives"),
        ],
    )
    def test_unusable_argument(self, scores, labels, message):
        with pytest.raises(ValueError, match=message):
            area_under_roc_curve(scores, labels)


class TestShareInterval:
    def test_is_that_of_a_bootstrap_written_out(self):
        rng = np.random.default_rng(4)
        clusters = rng.integers(40, size=150)
        values = (rng.random(150) < 0.3 + 0.5 * (clusters % 2)).astype(float)
        members = [values[clusters == cluster] for cluster in np.unique(clusters)]
        drawn = [
            np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]).mean()
            for _ in range(4000)
        ]
        interval = share_interval(values, clusters)
        assert interval.estimate == pytest.approx(values.mean())
        assert (interval.low, interval.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.012)
        alone = share_interval(values)
        assert interval.high - interval.low > 1.2 * (alone.high - alone.low)  # clusters here are alike inside

    def test_independent_samples_have_the_interval_of_wilson(self, rng):
        values = rng.integers(3, size=80) / 2
        assert share_interval(values, rng.permutation(80)) == share_interval(values) == accuracy_interval(values)

    @pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
    def test_does_not_collapse_where_all_is_equal(self, value):
        few, many = share_interval(np.full(40, value), np.repeat(np.arange(4), 10)), share_interval(np.full(40, value))
        assert few == accuracy_interval(np.full(4, value))
        assert few.high - few.low > many.high - many.low > 0.05

    def test_one_cluster_is_one_sample(self):
        assert share_interval([1, 1, 0, 0], ["a"] * 4) == accuracy_interval([0.5])

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match=r"clusters has shape \(1,\) but there are 2 samples"):
            share_interval([1, 1], ["a"])
        with pytest.raises(ValueError, match="at least one value"):
            share_interval([], [])


class TestRankCorrelation:
    @pytest.mark.parametrize("num_values", [3, 1000])  # many ties, hardly any
    def test_equals_scipy(self, rng, num_values):
        first = rng.integers(num_values, size=40).astype(float)
        second = first + rng.normal(size=40) * num_values / 2
        assert rank_correlation(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)

    def test_limits(self):
        values = np.array([0.1, 0.5, 3.0, np.inf])
        assert rank_correlation(values, values**3) == 1 and rank_correlation(values, -values) == -1
        for first, second in (([], []), ([1.0], [2.0]), ([7.0, 7.0], [1.0, 2.0])):
            assert np.isnan(rank_correlation(first, second))

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            ([1.0, 2.0], [1.0], r"first has shape \(2,\), second has shape \(1,\)"),
            ([1.0, 2.0], [1.0, np.nan], r"second\[1\] is NaN"),
        ],
    )
    def test_unusable_argument(self, first, second, message):
        with pytest.raises(ValueError, match=message):
            rank_correlation(first, second)


class TestCompareRewards:
    def test_change_is_paired_and_of_the_images_with_an_opinion_both_times(self, rng):
        before = rng.normal(size=(50, 3)) * [1, 10, 1]
        after = before + np.array([0.5, 0.0, 1.0])
        after[:, 1] += rng.normal(size=50)
        before[:10, 0], after[5:20, 0], before[:, 2] = np.nan, np.nan, np.nan
        results = compare_rewards(
            before.astype(np.float32), after.astype(np.float32), ["shifted", "noisy", "silent"], range(50)
        )
        assert list(results) == ["shifted", "noisy"]
        shifted, noisy = results.values()
        assert (shifted["n"], noisy["n"]) == (30, 50)
        assert shifted["interval"] == pytest.approx([0.5, 0.5], abs=1e-5)  # although the rewards differ by more
        assert shifted["before"] == pytest.approx(before[20:, 0].mean(), abs=1e-6)
        theirs = scipy.stats.bootstrap([after[:, 1] - before[:, 1]], np.mean, method="percentile", rng=1)
        ours = noisy["interval"]
        assert ours == pytest.approx(list(theirs.confidence_interval), abs=0.1)
        assert noisy["after"] - noisy["before"] == pytest.approx(noisy["change"], abs=1e-6)

    def test_images_of_one_prompt_change_together(self, rng):
        """Four copies of an image say no more than one: the interval is that of the prompts alone."""
        change = rng.normal(size=(30, 1))
        before, prompts = rng.normal(size=(120, 1)), np.arange(120) // 4
        alone = paired_change(np.zeros(30), change[:, 0], range(30))
        found = compare_rewards(before, before + np.repeat(change, 4, axis=0), ["judge"], prompts)["judge"]
        assert found["interval"] == pytest.approx([alone.low, alone.high], abs=1e-9)
        assert compare_rewards(before, before + 1, ["judge"], ["one"] * 120)["judge"]["interval"] is None
        assert paired_change([1.0, np.nan, 2.0], [1.0, 1.0, np.nan], ["a", "b", "c"]) is None


class TestPairedPermutationTest:
    def test_few_samples_give_the_exact_value_of_scipy(self, rng):
        for num_samples in (2, 5, 9):
            first, second = rng.normal(size=(2, num_samples))
            theirs = scipy.stats.permutation_test(
                (first, second), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", vectorized=True
            )
            ours = paired_permutation_test(first, second, rng=rng)
            assert ours == pytest.approx(theirs.pvalue, abs=1e-12)

    def test_right_and_wrong_give_the_sign_test(self, rng):
        """Of answers that are right or wrong only the pairs on which two models differ count, as in McNemar's exact test."""
        for only_first, only_second in ((3, 1), (9, 0), (60, 30), (40, 41)):
            first = np.repeat([1, 0, 1, 0], [only_first, only_second, 50, 20])
            second = np.repeat([0, 1, 1, 0], [only_first, only_second, 50, 20])
            exact = scipy.stats.binomtest(only_first, only_first + only_second).pvalue
            ours = paired_permutation_test(first, second, rng=rng)
            assert ours == pytest.approx(exact, abs=1e-12 if only_first + only_second <= 12 else 0.02)

    def test_a_cluster_counts_once(self, rng):
        """Ten copies of each sample are no more evidence than one."""
        first, second = rng.integers(2, size=(2, 10))
        once = paired_permutation_test(first, second, rng=rng)
        copied = paired_permutation_test(
            np.repeat(first, 10), np.repeat(second, 10), np.repeat(np.arange(10), 10), rng=rng
        )
        assert copied == pytest.approx(once)
        assert paired_permutation_test(np.repeat(first, 10), np.repeat(second, 10), rng=rng) <= once

    @pytest.mark.parametrize("num_clusters", [8, 40])
    def test_alike_models_are_rarely_called_different(self, num_clusters):
        rng = np.random.default_rng(1)
        clusters = np.repeat(np.arange(num_clusters), 3)
        p_values = [
            paired_permutation_test(
                *(np.repeat(rng.random(num_clusters) < 0.6, 3) for _ in range(2)), clusters, rng=rng, num_resamples=199
            )
            for _ in range(400)
        ]
        for level in (0.05, 0.2):
            assert np.mean(np.array(p_values) <= level) < level + 2 * (level * (1 - level) / 400) ** 0.5

    def test_sides_are_alike_and_no_difference_is_none(self, rng):
        first, second = rng.random((2, 11))
        assert paired_permutation_test(first, second, rng=rng) == paired_permutation_test(second, first, rng=rng)
        assert paired_permutation_test(first, first, rng=rng) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([], []), "two equal vectors"),
            (([1, 0], [1]), "two equal vectors"),
            (([1, np.nan], [1, 0]), "Sample 1 has a NaN"),
            (([1, 0], [1, 0], [1]), "one key per sample"),
        ],
    )
    def test_bad_input_is_named(self, arguments, message, rng):
        with pytest.raises(ValueError, match=message):
            paired_permutation_test(*arguments, rng=rng)


class TestHolm:
    def test_steps_down_by_hand(self):
        np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
        np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])
        assert len(holm([])) == 0

    def test_lies_between_no_adjustment_and_bonferroni(self, rng):
        p_values = rng.random(20) ** 3
        adjusted = holm(p_values)
        assert (adjusted >= p_values).all() and (adjusted <= np.minimum(20 * p_values, 1)).all()
        assert (np.diff(adjusted[np.argsort(p_values)]) >= 0).all()
        assert adjusted.min() == pytest.approx(20 * p_values.min())

    def test_bad_values_are_named(self):
        with pytest.raises(ValueError, match=r"p_values\[1\] is 1.5"):
            holm([0.5, 1.5])


def test_means_of_clusters_have_the_interval_of_any_statistic():
    """The quick way to resample means draws the same clusters as the general one."""
    rng = np.random.default_rng(0)
    clusters, values = rng.integers(7, size=40), rng.random(40)
    quick = bootstrap_interval(values, clusters, rng=np.random.default_rng(1))
    general = bootstrap_interval(values, clusters, rng=np.random.default_rng(1), statistic=lambda rows: rows.mean())
    assert (quick.low, quick.high) == pytest.approx((general.low, general.high), abs=1e-12)
