"""Makes the tables of an evaluation of images from its records alone."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..generation.jobs import encode_png
from ..statistics import Interval
from ..store import write_atomically
from .benchmarks.base import Benchmark, Evidence, Item, Metric, OfficialError, Protocol, images_of
from .data_files import published_hash
from .flags import find_flags, generator_label
from .image_run import ImageRun
from .intervals import metric_interval, official_intervals
from .published import published_numbers


_NUM_EXAMPLES = 6  # best prompts shown, and as many worst
_NUM_WORDS = 4  # questions shown with each
PICTURES = "examples"
_PICTURE_SIDE = 384  # pixels
_MOST_FAILURES = 200  # listed in the results


def image_results(run: ImageRun) -> dict[str, Any]:
    """
    Computes the tables of a run from its records, by the protocols for which judges were asked.

    Args:
        run ([`~evaluation.image_run.ImageRun`]):
            The run.

    Returns:
        `dict`: What `results.json` holds: `benchmark`, `generator`, `num_prompts`, `num_images`; `protocols`, name → `numbers`, a list of
        `name`, `estimate`, `low` and `high` (`fixed`: also `num_values`, `num_prompts` and `is_headline`), or `error`; `failures`, `judges`,
        `usage`, `published`, `examples`.

    Raises:
        `ValueError`: If a record is damaged.
    """
    benchmark, items = run.benchmark, run.items
    evidence, protocols = run.evidence(), run.protocols()
    metrics = benchmark.fixed(items, evidence["fixed"]) if "fixed" in protocols else []
    tables: dict[str, Any] = {}
    if "official" in protocols:
        tables["official"] = _official_table(benchmark, items, evidence["official"])
    if "fixed" in protocols:
        tables["fixed"] = {"numbers": [_metric_row(metric) for metric in metrics]}
    failures = find_failures(run, evidence, "fixed" if "fixed" in protocols else "official")
    return {
        "kind": "images",
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "source": benchmark.source,
        "license": benchmark.license,
        "plan": asdict(run.plan),
        "generator": generator_label(run),
        "flags": find_flags(run),
        "num_prompts": len(items),
        "num_images": len(items) * benchmark.num_images,
        "protocols": tables,
        "failures": {
            "counts": dict(Counter(failure["reason"].partition(":")[0] for failure in failures)),
            "list": failures[:_MOST_FAILURES],
        },
        **summarize_answers(run.answers, run.plan.judges, cost=run.spend().spent),
        "published": published_numbers(
            benchmark.name, judges=list(run.plan.judges.values()), difference=_difference(run)
        ),
        "examples": find_examples(run, evidence["fixed"], metrics),
    }


def _difference(run: ImageRun) -> str:
    """Says, in a sentence, how the prompts or images differ from the published setup; empty if they do not."""
    if run.plan.data_hash != published_hash(run.benchmark.files):
        return "Not measured on the published prompts."
    if run.plan.limit is not None or run.plan.spatial_only:
        return f"Measured on {len(run.items):,} of the prompts."
    if run.benchmark.num_images != type(run.benchmark).num_images:
        return f"Measured on {run.benchmark.num_images} images per prompt."
    return ""


def _official_table(benchmark: Benchmark, items: Sequence[Item], evidence: Evidence) -> dict[str, Any]:
    try:
        numbers = official_intervals(benchmark.official, items, evidence)
    except OfficialError as error:
        return {"numbers": [], "error": str(error)}
    return {"numbers": [{"name": name, **_ends(interval)} for name, interval in numbers.items()]}


def _metric_row(metric: Metric) -> dict[str, Any]:
    return {
        "name": metric.name,
        **_ends(metric_interval(metric)),
        "num_values": len(metric.values),
        "num_prompts": len(set(metric.items)),
        "is_headline": metric.is_headline,
    }


def _ends(interval: Interval | None) -> dict[str, float | None]:
    """Converts an interval for JSON, which has no NaN."""
    ends = (np.nan,) * 3 if interval is None else (interval.estimate, interval.low, interval.high)
    return {name: None if np.isnan(end) else end for name, end in zip(("estimate", "low", "high"), ends, strict=True)}


def find_failures(run: ImageRun, evidence_by: Mapping[Protocol, Evidence], protocol: Protocol) -> list[dict[str, Any]]:
    """
    Lists what counts as wrong because it is missing: images not drawn or unreadable, and questions without a usable
    reply.

    Args:
        run ([`~evaluation.image_run.ImageRun`]):
            The run.
        evidence_by (`Mapping[str, Evidence]`), protocol (`str`):
            Protocol → [`~evaluation.benchmarks.base.Evidence`], and the protocol whose images and questions are
            checked.

    Returns:
        `list[dict]`: `item`, `image`, `question` (`None` for an image) and `reason`.
    """
    failures: list[dict[str, Any]] = []
    refusals, unreadable = run.refusals(), run.unreadable()
    evidence, assignment = evidence_by[protocol], run.assignments(run.listed_files())[protocol]
    for item, number in images_of(run.items, run.benchmark.num_images):
        key = item.id, number
        if key not in evidence.images:
            file = assignment.get(key)
            reason = f"refused: {refusals[key]}" if key in refusals else "image missing"
            if file is not None:
                reason = f"image unreadable: {unreadable.get(file, '')}"
            failures.append({"item": item.id, "image": number, "question": None, "reason": reason})
            continue
        for question in run.benchmark.questions(item, protocol):
            replies = evidence.replies.get((*key, question.key), ())
            num_usable = sum(reply is not None and question.is_usable(reply) for reply in replies)
            if num_usable < question.num_replies:
                reason = "no usable answer" if replies else "not asked"
                failures.append({"item": item.id, "image": number, "question": question.key, "reason": reason})
    return failures


def summarize_answers(answers: Iterable[Mapping[str, Any]], judges: Mapping[str, str], cost: float) -> dict[str, Any]:
    """
    Summarizes who answered, in how much time, and at what cost.

    Args:
        answers (`Iterable[Mapping[str, Any]]`):
            Records of [`~evaluation.judging.ask_judges`].
        judges (`Mapping[str, str]`):
            Role → name.
        cost (`float`):
            Total paid, in US dollars; more than the sum over the answers if some were lost and requested again.

    Returns:
        `dict`: `judges`, role → `name` and `served`, served model → number of answers; `usage`, with `answers`, `cost` and `seconds`.
    """
    served: Counter[str] = Counter()
    usage = {"answers": 0, "cost": cost, "seconds": 0.0}
    for answer in answers:
        usage["answers"] += 1
        usage["seconds"] += answer.get("seconds", 0.0)
        if answer["served_model"] is not None:
            served[answer["served_model"]] += 1
    described = {
        role: {"name": name, "served": dict(served) if role == "vision" else {}} for role, name in judges.items()
    }
    return {"judges": described, "usage": usage}


def find_examples(run: ImageRun, evidence: Evidence, metrics: Sequence[Metric]) -> dict[str, list[dict[str, Any]]]:
    """The prompts that did best and worst in the first headline metric, each with an image and the judge's words about it."""
    headline = next((metric for metric in metrics if metric.is_headline), None)
    if headline is None:
        return {"worst": [], "best": []}
    sums: dict[str, float] = defaultdict(float)
    counts = Counter(headline.items)
    for item, value in zip(headline.items, headline.values, strict=True):
        sums[item] += float(value)
    items = {item.id: item for item in run.items}
    ranked = sorted((id for id in counts if evidence.numbers(items[id])), key=lambda id: sums[id] / counts[id])
    half = min(_NUM_EXAMPLES, len(ranked) // 2 or len(ranked))

    def example(id: str) -> dict[str, Any]:
        item, number = items[id], evidence.numbers(items[id])[0]
        asked = run.benchmark.questions(item, "fixed")[:_NUM_WORDS]
        words = [
            (question.text or question.key, _shorten(evidence.reply(item, number, question.key))) for question in asked
        ]
        file = evidence.images[id, number]
        picture = f"{PICTURES}/{hashlib.sha256(file.encode()).hexdigest()[:16]}.png"
        value = sums[id] / counts[id]
        return {"item": id, "prompt": item.prompt, "file": file, "picture": picture, "value": value, "words": words}

    return {"worst": [example(id) for id in ranked[:half]], "best": [example(id) for id in ranked[::-1][:half]]}


def save_pictures(run: ImageRun, results: Mapping[str, Any]) -> None:
    """Writes small pictures of the examples for the page, if their images still exist."""
    for example in (*results["examples"]["worst"], *results["examples"]["best"]):
        path = run.folder / example["picture"]
        if path.is_file() or not (run.image_folder / example["file"].partition("#")[0]).is_file():
            continue
        image = run.open(example["file"])
        image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, encode_png(image))


def _shorten(reply: Any) -> str:
    if isinstance(reply, Mapping) and "boxes" in reply:
        return ", ".join(f"{box['label']} {box['score']:.2f}" for box in reply["boxes"][:6]) or "nothing found"
    if isinstance(reply, Mapping) and "probabilities" in reply:
        best = sorted(reply["probabilities"].items(), key=lambda pair: -pair[1])[:3]
        return ", ".join(f"{token.strip()} {chance:.2f}" for token, chance in best)
    text = "no answer" if reply is None else str(reply)
    return text if len(text) <= 200 else f"{text[:199]}…"


def describe_results(results: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        f"# {results['title']}: {results['generator']}",
        "",
        f"{results['num_prompts']:,} prompts, {results['num_images']:,} images. Judges: "
        + (", ".join(f"{judge['name']} ({role})" for role, judge in results["judges"].items()) or "none")
        + ".",
    ]
    for protocol, table in results["protocols"].items():
        lines += ["", f"## {protocol}", ""]
        if "error" in table:
            lines.append(f"The official program would stop here: {table['error']}")
            continue
        lines += ["| what | value | 95 % interval | values |", "|---|---|---|---|"]
        for row in table["numbers"]:
            name = f"**{row['name']}**" if row.get("is_headline") else row["name"]
            ends = "–" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
            value = "–" if row["estimate"] is None else f"{row['estimate']:.4g}"
            lines.append(f"| {name} | {value} | {ends} | {row.get('num_values', '')} |")
    if results["failures"]["counts"]:
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in results["failures"]["counts"].items())
        lines += ["", f"Counted as wrong: {counts}."]
    if results["published"]:
        lines += [
            "",
            "## Published numbers",
            "",
            "| metric | model | value | judge | protocol | comparable |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['metric']} | {row['model']} | {row['value']:g} | {row['judge'] or 'none'} | {row['protocol']} "
            f"| {'yes' if row['is_comparable'] else 'no: ' + row['why']} |"
            for row in results["published"]
        ]
    return "\n".join(lines) + "\n"
