"""The dataset card of a build: how the dataset was made, what was dropped, and the controls."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict

from ...statistics import Interval
from ..export import card_files, check_splits
from ..kinds import NOTES_FILE
from .build_store import BuildStore
from .controls import guess_from_images, guess_from_texts, guess_without_prompt
from .decisions import describe_votes
from .plan import status


def write_card(store: BuildStore, splits: Mapping[str, Dataset], folder: Path) -> None:
    """
    Writes the card of an exported dataset, with its pictures.

    Args:
        store ([`BuildStore`]):
            The dataset that was built.
        splits (`Mapping[str, Dataset]`):
            Its splits.
        folder (`Path`):
            Where they are exported to.

    Raises:
        `ValueError`: If the dataset has faults that `trl_spatial data validate` would find.
    """
    dataset = DatasetDict(splits)
    report = check_splits(dataset, show_progress=False)
    notes = describe_making(store, splits)
    (folder / NOTES_FILE).write_text(notes, encoding="utf-8")
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{place}/{split}-*.parquet"} for split in names],
            **({"default": True} if name == "default" else {}),
        }
        for name, place, names in (
            ("default", "data", list(splits)),
            ("text", "text", list(splits)),
            ("preview", "preview", ["train"]),
        )
    ]
    files = card_files(dataset, store.folder.name, report, written={"configs": configs}, notes=notes)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def describe_making(store: BuildStore, splits: Mapping[str, Dataset]) -> str:
    """How a dataset was made, in Markdown: counts and drop rates of the stages, agreement, licenses and controls."""
    found = status(store)
    done = {stage["stage"]: stage["done"] for stage in found["stages"]}
    totals = {
        "prompts": sum(1 for _ in store.prompts),
        "perturb": done["perturb"],
        "pairs": sum(found["pairs"].values()),
    }
    lines = ["## How it was made", "", "| stage | made | dropped | why |", "|---|---|---|---|"]
    for stage, reasons in found["dropped"].items():
        total = totals[stage]
        dropped = sum(reasons.values())
        why = ", ".join(f"{reason} {number:,}" for reason, number in reasons.items()) or "–"
        lines.append(f"| {stage} | {total:,} | {dropped:,} ({dropped / max(total, 1):.1%}) | {why} |")
    rows = [
        row
        for part in splits.values()
        for row in zip(part["decided_by"], part["generator"], part["license"], strict=True)
    ]
    lines += [
        "",
        f"Decided by judges: {_share(rows, 0, 'judges')} of the rows; by people: {_share(rows, 0, 'people')}.",
    ]
    lines += [describe_votes(store)]
    licenses = Counter((generator, license) for _, generator, license in rows)
    lines += ["", "| generator | rows | terms of its images |", "|---|---|---|"]
    lines += [f"| {name} | {number:,} | {license or 'not known'} |" for (name, license), number in licenses.items()]
    return "\n".join([*lines, "", *_describe_controls(splits), ""])


def _describe_controls(splits: Mapping[str, Dataset]) -> list[str]:
    train = next(iter(splits.values()))
    test = splits.get("test", train)
    lines = [
        "## Controls",
        "",
        "| what guesses the winner | accuracy | chance |",
        "|---|---|---|",
        f"| any scorer that does not see the prompt, at best | {guess_without_prompt(train):.3f} | .5 |",
    ]
    if test is not train:
        for name, interval in (
            ("a linear classifier of both images", guess_from_images(train, test)),
            ("a linear classifier of both prompts", guess_from_texts(train, test)),
        ):
            lines.append(f"| {name} | {_format(interval)} | .5 |")
    return lines


def _format(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _share(rows: list[tuple], column: int, value: str) -> str:
    return f"{sum(row[column] == value for row in rows) / max(len(rows), 1):.1%}"
