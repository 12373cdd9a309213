"""Sheets of preference pairs with the scores of a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .sheets import QUIET, Cell, Color, Text, draw_sheet


RIGHT, WRONG = (22, 128, 66), (190, 38, 44)  # colors of the higher score


@dataclass(frozen=True)
class ScoredPair:
    """
    A pair to be drawn, with mean and standard deviation of the scores of its images, if they have any, and a text below, for
    example what was changed.
    """

    prompt: str
    chosen: Image.Image
    rejected: Image.Image
    chosen_score: tuple[float, float] | None
    rejected_score: tuple[float, float] | None
    caption: str


def draw_pairs(pairs: Sequence[ScoredPair], *, title: str, num_columns: int = 2, image_size: int = 160) -> Image.Image:
    """
    Draws scored pairs: the chosen image left, the rejected one right. The higher score is green if it is the chosen
    image's, and red otherwise; equal scores are both red.
    """
    if not pairs:
        raise ValueError("`pairs` is empty: there is nothing to draw.")
    cells = [
        Cell(
            [
                image.convert("RGB").resize((image_size, image_size), Image.Resampling.LANCZOS)
                for image in (pair.chosen, pair.rejected)
            ],
            [
                _label("chosen", pair.chosen_score, pair.rejected_score, RIGHT),
                _label("rejected", pair.rejected_score, pair.chosen_score, WRONG),
            ],
            above=Text(pair.prompt),
            below=Text(pair.caption, QUIET),
        )
        for pair in pairs
    ]
    return draw_sheet(cells, num_columns=num_columns, title=title)


def _label(role: str, score: tuple[float, float] | None, other: tuple[float, float] | None, color: Color) -> Text:
    """Role and score of an image, in `color` if its score is the higher one."""
    if score is None or other is None:
        return Text(role, QUIET)
    text = f"{role}  {score[0]:+.2f} ± {score[1]:.2f}"
    if score[0] == other[0]:
        return Text(text, WRONG)
    return Text(text, color if score[0] > other[0] else QUIET)
