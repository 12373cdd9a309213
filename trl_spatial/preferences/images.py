"""The only code that reads images, so that training, scoring, validation and publishing see the same pixels."""

import hashlib
import os
import re
import stat
import warnings
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError


# Formats that hold only pixels. Without this list, Pillow would run Ghostscript on a PostScript file named .png.
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
if find_spec("PIL.AvifImagePlugin") is not None:  # since Pillow 11.3
    FORMATS += ("AVIF",)
MAX_PIXELS = 48 * 2**20  # enough for most cameras; decoding takes up to 20 bytes per pixel, 1 GB
MAX_ASPECT_RATIO = 200  # longer side to shorter side; the limit of Qwen's image processor

# Pixels copied at once. The memory of larger copies would be returned to the system, and cleared again, each time.
_STRIP = 2**16
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # color space of an ICC profile → Pillow's mode


def open_image(image: Any) -> Image.Image:
    """
    Opens an image without decoding its pixels: a PIL image, the path of a local file, its content as bytes or as an open file, or
    a cell of an undecoded [`~datasets.Image`] column. The result is as it is stored: [`load_image`] shows it as a viewer does.

    Raises:
        `ValueError`: If the image is missing, of another type, not a local file of one of `FORMATS`, has no pixels or
        more than `MAX_PIXELS`, or is too narrow. The message is a predicate ("has no pixels ..."), for the caller to name
        the row.
    """
    if not isinstance(image, Image.Image):
        image = _open_file(_as_file(image))
    elif image.format not in (None, "MPO", *FORMATS):
        raise ValueError(f"is a {image.format} file, not one of {', '.join(FORMATS)}; convert it to PNG")
    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"has no pixels ({width}x{height})")
    if width * height > MAX_PIXELS:
        raise ValueError(f"is too large ({width}x{height}): shrink it to at most {MAX_PIXELS // 10**6} million pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"is too narrow ({width}x{height}): its sides differ by more than {MAX_ASPECT_RATIO} times")
    return image


def load_image(image: Any) -> Image.Image:
    """
    Decodes an image, in any form that [`open_image`] takes, to what a viewer shows, in RGB: upright by its EXIF
    orientation, because left must be the viewer's left; on white where it is transparent; in sRGB if it has a color
    profile; 16-bit gray scaled to 8 bits; the first frame of several, with a warning.

    Raises:
        `ValueError`: As in [`open_image`], or if the pixels cannot be decoded, do not match the file's checksums, or are
        floating-point numbers, for which white is undefined.
    """
    opened = open_image(image)
    pixels = decode_image(opened, is_own=opened is not image)
    return pixels.copy() if pixels is opened else pixels


def decode_image(opened: Image.Image, *, is_own: bool) -> Image.Image:
    """
    Decodes what [`open_image`] has opened as [`load_image`] does. The result may be `opened` itself. Checksums are only read of
    `is_own` images, which nobody has begun to read.
    """
    try:
        if is_own and isinstance(opened, PngImagePlugin.PngImageFile):
            assert opened.fp is not None
            opened.fp.seek(opened.tile[0][2] - 8)  # start of the first chunk of pixels
            PngImagePlugin.ChunkStream(opened.fp).verify()  # decoding does not verify checksums
        if opened.format != "MPO" and getattr(opened, "is_animated", False):  # MPO: a photograph and its previews
            name = getattr(opened, "filename", "") or "An image"
            warnings.warn(f"{name} has {getattr(opened, 'n_frames', 2)} frames; only one is used.", stacklevel=3)
        opened.load()
        pixels = _to_rgb(opened)
        orientation = _orientation(opened)
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, zlib.error, ...
        raise ValueError(f"cannot be decoded ({error})") from error
    if orientation != 1:
        pixels.getexif()[ExifTags.Base.Orientation] = orientation
        pixels = ImageOps.exif_transpose(pixels)
    return pixels


def image_digest(image: Image.Image) -> bytes:
    """Hash of the size and the pixels of an image from [`load_image`]: files that show the same picture share it."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}".encode(), digest_size=16)
    height = max(_STRIP // image.width, 1)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        digest.update(strip.tobytes())
    return digest.digest()


def _as_file(image: Any) -> Any:
    """Returns the path, or a binary file object, of an image; the input is not trusted."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if image is None or (isinstance(image, str) and not image):
        raise ValueError("is missing")
    if isinstance(image, (str, Path)):
        if re.match(r"[A-Za-z][\w+.-]+:/", str(image)):
            raise ValueError("is an address, and images are only read from local files; download it first")
        try:
            is_file = stat.S_ISREG(os.stat(image).st_mode)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            hint = "" if os.path.isabs(image) else "; a relative path starts at the current folder"
            raise ValueError(f"cannot be opened ({getattr(error, 'strerror', None) or error}{hint})") from error
        if not is_file:
            raise ValueError("is not a regular file")
        return image
    if isinstance(image, pa.Buffer):
        return pa.BufferReader(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return BytesIO(image)
    if not hasattr(image, "read"):
        raise ValueError(f"is a {type(image).__name__}, not a PIL image, a path, bytes or a datasets Image row")
    try:
        image.seek(0)
        content = image.read()
    except (OSError, ValueError) as error:  # a pipe; a closed file; a text file
        raise ValueError(f"cannot be read from its start as bytes ({error})") from error
    if not isinstance(content, bytes):
        raise ValueError("is a file in text mode; open it with mode 'rb'")
    return BytesIO(content)  # the caller's file object stays open


def _open_file(file: Any) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"cannot be opened: it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or its start is damaged"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"is too large: shrink it to at most {MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:  # formats raise all kinds: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot be opened ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts a decoded image to 8-bit sRGB on white."""
    profile = image.info.get("icc_profile")
    is_grey = image.mode.startswith(("1", "I", "L")) and image.mode != "LAB"
    alpha = None
    if image.mode.startswith(("I", "F")):
        image, alpha = _scale_to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile:
        image = _to_srgb(image, profile, "L" if is_grey else "CMYK" if image.mode == "CMYK" else "RGB")
    if image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is None:
        return image
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=alpha)
    return canvas


def _scale_to_8_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """
    Scales 16-bit gray to 8 bits; also returns its alpha channel if one of its values means transparent, else `None`.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        raise ValueError(f"its values are floating-point numbers, {low:g} to {high:g}; convert them to 8 bits")
    if low < 0 or high > 65535 or (image.mode == "I" and 0 < high < 256):
        raise ValueError(f"its values, {low} to {high}, do not look like 16 bits; convert them to 8 bits")
    tags = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(258, (16,))[0] - 1 if image.mode != "I" else 65535  # BitsPerSample: TIFF also has 12 bits
    grey = (values.astype(np.uint32) * 255 + white // 2) // white
    if tags.get(262) == 0:  # PhotometricInterpretation: 0 is white
        grey = 255 - grey
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey.astype(np.uint8)), alpha


def _to_srgb(image: Image.Image, profile: bytes, mode: str) -> Image.Image:
    """Applies an ICC profile; if it is broken or of another color space, warns and leaves the colors as they are."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if _PROFILE_MODES.get(source.profile.xcolor_space) != mode:
            raise OSError(f"it is of color space {source.profile.xcolor_space.strip()}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return transform.apply(image.convert(mode))
    except (OSError, ImageCms.PyCMSError) as error:
        warnings.warn(f"An image has a color profile that cannot be applied and is ignored ({error}).", stacklevel=2)
        return image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # damaged EXIF data raises all kinds
        warnings.warn(f"An image has damaged EXIF data, which is ignored ({error}).", stacklevel=2)
        return 1
