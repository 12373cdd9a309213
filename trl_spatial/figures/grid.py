"""Grids of generated images with their prompts and rewards."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .sheets import QUIET, Cell, Text, draw_sheet


MAX_IMAGE_SIZE = 320  # pixels; a sheet of full-size images would be too large for a logger
MIN_IMAGE_SIZE = 200  # pixels; below that, there is no room for the text
MAX_PROMPT_LINES = 4


def make_image_grid(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    captions: Sequence[str] | None = None,
    *,
    num_columns: int | None = None,
) -> Image.Image:
    """
    Draws images in rows, each at most 320 pixels wide and high, with a caption, such as its rewards, and its prompt below,
    shortened to four lines. Without `num_columns`, there are at most four in a row.

    Raises:
        `ValueError`: If there is no image, or the lists differ in length.
    """
    captions = [""] * len(images) if captions is None else captions
    if not images or not len(images) == len(prompts) == len(captions):
        raise ValueError(
            f"A grid needs as many prompts and captions as images, and at least one: got {len(images)} images, "
            f"{len(prompts)} prompts and {len(captions)} captions."
        )
    cells = [
        Cell([_fit(image)], [Text(caption)], below=Text(prompt, QUIET, MAX_PROMPT_LINES))
        for image, prompt, caption in zip(images, prompts, captions, strict=True)
    ]
    return draw_sheet(cells, num_columns=min(num_columns or 4, len(cells)))


def save_image_grid(
    path: str | Path,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    captions: Sequence[str] | None = None,
    *,
    num_columns: int | None = None,
) -> Image.Image:
    """Saves the result of [`make_image_grid`] to a file, whose folder is created if missing, and returns it."""
    grid = make_image_grid(images, prompts, captions, num_columns=num_columns)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return grid


def _fit(image: Image.Image) -> Image.Image:
    """Resizes an image to bring its longer side within bounds; small ones are enlarged by a whole factor."""
    longest = max(image.size)
    scale = -(-MIN_IMAGE_SIZE // longest) if longest < MIN_IMAGE_SIZE else min(1.0, MAX_IMAGE_SIZE / longest)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, resample)
