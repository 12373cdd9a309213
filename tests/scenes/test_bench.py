"""The measurements of recipes/bench run, at a size that proves nothing but that they do what they say."""

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn

from recipes.bench import checker, leakage, pairs


def test_checker_counts_every_relation_and_object_once(capsys):
    summary = checker.main(["--num_scenes", "12", "--image_size", "64"])
    assert (
        summary["satisfied"]["agreement"] == summary["violated"]["agreement"] == summary["objects"]["agreement"] == 1.0
    )
    assert summary["violated"]["n"] == 12  # one change per scene
    assert summary["satisfied"]["n"] == sum(r["n"] for r in summary["satisfied_by_relation"].values())
    assert "found satisfied" in capsys.readouterr().out
    noisy = checker.main(["--num_scenes", "3", "--degrade", "noise"])
    assert noisy["objects"]["n"] < summary["objects"]["n"]


def test_leakage_measures_every_classifier_with_and_without_a_leak():
    results = leakage.main(["--num_train", "24", "--num_test", "16", "--num_proc", "1", "--image_size", "32"])
    assert len(results) == 8 and all(result["n"] == 16 for result in results.values())


def test_the_accuracy_of_a_classifier_that_cannot_tell_is_a_half_and_of_one_that_can_is_one():
    torch.manual_seed(0)
    same = torch.randn(50, 1, 4).repeat(1, 2, 1)
    model = leakage.train(nn.Sequential(nn.Linear(4, 1)), same, 1, 1e-2, seed=0)
    assert leakage.accuracy(model, same)["accuracy"] == 0.5
    told = torch.randn(200, 2, 4)
    told[:, 0] += 3.0
    model = leakage.train(nn.Sequential(nn.Linear(4, 1)), told, 20, 1e-2, seed=0)
    assert leakage.accuracy(model, told)["accuracy"] > 0.95


def test_pairs_counts_the_pairs_it_made():
    result = pairs.main(["--num_pairs", "8", "--num_proc", "1", "--image_size", "32"])
    assert np.isclose(result["pairs_per_second"], 8 / result["seconds"], rtol=0.2, atol=0.06)  # both are rounded


def test_leakage_reads_every_pair_the_first_one_too():
    def pairs(number):
        images = [Image.new("RGB", (4, 4), (10 * i, 0, 255)) for i in range(number)]
        texts = {"prompt": ["left right"] * number, "perturbed_prompt": ["right left"] * number}
        return (
            Dataset.from_dict(texts | {"chosen": images, "rejected": images[::-1]})
            .cast_column("chosen", ImageFeature())
            .cast_column("rejected", ImageFeature())
        )

    # terms: left, right, (left, right), (right, left)
    for number, features in zip((6, 3), leakage.read_texts([pairs(6), pairs(3)], None), strict=True):
        assert features.shape == (number, 2, 4)
        winner, loser = features.unbind(1)
        assert (winner.sum(1) == 3).all() and (loser.sum(1) == 3).all() and ((winner - loser).abs().sum(1) == 2).all()
        assert (features == features[0]).all()
    red = leakage.read_images(pairs(6), None)[:, :, 0, 0, 0]  # winner, loser
    assert ((red + 1) * 127.5).round().tolist() == [[10 * i, 50 - 10 * i] for i in range(6)]
