"""Estimators of depth: models of transformers, and the flat world's."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from tests.judge_models import save_depth_anything, save_mask2former
from tests.judges.test_detectors import draw, picture, plant
from trl_spatial.judges.depth import DepthEstimator, stretch
from trl_spatial.judges.flat import FlatDetector
from trl_spatial.judges.loading import load_depth


@pytest.mark.parametrize("options", [{}, {"depth_estimation_type": "metric", "max_depth": 20}])
def test_depth_is_the_models_own(options, tmp_path):
    """Oracle: the library's map of each pixel, with near bright: distances are inverted, other values are not."""
    folder = save_depth_anything(tmp_path, **options)
    estimate = load_depth(str(folder), "cpu")
    assert isinstance(estimate, DepthEstimator)
    model, processor = AutoModelForDepthEstimation.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    for image in (picture(96, 70), picture(40, 90)):
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        raw = outputs.predicted_depth[0].numpy()
        if options:
            assert 0 < raw.min() < 0.1 < raw.max() <= 20
            outputs.predicted_depth = 1 / outputs.predicted_depth.clamp(min=0.1)
        (result,) = processor.post_process_depth_estimation(outputs, target_sizes=[(image.height, image.width)])
        near = result["predicted_depth"].numpy()
        depth = estimate(image)
        assert depth.shape == (image.height, image.width) and depth.dtype == np.float32
        assert (depth.min(), depth.max()) == (0.0, pytest.approx(255.0))
        assert depth == pytest.approx(255 * (near - near.min()) / (near.max() - near.min()), abs=1e-2)


def test_metric_models_are_inverted(tmp_path):
    """Distances of 1, 2 and 4 meters, planted: their inverses are 1, 1/2 and 1/4."""
    estimate = DepthEstimator(
        str(save_depth_anything(tmp_path, depth_estimation_type="metric", max_depth=20)), device="cpu"
    )
    distances = torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(20).expand(1, 60, 60)
    with plant(estimate.model, predicted_depth=distances):
        depth = estimate(Image.new("RGB", (60, 60)))
    assert depth[30, [5, 30, 55]] == pytest.approx([255.0, 85.0, 0.0], abs=1e-2)


def test_equal_values_are_far():
    assert (stretch(np.full((2, 3), 7.0)) == 0).all()
    assert stretch(np.array([1.0, 2.0, 3.0])).tolist() == [0.0, 127.5, 255.0]


@pytest.mark.parametrize("image_size", [64, 200])
def test_flat_depth_is_the_order_in_which_things_are_drawn(image_size):
    """The mean in the box of what is in front, or inside, is larger than in the box of what it covers."""
    estimate, num_compared = load_depth("flat"), 0
    for seed in range(80):
        graph, _, image = draw(seed, image_size, ("front_of", "behind", "inside", "contains"))
        depth = estimate(image)
        assert depth.shape == (image_size, image_size) and depth.min() == 0 and depth.max() == 255
        boxes = {each.label: [round(edge) for edge in each.box] for each in FlatDetector()([image])[0]}
        means = {name: depth[top:bottom, left:right].mean() for name, (left, top, right, bottom) in boxes.items()}
        for relation in graph.relations:
            near, far = (means[entity.look] for entity in relation.arguments)
            if relation.name in ("behind", "contains"):
                near, far = far, near
            assert near > far, (seed, relation)
            num_compared += 1
    assert num_compared == 80


def test_flat_things_that_do_not_overlap_are_equally_near():
    for seed in range(20):
        _, layout, image = draw(seed, 128, ("left_of", "on", "next_to"))
        depth = load_depth("flat")(image)
        assert set(np.unique(depth).tolist()) == {0.0, 255.0}
        assert all(depth[int(placed.y * 128), int(placed.x * 128)] == 255 for placed in layout)
    assert not load_depth("flat")(Image.new("RGB", (64, 48), "grey")).any()


def test_what_is_no_estimator_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"There is no depth estimator 'nowhere'. Name flat, .*module:function"):
        load_depth("nowhere")
    folder = save_mask2former(tmp_path / "mask2former")
    with pytest.raises(ValueError, match="is a mask2former model, not a depth estimator"):
        load_depth(str(folder))
    (tmp_path / "my_depth.py").write_text("def ramp(image):\n    return [[0] * image.width] * image.height\n")
    monkeypatch.chdir(tmp_path)
    assert load_depth("my_depth:ramp")(Image.new("RGB", (2, 1))) == [[0, 0]]
