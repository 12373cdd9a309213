"""Slightly changed views of an image. A verdict that changes between views is not reliable."""

from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageFilter


_BLUR = 1.0  # standard deviation in pixels
_SCALE = 0.9


def _change_brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _shrink_and_enlarge(image: Image.Image) -> Image.Image:
    small = (max(1, int(image.width * _SCALE)), max(1, int(image.height * _SCALE)))
    return image.resize(small, Image.Resampling.LANCZOS).resize(image.size, Image.Resampling.LANCZOS)


# The views of SpatialBench-UC; all keep the size of the image and the position of everything in it
VIEWS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "brighter": lambda image: _change_brightness(image, 1.1),
    "darker": lambda image: _change_brightness(image, 0.9),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(_BLUR)),
    "resized": _shrink_and_enlarge,
}


def apply(name: str, image: Image.Image) -> Image.Image:
    """
    Returns a view of an image.

    Args:
        name (`str`):
            A key of `VIEWS`.
        image (`Image.Image`):
            An RGB image, which stays as it is.

    Raises:
        `ValueError`: If there is no such view.
    """
    _check(name)
    return VIEWS[name](image)


def _check(name: str) -> None:
    if name not in VIEWS:
        raise ValueError(f"There is no view {name!r} of an image. Available: {', '.join(VIEWS)}.")
