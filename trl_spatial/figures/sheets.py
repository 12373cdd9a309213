"""Sheets of images with lines of text, used by [`~figures.pairs.draw_pairs`] and [`~figures.grid.make_image_grid`]."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


Color = tuple[int, int, int]
INK, QUIET = (20, 20, 24), (100, 100, 110)
_BACKGROUND = (255, 255, 255)
_MARGIN, _GAP = 12, 4
_FONT_SIZE, _LINE, _TITLE_SIZE = 13, 17, 20
_ASCII_SIGNS = str.maketrans("−–—‘’“”", "---''\"\"")


@dataclass(frozen=True)
class Text:
    """Text of a cell, cut short after `max_lines`. Letters that Pillow's own font lacks are drawn without their accents or as `?`."""

    text: str
    color: Color = INK
    max_lines: int | None = None


@dataclass(frozen=True)
class Cell:
    """Images side by side, in their own size, with a label below each, and text above and below, as wide as all images."""

    images: Sequence[Image.Image]
    labels: Sequence[Text]
    above: Text = Text("")
    below: Text = Text("")


def draw_sheet(cells: Sequence[Cell], *, num_columns: int, title: str = "") -> Image.Image:
    """
    Draws cells, which all have the same number of images, in reading order. All columns are equally wide, and the same parts of
    all cells equally high.
    """
    images = [image for cell in cells for image in cell.images]
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    cell_width = len(cells[0].images) * (width + _GAP) - _GAP
    above = [_wrap(cell.above, cell_width) for cell in cells]
    labels = [[_wrap(label, width) for label in cell.labels] for cell in cells]
    below = [_wrap(cell.below, cell_width) for cell in cells]
    above_height = _height(above)
    labels_height = _height([lines for row in labels for lines in row])
    cell_height = above_height + height + labels_height + _height(below) + _MARGIN
    header = _TITLE_SIZE + 2 * _MARGIN if title else _MARGIN
    size = (_MARGIN + num_columns * (cell_width + _MARGIN), header + -(-len(cells) // num_columns) * cell_height)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), _drawable(title), fill=INK, font=ImageFont.load_default(_TITLE_SIZE))
    for number, cell in enumerate(cells):
        left = _MARGIN + number % num_columns * (cell_width + _MARGIN)
        top = header + number // num_columns * cell_height
        _draw_lines(draw, above[number], (left, top), cell.above.color)
        top += above_height
        for position, (image, label) in enumerate(zip(cell.images, cell.labels, strict=True)):
            corner = left + position * (width + _GAP)
            sheet.paste(image, (corner, top))
            _draw_lines(draw, labels[number][position], (corner, top + height + _GAP), label.color)
        _draw_lines(draw, below[number], (left, top + height + labels_height + _GAP), cell.below.color)
    return sheet


def _height(texts: Sequence[list[str]]) -> int:
    """Height of the longest of several texts, including the gap above it."""
    num_lines = max(map(len, texts))
    return num_lines and _LINE * num_lines + _GAP


def _draw_lines(draw: ImageDraw.ImageDraw, lines: list[str], corner: tuple[int, int], color: Color) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + _LINE * number), line, fill=color, font=_font())


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)


def _drawable(text: str) -> str:
    """Converts text to the letters of Pillow's own font, which draws a box for any other."""
    text = unicodedata.normalize("NFKD", text.translate(_ASCII_SIGNS))
    letters = "".join(letter for letter in text if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() or letter == "±" else "?" for letter in letters)


def _wrap(text: Text, width: int) -> list[str]:
    """Splits text into lines of at most `width` pixels. Words are kept whole unless one alone is too wide."""
    font, lines = _font(), []
    for paragraph in _drawable(text.text).splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".lstrip()
            while font.getlength(line) > width:
                ends = range(len(line) - 1, 1, -1)
                end = next((end for end in ends if font.getlength(line[:end]) <= width), 1)
                lines.append(line[:end])
                line = line[end:]
        lines.append(line)
    if text.max_lines is None or len(lines) <= text.max_lines:
        return lines
    last = lines[text.max_lines - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: text.max_lines - 1], f"{last}..."]
