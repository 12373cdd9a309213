"""Drawing the prompts of a dataset: in batches, split between processes, with the same images every time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from .generators import ImageGenerator
from .seeds import image_generator


@dataclass
class DrawnBatch:
    """Images that were drawn together."""

    images: list[Image.Image]
    indices: list[int]  # numbers of the images among those of all processes, ascending: row * num_images + image
    rows: list[dict[str, Any]]  # the row of each image


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
    Draws `num_images` images for each row of a dataset, `batch_size` at once, with the prompts in the column `prompt`.
    Image `j` of row `i` starts from the noise of `(seed, i, j)`, whatever the batch size and the number of processes,
    so that images of two generators differ by the generators alone.

    Each process draws its share of all images, and yields it in order. If drawing `is_collective`, it needs all
    processes, as a sharded model does: those with fewer batches than others draw one more, which is dropped.
    `progress` is the name of a progress bar. Raises `ValueError` if the generator does not return one image per prompt.
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
