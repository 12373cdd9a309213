"""The statistics page of a build, with the paper's published numbers alongside."""

import base64
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...scenes import describe_changes
from ...store import write_atomically
from .build_store import BuildStore
from .decisions import decide_pairs, describe_votes
from .filter import DrawnPair, drawn_pairs, judge_agreement
from .plan import status
from .recipe import NUM_RELATIONS, SCENES


NUM_PAIRS = 6  # shown on the page
WORD_BIN = 10


def write_stats(store: BuildStore) -> Path:
    """
    Writes the page: one HTML file without scripts that needs no other file and no network.

    Args:
        store ([`BuildStore`]):
            The dataset that is being built.

    Returns:
        `Path`: `stats.html` in the store.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["scale"] = lambda rows: max(share or 0 for _, shares in rows for share in shares) or 1
    path = store.folder / "stats.html"
    write_atomically(path, environment.get_template("stats.html.jinja").render(**collect_stats(store)))
    return path


def collect_stats(store: BuildStore) -> dict[str, Any]:
    """
    Collects the data of the page.

    Args:
        store ([`BuildStore`]):
            The dataset that is being built.
    """
    found = status(store)
    prompts, edits = list(store.accepted_prompts().values()), list(store.accepted_edits().values())
    numbers = [len(record["relations"]) for record in prompts]
    words = [len(record["prompt"].split()) for record in prompts]
    decisions = decide_pairs(store)
    pairs = drawn_pairs(store)
    accepted = [pairs[id] for id, decision in decisions.items() if decision.outcome == "accepted"]
    first = store.accepted_prompts()
    cards = [
        (f"{len(prompts):,}", "prompts"),
        (f"{len(edits):,}", "with a perturbation"),
        (f"{len(pairs):,}", "pairs of images"),
        (f"{len(accepted):,}", "accepted pairs, each in both directions"),
        (f"{found['waiting']:,}", "items for reviewers"),
    ]
    return {
        "name": store.folder.name,
        "cards": cards,
        "pairs": [_show(store, pair) for pair in accepted[:NUM_PAIRS]],
        "charts": {
            "num_relations": _compare(numbers, NUM_RELATIONS),
            "num_words": _compare([f"{n // WORD_BIN * WORD_BIN}–{n // WORD_BIN * WORD_BIN + WORD_BIN - 1}" for n in words]),
            "scenes": _compare([record["scene"] for record in prompts], SCENES, by_size=True),
            "relations": _compare([r["relation"] for record in prompts for r in record["relations"]], by_size=True),
            "dimensions": _compare([first[record["id"]]["dimension"] for record in edits], by_size=True),
            "levels": _compare([record["level"] for record in edits]),
        },
        "means": {"num_relations": _mean(numbers), "num_words": _mean(words)},
        "drops": _drops(store, found, len(decisions)),
        "agreement": judge_agreement(store),
        "reviewers": describe_votes(store),
        "cost": _describe_cost(found["spent"]),
    }  # fmt: skip


def _compare(
    values: Iterable[Any], published: Mapping[Any, float] | None = None, *, by_size: bool = False
) -> list[tuple[str, list[float | None]]]:
    """
    Returns (value, shares) rows: its share in `values` and, if `published` is given, in the paper (`None` if it has
    none there). Rows are sorted by count with `by_size`, else by value.
    """
    counts = Counter(values)
    names = set(counts) | set(published or ())
    if by_size:
        order = sorted(names, key=lambda name: (-counts[name], -(published or {}).get(name, 0), str(name)))
    else:
        order = sorted(names, key=lambda name: (len(str(name)), name))
    rows = []
    for name in order:
        shares: list[float | None] = [counts[name] / max(counts.total(), 1)]
        if published is not None:
            shares.append(published[name] / sum(published.values()) if name in published else None)
        rows.append((str(name).replace("_", " "), shares))
    return rows


def _mean(values: list[int]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "–"


def _drops(store: BuildStore, found: Mapping[str, Any], num_pairs: int) -> list[dict[str, Any]]:
    totals = {"prompts": sum(1 for _ in store.prompts), "perturb": sum(1 for _ in store.edits), "pairs": num_pairs}
    return [
        {"stage": stage, "reason": reason, "number": number, "share": number / max(totals[stage], 1)}
        for stage, reasons in found["dropped"].items()
        for reason, number in reasons.items()
    ]


def _show(store: BuildStore, pair: DrawnPair | str) -> dict[str, str]:
    assert isinstance(pair, DrawnPair)
    images = {
        side: f"data:image/png;base64,{base64.b64encode(store.files.get(record['image'])).decode()}"
        for side, record in pair.images.items()
    }
    change = describe_changes(pair.edit["operations"])
    return {
        "prompt": pair.prompt["prompt"],
        "change": change,
        "chosen": images["original"],
        "rejected": images["edited"],
    }


def _describe_cost(spent: Mapping[str, float]) -> str:
    total = sum(spent.values())
    parts = ", ".join(f"{cost:,.2f} on {stage}" for stage, cost in spent.items() if cost)
    return f"Spent: {total:,.2f} US dollars ({parts})." if parts else "No paid call was made."
