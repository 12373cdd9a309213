"""Official tables of SpatialBench-UC: verdicts on images, and a checker compared with people."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .spatialbench_uc_rules import RELATIONS, Verdict


class Sample(NamedTuple):
    """The verdict on an image of a prompt."""

    prompt: str
    relation: str
    verdict: Verdict
    reason: str | None
    confidence: float


class Twin(NamedTuple):
    """A prompt, and the prompt that says the same from the other object's side."""

    prompt: str
    counterfactual: str | None


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _count_verdicts(samples: Sequence[Sample]) -> dict[str, int]:
    counts = Counter(sample.verdict for sample in samples)
    return {
        "pass_count": counts["PASS"],
        "fail_count": counts["FAIL"],
        "undecidable_count": counts["UNDECIDABLE"],
    }


def _rates(samples: Sequence[Sample]) -> dict[str, float]:
    counts = _count_verdicts(samples)
    num_decided = counts["pass_count"] + counts["fail_count"]
    return {
        "coverage": _share(num_decided, len(samples)),
        "pass_rate_overall": _share(counts["pass_count"], len(samples)),
        "pass_rate_conditional": _share(counts["pass_count"], num_decided),
    }


def _overall(samples: Sequence[Sample]) -> dict[str, float]:
    counts = _count_verdicts(samples)
    return {
        "total_samples": len(samples),
        **counts,
        **_rates(samples),
        "undecidable_rate": _share(counts["undecidable_count"], len(samples)),
        "mean_confidence": _share(sum(sample.confidence for sample in samples), len(samples)),
    }


def evaluate_table(samples: Sequence[Sample]) -> dict[str, Any]:
    """The table of the official evaluation; an error without images."""
    if not samples:
        return {"error": "no_samples"}
    by_relation = {name: [sample for sample in samples if sample.relation == name] for name in RELATIONS}
    reasons = [sample.reason for sample in samples if sample.verdict == "UNDECIDABLE" and sample.reason]
    return {
        **_overall(samples),
        "by_relation": {
            name: {"count": len(part), **_count_verdicts(part), **_rates(part)}
            for name, part in by_relation.items()
            if part
        },
        "undecidable_reasons": dict(Counter(map(reason_category, reasons))),
    }


def reason_category(reason: str) -> str:
    """Returns the kind of a reason: the part before its details."""
    for mark in (":", "(", " "):
        if mark in reason:
            return reason.strip().split(mark)[0].strip()
    return reason


def report_table(samples: Sequence[Sample], twins: Sequence[Twin], num_images: int) -> dict[str, Any]:
    """
    The table of the official report.

    Args:
        samples (`Sequence[Sample]`):
            The verdicts about images.
        twins (`Sequence[Twin]`):
            The prompts.
        num_images (`int`):
            Images of each prompt; a prompt with more or fewer does not pass with all.
    """
    by_prompt: dict[str, list[Verdict]] = defaultdict(list)
    by_relation: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_prompt[sample.prompt].append(sample.verdict)
        by_relation[sample.relation].append(sample)
    best = {prompt: best_verdict(verdicts) for prompt, verdicts in by_prompt.items()}
    counts = Counter(best.values())
    num_all_pass = sum(verdicts == ["PASS"] * num_images for verdicts in by_prompt.values())
    return {
        **_overall(samples),
        "total_prompts": len(best),
        "prompt_pass_count": counts["PASS"],
        "prompt_fail_count": counts["FAIL"],
        "prompt_undecidable_count": counts["UNDECIDABLE"],
        "prompt_coverage": _share(counts["PASS"] + counts["FAIL"], len(best)),
        "prompt_pass_rate": _share(counts["PASS"], len(best)),
        "prompt_all_pass_count": num_all_pass,
        "prompt_pass_rate_all": _share(num_all_pass, len(best)),
        "by_relation": {name: _report_row(part) for name, part in by_relation.items()},
        **_count_twins(best, twins),
    }


def best_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Returns the verdict on a prompt, the best one on its images."""
    if "PASS" in verdicts:
        return "PASS"
    return "FAIL" if set(verdicts) == {"FAIL"} else "UNDECIDABLE"


def _report_row(samples: Sequence[Sample]) -> dict[str, float]:
    rates = _rates(samples)
    return {
        "count": len(samples),
        **_count_verdicts(samples),
        "pass_rate": rates["pass_rate_overall"],
        "coverage": rates["coverage"],
    }


def _count_twins(best: Mapping[str, Verdict], twins: Sequence[Twin]) -> dict[str, float]:
    """Counts the combinations of verdicts on the two prompts of a pair, over the pairs whose prompts both have one."""
    pairs = {
        frozenset((twin.prompt, twin.counterfactual))
        for twin in twins
        if twin.prompt in best and twin.counterfactual in best
    }
    counts = Counter(frozenset(best[prompt] for prompt in pair if prompt is not None) for pair in pairs)
    both_pass, both_fail = counts[frozenset({"PASS"})], counts[frozenset({"FAIL"})]
    one_sided = counts[frozenset({"PASS", "FAIL"})]
    return {
        "cf_total_pairs": len(pairs),
        "cf_both_pass": both_pass,
        "cf_both_fail": both_fail,
        "cf_one_sided": one_sided,
        "cf_undecidable": len(pairs) - both_pass - both_fail - one_sided,
        "cf_both_pass_rate": _share(both_pass, len(pairs)),
        "cf_one_sided_rate": _share(one_sided, len(pairs)),
        "cf_both_fail_rate": _share(both_fail, len(pairs)),
    }


def confidence_grid(step: float) -> list[float]:
    """Confidences from 0 to 1 in even steps."""
    num_steps = round(1 / step)
    return [*(index * step for index in range(num_steps)), 1.0]


def observed_confidences(results: Mapping[str, tuple[Verdict, float]]) -> list[float]:
    """Confidences of the images with a verdict, and 0 and 1, without repetition."""
    found = {
        confidence for verdict, confidence in results.values() if verdict != "UNDECIDABLE" and 0 <= confidence <= 1
    }
    return sorted(found | {0.0, 1.0})


def risk_coverage_curve(
    results: Mapping[str, tuple[Verdict, float]],
    labels: Mapping[str, Verdict],
    num_samples: int,
    thresholds: Sequence[float],
) -> list[dict[str, float]]:
    """
    Returns the share of images that a checker judges, and how often people contradict it, at each confidence
    threshold.

    Args:
        results (`Mapping[str, tuple[str, float]]`):
            Image → verdict of the checker, and its confidence.
        labels (`Mapping[str, str]`):
            Image → verdict of people, where there is one.
        num_samples (`int`):
            Images that were sampled for people.
        thresholds (`Sequence[float]`):
            Lowest confidences.

    Returns:
        `list[dict]`: For each threshold `tau`, `coverage`, `risk`, `accuracy`, `n_covered` and `n_evaluated`. Without an image that both
        judge the risk is 1; without one that the checker judges it is 0, and there is no `n_evaluated`.
    """
    curve: list[dict[str, float]] = []
    for threshold in thresholds:
        covered = {
            image: verdict
            for image, (verdict, confidence) in results.items()
            if verdict != "UNDECIDABLE" and confidence >= threshold
        }
        if not covered:
            curve.append({"tau": threshold, "coverage": 0.0, "risk": 0.0, "accuracy": 1.0, "n_covered": 0})
            continue
        is_right = [
            verdict == labels[image]
            for image, verdict in covered.items()
            if labels.get(image, "UNDECIDABLE") != "UNDECIDABLE"
        ]
        accuracy = _share(sum(is_right), len(is_right))
        curve.append(
            {
                "tau": threshold,
                "coverage": _share(len(covered), num_samples),
                "risk": 1 - accuracy,
                "accuracy": accuracy,
                "n_covered": len(covered),
                "n_evaluated": len(is_right),
            }
        )
    return curve


def confusion_table(verdicts: Mapping[str, Verdict], labels: Mapping[str, Verdict]) -> dict[str, Any]:
    """Verdicts of a checker against those of people, over the images that have both."""
    both = [(verdicts[image], labels[image]) for image in verdicts.keys() & labels.keys()]
    counts = Counter(both)
    decided: tuple[Verdict, Verdict] = ("PASS", "FAIL")
    matrix = {one: {other: counts[one, other] for other in decided} for one in decided}
    right_pass, false_pass = matrix["PASS"]["PASS"], matrix["PASS"]["FAIL"]
    false_fail, right_fail = matrix["FAIL"]["PASS"], matrix["FAIL"]["FAIL"]
    num_decided = right_pass + false_pass + false_fail + right_fail
    precision = _share(right_pass, right_pass + false_pass)
    recall = _share(right_pass, right_pass + false_fail)
    return {
        "confusion_matrix": matrix,
        "undecidable_checker": sum(verdict == "UNDECIDABLE" for verdict, _ in both),
        "undecidable_human": sum(label == "UNDECIDABLE" for _, label in both),
        "total_samples": len(both),
        "decided_samples": num_decided,
        "true_positives": right_pass,
        "false_positives": false_pass,
        "true_negatives": right_fail,
        "false_negatives": false_fail,
        "accuracy": _share(right_pass + right_fail, num_decided),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
    }
