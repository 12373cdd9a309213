"""Results in the Hub's format: entries of `.eval_results/`, and a section for a model card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hub.cards import Result, result_files
from ..preferences.benchmark import SPLIT
from ..store import write_atomically


_DATASET = re.compile(r"https://huggingface\.co/datasets/([^/]+/[^/]+)")
CARD_SECTION, CARDS_FOLDER = "card.md", "cards"


def shared_results(results: Mapping[str, Any]) -> list[Result]:
    """
    Returns the headline numbers of a run.

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
    """
    Returns what is public of a judge's name: the name of a folder, the model behind an address, or the name itself.
    """
    if judge.startswith(("http://", "https://")):
        return judge.partition("#")[2]
    is_path = Path(judge).is_absolute() or judge.count("/") > 1 or Path(judge).exists()
    return Path(judge).resolve().name if is_path else judge


def write_shared_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes `card.md`, and `.eval_results/` if the benchmark is a dataset on the Hub."""
    _write(folder, card_section(results), shared_results(results))


def shared_pair_results(results: Mapping[str, Any], scorer: Mapping[str, Any]) -> list[Result]:
    """
    Returns the numbers of a scorer on pairs for the repository of its model.

    Args:
        results (`Mapping[str, Any]`), scorer (`Mapping[str, Any]`):
            As [`~evaluation.pair_tables.make_results`] returns them, and one of its `scorers`.

    Returns:
        `list[Result]`: Those of the leaderboards that the `eval.yaml` of a dataset names; none unless all pairs of its split `benchmark`
        on the Hub were measured.
    """
    if results["dataset_id"] is None or results["split"] != SPLIT:
        return []
    return [
        Result(
            metric=name,
            value=row["estimate"],
            num_samples=row["num_pairs"],
            unit="pairs",
            interval=(row["low"], row["high"]),
            dataset=results["dataset"],
            dataset_id=results["dataset_id"],
            split=SPLIT,
        )
        for name, row in scorer["numbers"].items()
    ]


def pair_card_section(results: Mapping[str, Any], scorer: Mapping[str, Any]) -> str:
    """A section for the card of a scorer: the numbers with intervals, the controls, and what counted as wrong."""
    kind, _, model = scorer["name"].partition(":")
    name = f"{kind}:{_public_name(model)}" if model else kind
    dataset = results["dataset_id"] or _public_name(results["dataset"])
    lines = [
        f"## Pairs of {dataset}",
        "",
        f"{results['num_pairs']:,} pairs, ordered by {name}; it is right if it prefers the chosen image. Trained on "
        f"{scorer['trained_on']}. A pair without a verdict counts as wrong: {1 - scorer['coverage']:.1%} of the pairs.",
        "",
        "| number | value | 95 % interval | pairs |",
        "|---|---|---|---|",
    ]
    controls = {f"control: {control}": row for control, row in scorer["controls"].items()}
    for title, row in {**scorer["numbers"], **controls}.items():
        if row["estimate"] is not None:
            ends = f"{row['low']:.3f} to {row['high']:.3f}"
            lines.append(f"| {title} | {row['estimate']:.4g} | {ends} | {row['num_pairs']:,} |")
    return "\n".join(lines) + "\n"


def write_shared_pairs(folder: Path, results: Mapping[str, Any]) -> None:
    """
    Writes a folder in `cards/` for each scorer, named as its file in `records/`: `card.md` and, of a benchmark on the Hub,
    `.eval_results/`.
    """
    for scorer in results["scorers"]:
        place = folder / CARDS_FOLDER / Path(scorer["file"]).stem
        place.mkdir(parents=True, exist_ok=True)
        _write(place, pair_card_section(results, scorer), shared_pair_results(results, scorer))


def _write(folder: Path, section: str, shared: list[Result]) -> None:
    write_atomically(folder / CARD_SECTION, section)
    for name, content in result_files(shared).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, content)
