"""Reading an image to the last byte, without keeping it."""

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets.utils.file_utils import is_local_path, xopen
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclass(frozen=True)
class ImageFacts:
    """
    What is kept of an image.

    Args:
        digest (`bytes`):
            Hash of its pixels as training sees them: upright and in RGB. Two files with the same picture share it.
        width (`int`), height (`int`):
            Its size, upright, in pixels.
        mode (`str`):
            Pillow's name of the pixels in the file, for example `"RGB"`.
    """

    digest: bytes
    width: int
    height: int
    mode: str


def read_image(value: Any) -> ImageFacts:
    """
    Decode an image fully and verify its file's checksums.

    Args:
        value (`dict`, `bytes` or `str`):
            `{"bytes": ..., "path": ...}` as an undecoded [`~datasets.Image`] column has it, the bytes of a file, or its
            path or address.

    Returns:
        [`ImageFacts`]: what is kept of it.

    Raises:
        `ValueError`: If there is no image, or it is damaged. The message is a predicate without its subject.
    """
    data = _read_bytes(value)
    try:
        with Image.open(BytesIO(data)) as image:
            image.verify()  # checksums, which decoding skips
        with Image.open(BytesIO(data)) as image:  # verifying has used the first one up
            mode = image.mode
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("is not an image file that Pillow can read") from error
    except Exception as error:  # each decoder has its own: OSError, SyntaxError, struct.error, zlib.error, ...
        raise ValueError(f"cannot be decoded ({error})") from error
    digest = hashlib.blake2b(f"{picture.width}x{picture.height}".encode(), digest_size=16)
    digest.update(picture.tobytes())
    return ImageFacts(digest.digest(), picture.width, picture.height, mode)


def _read_bytes(value: Any) -> bytes:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "":
        raise ValueError("is missing")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str):
        raise ValueError(f"is a {type(value).__name__}, not an image")
    try:
        with xopen(value, "rb") as file:
            return file.read()
    except Exception as error:  # a remote file system has its own
        is_relative = is_local_path(value) and not Path(value).is_absolute()
        hint = "; a relative path starts at the current folder" if is_relative else ""
        raise ValueError(f"cannot be opened ({error}{hint})") from error
