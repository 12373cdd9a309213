"""Grids: files that hold up to four images of a prompt in two rows and two columns, as some benchmarks require."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image

from ...preferences.images import load_image
from ...store import write_atomically
from .base import Item


MOST_TILES = 4
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif"})
_SINGLES = "single"  # folder of the separate images


def single_path(grid: str, number: int, num_images: int) -> str:
    """
    Returns the path at which an image of a grid is drawn: beside the grid, in a folder that the official programs
    ignore. A prompt's only image is its own grid.

    Args:
        grid (`str`):
            The file of the grid, such as `"object/000.png"`.
        number (`int`), num_images (`int`):
            Number of the image, and how many there are.

    Raises:
        `ValueError`: If there are more images than places.
    """
    if num_images > MOST_TILES:
        raise ValueError(f"{num_images} images for each prompt do not fit into a grid of {MOST_TILES}. Draw fewer.")
    if num_images == 1:
        return grid
    path = PurePosixPath(grid)
    return str(path.parent / _SINGLES / f"{path.stem}_{number}.png")


def tile_names(grid: str, num_images: int) -> list[str]:
    """Returns the names of the images in a grid: `FILE#0` to `FILE#3`, from left to right, then down."""
    return [grid] if num_images == 1 else [f"{grid}#{number}" for number in range(num_images)]


def grid_of(tile: str, num_images: int) -> str:
    """The file that a tile is part of."""
    return tile if num_images == 1 else tile.rpartition("#")[0]


def open_tile(folder: Path, tile: str, num_images: int) -> Image.Image:
    """
    Reads an image out of a grid.

    Raises:
        `ValueError`: If the file cannot be read, or is too small to be cut.
    """
    image = load_image(folder / PurePosixPath(grid_of(tile, num_images)))
    if num_images == 1:
        return image
    row, column = divmod(int(tile.rpartition("#")[2]), 2)
    width, height = image.width // 2, image.height // 2
    if not width or not height:
        raise ValueError(f"is not a grid of two rows and two columns: it has {image.width}x{image.height} pixels")
    return image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


def write_grid(folder: Path, item: Item, grid: str, num_images: int) -> None:
    """
    Writes the grid of an item from its images, unless it exists and is newer than they are. Missing images are black.
    Without any images, no grid is written.

    Args:
        folder (`Path`):
            Folder of the images.
        item ([`~evaluation.benchmarks.base.Item`]):
            The item.
        grid (`str`):
            Its file, relative to the folder.
        num_images (`int`):
            Images for each prompt.

    Raises:
        `ValueError`: If an image cannot be read, or they differ in size.
    """
    paths = {number: folder / single_path(grid, number, num_images) for number in range(num_images)}
    paths = {number: path for number, path in paths.items() if path.is_file()}
    target = folder / grid
    if num_images == 1 or not paths:
        return
    if target.is_file() and target.stat().st_mtime_ns > max(path.stat().st_mtime_ns for path in paths.values()):
        return
    images: dict[int, Image.Image] = {}
    for number, path in paths.items():
        try:
            images[number] = load_image(path)
        except ValueError as error:
            raise ValueError(f"{path} {error}. Delete it, so that it is drawn again.") from None
    sizes = {image.size for image in images.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"The images of item {item.id!r} in {paths[min(paths)].parent} have the sizes {sorted(sizes)}, but a grid needs one size. "
            "Draw them all at one size."
        )
    (width, height) = sizes.pop()
    canvas = Image.new("RGB", (2 * width, 2 * height))
    for number, image in images.items():
        canvas.paste(image, (number % 2 * width, number // 2 * height))
    content = BytesIO()
    canvas.save(content, "PNG")
    write_atomically(target, content.getvalue())


def drawn_tiles(grid: str, num_images: int, files: Sequence[str]) -> list[tuple[int, str]]:
    """Returns number and name of each image in a grid, except those that are black because they were never drawn."""
    tiles = list(enumerate(tile_names(grid, num_images)))
    known = set(files)
    are_drawn = [single_path(grid, number, num_images) in known for number, _ in tiles]
    return [tile for tile, is_drawn in zip(tiles, are_drawn, strict=True) if is_drawn or not any(are_drawn)]


def choose_grid(item: Item, path: str, candidates: Sequence[str]) -> str | None:
    """
    Chooses the file that is the grid of an item.

    Args:
        item ([`~evaluation.benchmarks.base.Item`]), path (`str`):
            The item, and its official file, which is preferred.
        candidates (`Sequence[str]`):
            The files that may be it.

    Returns:
        `str` or `None`: The file, if there is one.

    Raises:
        `ValueError`: If several files may be it.
    """
    if path in candidates or not candidates:
        return path if candidates else None
    if len(candidates) > 1:
        raise ValueError(
            f"Each of {', '.join(candidates)} could be the grid of item {item.id!r}. Name the right one {path!r}."
        )
    return candidates[0]
