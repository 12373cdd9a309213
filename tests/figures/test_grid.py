"""What is drawn is measured on the pixels of the sheet."""

import itertools

import numpy as np
import pytest
from PIL import Image

from trl_spatial.figures.grid import MAX_IMAGE_SIZE, make_image_grid, save_image_grid


COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]


def plain(color, size=(32, 32)):
    return Image.new("RGB", size, color)


def box_of(sheet, color):
    """Bounds (left, top, right, bottom) of the pixels of a color."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def ink(sheet):
    """Pixels that are darker than the paper and grey: text."""
    pixels = np.asarray(sheet).astype(int)
    return (pixels.max(axis=-1) < 230) & (np.ptp(pixels, axis=-1) < 20)


@pytest.mark.parametrize("num_columns", [1, 2, None])
def test_images_stand_in_reading_order_without_overlap(num_columns):
    sheet = make_image_grid([plain(color) for color in COLORS], [""] * 5, num_columns=num_columns)
    boxes = [box_of(sheet, color) for color in COLORS]
    assert len({(right - left, bottom - top) for left, top, right, bottom in boxes}) == 1
    columns = num_columns or 4
    for (i, first), (j, second) in itertools.combinations(enumerate(boxes), 2):
        if i // columns == j // columns:
            assert first[1] == second[1] and first[2] < second[0]
        else:
            assert first[3] < second[1]


@pytest.mark.parametrize("size", [(32, 48), (1024, 640), (512, 768), (1, 1), (2000, 3)])
def test_every_image_is_visible_whole_and_in_its_shape(size):
    left, top, right, bottom = box_of(make_image_grid([plain(COLORS[0], size)], ["p"]), COLORS[0])
    width, height = right - left, bottom - top
    assert 150 < max(width, height) <= MAX_IMAGE_SIZE
    assert height == pytest.approx(width * size[1] / size[0], abs=1)


def test_text_stands_below_its_own_image():
    images = [plain(color) for color in COLORS[:2]]
    sheet = make_image_grid(images, ["a red cube " * 30, "x" * 500], ["reward 1.25", "reward -3"])
    boxes = [box_of(sheet, color) for color in COLORS[:2]]
    text = ink(sheet)
    assert not text[: boxes[0][3]].any()
    # nothing of it beside the columns of the two images
    for left, _, right, _ in boxes:
        assert text[:, left:right].any()
        text[:, left:right] = False
    assert not text.any()


def test_captions_change_the_picture_and_its_text_is_told_apart():
    def lines(captions):
        return ink(make_image_grid([plain(COLORS[0])], ["a blue cube"], captions)).any(axis=1)

    def count(rows):
        return int(np.count_nonzero(np.diff(rows.astype(int)) == 1))

    assert count(lines(["reward 1.25"])) == count(lines(None)) + 1
    assert count(lines(["reward 1.25\nrules 0.50"])) == count(lines(None)) + 2


def test_long_prompts_are_shortened():
    def height(prompt):
        return make_image_grid([plain(COLORS[0])], [prompt]).height

    assert height("a red cube " * 20) == height("a red cube " * 2000) > height("a red cube")


@pytest.mark.parametrize(("prompt", "drawn_as"), [("Würfel", "Wurfel"), ("a − b – c", "a - b - c"), ("“é”", '"e"')])
def test_letters_that_the_font_lacks(prompt, drawn_as):
    ours, theirs = (make_image_grid([plain(COLORS[0])], [text]) for text in (prompt, drawn_as))
    assert ours.tobytes() == theirs.tobytes()


def test_saved_grid_is_the_drawn_one(tmp_path):
    path = tmp_path / "images" / "step_1.png"
    grid = save_image_grid(path, [plain(COLORS[0])], ["a blue cube"], ["reward 1"])
    assert Image.open(path).tobytes() == grid.tobytes()


@pytest.mark.parametrize(("num_images", "num_prompts", "num_captions"), [(0, 0, 0), (2, 1, 2), (1, 1, 2)])
def test_error_of_lists_that_do_not_match(num_images, num_prompts, num_captions):
    with pytest.raises(ValueError, match=f"{num_images} images, {num_prompts} prompts and {num_captions} captions"):
        make_image_grid([plain(COLORS[0])] * num_images, ["p"] * num_prompts, ["c"] * num_captions)
