"""The HTML page with the results of the demo."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..figures.charts import reliability_diagram, share_dots
from ..figures.page import render_page
from ..store import ContentStore, write_atomically
from .charts import relation_dots, reward_curve, truth_curve


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
    page = render_page(
        Path(__file__).with_name("report.html.jinja"),
        output_dir,
        results=results,
        charts=draw_charts(results),
        change=describe_change(results),
    )
    write_atomically(output_dir / "report.html", page)
    return output_dir / "report.html"


def draw_charts(results: Mapping[str, Any]) -> dict[str, str]:
    """Draw the charts that there are results for: name of the chart → its `<svg>` element."""
    charts = {}
    reward_model = results["reward_model"]
    accuracy = reward_model["accuracy"]
    levels = {f"{level} change" + "s" * (level != "1"): row for level, row in accuracy["level"].items()}
    charts["pairs"] = share_dots(
        {"all pairs": accuracy["all"]["all"], **levels}, "pairs", "pairs ranked correctly", chance=0.5
    )
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
