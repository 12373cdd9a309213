"""Results as the Hub takes them: entries of `.eval_results/`, and a section for a model card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hub.cards import Result, result_files
from ..store import write_atomically


_DATASET = re.compile(r"https://huggingface\.co/datasets/([^/]+/[^/]+)")
CARD_SECTION = "card.md"


def shared_results(results: Mapping[str, Any]) -> list[Result]:
    """
    The numbers of a run that people quote.

    Args:
        results (`Mapping[str, Any]`):
            As [`~evaluation.image_results.image_results`] returns them.

    Returns:
        `list[Result]`: Those of the protocol `fixed`; none if only the official rules were applied.
    """
    found = _DATASET.match(results["source"])
    return [
        Result(
            metric=f"{results['title']}: {row['name']}",
            value=row["estimate"],
            num_samples=row["num_prompts"],
            unit="prompts",
            interval=None if row["low"] is None else (row["low"], row["high"]),
            dataset=results["title"],
            dataset_id=None if found is None else found[1],
        )
        for row in results["protocols"].get("fixed", {}).get("numbers", ())
        if row["is_headline"] and row["estimate"] is not None
    ]


def card_section(results: Mapping[str, Any]) -> str:
    """A section for the card of the model that drew the images: the numbers with intervals, judges, and what counted as wrong."""
    judges = ", ".join(f"{_public_name(judge['name'])} ({role})" for role, judge in results["judges"].items())
    lines = [
        f"## {results['title']}",
        "",
        f"{results['num_prompts']:,} prompts, {results['num_images']:,} images, judged by {judges or 'nobody'}. What is missing or "
        "unusable counts as wrong.",
        "",
        "| protocol | metric | value | 95 % interval |",
        "|---|---|---|---|",
    ]
    for protocol, table in results["protocols"].items():
        for row in table["numbers"]:
            if row["estimate"] is not None and (protocol == "official" or row["is_headline"]):
                ends = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
                lines.append(f"| {protocol} | {row['name']} | {row['estimate']:.4g} | {ends} |")
    return "\n".join(lines) + "\n"


def _public_name(judge: str) -> str:
    """Of a folder or an address, only what a reader can use: its name or its model."""
    if judge.startswith(("http://", "https://")):
        return judge.partition("#")[2]
    return Path(judge).resolve().name if Path(judge).exists() else judge


def write_shared_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes `card.md`, and `.eval_results/` if the benchmark is a dataset on the Hub."""
    write_atomically(folder / CARD_SECTION, card_section(results))
    for name, content in result_files(shared_results(results)).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, content)
