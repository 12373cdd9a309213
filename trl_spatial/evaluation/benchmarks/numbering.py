"""Numbers of images that lie under the names of another program."""

from collections import defaultdict
from collections.abc import Iterable

from .base import ImageKey


def number_images(named: Iterable[tuple[str, int, str]], num_images: int) -> dict[ImageKey, str]:
    """
    Says which image is which from the numbers in file names. Where one is too large, as when a program counts over all prompts, or
    takes the seed for the number, the images of that prompt are numbered in their order.

    Args:
        named (`Iterable[tuple[str, int, str]]`):
            Id of an item, number in the name, and file, of each image.
        num_images (`int`):
            How many images of an item are wanted.

    Raises:
        `ValueError`: If two files of an item have one number.
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
