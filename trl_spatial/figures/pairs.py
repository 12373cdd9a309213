"""Pictures of what a reward model says."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


_BACKGROUND, _INK, _QUIET = (255, 255, 255), (20, 20, 24), (110, 110, 120)
_LINE, _SMALL_LINE = 17, 14
_RIGHT, _WRONG = (22, 128, 66), (190, 38, 44)


@dataclass(frozen=True)
class ScoredPair:
    """
    One pair to be drawn.

    Args:
        prompt (`str`):
            The prompt.
        chosen (`Image.Image`), rejected (`Image.Image`):
            The two images.
        chosen_score (`tuple[float, float]`, *optional*), rejected_score (`tuple[float, float]`, *optional*):
            Mean and standard deviation of their scores; both `None` if they have none.
        caption (`str`):
            A line below, for example what was changed.
    """

    prompt: str
    chosen: Image.Image
    rejected: Image.Image
    chosen_score: tuple[float, float] | None
    rejected_score: tuple[float, float] | None
    caption: str


def draw_pairs(pairs: Sequence[ScoredPair], *, title: str, num_columns: int = 2, image_size: int = 160) -> Image.Image:
    """
    Draw scored pairs: the chosen image left, the rejected one right, the higher score in green if that is the order the
    prompt asks for and in red if not.

    Args:
        pairs (`Sequence[ScoredPair]`):
            The pairs.
        title (`str`):
            Headline.
        num_columns (`int`, *optional*, defaults to `2`):
            Pairs per row.
        image_size (`int`, *optional*, defaults to `160`):
            Width and height of the drawn images, in pixels.

    Returns:
        `Image.Image`: the sheet.
    """
    if not pairs:
        raise ValueError("`pairs` is empty: there is nothing to draw.")
    margin, width = 16, 2 * image_size + 8
    prompts = [textwrap.wrap(pair.prompt, width // 7) for pair in pairs]
    captions = [textwrap.wrap(pair.caption, width // 6) for pair in pairs]
    text_height = _LINE * max(map(len, prompts)) + 6
    height = text_height + image_size + _LINE + 6 + _SMALL_LINE * max(map(len, captions)) + margin
    num_rows = -(-len(pairs) // num_columns)
    header = 44 if title else 0
    size = (margin + num_columns * (width + margin), header + margin + num_rows * height)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), title, fill=_INK, font=ImageFont.load_default(20))
    for i, pair in enumerate(pairs):
        x, y = margin + i % num_columns * (width + margin), header + margin + i // num_columns * height
        _draw_lines(draw, prompts[i], (x, y), _LINE, 14, _INK)
        _draw_images(sheet, draw, pair, (x, y + text_height), image_size)
        bottom = y + text_height + image_size + _LINE + 6
        _draw_lines(draw, captions[i], (x, bottom), _SMALL_LINE, 12, _QUIET)
    return sheet


def _draw_lines(draw, lines: list[str], corner: tuple[int, int], line_height: int, size: int, color) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + line_height * number), line, fill=color, font=ImageFont.load_default(size))


def _draw_images(sheet, draw, pair: ScoredPair, corner: tuple[int, int], image_size: int) -> None:
    scored = ((pair.chosen, pair.chosen_score, "chosen"), (pair.rejected, pair.rejected_score, "rejected"))
    for side, (image, score, role) in enumerate(scored):
        left, top = corner[0] + side * (image_size + 8), corner[1]
        sheet.paste(image.convert("RGB").resize((image_size, image_size), Image.Resampling.LANCZOS), (left, top))
        text = role if score is None else f"{role}  {score[0]:+.2f} ± {score[1]:.2f}"
        color = _score_color(pair, score)
        draw.text((left, top + image_size + 3), text, fill=color, font=ImageFont.load_default(14))


def _score_color(pair: ScoredPair, score: tuple[float, float] | None) -> tuple[int, int, int]:
    if score is None or pair.chosen_score is None or pair.rejected_score is None:
        return _QUIET
    highest = max(pair.chosen_score[0], pair.rejected_score[0])
    if score[0] != highest:
        return _QUIET
    return _RIGHT if pair.chosen_score[0] > pair.rejected_score[0] else _WRONG
