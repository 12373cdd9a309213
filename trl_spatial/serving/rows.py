"""Reads prompts and images from the JSON of a request; a fault in one row affects that row alone."""

import base64
import json
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image
from pydantic import BaseModel, ValidationError, model_validator

from ..preferences.images import load_image, open_image
from ..preferences.prompts import clean_prompt
from .intake import Refusal
from .limits import Limits


_DATA_URI = re.compile(r"data:[\w/+.;=-]*,")  # the prefix that browsers write before the base64


class ScoreRequest(BaseModel):
    """Body of `POST /score`: one prompt per image, and images as base64 of image files."""

    prompts: list[Any]
    images: list[Any]

    @model_validator(mode="after")
    def _check_lengths(self) -> "ScoreRequest":
        if len(self.prompts) != len(self.images):
            raise ValueError(
                f"There are {len(self.prompts)} prompts and {len(self.images)} images: send one prompt per image."
            )
        return self


class ScoreAnswer(BaseModel):
    """Answer to `POST /score`, one entry per row: a score, or `None` and the reason."""

    mean: list[float | None]
    std: list[float | None]
    errors: list[str | None]


@dataclass
class Row:
    """A row of a request: an image, first opened and then decoded, or the reason why it cannot be scored."""

    prompt: str
    image: Image.Image | None = None
    error: str | None = None


def read_rows(body: bytes | bytearray, limits: Limits) -> list[Row]:
    """
    Reads the rows of a request and opens their images, without decoding them. Refuses with 422 what is not a request, and with 413
    too many rows.
    """
    try:
        # not pydantic's parser, which would reject the whole request for a lone surrogate in one row
        request = ScoreRequest.model_validate(json.loads(body))
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        if fault["type"] == "value_error":
            raise Refusal(422, str(fault["ctx"]["error"])) from None
        raise Refusal(422, 'Send {"prompts": [...], "images": [...]}: two lists of strings.') from None
    except (ValueError, RecursionError):
        raise Refusal(422, "The request is not JSON.") from None
    if len(request.images) > limits.max_images:
        raise Refusal(413, f"There are {len(request.images)} images: send at most {limits.max_images} at a time.")
    return [
        _read_row(number, prompt, image, limits)
        for number, (prompt, image) in enumerate(zip(request.prompts, request.images, strict=True))
    ]


def _read_row(number: int, prompt: Any, image: Any, limits: Limits) -> Row:
    if isinstance(prompt, str) and len(prompt) > limits.max_prompt_length:
        return Row(
            "",
            error=f"prompts[{number}] has {len(prompt)} characters: send at most {limits.max_prompt_length}",
        )
    try:
        prompt = clean_prompt(prompt)
    except ValueError as error:
        return Row("", error=f"prompts[{number}] {error}")
    try:
        opened = open_image(_decode_base64(image, limits.max_image_bytes))
        if opened.width * opened.height > limits.max_pixels:
            raise ValueError(f"has more than {limits.max_pixels} pixels")
    except ValueError as error:
        return Row(prompt, error=f"images[{number}] {error}")
    return Row(prompt, opened)


def _decode_base64(text: Any, max_bytes: int) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"is a {type(text).__name__}, not a string of base64")
    if prefix := _DATA_URI.match(text):
        text = text[prefix.end() :]
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise ValueError("is not base64") from None
    if len(data) > max_bytes:
        raise ValueError(f"is larger than {max_bytes} bytes")
    return data


def num_decoded_bytes(rows: list[Row]) -> int:
    """Memory that decoding takes: 3 bytes a pixel, and 17 more while the largest image is converted."""
    pixels = [row.image.width * row.image.height for row in rows if row.image is not None]
    return 3 * sum(pixels) + 17 * max(pixels, default=0)


def decode_rows(rows: list[Row]) -> None:
    """Decodes the images of rows. A row whose image is damaged gets an error."""
    for number, row in enumerate(rows):
        if row.image is not None:
            try:
                row.image = load_image(row.image)
            except ValueError as error:
                row.image, row.error = None, f"images[{number}] {error}"
