"""Images in the size in which judges look at them, and as servers take them."""

import base64
from io import BytesIO
from typing import Any

from PIL import Image

from ..preferences.images import load_image


_LARGEST_PNG = 2**19  # bytes; larger pictures are sent as JPEG


def check_side(max_side: int) -> int:
    """The longer side of an image in pixels, at most. Raises a `ValueError` if it is none."""
    if max_side < 1:
        raise ValueError(f"`max_side` must be at least 1, got {max_side}.")
    return max_side


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


def user_message(image: Any, text: str, max_side: int) -> dict[str, Any]:
    """A message of the user as OpenAI's API takes it: an image or a list of them, see [`encode_image`], and words about it."""
    images = image if isinstance(image, list) else [image]
    pictures = [{"type": "image_url", "image_url": {"url": encode_image(each, max_side)}} for each in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def encode_image(image: Any, max_side: int) -> str:
    """
    An image as a data URL: PNG, or JPEG if that would be large.

    Args:
        image (any image):
            In any form that [`~preferences.images.load_image`] takes.
        max_side (`int`):
            The longer side in pixels; larger images are shrunk.

    Raises:
        `ValueError`: If the image cannot be read.
    """
    picture = load_picture(image, max_side)
    kind, data = "png", _save(picture, "PNG")
    if len(data) > _LARGEST_PNG:
        kind, data = "jpeg", _save(picture, "JPEG", quality=95, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _save(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()
