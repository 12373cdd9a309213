"""Sheets of generated images with their prompts and rewards."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


MAX_IMAGE_SIZE = 320  # pixels; a sheet of full-size images would be too large for a logger
MIN_IMAGE_SIZE = 200  # pixels; below there is no room for the text
MAX_PROMPT_LINES = 4
_MARGIN, _LINE, _FONT_SIZE = 12, 17, 13
_ASCII_SIGNS = str.maketrans("−–—‘’“”", "---''\"\"")
_BACKGROUND, _INK, _QUIET = (255, 255, 255), (20, 20, 24), (90, 90, 100)


def make_image_grid(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    captions: Sequence[str] | None = None,
    *,
    num_columns: int | None = None,
) -> Image.Image:
    """
    Draws images in rows, each with its caption and its prompt below.

    Args:
        images (`Sequence[Image.Image]`):
            The images. They are drawn at most 320 pixels wide and high; shapes may differ.
        prompts (`Sequence[str]`):
            Prompt of each image, shortened to four lines. Letters that Pillow's own font lacks are drawn without their
            accents or as `?`.
        captions (`Sequence[str]`, *optional*):
            A short text for each image, such as its rewards.
        num_columns (`int`, *optional*):
            Images per row. If `None`, at most four.

    Returns:
        `Image.Image`: the sheet.

    Raises:
        `ValueError`: If there is no image, or the lists differ in length.
    """
    captions = [""] * len(images) if captions is None else captions
    if not images or not len(images) == len(prompts) == len(captions):
        raise ValueError(
            f"A grid needs as many prompts and captions as images, and at least one: got {len(images)} images, "
            f"{len(prompts)} prompts and {len(captions)} captions."
        )
    num_columns = min(num_columns or 4, len(images))
    pictures = [_fit(image) for image in images]
    width, height = (max(picture.size[side] for picture in pictures) for side in (0, 1))
    texts = [
        (_wrap(caption, width), _wrap_prompt(prompt, width)) for caption, prompt in zip(captions, prompts, strict=True)
    ]
    num_caption_lines, num_prompt_lines = (max(len(text[part]) for text in texts) for part in (0, 1))
    caption_height = _LINE * num_caption_lines + 4
    cell = (width + _MARGIN, height + caption_height + _LINE * num_prompt_lines + _MARGIN)
    num_rows = -(-len(images) // num_columns)
    sheet = Image.new("RGB", (_MARGIN + num_columns * cell[0], _MARGIN + num_rows * cell[1]), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, (picture, (caption_lines, prompt_lines)) in enumerate(zip(pictures, texts, strict=True)):
        left = _MARGIN + index % num_columns * cell[0]
        top = _MARGIN + index // num_columns * cell[1]
        sheet.paste(picture, (left, top))
        _draw_lines(draw, caption_lines, left, top + height + 4, _INK)
        _draw_lines(draw, prompt_lines, left, top + height + caption_height, _QUIET)
    return sheet


def save_image_grid(
    path: str | Path,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    captions: Sequence[str] | None = None,
    *,
    num_columns: int | None = None,
) -> Image.Image:
    """
    Draws a grid and saves it.

    Args:
        path (`str` or `Path`):
            File to write, such as `images/step_00100.png`; its folder is created if missing.
        images, prompts, captions, num_columns:
            See [`make_image_grid`].

    Returns:
        `Image.Image`: the sheet.
    """
    grid = make_image_grid(images, prompts, captions, num_columns=num_columns)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return grid


def _fit(image: Image.Image) -> Image.Image:
    """An image whose longer side is within bounds; small ones are enlarged to be seen, by whole pixels."""
    longest = max(image.size)
    scale = -(-MIN_IMAGE_SIZE // longest) if longest < MIN_IMAGE_SIZE else min(1.0, MAX_IMAGE_SIZE / longest)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, resample)


def _drawable(text: str) -> str:
    """Text in the letters of Pillow's own font, which draws a box for any other."""
    text = unicodedata.normalize("NFKD", text.translate(_ASCII_SIGNS))
    letters = "".join(letter for letter in text if not unicodedata.combining(letter))
    return letters.encode("ascii", "replace").decode()


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels. Words are kept whole unless one alone is too wide."""
    font, lines = _font(), []
    for paragraph in _drawable(text).splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".lstrip()
            while font.getlength(line) > width:
                end = next(
                    end for end in range(len(line) - 1, 0, -1) if end == 1 or font.getlength(line[:end]) <= width
                )
                lines.append(line[:end])
                line = line[end:]
        lines.append(line)
    return lines


def _wrap_prompt(prompt: str, width: int) -> list[str]:
    lines = _wrap(prompt, width)
    if len(lines) <= MAX_PROMPT_LINES:
        return lines
    last = lines[MAX_PROMPT_LINES - 1]
    while _font().getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: MAX_PROMPT_LINES - 1], f"{last}..."]


def _draw_lines(draw: ImageDraw.ImageDraw, lines: list[str], left: int, top: int, color: tuple[int, int, int]) -> None:
    for number, line in enumerate(lines):
        draw.text((left, top + _LINE * number), line, fill=color, font=_font())
