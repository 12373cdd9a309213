"""Makes the tables of a measurement of scorers from its records alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from ..gaussian_reward.losses import preference_probability
from ..preferences.benchmark import NUMBERS
from ..statistics import (
    bootstrap_interval,
    expected_calibration_error,
    holm,
    paired_permutation_test,
    reliability_bins,
    share_interval,
)
from .mmrb2 import MMRB2, NUM_PAIRS
from .pair_controls import CONTROLS, GIVEN
from .published import published_numbers


GROUPINGS = ("level", "relation", "operation", "orientation", "generator", "source")
_NUM_EXAMPLES = 4  # worst pairs shown, and as many of the best
_VALUES = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0, None: 0.0}
Record = Mapping[str, Any]


@dataclass(frozen=True)
class PairScores:
    """
    Mean and standard deviation of the scores of the two images of every pair, each of shape `(num_pairs,)`; NaN where there is
    none.
    """

    chosen_mean: np.ndarray
    chosen_std: np.ndarray
    rejected_mean: np.ndarray
    rejected_std: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        """Difference of the means, `(num_pairs,)`; positive where the order is right."""
        return self.chosen_mean - self.rejected_mean

    @property
    def probability(self) -> np.ndarray:
        """P(chosen ≻ rejected), `(num_pairs,)`, as models whose scores have a standard deviation are trained to give it."""
        with np.errstate(divide="ignore"):  # a standard deviation may be 0
            log_stds = np.log(self.chosen_std), np.log(self.rejected_std)
        fields = (self.chosen_mean, log_stds[0], self.rejected_mean, log_stds[1])
        return preference_probability(*(torch.from_numpy(values.astype(float)) for values in fields)).numpy()


def make_results(plan: Record, pairs: Sequence[Record], records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """
    Computes the tables of a run, as [`~evaluation.pair_run.read_run`] reads it.

    A pair counts 1 if the chosen image has the higher score, 0.5 for a tie, else 0; of a scorer that compares, which is asked in
    both orders, the mean of both. A pair without a verdict counts 0. Intervals draw clusters of pairs that share a prompt.

    Args:
        plan (`Mapping`):
            What was measured.
        pairs (`Sequence[Mapping]`):
            Records of the pairs.
        records (`Mapping[str, Sequence[Mapping]]`):
            Name of each scorer → its records. Of several on the same pair, the last counts.

    Returns:
        `dict`: What `results.json` holds: `kind`, `dataset`, `dataset_id` and `split` if it is all of a split on the Hub, `num_pairs`,
        `scorers`, `differences` (the second minus the first), `published`, `examples` (the worst, then the best).
    """
    clusters = np.array([pair["cluster"] for pair in pairs])
    answers = {spec: latest(found) for spec, found in records.items()}
    names = [pair["pair"] for pair in pairs]
    values = {spec: values_of(found, names, GIVEN)[0] for spec, found in answers.items()}
    return {
        "kind": "pairs",
        "dataset": plan["dataset"],
        # missing in runs of earlier versions
        "dataset_id": plan.get("dataset_id"),
        "split": plan.get("split"),
        "num_pairs": len(pairs),
        "scorers": [
            _scorer_row(spec, facts, pairs, clusters, records[spec]) for spec, facts in plan["scorers"].items()
        ],
        "differences": _differences(values, clusters),
        "published": _published(plan["dataset"], len(pairs)),
        "examples": _examples(pairs, answers, values),
    }


def latest(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The last record of each pair and condition."""
    return {(record["pair"], record["condition"]): record for record in records}


def values_of(
    answers: Mapping[tuple[str, str], Record], names: Sequence[str], condition: str
) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns how right a scorer is on each pair, in `[0, 1]`, and whether it has a verdict: both of shape
    `(num_pairs,)`. A reply that cannot be read counts as wrong, and a pair that lacks one as without a verdict.
    """
    values, is_covered = np.zeros(len(names)), np.zeros(len(names), dtype=bool)
    for row, name in enumerate(names):
        record = answers.get((name, condition), {})
        if "verdicts" in record:
            preferred = [verdict["preferred"] for verdict in record["verdicts"]]
            values[row] = np.mean([_VALUES[choice] for choice in preferred])
            is_covered[row] = None not in preferred
        elif (scores := _scores(record)) is not None:
            values[row] = (np.sign(scores[0] - scores[1]) + 1) / 2
            is_covered[row] = True
    return values, is_covered


def scores_of(answers: Mapping[tuple[str, str], Record], names: Sequence[str]) -> PairScores:
    """Returns the scores of the pairs with these names."""
    rows = np.full((len(names), 4), np.nan)
    for row, name in enumerate(names):
        record = answers.get((name, GIVEN), {})
        if _scores(record) is not None:
            numbers = [record[side][number] for side in ("chosen", "rejected") for number in ("mean", "std")]
            rows[row] = [np.nan if number is None else number for number in numbers]
    return PairScores(*rows.T)


def _scores(record: Record) -> tuple[float, float] | None:
    """Returns the scores of the chosen and the rejected image, or `None` unless the record has both."""
    if "chosen" not in record or None in (means := (record["chosen"]["mean"], record["rejected"]["mean"])):
        return None
    return means


def _scorer_row(
    spec: str, facts: Record, pairs: Sequence[Record], clusters: np.ndarray, records: Sequence[Record]
) -> dict[str, Any]:
    answers, names = latest(records), [pair["pair"] for pair in pairs]
    values, is_covered = values_of(answers, names, GIVEN)
    num_asked = max(len(answers), 1)
    return {
        "name": spec,
        "file": facts["file"],
        "trained_on": facts["trained_on"],
        "served_models": sorted({model for record in records for model in record["served_models"]}),
        "accuracy": _share(values, clusters),
        "num_pairs": len(pairs),
        "coverage": float(is_covered.mean()),
        "covered_accuracy": _share(values[is_covered], clusters[is_covered]),
        "numbers": _numbers(pairs, values, clusters),
        "failures": list(_failures(answers, names)),
        "groups": {grouping: _groups(grouping, pairs, values, clusters) for grouping in GROUPINGS},
        "controls": {control: _control(control, answers, names, clusters) for control in _asked_controls(answers)},
        "calibration": _calibration(answers, names),
        "order_consistency": _order_consistency(answers, names),
        "seconds_per_1000": 1000 * sum(record["seconds"] for record in records) / num_asked,
        "price_per_1000": 1000 * sum(record["cost"] for record in records) / num_asked,
    }


def _share(values: np.ndarray, clusters: np.ndarray) -> dict[str, float | None]:
    """Returns a share and its interval for JSON; all `None` if there are no values."""
    if len(values) == 0:
        return dict.fromkeys(("estimate", "low", "high"))
    return dict(vars(share_interval(values, clusters)))


def _failures(answers: Mapping[tuple[str, str], Record], names: Sequence[str]) -> Iterable[dict[str, Any]]:
    """Yields the reason for each missing verdict."""
    for name in names:
        record = answers.get((name, GIVEN))
        if record is None:
            yield {"pair": name, "reason": "not asked", "raw": None}
        elif "failure" in record:
            failure = record["failure"]
            yield {"pair": name, "reason": f"{failure['reason']}: {failure['message']}", "raw": failure["raw"]}
        elif "verdicts" in record:
            for verdict in record["verdicts"]:
                if verdict["preferred"] is None:
                    reason = f"unreadable answer, with the {verdict['first']} image first"
                    yield {"pair": name, "reason": reason, "raw": verdict["raw"]}
        else:
            missing = [side for side in ("chosen", "rejected") if record[side]["mean"] is None]
            if missing:
                reason = f"no score of the {' and the '.join(missing)} image"
                yield {"pair": name, "reason": reason, "raw": record[missing[0]]["raw"]}


def _groups(grouping: str, pairs: Sequence[Record], values: np.ndarray, clusters: np.ndarray) -> list[dict[str, Any]]:
    group_of = np.array([pair["groups"].get(grouping, "") for pair in pairs])
    rows = []
    for name in sorted(set(group_of.tolist()) - {""}):
        members = group_of == name
        interval = share_interval(values[members], clusters[members])
        ends = {"accuracy": interval.estimate, "low": interval.low, "high": interval.high}
        rows.append({"name": name} | ends | {"num_pairs": int(members.sum())})
    return rows


def _numbers(pairs: Sequence[Record], values: np.ndarray, clusters: np.ndarray) -> dict[str, dict[str, Any]]:
    """Returns the numbers on which scorers are compared, without those that cover no pairs."""
    level_of = np.array([pair["groups"].get("level", "") for pair in pairs])
    numbers = {}
    for name, levels in NUMBERS.items():
        members = np.ones(len(pairs), dtype=bool) if levels is None else np.isin(level_of, [str(n) for n in levels])
        if members.any():
            numbers[name] = _share(values[members], clusters[members]) | {"num_pairs": int(members.sum())}
    return numbers


def _asked_controls(answers: Mapping[tuple[str, str], Record]) -> list[str]:
    asked = {condition for _, condition in answers}
    return [control for control in CONTROLS if control in asked]


def _control(
    control: str, answers: Mapping[tuple[str, str], Record], names: Sequence[str], clusters: np.ndarray
) -> dict[str, Any]:
    """
    Returns the result of a control over the pairs with a verdict only, so that a scorer that declines nonsense prompts
    does not fail it.
    """
    values, is_covered = values_of(answers, names, control)
    if control == "flip":
        given, is_given = values_of(answers, names, GIVEN)
        values, is_covered = 1 - np.abs(values - given), is_covered & is_given
    return _share(values[is_covered], clusters[is_covered]) | {"num_pairs": int(is_covered.sum())}


def _calibration(answers: Mapping[tuple[str, str], Record], names: Sequence[str]) -> dict[str, Any] | None:
    """Compares the probabilities of scores that have a standard deviation with how often their order is right."""
    probability = scores_of(answers, names).probability
    known = probability[~np.isnan(probability)]
    if len(known) == 0:
        return None
    bins = reliability_bins(known)
    rows = [
        {"predicted": float(predicted), "observed": float(observed), "num_pairs": int(count)}
        for predicted, observed, count in zip(bins.confidence, bins.accuracy, bins.counts, strict=True)
        if count
    ]
    return {"bins": rows, "error": expected_calibration_error(known)}


def _order_consistency(answers: Mapping[tuple[str, str], Record], names: Sequence[str]) -> float | None:
    """Returns the share of the pairs with the same verdict in both orders, among those with two verdicts."""
    is_same = []
    for name in names:
        preferred = {verdict["preferred"] for verdict in answers.get((name, GIVEN), {}).get("verdicts", ())}
        if preferred and None not in preferred:
            is_same.append(len(preferred) == 1)
    return float(np.mean(is_same)) if is_same else None


def _differences(values: Mapping[str, np.ndarray], clusters: np.ndarray) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for first, second in combinations(values, 2):
        interval = bootstrap_interval(values[second] - values[first], clusters, rng=np.random.default_rng(0))
        p_value = paired_permutation_test(values[second], values[first], clusters, rng=np.random.default_rng(0))
        rows.append(
            {
                "first": first,
                "second": second,
                "difference": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "p_value": p_value,
                "num_pairs": len(clusters),
            }
        )
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = float(adjusted)
    return rows


def _published(dataset: str, num_pairs: int) -> list[dict[str, Any]]:
    if dataset.startswith(f"{MMRB2}:"):
        is_whole = num_pairs == NUM_PAIRS
        return published_numbers(
            MMRB2, difference="" if is_whole else f"Measured on {NUM_PAIRS:,} pairs, not on {num_pairs:,}."
        )
    return published_numbers("pairs", difference=f"Measured on 365 pairs, which are not public, not on {dataset}.")


def _examples(
    pairs: Sequence[Record],
    answers: Mapping[str, Mapping[tuple[str, str], Record]],
    values: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Returns the pairs that the scorers order worst, then those that they order best."""
    if not values:
        return []
    scores = {
        spec: [
            _pair_scores(found.get((pair["pair"], GIVEN), {}), value) for pair, value in zip(pairs, of, strict=True)
        ]
        for (spec, found), of in zip(answers.items(), values.values(), strict=True)
    }
    # ties between pairs are broken by margin, relative to each scorer's largest
    margins = np.zeros(len(pairs))
    for of in scores.values():
        margin = -np.diff(np.array(of, float), axis=1)[:, 0]
        margin[np.isnan(margin)] = 0
        margins += margin / (np.abs(margin).max() or 1)
    order = np.lexsort((margins, np.mean(list(values.values()), axis=0))).tolist()
    num_shown = min(_NUM_EXAMPLES, len(order) // 2) or len(order)
    shown = order[:num_shown] + (order[-num_shown:][::-1] if len(order) > 1 else [])
    return [
        {
            "pair": pairs[row]["pair"],
            "prompt": pairs[row]["prompts"][GIVEN],
            "change": pairs[row]["change"],
            "chosen": f"images/{pairs[row]['pair']}-chosen.png",
            "rejected": f"images/{pairs[row]['pair']}-rejected.png",
            "scores": {spec: of[row] for spec, of in scores.items()},
        }
        for row in shown
    ]


def _pair_scores(record: Record, value: float) -> list[float | None]:
    """Returns the scores of both images; for a pairwise scorer, the share of orders in which it prefers each."""
    if "verdicts" in record:
        return [float(value), 1 - float(value)]
    return list(_scores(record) or (None, None))
