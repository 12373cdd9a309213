"""Reading an image to the last byte, without keeping it."""

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets.utils.file_utils import is_local_path, xopen
from PIL import Image, ImageOps, UnidentifiedImageError


MAX_ASPECT_RATIO = 200  # of the longer side of an image to the shorter: the limit of Qwen's image processor


def open_image(image: Any) -> Image.Image:
    """
    Opens one image, in whatever form a dataset or a user hands it over, without decoding its pixels.

    Args:
        image (`PIL.Image.Image`, `str`, `Path`, `bytes`, `dict` or file object):
            A PIL image, a local path, an image file or its bytes, or a row of an undecoded [`~datasets.Image`] column
            (`{"bytes": ..., "path": ...}`).

    Returns:
        `PIL.Image.Image`: The image; a PIL image is returned as it is.

    Raises:
        `ValueError`: If the image is of another type, missing, not an image file, has no pixels, or is too narrow. The
        message is a predicate ("has no pixels ..."), for the caller to name the row.
    """
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        image = BytesIO(image)
    if isinstance(image, (str, Path)) or hasattr(image, "read"):
        try:
            image = Image.open(image)
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot be opened ({error})") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"is a {type(image).__name__}, not a PIL image, a path, bytes or a datasets Image row")
    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"has no pixels ({width}x{height})")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"is too narrow ({width}x{height}): its sides differ by more than {MAX_ASPECT_RATIO} times")
    return image


def load_image(image: Any) -> Image.Image:
    """
    Opens and decodes one image.

    Args:
        image (`PIL.Image.Image`, `str`, `Path`, `bytes`, `dict` or file object):
            As in [`open_image`].

    Returns:
        `PIL.Image.Image`: The image in RGB and upright: its EXIF orientation is applied, because left must be the
        viewer's left.

    Raises:
        `ValueError`: As [`open_image`], or if the pixels cannot be decoded.
    """
    image = open_image(image)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error


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
