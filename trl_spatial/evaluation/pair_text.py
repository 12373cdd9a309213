"""Formats the results of a measurement of scorers as Markdown."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..preferences.benchmark import NUMBERS
from .pair_controls import CONTROLS
from .pair_tables import GROUPINGS, Record


_NUM_REASONS = 5  # reasons for missing verdicts shown per scorer


def describe_pairs(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# Scorers on {results['num_pairs']:,} pairs of {results['dataset']}",
        "",
        *_scorer_table(results["scorers"]),
    ]
    for grouping in GROUPINGS:
        lines += _group_table(grouping, results["scorers"])
    lines += [*_control_table(results["scorers"]), *_difference_table(results["differences"])]
    lines += [*_published_table(results), "", "## Scorers", ""]
    for row in results["scorers"]:
        served = f" Answered by {', '.join(row['served_models'])}." if row["served_models"] else ""
        lines.append(f"- {row['name']}: trained on {row['trained_on']}.{served}")
        reasons = Counter(failure["reason"] for failure in row["failures"])
        lines += [f"    - {count:,} times {reason}" for reason, count in reasons.most_common(_NUM_REASONS)]
    return "\n".join(lines) + "\n"


def _scorer_table(scorers: Sequence[Record]) -> list[str]:
    head = ("scorer", "accuracy", "coverage", "accuracy where it answers", "order consistency", "calibration error")
    rows = [
        (
            row["name"],
            _with_ends(row["accuracy"]),
            _number(row["coverage"]),
            _with_ends(row["covered_accuracy"]),
            _number(row["order_consistency"]),
            _number(row["calibration"] and row["calibration"]["error"]),
            f"{row['seconds_per_1000']:.1f}",
            f"{row['price_per_1000']:.2f}",
        )
        for row in scorers
    ]
    return _table((*head, "seconds for 1,000 pairs", "$ for 1,000 pairs"), rows)


def _group_table(grouping: str, scorers: Sequence[Record]) -> list[str]:
    if not scorers or not scorers[0]["groups"][grouping]:
        return []
    rows = [
        (f"{group['name']} (n = {group['num_pairs']:,})", *(_of_group(row["groups"][grouping][i]) for row in scorers))
        for i, group in enumerate(scorers[0]["groups"][grouping])
    ]
    return ["", f"## Accuracy by {grouping}", "", *_table((grouping, *(row["name"] for row in scorers)), rows)]


def _of_group(group: Record) -> str:
    return _with_ends({"estimate": group["accuracy"], "low": group["low"], "high": group["high"]})


def _control_table(scorers: Sequence[Record]) -> list[str]:
    rows = [
        (row["name"], control, _with_ends(found), f"{found['num_pairs']:,}", CONTROLS[control])
        for row in scorers
        for control, found in row["controls"].items()
    ]
    if not rows:
        return []
    return [
        "",
        "## Controls",
        "",
        *_table(("scorer", "control", "share", "pairs with a verdict", "what was done"), rows),
    ]


def _difference_table(differences: Sequence[Record]) -> list[str]:
    if not differences:
        return []
    rows = [
        (
            f"{row['second']} − {row['first']}",
            f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})",
            f"{row['p_value']:.4f}",
            f"{row['p_holm']:.4f}",
        )
        for row in differences
    ]
    return ["", "## Differences", "", *_table(("scorers", "difference", "p", "p, Holm"), rows)]


def _published_table(results: Record) -> list[str]:
    """Makes the table of published numbers, one row per model, below ours."""
    published = results["published"]
    metrics = list(dict.fromkeys(row["metric"] for row in published))
    models: dict[str, dict[str, Record]] = {}
    for row in published:
        models.setdefault(row["model"], {})[row["metric"]] = row
    ours = [
        (f"ours: {row['name']}", *(_number(_as_published(row, metric)) for metric in metrics), "", "")
        for row in results["scorers"]
    ]
    rows = [
        (
            model,
            *(str(found[metric]["value"]) if metric in found else "–" for metric in metrics),
            next(iter(found.values()))["protocol"],
            "yes" if all(row["is_comparable"] for row in found.values()) else "no",
        )
        for model, found in models.items()
    ]
    whys = dict.fromkeys(row["why"] for row in published if row["why"])
    sources = dict.fromkeys(row["source"] for row in published)
    table = _table(("model", *metrics, "protocol", "comparable"), [*ours, *rows])
    return [
        "",
        "## Published",
        "",
        *table,
        "",
        *(f"Not comparable: {why}" for why in whys),
        f"Source: {', '.join(sources)}",
    ]


def _as_published(row: Record, metric: str) -> float | None:
    """Returns our accuracy on the pairs that a published metric covers: all of them unless it is one of `NUMBERS`."""
    found = row["numbers"].get(metric) if metric in NUMBERS else row["accuracy"]
    return None if found is None else found["estimate"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _with_ends(interval: Record) -> str:
    if interval["estimate"] is None:
        return "–"
    return f"{interval['estimate']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
