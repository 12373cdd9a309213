"""Oracles: pairs of images one by one, closed forms."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from trl_spatial.diffusion_grpo.runtime.metrics import TrainingMetrics, group_diversity


class TestGroupDiversity:
    def test_is_the_difference_of_all_pairs(self):
        pixels = np.random.default_rng(0).integers(256, size=(6, 20, 32, 3), dtype=np.uint8)  # two groups of three
        diversity = group_diversity([Image.fromarray(image) for image in pixels], 3)
        for group, value in zip(pixels.reshape(2, 3, -1) / 255, diversity.tolist(), strict=True):
            squares = [((one - other) ** 2).mean() for one, other in itertools.combinations(group, 2)]
            assert value == pytest.approx(np.mean(squares) ** 0.5, rel=1e-5)

    def test_limits(self):
        black, white, grey = (Image.new("RGB", (512, 512), (level,) * 3) for level in (0, 255, 128))
        assert group_diversity([black, white, grey, grey], 2).tolist() == [1.0, 0.0]

    def test_leaves_fine_grain_out(self):
        grain = np.indices((512, 512)).sum(0) % 2 * 255
        images = [Image.fromarray(values.astype(np.uint8)) for values in (grain, 255 - grain)]
        assert group_diversity(images, 2).item() < 0.01


class OneProcess:
    device, num_processes = torch.device("cpu"), 1

    def gather(self, values):
        return values

    reduce = gather


def test_passes_are_counted_per_update_and_per_trained_image():
    metrics = TrainingMetrics(["num_images", "num_trained_images", "num_policy_passes", "num_reference_passes"])
    metrics.load_totals(
        {"num_images": 10, "num_trained_images": 5, "num_policy_passes": 100, "num_reference_passes": 20}
    )
    metrics.totals.update(num_images=8, num_trained_images=5, num_policy_passes=60, num_reference_passes=20)
    metrics.num_updates = 4
    log = metrics.collect(OneProcess(), {"time/step": 2.0})
    assert log["passes_per_update"] == 80 / 4  # since the log before
    assert log["passes_per_trained_image"] == 200 / 10  # since the start
    assert log["images_per_second"] == 8 / 2.0
    assert log["num_policy_passes"] == 160
