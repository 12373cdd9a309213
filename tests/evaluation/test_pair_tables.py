"""Tables of scorers on pairs, from records written by hand."""

import json

import numpy as np
import pytest
from scipy.special import expit

from trl_spatial.evaluation.pair_tables import make_results
from trl_spatial.evaluation.pair_text import describe_pairs
from trl_spatial.evaluation.published import published_numbers


def make_plan(*names, dataset="some/pairs", is_pairwise=False):
    facts = {"trained_on": "nothing", "is_pairwise": is_pairwise}
    return {"dataset": dataset, "scorers": {name: facts | {"file": f"records/{name}.jsonl"} for name in names}}


def make_pairs(clusters, **groups):
    return [
        {
            "pair": str(number),
            "prompts": {"given": f"prompt {number}"},
            "cluster": int(cluster),
            "groups": {name: values[number] for name, values in groups.items() if values[number] is not None},
            "change": "",
        }
        for number, cluster in enumerate(clusters)
    ]


def scored(number, chosen, rejected, std=(None, None), condition="given", cost=0.0):
    sides = [{"mean": mean, "std": s, "raw": None} for mean, s in zip((chosen, rejected), std, strict=True)]
    base = {"pair": str(number), "condition": condition, "seconds": 0.5, "cost": cost, "served_models": []}
    return base | {"chosen": sides[0], "rejected": sides[1]}


def compared(number, first, second, condition="given"):
    """What was preferred with the chosen image first, and with the rejected image first."""
    verdicts = [
        {"first": "chosen", "preferred": first, "raw": "A"},
        {"first": "rejected", "preferred": second, "raw": "?"},
    ]
    costs = {"seconds": 1.0, "cost": 0.01, "served_models": ["judge-2"]}
    return {"pair": str(number), "condition": condition, "verdicts": verdicts} | costs


def outcomes(values):
    """Records whose scores give these values."""
    return [scored(number, value, 0.5) for number, value in enumerate(values)]


def the_scorer(results):
    json.dumps(results, allow_nan=False)
    describe_pairs(results)
    return results["scorers"][0]


def test_scores_ties_and_missing_scores():
    records = [scored(0, 2, 1), scored(1, 1, 1), scored(2, 0, 1), scored(3, None, 1), scored(4, 5, 1)]
    records.append(scored(4, None, None))  # asked again: the last counts
    records[3]["chosen"]["raw"] = "no such scene"
    row = the_scorer(make_results(make_plan("s"), make_pairs(range(6)), {"s": records}))
    assert row["accuracy"]["estimate"] == pytest.approx(1.5 / 6) and row["num_pairs"] == 6
    assert row["coverage"] == 0.5 and row["covered_accuracy"]["estimate"] == 0.5
    assert [(failure["pair"], failure["reason"], failure["raw"]) for failure in row["failures"]] == [
        ("3", "no score of the chosen image", "no such scene"),
        ("4", "no score of the chosen and the rejected image", None),
        ("5", "not asked", None),
    ]
    assert row["seconds_per_1000"] == pytest.approx(1000 * 3 / 5)  # six answers on five pairs
    assert row["calibration"] is row["order_consistency"] is None


def test_comparisons_count_the_mean_of_both_orders():
    records = [
        compared(0, "chosen", "chosen"), compared(1, "chosen", "rejected"), compared(2, "tie", "chosen"),
        compared(3, "chosen", None), compared(4, "rejected", "rejected"),
    ]  # fmt: skip
    plan = make_plan("judge", is_pairwise=True)
    results = make_results(plan, make_pairs(range(5)), {"judge": records})
    row = the_scorer(results)
    assert row["accuracy"]["estimate"] == pytest.approx((1 + 0.5 + 0.75 + 0.5 + 0) / 5)
    assert row["coverage"] == 0.8 and row["order_consistency"] == 0.5
    assert row["failures"] == [{"pair": "3", "reason": "unreadable answer, with the rejected image first", "raw": "?"}]
    assert row["served_models"] == ["judge-2"] and row["price_per_1000"] == pytest.approx(10)
    scores = {example["pair"]: example["scores"]["judge"] for example in results["examples"]}
    assert scores["0"] == [1, 0] and scores["4"] == [0, 1]


def test_failures_keep_their_words():
    failure = {"reason": "refused or malformed answer", "message": "no JSON", "raw": "Sorry."}
    record = {
        "pair": "0",
        "condition": "given",
        "failure": failure,
        "seconds": 1.0,
        "cost": 0.5,
        "served_models": ["m"],
    }
    row = the_scorer(make_results(make_plan("s"), make_pairs([0]), {"s": [record]}))
    assert row["failures"] == [{"pair": "0", "reason": "refused or malformed answer: no JSON", "raw": "Sorry."}]
    assert row["accuracy"]["estimate"] == 0 and row["covered_accuracy"] == {
        "estimate": None,
        "low": None,
        "high": None,
    }
    assert row["price_per_1000"] == 500


def test_groups_hold_their_own_pairs():
    values = np.array([1, 0, 1, 1, 0, 1], float)
    levels = ["1", "1", "2", "2", None, "3"]
    pairs = make_pairs(range(6), level=levels, source=["a"] * 6)
    row = the_scorer(make_results(make_plan("s"), pairs, {"s": outcomes(values)}))
    found = {group["name"]: (group["accuracy"], group["num_pairs"]) for group in row["groups"]["level"]}
    assert found == {"1": (0.5, 2), "2": (1.0, 2), "3": (1.0, 1)}
    assert [group["num_pairs"] for group in row["groups"]["source"]] == [6] and row["groups"]["orientation"] == []


def test_the_numbers_of_comparisons_are_about_their_changes():
    pairs = make_pairs([0, 0, 1, 2, 3, 4], level=["1", "1", "2", "3", "2", "hard"])
    row = the_scorer(make_results(make_plan("s"), pairs, {"s": outcomes([1, 0, 1, 1, 0, 1])}))
    found = {name: (number["estimate"], number["num_pairs"]) for name, number in row["numbers"].items()}
    assert found == {
        "accuracy": (pytest.approx(4 / 6), 6),
        "accuracy, 1 change": (0.5, 2),
        "accuracy, 2-3 changes": (pytest.approx(2 / 3), 3),
    }
    assert row["numbers"]["accuracy, 1 change"]["low"] < 0.1  # two pairs of one prompt say as much as one
    row = the_scorer(make_results(make_plan("s"), make_pairs([0, 1]), {"s": outcomes([1, 0])}))
    assert list(row["numbers"]) == ["accuracy"]


def test_controls():
    given = [scored(0, 2, 1), scored(1, 2, 1), scored(2, 1, 1), scored(3, None, None)]
    flipped = [(9, 1), (0, 1), (0, 1), (2, 1)]
    blind = [(None, None), (2, 1), (0, 1), (1, 1)]
    records = given + [scored(i, *pair, condition="flip") for i, pair in enumerate(flipped)]
    records += [scored(i, *pair, condition="image_only") for i, pair in enumerate(blind)]
    row = the_scorer(make_results(make_plan("s"), make_pairs(range(4)), {"s": records}))
    controls = {name: (found["estimate"], found["num_pairs"]) for name, found in row["controls"].items()}
    assert controls == {"flip": (0.5, 3), "image_only": (0.5, 3)}  # flip: same, opposite, a tie that is one no more


def test_p_values_are_uniform_where_scorers_are_alike():
    rng = np.random.default_rng(11)
    p_values = []
    for _ in range(100):
        sizes = rng.integers(1, 12, size=50)  # unequal, so that sums of whole clusters take many values
        clusters, skill = np.repeat(np.arange(50), sizes), rng.random(50)
        first, second = ((rng.random(50) < skill).astype(float)[clusters] for _ in range(2))
        results = make_results(
            make_plan("a", "b"), make_pairs(clusters), {"a": outcomes(first), "b": outcomes(second)}
        )
        (row,) = results["differences"]
        assert row["p_holm"] == row["p_value"]
        assert row["difference"] == pytest.approx(second.mean() - first.mean())
        p_values.append(row["p_value"])
    # 1.95 / sqrt(n) is the 99.9 % quantile of Kolmogorov's distance
    levels = np.array([0.05, 0.1, 0.25, 0.5, 0.75])
    shares = (np.array(p_values)[:, None] <= levels).mean(axis=0)
    assert np.abs(shares - levels).max() < 1.95 / np.sqrt(len(p_values))
    assert shares[0] <= 0.13


def test_a_difference_is_found_and_corrected_for_the_number_of_tests():
    rng = np.random.default_rng(0)
    good, bad = (rng.random(200) < 0.9).astype(float), (rng.random(200) < 0.6).astype(float)
    records = {"bad": outcomes(bad), "good": outcomes(good), "twin": outcomes(good)}
    results = make_results(make_plan(*records), make_pairs(range(200)), records)
    rows = {(row["first"], row["second"]): row for row in results["differences"]}
    found = rows["bad", "good"]
    assert found["low"] > 0.15 and found["p_value"] < 0.001 and found["p_holm"] == pytest.approx(3 * found["p_value"])
    assert rows["good", "twin"]["p_value"] == rows["good", "twin"]["p_holm"] == 1


def test_calibration_of_scores_that_are_drawn_as_they_say():
    rng = np.random.default_rng(2)
    num_pairs = 4000
    means, stds = rng.normal(size=(num_pairs, 2)), rng.uniform(0.3, 1.5, size=(num_pairs, 2))
    # the truth: each image draws its score, and of these the first is preferred as Bradley and Terry say
    drawn = np.diff(rng.normal(means, stds))[:, 0]
    is_first = rng.random(num_pairs) < expit(-drawn)
    order = np.where(is_first, 0, 1)[:, None]
    order = np.concatenate([order, 1 - order], axis=1)
    means, stds = np.take_along_axis(means, order, 1), np.take_along_axis(stds, order, 1)

    def calibration(scale):
        records = [
            scored(i, *mean.tolist(), std=(scale * std).tolist())
            for i, (mean, std) in enumerate(zip(means, stds, strict=True))
        ]
        row = the_scorer(make_results(make_plan("s"), make_pairs(range(num_pairs)), {"s": records}))
        assert sum(bin["num_pairs"] for bin in row["calibration"]["bins"]) == num_pairs
        return row["calibration"]

    right, sure, unsure = calibration(1), calibration(0.01), calibration(5)
    assert right["error"] < 0.03 and sure["error"] > 0.04 and unsure["error"] > 0.1
    for found in right["bins"]:
        assert found["observed"] == pytest.approx(found["predicted"], abs=4 * 0.5 / np.sqrt(found["num_pairs"]))
    certain = [scored(0, 1.0, 0.0, std=(0.0, 0.0)), scored(1, 0.0, 1.0, std=(0.0, 0.0))]
    row = the_scorer(make_results(make_plan("s"), make_pairs(range(2)), {"s": certain}))
    [found] = row["calibration"]["bins"]
    assert found == {"predicted": pytest.approx(expit(1)), "observed": 0.5, "num_pairs": 2}


def test_examples_are_the_worst_and_the_best():
    values = {"a": [1, 0, 1, 0, 1, 1, 1, 1, 1, 1], "b": [1, 0, 1, 1, 1, 1, 1, 1, 1, 1]}
    records = {name: outcomes(of) for name, of in values.items()}
    records["a"][7]["chosen"]["mean"] = 3  # by the widest margin
    results = make_results(make_plan(*records), make_pairs(range(10)), records)
    shown = [example["pair"] for example in results["examples"]]
    assert len(shown) == 8 and shown[:2] == ["1", "3"] and shown[4] == "7"
    assert results["examples"][0]["scores"] == {"a": [0, 0.5], "b": [0, 0.5]}
    one = make_results(make_plan("s"), make_pairs([0]), {"s": outcomes([1])})
    assert len(one["examples"]) == 1
    none = make_results(make_plan(), make_pairs([0]), {})
    assert none["scorers"] == none["differences"] == none["examples"] == [] and describe_pairs(none)


def test_published_numbers_are_whole_and_flagged():
    pairs = make_results(make_plan("s"), make_pairs(range(3)), {"s": outcomes([1, 0, 1])})
    published = {(row["model"], row["metric"]): row for row in pairs["published"]}
    best = published["SpatialScore-7B", "accuracy"]
    assert best["value"] == 0.958 and not best["is_comparable"] and "365 pairs" in best["why"]
    assert "| SpatialScore-7B | 0.939 | 0.978 | 0.958 |" in describe_pairs(pairs)

    def of_mmrb2(num_pairs):
        plan, values = make_plan("s", dataset="mmrb2:folder"), np.arange(num_pairs) % 2
        return make_results(plan, make_pairs(range(num_pairs)), {"s": outcomes(values)})["published"]

    assert {row["benchmark"] for row in of_mmrb2(1000)} == {"mmrb2"}
    assert all(row["is_comparable"] for row in of_mmrb2(1000)) and not any(row["is_comparable"] for row in of_mmrb2(9))


def test_published_numbers_need_the_same_judge():
    from trl_spatial.evaluation.benchmarks import BENCHMARKS
    from trl_spatial.evaluation.published import _read

    keys = {"benchmark", "metric", "model", "value", "judge", "protocol", "source"}
    assert all(set(row) == keys and row["source"].startswith("https://") for row in _read())
    assert {row["benchmark"] for row in _read()} <= {*BENCHMARKS, "pairs", "mmrb2"}
    assert len({(row["benchmark"], row["metric"], row["model"], row["source"]) for row in _read()}) == len(_read())
    with_judge = published_numbers("spatialgeneval", judges=["Qwen/Qwen2.5-VL-72B-Instruct"])
    assert with_judge and all(row["is_comparable"] and not row["why"] for row in with_judge)
    other = published_numbers("spatialgeneval", judges=["Qwen/Qwen2.5-VL-7B-Instruct"])
    assert {row["why"] for row in other} == {"Judged by Qwen2.5-VL-72B."}
    assert not any(row["is_comparable"] for row in published_numbers("unigenbench-long"))
