"""The plan of a build, with its estimated cost, and its status."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...generation.engines import estimate
from .build_store import BuildStore, drop_reasons
from .decisions import count_votes, decide_pairs, review_items
from .filter import drawn_pairs
from .recipe import endpoint_settings
from .render import SIDES, generator_of


# Approximate (input, output) tokens per call: writing a prompt, rewriting one, reading one back, and judging an image.
WRITE, REWRITE, READ, JUDGE = (900, 700), (1100, 700), (700, 400), (1800, 250)
SECONDS_PER_VOTE = 20


def plan(store: BuildStore) -> list[dict[str, Any]]:
    """
    Returns the remaining work of each stage, and its cost as far as it is known. Numbers of later stages assume that
    nothing more is dropped before them.

    Args:
        store ([`BuildStore`]):
            The dataset that is being built.

    Returns:
        `list[dict]`: for each stage `stage`, `todo`, `done`, `calls`, `cost` in US dollars, `gpu_hours`, and what of it is `unknown`.
    """
    recipe = store.recipe
    num_prompts = recipe.prompts.num_prompts
    num_written = len(store.accepted_prompts())
    num_edits = sum(1 for _ in store.edits)
    lost = num_edits - len(store.accepted_edits())
    num_pairs = (num_prompts - lost) * recipe.render.draws
    num_images, num_verdicts = sum(1 for _ in store.images), sum(1 for _ in store.verdicts)
    num_refused = sum(isinstance(pair, str) for pair in drawn_pairs(store).values())
    reader = recipe.prompts.reader or recipe.prompts.writer
    stages = [
        _stage("prompts", num_prompts - num_written, num_written, [(recipe.prompts.writer, WRITE)]),
        _stage("perturb", num_prompts - num_edits, num_edits, [(recipe.prompts.writer, REWRITE), (reader, READ)]),
        _render(store, num_pairs * len(SIDES) - num_images, num_images),
        _stage(
            "filter",
            num_pairs - num_refused - num_verdicts,
            num_verdicts,
            [(judge, JUDGE) for judge in recipe.filter.judges],
            times=2,
        ),
    ]
    return stages


def _stage(
    name: str, todo: int, done: int, asked: list[tuple[Mapping[str, Any], tuple[int, int]]], times: int = 1
) -> dict[str, Any]:
    calls, cost = 0, 0.0
    unknown: list[str] = []
    for spec, (num_input, num_output) in asked:
        if "model" not in spec:
            continue  # free: the grammar, the rules, or a local model
        calls += times * todo
        prices = endpoint_settings(spec).get("prices")
        if prices is None:
            unknown.append(f"prices of {spec['model']}")
        else:
            cost += times * todo * prices.of_tokens(num_input, num_output)
    stage: dict[str, Any] = {"stage": name, "todo": todo, "done": done, "calls": calls, "cost": cost}
    return stage | ({"unknown": list(dict.fromkeys(unknown))} if unknown else {})


def _render(store: BuildStore, todo: int, done: int) -> dict[str, Any]:
    generators = store.recipe.render.generators
    total = sum(generator.get("share", 1) for generator in generators)
    stage: dict[str, Any] = {"stage": "render", "todo": max(todo, 0), "done": done, "calls": 0}
    for number, generator in enumerate(generators):
        share = round(max(todo, 0) * generator.get("share", 1) / total)
        for key, value in estimate(generator_of(store, number), share).items():
            if value is None:
                stage.setdefault("unknown", []).append(f"{key} of {generator.get('name') or generator.get('model')}")
            else:
                stage[key] = stage.get(key, 0) + value
    return stage


def format_plan(stages: list[dict[str, Any]]) -> str:
    """The plan as lines of text."""
    lines = []
    for stage in stages:
        parts = [f"{stage['todo']:,} to do, {stage['done']:,} done"]
        if stage["calls"]:
            parts.append(f"{stage['calls']:,} calls")
        for key, unit in (("gpu_hours", "GPU hours (H100)"), ("cost", "US dollars")):
            if stage.get(key):
                parts.append(f"about {stage[key]:,.0f} {unit}")
        if "unknown" in stage:
            parts.append(f"not known: {', '.join(stage['unknown'])}")
        lines.append(f"{stage['stage']:>8}: {', '.join(parts)}")
    return "\n".join(lines)


def status(store: BuildStore) -> dict[str, Any]:
    """
    Returns the progress of all stages.

    Args:
        store ([`BuildStore`]):
            The dataset that is being built.

    Returns:
        `dict`: `stages`, see [`plan`]; `dropped`, stage → reason → number; `pairs`, outcome → number; `waiting`, number of
        items for reviewers; `votes`, reviewer → number; `spent`, section of the recipe → US dollars.
    """
    decisions = decide_pairs(store)
    reasons = Counter(
        decision.reason.split(":")[0] for decision in decisions.values() if decision.outcome == "dropped"
    )
    spent: Counter[str] = Counter()
    for record in store.payments:
        spent[record["section"]] += record["cost"]
    return {
        "stages": plan(store),
        "dropped": {
            "prompts": dict(drop_reasons(store.prompts).most_common()),
            "perturb": dict(drop_reasons(store.edits).most_common()),
            "pairs": dict(reasons.most_common()),
        },
        "pairs": dict(Counter(decision.outcome for decision in decisions.values())),
        "waiting": len(review_items(store)),
        "votes": count_votes(store),
        "spent": {name: round(cost, 2) for name, cost in spent.items()},
    }


def format_status(found: Mapping[str, Any]) -> str:
    """The status as text."""
    lines = [format_plan(found["stages"])]
    pairs = ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(found["pairs"].items())) or "none yet"
    votes = ", ".join(f"{name} {number:,}" for name, number in sorted(found["votes"].items())) or "none yet"
    lines.append(f"{'pairs':>8}: {pairs}; reviewers see {found['waiting']:,} items; votes: {votes}")
    for stage, reasons in found["dropped"].items():
        lines += [f"{stage:>8}: dropped {number:,}, {reason}" for reason, number in reasons.items()]
    if any(found["spent"].values()):
        lines.append("   spent: " + ", ".join(f"{cost:,.2f} USD on {stage}" for stage, cost in found["spent"].items()))
    return "\n".join(lines)
