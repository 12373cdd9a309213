"""Formats a validation report for a terminal."""

from collections.abc import Iterator, Mapping, Sequence

from ..preferences.faults import KINDS, Finding, clip
from .counts import QUANTITIES, Quantity, SplitStatistics, mean_of, tabulate
from .validation import ValidationReport


_MAX_SHOWN = 20  # findings per kind
_BAR = 20  # length of the longest bar, in characters


def format_report(report: ValidationReport, name: str) -> str:
    """
    Write a validation report for a terminal.

    Args:
        report ([`ValidationReport`]):
            From [`validate_splits`].
        name (`str`):
            What the dataset is called.

    Returns:
        `str`: errors first, with their rows, at most 20 of a kind; then warnings, notes, the splits, and a histogram of
        each quantity. Plain ASCII but for what the dataset holds.
    """
    num_rows = sum(statistics.num_rows for statistics in report.statistics.values())
    num_checked = sum(statistics.num_checked for statistics in report.statistics.values())
    seen = "" if num_checked == num_rows else f", {num_checked:,} of them checked"
    found = ", ".join(
        _count(len(findings), title)
        for title, findings in (("error", report.errors), ("warning", report.warnings), ("note", report.notes))
    )
    lines = [f"{name}: {_count(num_rows, 'row')} in {_count(len(report.statistics), 'split')}{seen}; {found}"]
    for severity in ("error", "warning", "note"):
        lines += _format_findings(report.of_severity(severity), severity)
    lines += ["", *_format_splits(report.statistics)]
    for quantity in QUANTITIES:
        lines += _format_histogram(quantity, report.statistics)
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _format_findings(findings: Sequence[Finding], severity: str) -> Iterator[str]:
    for kind, (_, title) in KINDS.items():
        lines = _merge_splits([finding for finding in findings if finding.kind == kind])
        if not lines:
            continue
        yield from ("", f"{severity.upper()}: {title} ({len(lines):,})")
        yield from (f"  {line}" for line in lines[:_MAX_SHOWN])
        if len(lines) > _MAX_SHOWN:
            yield f"  ... and {len(lines) - _MAX_SHOWN:,} more"


def _merge_splits(findings: Sequence[Finding]) -> list[str]:
    """Returns one line per finding; the same finding about a column in several splits is one line."""
    lines: dict[tuple, list[str]] = {}
    for number, finding in enumerate(findings):
        place = finding.place
        if place.row is None and place.column is not None:
            lines.setdefault((place.column, finding.reason), []).append(place.split)
        else:
            lines[number, str(finding)] = []
    return [f"{', '.join(splits)}: `{key}` {text}" if splits else text for (key, text), splits in lines.items()]


def _format_splits(statistics: Mapping[str, SplitStatistics]) -> list[str]:
    header = ["split", "rows", "share", "prompts", "images", "scenes"]
    rows = [
        [
            split,
            f"{found.num_rows:,}",
            f"{100 * found.share:.1f} %",
            f"{found.num_prompts:,}",
            f"{found.num_images:,}",
            "-" if found.num_scenes is None else f"{found.num_scenes:,}",
        ]
        for split, found in statistics.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for split, *cells in [header, *rows]:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([split.ljust(widths[0]), *aligned]))
    return [*lines, "(prompts, images, scenes: the different ones)"]


def _format_histogram(quantity: Quantity, statistics: Mapping[str, SplitStatistics]) -> Iterator[str]:
    groups = tabulate(quantity, statistics)
    if not groups:
        return
    if len(groups) == 1:
        yield from ("", f"{quantity.title}: {clip(groups[0][0], 80)}")
        return
    totals = [statistics[split].counts[quantity.name].total() for split in statistics]
    shares = [[count / max(total, 1) for count, total in zip(counts, totals, strict=True)] for _, counts in groups]
    largest = max(map(max, shares))
    labels = [clip(label, 40) for label, _ in groups]
    label_width, count_width = max(map(len, labels)), max(len(f"{max(counts):,}") for _, counts in groups)
    cell_width = count_width + 9 + _BAR
    yield from ("", f"{quantity.title} (share of {quantity.unit})")
    heads = [_describe_split(quantity, split, statistics[split]) for split in statistics]
    cell_width = max(cell_width, *map(len, heads))
    yield "  ".join([" " * (label_width + 2), *(head.ljust(cell_width) for head in heads)]).rstrip()
    for label, (_, counts), row in zip(labels, groups, shares, strict=True):
        cells = [
            f"{count:>{count_width},} {100 * share:5.1f} %  {'#' * _bar_length(share, largest)}".ljust(cell_width)
            for count, share in zip(counts, row, strict=True)
        ]
        aligned = label.rjust(label_width) if quantity.is_number else label.ljust(label_width)
        yield "  ".join([f"  {aligned}", *cells]).rstrip()


def _bar_length(share: float, largest: float) -> int:
    """Length of a bar, in characters; at least 1 unless the share is 0."""
    return max(round(_BAR * share / largest), 1) if share else 0


def _describe_split(quantity: Quantity, split: str, statistics: SplitStatistics) -> str:
    counts = statistics.counts[quantity.name]
    return f"{split}, mean {mean_of(counts):.2f}" if quantity.is_number and counts else split
