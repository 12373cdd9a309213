"""Writes an HTML page about an evaluation of images or of pairs, or about a comparison of runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..figures.charts import difference_dots, reliability_diagram, share_dots
from ..figures.page import render_page
from ..store import write_atomically


_MOST_ROWS = 14  # rows of a chart; the table has all of them


def write_report(folder: Path, results: Mapping[str, Any]) -> Path:
    """
    Writes `report.html`: one file without scripts that needs no other file and no network.

    Args:
        folder (`Path`):
            Output folder; the paths of pictures in the results are relative to it.
        results (`Mapping[str, Any]`):
            The content of `results.json` or `compare.json`.

    Returns:
        `Path`: The page.
    """
    draw = {"images": draw_image_charts, "pairs": draw_pair_charts, "compare": draw_comparison_charts}
    page = render_page(
        Path(__file__).with_name(f"{results['kind']}.html.jinja"),
        folder,
        results=results,
        charts=draw[results["kind"]](results),
        has_image=lambda name: name is not None and (folder / name).is_file(),
    )
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def draw_image_charts(results: Mapping[str, Any]) -> dict[str, str]:
    """Returns name of the chart → its `<svg>` element; empty if no number is a share."""
    numbers = results["protocols"].get("fixed", {}).get("numbers", [])
    shares = [row for row in numbers if row["low"] is not None and 0 <= row["low"] <= row["high"] <= 1]
    shares.sort(key=lambda row: not row["is_headline"])
    rows = {row["name"]: row for row in shares[:_MOST_ROWS]}
    return {"numbers": share_dots(rows, "numbers", "correct, of all that was expected")} if rows else {}


def draw_pair_charts(results: Mapping[str, Any]) -> dict[str, str]:
    """As [`draw_image_charts`], for pairs: `scorers`, and, for each scorer with a standard deviation, `calibration-K`."""
    charts = {}
    rows = {scorer["name"]: scorer["accuracy"] for scorer in results["scorers"]}
    if rows:
        charts["scorers"] = share_dots(rows, "scorers", "pairs ranked correctly", chance=0.5)
    for number, scorer in enumerate(results["scorers"]):
        bins = (scorer["calibration"] or {}).get("bins", [])
        shown = [
            {"confidence": row["predicted"], "accuracy": row["observed"], "num_pairs": row["num_pairs"]}
            for row in bins
            if row["num_pairs"]
        ]
        if shown:
            charts[f"calibration-{number}"] = reliability_diagram(shown, f"calibration-{number}")
    return charts


def draw_comparison_charts(results: Mapping[str, Any]) -> dict[str, str]:
    """As [`draw_image_charts`], for a comparison: `run-K`, the differences of each run but the first."""
    charts = {}
    for number in range(1, len(results["runs"])):
        rows = [row for row in results["rows"] if row["run"] == number]
        rows.sort(key=lambda row: not row["is_headline"])
        shown = {
            row["metric"]: {"estimate": row["difference"], "low": row["low"], "high": row["high"]}
            for row in rows[:_MOST_ROWS]
        }
        if shown:
            charts[f"run-{number}"] = difference_dots(shown, f"run-{number}", "percentage points, after minus before")
    return charts
