"""Scales images to the size that judges see, and encodes them for servers."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from ..preferences.images import load_image
from .geneval import Detection


_LARGEST_PNG = 2**19  # bytes; larger pictures are sent as JPEG
_HIDDEN = (153, 153, 153)  # GenEval's gray for pixels outside the object


def check_side(max_side: int) -> int:
    """
    Checks and returns a maximum for the longer side of images, in pixels. Raises a `ValueError` if it is below 1.
    """
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
    return {"role": "user", "content": [*image_parts(image, max_side), {"type": "text", "text": text}]}


def image_parts(image: Any, max_side: int) -> list[dict[str, Any]]:
    """Returns the image parts of a message, for one image or a list of them."""
    images = image if isinstance(image, list) else [image]
    return [{"type": "image_url", "image_url": {"url": encode_image(each, max_side)}} for each in images]


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


def crop_object(image: Image.Image, detection: Detection) -> Image.Image:
    """
    Cuts an object out of an image, so that its color can be named.

    Args:
        image (`PIL.Image.Image`):
            The RGB image.
        detection ([`~judges.geneval.Detection`]):
            The object. If it has a mask, all other pixels become gray, as in GenEval.

    Returns:
        `PIL.Image.Image`: The part of the image in its box, at least one pixel.
    """
    left, top, right, bottom = detection.box
    # at least the pixel in which the box begins, and within the image
    left, top = min(max(int(left), 0), image.width - 1), min(max(int(top), 0), image.height - 1)
    right, bottom = min(max(round(right), left + 1), image.width), min(max(round(bottom), top + 1), image.height)
    if detection.mask is not None:
        image = Image.fromarray(np.where(detection.mask[..., None], np.asarray(image), np.array(_HIDDEN, np.uint8)))
    return image.crop((left, top, right, bottom))
