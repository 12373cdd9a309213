"""Compares runs of the same benchmark: paired by prompt, tested, and flagged where a comparison would mislead."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..statistics import holm
from .benchmarks.base import Metric
from .flags import find_flags, generator_label
from .image_run import ImageRun
from .intervals import metric_difference, metric_interval


def compare_runs(runs: Sequence[ImageRun]) -> dict[str, Any]:
    """
    Compares runs with the first of them, by the fixed protocol.

    Args:
        runs (`Sequence[ImageRun]`):
            Two or more runs of one benchmark.

    Returns:
        `dict`: `kind`, `benchmark`, `title`, `runs` (`label`, `flags`) and `rows`: for each metric of each further run `metric`,
        `run`, `before`, `after`, `difference`, `low`, `high`, `p_value`, `p_holm`, which is corrected for all rows, and `num_prompts`.

    Raises:
        `ValueError`: If there are fewer than two runs, they are of different benchmarks or data, have fewer than two prompts in common, or one was
            not judged by the fixed protocol.
    """
    if len(runs) < 2:
        raise ValueError("Name at least two runs.")
    first = runs[0]
    for run in runs[1:]:
        for name in ("benchmark", "data_hash"):
            one, other = getattr(first.plan, name), getattr(run.plan, name)
            if one != other:
                raise ValueError(f"{first.folder} and {run.folder} are not comparable: {name} is {one} and {other}.")
    for run in runs:
        if not run.protocols():
            raise ValueError(f"{run.folder} has no answers from judges yet. Run the command that began it once more.")
        if "fixed" not in run.protocols():
            raise ValueError(
                f"{run.folder} was not judged with the fixed protocol. Run it once more with --protocol both."
            )
    metrics = [
        {metric.name: metric for metric in run.benchmark.fixed(run.items, run.evidence()["fixed"])} for run in runs
    ]
    rows = [
        row
        for number in range(1, len(runs))
        for name, metric in metrics[number].items()
        if name in metrics[0] and (row := _row(name, number, metrics[0][name], metric)) is not None
    ]
    if not rows:
        raise ValueError(f"{first.folder} and the others have fewer than two prompts in common.")
    for row, corrected in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = float(corrected)
    return {
        "kind": "compare",
        "benchmark": first.benchmark.name,
        "title": first.benchmark.title,
        "runs": [
            {"label": f"{run.folder.name} ({generator_label(run)})", "flags": find_flags(run, first)} for run in runs
        ],
        "rows": rows,
    }


def _row(name: str, number: int, before: Metric, after: Metric) -> dict[str, Any] | None:
    difference = metric_difference(before, after)
    if difference is None or np.isnan(difference.interval.estimate):
        return None
    return {
        "metric": name,
        "run": number,
        "is_headline": after.is_headline,
        "before": metric_interval(before).estimate,
        "after": metric_interval(after).estimate,
        "difference": difference.interval.estimate,
        "low": difference.interval.low,
        "high": difference.interval.high,
        "p_value": difference.p_value,
        "num_prompts": difference.num_items,
    }


def describe_comparison(comparison: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    runs = comparison["runs"]
    lines = [f"# {comparison['title']}: {' against '.join(run['label'] for run in runs)}", ""]
    lines += [f"- {run['label']}: {flag}" for run in runs for flag in run["flags"]]
    lines += [
        "",
        "| metric | run | before | after | difference | 95 % interval | p | p, Holm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in comparison["rows"]:
        name = f"**{row['metric']}**" if row["is_headline"] else row["metric"]
        lines.append(
            f"| {name} | {runs[row['run']]['label']} | {row['before']:.3f} | {row['after']:.3f} | {row['difference']:+.3f} "
            f"| {row['low']:+.3f} to {row['high']:+.3f} | {row['p_value']:.4f} | {row['p_holm']:.4f} |"
        )
    return "\n".join(lines) + "\n"
