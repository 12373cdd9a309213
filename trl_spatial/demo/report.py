"""The HTML page with the results of the demo."""

import base64
import json
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL.Image import Image

from ..store import ContentStore, write_atomically
from .charts import (
    format_share,
    pair_accuracy_dots,
    relation_dots,
    reliability_diagram,
    reward_curve,
    truth_curve,
)


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class EmbeddedImage(NamedTuple):
    """An image that is part of the page: the file as a `data:` URI, and its size in pixels."""

    uri: str
    width: int
    height: int


def write_report(results: Mapping[str, Any], output_dir: Path) -> Path:
    """
    Write the page of a demo run, `output_dir / "report.html"`: a single HTML file without scripts that needs no other file and no
    network. It is replaced atomically.

    Args:
        results (`Mapping[str, Any]`):
            Results of the demo, as in its `results.json`. Paths of images are relative to `output_dir`. `"generator"`,
            `"training"`, `"examples"` and the reward model's `"examples"` may be absent; the page has no section for them then.
        output_dir (`Path`):
            Folder of the images, and of the page.

    Raises:
        `FileNotFoundError`: If an image is missing.
        `ValueError`: If an image is not a PNG file.
        `jinja2.UndefinedError`: If `results` lacks an entry that the page needs.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
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
    environment.globals["embed"] = lambda path: embed_image(output_dir / path)
    page = environment.get_template("report.html.jinja").render(
        results=results, charts=draw_charts(results), change=describe_change(results)
    )
    write_atomically(output_dir / "report.html", page)
    return output_dir / "report.html"


def draw_charts(results: Mapping[str, Any]) -> dict[str, str]:
    """Draw the charts that there are results for: name of the chart → its `<svg>` element."""
    charts = {}
    reward_model = results["reward_model"]
    accuracy = reward_model["accuracy"]
    levels = {f"{level} change" + "s" * (level != "1"): row for level, row in accuracy["level"].items()}
    charts["pairs"] = pair_accuracy_dots({"all pairs": accuracy["all"]["all"], **levels})
    if reward_model["reliability"]:
        charts["calibration"] = reliability_diagram(reward_model["reliability"])
    if training := results.get("training"):
        if training["steps"] or training["evaluations"]:
            charts["reward"] = reward_curve(training)
        if training["evaluations"]:
            charts["truth"] = truth_curve(training)
    if generator := results.get("generator"):
        charts["relations"] = relation_dots(generator["before"]["relations"], generator["after"]["relations"])
    return charts


def describe_change(results: Mapping[str, Any]) -> str | None:
    """
    Say whether training moved the spatial accuracy by more than its 95 % intervals: `"rose"` or `"fell"` if those before and after
    do not overlap, `"stayed"` if they do, `None` if no generator was measured.
    """
    if "generator" not in results:
        return None
    before, after = (results["generator"][side]["spatial_accuracy"] for side in ("before", "after"))
    if before["high"] < after["low"]:
        return "rose"
    return "fell" if after["high"] < before["low"] else "stayed"


def save_image(image: Image, output_dir: Path) -> str:
    """Save a picture for the page: its file, relative to the output folder."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return f"images/{ContentStore(output_dir / 'images').put(buffer.getvalue(), '.png')}"


def embed_image(path: Path) -> EmbeddedImage:
    """Read a file into the page; a `ValueError` if it is not a PNG file."""
    data = path.read_bytes()
    if not data.startswith(_PNG_SIGNATURE):
        raise ValueError(f"{path} is not a PNG file: it begins with {data[:8]!r}. Save the image as PNG.")
    width, height = struct.unpack(">II", data[16:24])  # the first chunk is the header
    return EmbeddedImage(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height)


def format_interval(row: Mapping[str, float]) -> str:
    """Format the ends `low` and `high` of an interval of shares: `48.1–54.2 %`."""
    return f"{100 * row['low']:.1f}–{format_share(row['high'])}"


def format_count(count: int | float) -> str:
    """Format a number of things, its thousands apart: `1,024`, `13.5`."""
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
