"""Drawing the prompts of a dataset: in batches, shared between processes, the same images every time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from .generators import ImageGenerator
from .seeds import image_generator


@dataclass
class DrawnBatch:
    """
    Images that were drawn together.

    Args:
        images (`list[Image.Image]` of length `n`):
            The images.
        indices (`list[int]` of length `n`):
            Their numbers among those of all processes, ascending: `row * num_images + image`.
        rows (`list[dict]` of length `n`):
            The row of each.
    """

    images: list[Image.Image]
    indices: list[int]
    rows: list[dict[str, Any]]


def draw_rows(
    generator: ImageGenerator,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int,
    seed: int,
    num_images: int = 1,
    rank: int = 0,
    world_size: int = 1,
    is_collective: bool = False,
    progress: str | None = None,
) -> Iterator[DrawnBatch]:
    """
    Draws images for the rows of a dataset. Image `j` of row `i` starts from the noise of `(seed, i, j)`, whatever the batch
    size and the number of processes, so that images of two generators differ by the generators alone.

    Args:
        generator ([`~generation.generators.ImageGenerator`]):
            Draws the images.
        rows (`Sequence[dict]`):
            All rows, with a `prompt`. Each process takes its share.
        batch_size (`int`):
            Images that are drawn at once.
        seed (`int`):
            Seed of the noise.
        num_images (`int`, *optional*, defaults to `1`):
            Images per row.
        rank (`int`, *optional*, defaults to `0`), world_size (`int`, *optional*, defaults to `1`):
            Number of this process and of all.
        is_collective (`bool`, *optional*, defaults to `False`):
            Whether drawing needs all processes, as a sharded model does. Those with fewer batches than others then draw one
            more, which is dropped.
        progress (`str`, *optional*):
            Name of the progress bar. If `None`, there is none.

    Yields:
        [`DrawnBatch`]: The images of one batch, in the order of the rows.

    Raises:
        `ValueError`: If the generator does not give one image per prompt.
    """
    indices = range(rank, len(rows) * num_images, world_size)
    # Process 0 has the most images.
    num_drawn = len(range(0, len(rows) * num_images, world_size)) if is_collective else len(indices)
    with tqdm(total=len(indices), desc=progress, unit="image", disable=progress is None) as bar:
        for start in range(0, num_drawn, batch_size):
            batch = list(indices[start : start + batch_size]) or [0]  # dropped below
            batch_rows = [rows[index // num_images] for index in batch]
            images = generator(
                [row["prompt"] for row in batch_rows],
                [image_generator(seed, *divmod(index, num_images)) for index in batch],
            )
            if len(images) != len(batch):
                raise ValueError(
                    f"{type(generator).__name__} drew {len(images)} images for {len(batch)} prompts. It should draw one for "
                    "each."
                )
            if start < len(indices):
                yield DrawnBatch(images, batch, batch_rows)
                bar.update(len(batch))
