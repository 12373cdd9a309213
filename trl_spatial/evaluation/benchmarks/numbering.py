"""Numbers images that were named by another program."""

from collections import defaultdict
from collections.abc import Iterable

from .base import ImageKey


def number_images(named: Iterable[tuple[str, int, str]], num_images: int) -> dict[ImageKey, str]:
    """
    Identifies images by the numbers in file names. If one is too large, because a program counts over all prompts or
    uses the seed as number, the images of that prompt are renumbered in order.

    Args:
        named (`Iterable[tuple[str, int, str]]`):
            Id of an item, number in the name, and file, of each image.
        num_images (`int`):
            How many images of an item are wanted.

    Raises:
        `ValueError`: If two files of an item have the same number.
    """
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for id, number, file in named:
        known = found[id]
        if number in known:
            raise ValueError(f"{known[number]!r} and {file!r} are both image {number} of item {id}: remove one.")
        known[number] = file
    return {
        (id, rank if max(known) >= num_images else number): known[number]
        for id, known in found.items()
        for rank, number in enumerate(sorted(known))
        if rank < num_images
    }
