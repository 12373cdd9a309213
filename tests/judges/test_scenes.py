"""Judging a generator of scenes by their rules."""

import itertools
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from trl_spatial.judges.scenes import check_images, has_objects, pairwise_distance, summarize_checks
from trl_spatial.scenes import SceneGraph, parse_description, perturb, render_scene, sample_graph
from trl_spatial.statistics import accuracy_interval


def make_graphs(num_graphs):
    rng = np.random.default_rng(5)
    relations = ("left_of", "right_of", "above", "below")
    return [sample_graph(rng, num_objects=2, num_relations=1, relations=relations) for _ in range(num_graphs)]


def draw(graphs):
    return [render_scene(graph, seed=seed) for seed, graph in enumerate(graphs)]


def test_pictures_of_the_scenes_are_right_and_of_changed_scenes_misplaced():
    graphs = make_graphs(20)
    changed = [perturb(graph, np.random.default_rng(index))[0] for index, graph in enumerate(graphs)]
    summary = summarize_checks(check_images(draw(graphs), graphs))
    assert {interval.estimate for interval in summary.values()} == {1.0}
    summary = summarize_checks(check_images(draw(changed), graphs))
    estimates = {name: interval.estimate for name, interval in summary.items()}
    assert estimates == {"spatial_accuracy": 0.0, "objects_present": 1.0, "relations_correct": 0.0}


def test_a_missing_or_a_second_object_is_no_misplaced_one():
    (graph,) = make_graphs(1)
    blank = Image.new("RGB", (64, 64), (120, 120, 120))
    one = render_scene(SceneGraph(graph.entities[:1]), seed=0)
    two = render_scene(graph, seed=0)
    twice = Image.fromarray(np.concatenate([np.asarray(two), np.asarray(two)], axis=1))
    checks = check_images([blank, one, twice, two], [graph] * 4)
    assert [has_objects(check) for check in checks] == [False, False, False, True]
    summary = summarize_checks(checks)
    assert summary["spatial_accuracy"].estimate == summary["objects_present"].estimate == 0.25
    assert summary["relations_correct"].estimate == 1.0
    assert "relations_correct" not in summarize_checks(checks[:3])


def test_without_clusters_intervals_are_wilsons():
    graphs = make_graphs(12)
    checks = check_images(draw(graphs[:8]) + [Image.new("RGB", (64, 64))] * 4, graphs)
    assert summarize_checks(checks)["spatial_accuracy"] == accuracy_interval([1] * 8 + [0] * 4)


def test_images_that_are_the_same_tell_no_more_than_one():
    graphs = make_graphs(30)
    checks = check_images(draw(graphs[:20]) + [Image.new("RGB", (64, 64))] * 10, graphs)
    once = summarize_checks(checks, np.arange(30))["spatial_accuracy"]
    repeated = [check for check in checks for _ in range(4)]
    prompts = np.arange(30).repeat(4)
    shared = summarize_checks(repeated, prompts)["spatial_accuracy"]
    # a bootstrap, and Wilson's
    assert (shared.low, shared.high) == pytest.approx((once.low, once.high), abs=0.03)
    independent = summarize_checks(repeated)["spatial_accuracy"]
    assert independent.high - independent.low < 0.7 * (once.high - once.low)


def test_an_interval_does_not_collapse_where_everything_is_right():
    graphs = make_graphs(10)
    interval = summarize_checks(check_images(draw(graphs), graphs), np.arange(10))["spatial_accuracy"]
    assert interval.low < 0.8 and interval.high == 1.0


def test_diversity_is_the_mean_distance_of_pairs_within_a_prompt():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(6, 5, 4, 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in pixels]
    distances = [
        np.sqrt(np.mean((pixels[i] / 255.0 - pixels[j] / 255.0) ** 2))
        for group in (range(3), range(3, 6))
        for i, j in itertools.combinations(group, 2)
    ]
    assert pairwise_distance(images, 3) == pytest.approx(np.mean(distances), rel=1e-5)
    assert pairwise_distance([images[0], images[0], images[1], images[1]], 2) == pytest.approx(0, abs=1e-3)
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    assert pairwise_distance([black, white], 2) == pytest.approx(1)


def test_bad_input_is_named():
    (graph,) = make_graphs(1)
    image = render_scene(graph, seed=0)
    with pytest.raises(ValueError, match="2 `images` and 1 `graphs`"):
        check_images([image, image], [graph])
    with pytest.raises(ValueError, match="`checks` is empty"):
        summarize_checks([])
    with pytest.raises(ValueError, match=r"1 `checks`, but `clusters` has shape \(2,\)"):
        summarize_checks(check_images([image], [graph]), [0, 1])
    for size, number in ((1, 2), (2, 3), (2, 0)):
        with pytest.raises(ValueError, match=f"{number} images .* group_size={size}"):
            pairwise_distance([image] * number, size)


def test_an_image_is_judged_as_a_viewer_sees_it():
    """Turned by EXIF, hidden by transparency: what the file stores is not what is shown."""
    graph = parse_description("A red circle is left of a blue square.")
    upright = render_scene(graph, seed=0)
    file = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    upright.transpose(Image.Transpose.ROTATE_180).save(file, "PNG", exif=exif)
    hidden = upright.convert("RGBA")
    hidden.putalpha(0)
    checks = check_images([upright, file.getvalue(), hidden], [graph] * 3)
    assert [check.is_correct for check in checks] == [True, True, False]
    assert pairwise_distance([upright, file.getvalue()], 2) == 0
    assert pairwise_distance([hidden, Image.new("RGB", upright.size, "white")], 2) == 0
    with pytest.raises(ValueError, match=r"images\[1\] .*is not a PNG"):
        check_images([upright, b"no image"], [graph] * 2)
