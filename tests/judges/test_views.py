"""Changed views of an image."""

import numpy as np
import pytest
from PIL import Image

from trl_spatial.judges import views


ALL = pytest.mark.parametrize("name", views.VIEWS)


def draw_square(size, box, background=60, color=200):
    pixels = np.full((size[1], size[0], 3), background, dtype=np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = color
    return Image.fromarray(pixels)


def find_square(image):
    """The box of what is nearer to the brightest than to the darkest."""
    pixels = np.asarray(image, dtype=float).mean(axis=2)
    rows, columns = np.nonzero(pixels > (pixels.min() + pixels.max()) / 2)
    return [float(edge) for edge in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


@ALL
@pytest.mark.parametrize("size", [(96, 64), (63, 101)])
def test_what_is_found_in_a_view_lies_at_its_place_in_the_image(name, size):
    box = (21, 17, 45, 40)
    image = draw_square(size, box)
    before = image.tobytes()
    view = views.apply(name, image)
    assert view.mode == "RGB" and image.tobytes() == before != view.tobytes()
    found = find_square(view)
    assert found == pytest.approx(box, abs=1)


@ALL
def test_a_view_differs_little_and_is_the_same_each_time(name):
    image = Image.fromarray(np.random.default_rng(0).integers(40, 200, (50, 60, 3), dtype=np.uint8))
    smooth = image.resize((12, 10)).resize((60, 50))
    view = views.apply(name, smooth)
    assert view.tobytes() == views.apply(name, smooth).tobytes()
    difference = np.abs(np.asarray(view, float) - np.asarray(smooth, float)).mean()
    assert 0 < difference < 16


def test_views_are_as_large_a_change_as_in_the_benchmark():
    image = draw_square((64, 64), (20, 20, 40, 40))
    for name, factor in (("brighter", 1.1), ("darker", 0.9)):
        pixels = np.asarray(views.apply(name, image), float)
        assert np.allclose(pixels, np.asarray(image, float) * factor, atol=1)
    edge = np.asarray(views.apply("blurred", image), float)[30, :, 0]
    # an edge under a normal kernel of one pixel: pixel 20 lies half a standard deviation behind it, pixel 22 two and a half
    assert edge[20] == pytest.approx(60 + 140 * 0.69, abs=8) and edge[22] == pytest.approx(60 + 140 * 0.994, abs=4)
    # a pattern of single pixels does not outlive the smaller image
    stripes = Image.fromarray(
        np.tile(np.array([[0], [255]], np.uint8), (32, 1))[:, :, None].repeat(64, 1).repeat(3, 2)
    )
    assert np.asarray(views.apply("resized", stripes), float).std() < np.asarray(stripes, float).std()


@ALL
def test_the_smallest_image_has_views(name):
    assert views.apply(name, Image.new("RGB", (1, 1), (90, 90, 90))).size == (1, 1)


def test_an_unknown_view_is_named():
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match=r"'upside down'.*brighter, darker, blurred, resized"):
        views.apply("upside down", image)


def test_brightness_is_cut_at_white():
    assert views.apply("brighter", Image.new("RGB", (2, 2), (250, 250, 250))).getpixel((0, 0)) == (255, 255, 255)
