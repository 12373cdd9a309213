"""Images in the size in which judges look at them."""

from typing import Any

from PIL import Image

from ..preferences.images import load_image


def load_picture(image: Any, max_side: int) -> Image.Image:
    """
    Loads an image as a viewer sees it, shrunk if it is large.

    Args:
        image (any image):
            In any form that [`~preferences.images.load_image`] takes.
        max_side (`int`):
            The longer side in pixels, at most.

    Raises:
        `ValueError`: If the image cannot be read.
    """
    try:
        picture = load_image(image)
    except ValueError as error:
        raise ValueError(f"The image {error}.") from error
    scale = max_side / max(picture.size)
    if scale >= 1:
        return picture
    return picture.resize([max(round(scale * side), 1) for side in picture.size], Image.Resampling.LANCZOS)
