"""The bench counts the evaluations of the transformer, and names what misses its target."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from recipes.bench import flow_grpo as flow_grpo_bench
from recipes.bench import grpo as bench
from recipes.bench import levers as levers_bench
from recipes.bench import rewards as rewards_bench


@pytest.mark.parametrize(("top_k", "window", "expected"), [(None, None, 21 + 5), (6, 2, 9 + 1)])
def test_an_update_costs_what_the_formula_says(top_k, window, expected):
    """Oracle: hooks in the transformer, which see recomputed forward passes and backward passes too."""
    args = argparse.Namespace(num_updates=1, image_size=16, model="tiny", num_generations=24, num_threads=1)
    result = bench.measure(top_k, window, args)
    evaluations, seconds = result["evaluations_per_image"], result["seconds"]
    assert evaluations["counted"] == sum(evaluations["formula"].values()) == expected
    assert evaluations["logged"] == evaluations["formula"]
    assert sum(seconds[phase] for phase in bench.PHASES) == pytest.approx(seconds["step"], rel=1e-6)
    assert result["processor_seconds_per_step"] > 0 and result["peak_megabytes"] > 0


def test_missed_targets_are_named():
    def result(processor, rest, formula, counted):
        evaluations = {"policy": formula, "reference": 1.0}
        return {
            "seconds": {"rest": rest, "step": 1.0},
            "processor_seconds_per_step": processor,
            "evaluations_per_image": {"formula": evaluations, "logged": dict(evaluations), "counted": counted},
        }

    good = {"all images, all steps": result(10.0, 0.05, 21.0, 22.0), "filter": result(6.9, 0.1, 13.5, 14.5)}
    assert bench.shortcomings(good) == []
    bad = {"all images, all steps": result(10.0, 0.11, 21.0, 22.0), "filter": result(7.1, 0.1, 13.5, 16.0)}
    messages = bench.shortcomings(bad)
    assert len(messages) == 3
    for part in (
        "the rest is 11.0% of a step",
        "filter: the evaluations per image",
        "takes 0.71 of an unfiltered one",
    ):
        assert any(part in message for message in messages)


@pytest.mark.parametrize(
    ("top_k", "window", "trained"),
    [(None, None, levers_bench.ALL), (levers_bench.TOP_K, None, levers_bench.PAPER), (levers_bench.TOP_K, 2, 1)],
)
def test_levers_are_predicted_by_the_same_formula(top_k, window, trained):
    expected = bench.expected_evaluations(top_k, window, levers_bench.NUM_IMAGES)
    assert levers_bench.evaluations(trained) == sum(expected.values())
    assert levers_bench.evaluations(trained, reference=False, cfg=2) == 2 * expected["policy"]


def test_a_lever_is_measured(capsys, monkeypatch):
    """By a clock that stands still but for evaluations of the transformer."""
    counts = []

    def build_flux_pipeline():
        pipeline = build()
        counts.append(bench.count_evaluations(pipeline.transformer))
        return pipeline

    build = levers_bench.build_flux_pipeline
    monkeypatch.setattr(levers_bench, "build_flux_pipeline", build_flux_pipeline)
    monkeypatch.setattr(levers_bench, "time", SimpleNamespace(process_time=lambda: counts[-1].total()))
    argv = ["--model", "tiny", "--image_size", "16", "--repeats", "1", "--num_rollouts", "1", "--only", "window"]
    (result,) = levers_bench.main(argv).values()
    assert result["ratio"] == result["predicted"] == 10 / 16
    assert f"| 0.62 | {result['ratio']:.2f} (" in capsys.readouterr().out


def test_a_lever_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        levers_bench.main(["--only", "nothing"])
    assert "no row has 'nothing' in its name; there are: filter" in capsys.readouterr().err


def test_rewards_in_the_shade_of_the_drawing_cost_what_the_formula_says():
    assert rewards_bench.predicted_ratio(1, 1.0) == 1.0  # one batch: nothing overlaps
    assert rewards_bench.predicted_ratio(6, 1.0) == pytest.approx(7 / 12)
    assert rewards_bench.predicted_ratio(1000, 1.0) == pytest.approx(0.5, abs=1e-3)
    assert rewards_bench.predicted_ratio(4, 0.5) == pytest.approx((4 + 0.5) / 6)
    assert rewards_bench.predicted_ratio(4, 2.0) == pytest.approx((1 + 8) / 12)
    args = ["--model", "tiny", "--num_generations", "8", "--image_size", "16", "--num_rollouts", "1"]
    assert [result["share"] for result in rewards_bench.main(args)] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("name", ["equal work", "two updates, no KL"])
def test_flow_grpos_loop_costs_what_the_formula_says(name):
    args = argparse.Namespace(image_size=16, model="tiny")
    row = flow_grpo_bench.ROWS[name]
    loop = flow_grpo_bench.FlowGRPO(row, args)
    counts = bench.count_evaluations(loop.transformer)
    before = [weight.detach().clone() for weight in loop.weights]
    loop.rollout_and_updates()
    num_images, num_trained = flow_grpo_bench.NUM_IMAGES, flow_grpo_bench.NUM_STEPS - 1
    per_image = flow_grpo_bench.NUM_STEPS + 3 * num_trained + (num_trained if row.beta > 0 else 0)
    assert counts.total() == num_images * per_image
    assert any(not torch.equal(weight, old) for weight, old in zip(loop.weights, before, strict=True))


def test_both_loops_are_measured():
    argv = ["--model", "tiny", "--image_size", "16", "--repeats", "1", "--only", "two"]
    results = flow_grpo_bench.main(argv).values()
    assert len(results) == 2
    for result in results:
        assert result["ratio"] == result["ours"] / result["flow_grpo"] and result["lowest"] == result["highest"]
