"""Which score stands below which image, and in which color, measured on the pixels of the sheet."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from trl_spatial.demo.reward_model import scored_pair
from trl_spatial.evaluation.pair_tables import PairScores
from trl_spatial.figures.pairs import RIGHT, WRONG, ScoredPair, draw_pairs


BLUE, YELLOW = (0, 0, 200), (200, 200, 0)
PAIR = ScoredPair("a", Image.new("RGB", (8, 8), BLUE), Image.new("RGB", (8, 8), YELLOW), (2.0, 0.1), (1.0, 0.2), "b")


def draw(**changes):
    return np.asarray(draw_pairs([replace(PAIR, **changes)], title="Pairs")).astype(int)


def columns_of(sheet, color):
    """First column of the pixels of a color, and the one after the last."""
    (columns,) = np.nonzero((sheet == color).all(axis=-1).any(axis=0))
    return columns.min(), columns.max() + 1


@pytest.mark.parametrize(
    ("changes", "color"),
    [({"chosen_score": (3.0, 0.4)}, BLUE), ({"rejected_score": (0.5, 0.3)}, YELLOW), ({"rejected_score": (1.0, 0.3)}, YELLOW)],
)  # fmt: skip
def test_a_score_stands_below_its_image(changes, color):
    sheet = draw()
    rows, columns = np.nonzero((sheet != draw(**changes)).any(axis=-1))
    first, last = columns_of(sheet, color)
    assert first <= columns.min() and columns.max() < last
    assert rows.min() > np.nonzero((sheet == color).all(axis=-1))[0].max()


@pytest.mark.parametrize(
    ("chosen", "rejected", "colored"),
    [
        (1.0, -1.0, {RIGHT: BLUE}),
        (-1.0, -0.5, {WRONG: YELLOW}),
        (0.0, 0.0, {WRONG: (BLUE, YELLOW)}),
        (None, None, {}),
    ],
)
def test_the_higher_score_is_green_where_the_order_is_right(chosen, rejected, colored):
    scores = [None if mean is None else (mean, 0.1) for mean in (chosen, rejected)]
    sheet = draw(chosen_score=scores[0], rejected_score=scores[1])
    for color in (RIGHT, WRONG):
        (columns,) = np.nonzero((sheet == color).all(axis=-1).any(axis=0))
        if color not in colored:
            assert not columns.size
        else:
            images = colored[color] if color == WRONG and chosen == rejected else (colored[color],)
            spans = [columns_of(sheet, image) for image in images]
            inside = [(columns >= first) & (columns < last) for first, last in spans]
            assert np.logical_or.reduce(inside).all() and all(part.any() for part in inside)


def test_the_images_stand_chosen_first_below_the_title_and_the_prompt():
    sheet = draw()
    assert columns_of(sheet, BLUE)[1] <= columns_of(sheet, YELLOW)[0]
    top = np.nonzero((sheet == BLUE).all(axis=-1))[0].min()
    assert (sheet[:top] != 255).any() and (draw(prompt="other words") != sheet)[:top].any()


def test_the_demo_draws_every_pair_with_its_own_scores():
    numbers = np.arange(8.0).reshape(4, 2)
    row = {"prompt": "p", "chosen": PAIR.chosen, "rejected": PAIR.rejected, "operations": []}
    scores = PairScores(
        **dict(zip(("chosen_mean", "chosen_std", "rejected_mean", "rejected_std"), numbers, strict=True))
    )
    pair = scored_pair(row, scores, 1)
    assert (pair.chosen_score, pair.rejected_score) == ((1.0, 3.0), (5.0, 7.0))
    assert (pair.chosen, pair.rejected) == (PAIR.chosen, PAIR.rejected)


def test_a_sheet_shows_images_of_its_size_as_they_are():
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    pair = replace(PAIR, chosen=Image.fromarray(noise))
    sheet = np.asarray(draw_pairs([pair] * 3, title="", image_size=64))
    corners = np.argwhere((sheet[:-63, :-63] == noise[0, 0]).all(axis=2))
    assert sum((sheet[y : y + 64, x : x + 64] == noise).all() for y, x in corners) == 3
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_pairs([], title="")
