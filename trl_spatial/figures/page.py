"""A self-contained page: one HTML file without scripts, which needs no other file and no network."""

import base64
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .charts import format_share


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class EmbeddedImage(NamedTuple):
    """An image that is part of the page: the file as a `data:` URI, and its size in pixels."""

    uri: str
    width: int
    height: int


def render_page(template: Path, folder: Path, **values: Any) -> str:
    """
    Fills in a template that extends `page.html.jinja`.

    Args:
        template (`Path`):
            The template.
        folder (`Path`):
            Folder that the paths of images on the page are relative to.
        **values:
            Values that the template uses.

    Raises:
        `FileNotFoundError`: If an image is missing.
        `ValueError`: If an image is not a PNG file.
        `jinja2.UndefinedError`: If the template names something that is not there.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        share=format_share,
        interval=format_interval,
        count=format_count,
        signed=format_signed,
        duration=format_duration,
        setting=format_setting,
    )
    environment.globals["embed"] = lambda path: embed_image(folder / path)
    return environment.get_template(template.name).render(**values)


def embed_image(path: Path) -> EmbeddedImage:
    """Read a file to embed in the page. Raises `ValueError` if it is not a PNG file."""
    data = path.read_bytes()
    if not data.startswith(_PNG_SIGNATURE):
        raise ValueError(f"{path} is not a PNG file: it begins with {data[:8]!r}. Save the image as PNG.")
    width, height = struct.unpack(">II", data[16:24])  # the first chunk is the header
    return EmbeddedImage(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height)


def format_interval(row: Mapping[str, float]) -> str:
    """Format the ends `low` and `high` of an interval of shares: `48.1–54.2 %`."""
    return f"{100 * row['low']:.1f}–{format_share(row['high'])}"


def format_count(count: int | float) -> str:
    """Format a number of things, with a thousands separator: `1,024`, `13.5`."""
    return f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"


def format_signed(number: float) -> str:
    """Format a score with two digits, its sign and a real minus."""
    return f"{number:+.2f}".replace("-", "\N{MINUS SIGN}")


def format_duration(seconds: float) -> str:
    """Format a time: `4.2 s`, `21 s`, `14 min 0 s`, `1 h 3 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_setting(value: Any) -> str:
    """Format the value of an option as it is written in JSON, a string without its quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
