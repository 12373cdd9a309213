import os

import numpy as np
import pytest
from PIL import Image

from trl_spatial.evaluation.benchmarks.base import Item
from trl_spatial.evaluation.benchmarks.dpg_bench import DPGBench


ITEM = Item("a", "A prompt.", {})


def draw(folder, numbers, seed=0, size=(7, 5)):
    """Images of noise in the places where a run draws them."""
    benchmark = DPGBench()
    images = {}
    for number in numbers:
        pixels = np.random.default_rng([seed, number]).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
        images[number] = Image.fromarray(pixels)
        path = folder / benchmark.image_path(ITEM, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        images[number].save(path)
    return images


def list_files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("protocol", ["official", "fixed"])
def test_a_grid_that_was_written_gives_the_same_pixels(tmp_path, protocol):
    benchmark = DPGBench()
    images = draw(tmp_path, range(4))
    benchmark.finish(tmp_path, [ITEM])
    assigned = benchmark.assign([ITEM], list_files(tmp_path), protocol)
    assert assigned.keys() == {("a", number) for number in range(4)}
    for (_, number), tile in assigned.items():
        assert np.array_equal(np.asarray(benchmark.open(tmp_path, tile)), np.asarray(images[number]))


def test_grids_are_written_again_only_if_images_are_newer(tmp_path):
    benchmark = DPGBench()
    draw(tmp_path, range(4))
    benchmark.finish(tmp_path, [ITEM])
    grid = tmp_path / "a.png"
    os.utime(grid, ns=(grid.stat().st_mtime_ns + 10**9,) * 2)
    before = grid.stat().st_mtime_ns
    benchmark.finish(tmp_path, [ITEM])
    assert grid.stat().st_mtime_ns == before
    newer = draw(tmp_path, [3], seed=1)[3]
    os.utime(tmp_path / benchmark.image_path(ITEM, 3), ns=(before + 10**9,) * 2)
    benchmark.finish(tmp_path, [ITEM])
    assert np.array_equal(np.asarray(benchmark.open(tmp_path, "a.png#3")), np.asarray(newer))


def test_an_image_that_was_not_drawn_is_black_and_left_out_of_fixed(tmp_path):
    benchmark = DPGBench()
    images = draw(tmp_path, [0, 2])
    benchmark.finish(tmp_path, [ITEM])
    assert not np.asarray(benchmark.open(tmp_path, "a.png#1")).any()
    assert np.array_equal(np.asarray(benchmark.open(tmp_path, "a.png#2")), np.asarray(images[2]))
    files = list_files(tmp_path)
    assert benchmark.assign([ITEM], files, "fixed") == {("a", 0): "a.png#0", ("a", 2): "a.png#2"}
    assert len(benchmark.assign([ITEM], files, "official")) == 4


def test_a_single_image_is_its_own_grid(tmp_path):
    benchmark = DPGBench()
    benchmark.num_images = 1
    assert benchmark.image_path(ITEM, 0) == "a.png"
    image = Image.new("RGB", (4, 6), "red")
    image.save(tmp_path / "a.png")
    benchmark.finish(tmp_path, [ITEM])
    assert benchmark.assign([ITEM], ["a.png"], "fixed") == {("a", 0): "a.png"}
    assert benchmark.open(tmp_path, "a.png").size == (4, 6)


def test_nothing_drawn_gives_no_grid(tmp_path):
    DPGBench().finish(tmp_path, [ITEM])
    assert not list(tmp_path.iterdir())


def test_images_that_fit_no_grid_are_refused(tmp_path):
    benchmark = DPGBench()
    draw(tmp_path, [0])
    draw(tmp_path, [1], size=(9, 5))
    with pytest.raises(ValueError, match=r"item 'a' .* sizes \[\(7, 5\), \(9, 5\)\]"):
        benchmark.finish(tmp_path, [ITEM])
    benchmark.num_images = 5
    with pytest.raises(ValueError, match="5 images for each prompt do not fit"):
        benchmark.image_path(ITEM, 0)


def test_a_damaged_image_is_named(tmp_path):
    benchmark = DPGBench()
    draw(tmp_path, range(4))
    path = tmp_path / benchmark.image_path(ITEM, 1)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"single/a_1\.png cannot be .*Delete it"):
        benchmark.finish(tmp_path, [ITEM])


def test_a_picture_of_one_pixel_is_no_grid(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"is not a grid .* 1x1"):
        DPGBench().open(tmp_path, "a.png#0")
