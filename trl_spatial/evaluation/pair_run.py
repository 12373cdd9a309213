"""Measures scorers on pairs: every answer is recorded in a folder, so that an interrupted run can continue."""

import hashlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageOps
from PIL.Image import Image
from tqdm.auto import tqdm

from ..endpoints import BadAnswer, BudgetReached, EndpointError, RecordedSpend, ServerError, Spend
from ..gaussian_reward.checkpoints import fingerprint
from ..store import RecordLog, read_record, write_atomically, write_record
from .pair_controls import GIVEN
from .pair_set import PairSet
from .pair_tables import latest, make_results
from .pair_text import describe_pairs
from .sharing import write_shared_pairs


if TYPE_CHECKING:
    from .scorers import Comparison, PairScorer, PairwiseScorer, Score

PLAN_FILE, PAIRS_FILE, PAYMENTS_FILE, RECORDS_FOLDER = "plan.json", "pairs.jsonl", "payments.jsonl", "records"
RESULTS_FILE, TABLES_FILE = "results.json", "results.md"
Task = tuple[int, str]  # number of a pair, and the condition (`GIVEN` or a control) under which it is shown
Shown = tuple[str, Image, Image]  # prompt, chosen, rejected

# Failures that are asked again: a server may answer later, and a user may have fixed their function.
_PASSING = ("no answer from the server", "error")


class PairRun:
    """
    The folder of a run. `plan.json` says what is measured, `pairs.jsonl` what the tables need to know of each pair, and
    `records/` holds a log for each scorer, from which the tables are made.

    Args:
        folder (`Path`):
            The folder, which exists; the caller has locked it.
        pairs ([`~evaluation.pair_set.PairSet`]):
            The pairs.

    Raises:
        `ValueError`: If the folder holds something else or a run on other pairs, or an image cannot be used.
    """

    def __init__(self, folder: Path, pairs: PairSet):
        self.folder, self.pairs = folder, pairs
        self.plan = read_record(folder / PLAN_FILE)
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if not self.plan and any(name != PAIRS_FILE for name in others):
            raise ValueError(f"{folder} is not empty and holds no run that can be continued. Name another folder.")
        now = {"kind": "pairs", "dataset": pairs.name, "num_pairs": len(pairs), "digest": pairs.digest()}
        if self.plan:
            self._check(now)
        else:
            pairs.check()
            (folder / PAIRS_FILE).unlink(missing_ok=True)
            RecordLog(folder / PAIRS_FILE).append(pairs.records())
            self.plan = now | {"dataset_id": pairs.dataset_id, "split": pairs.split, "scorers": {}}
            write_record(folder / PLAN_FILE, self.plan)
        self._prompts = [record["prompts"] for record in RecordLog(folder / PAIRS_FILE)]

    def spend(self, limit_usd: float = math.inf) -> Spend:
        """Returns the spending limit for models on servers, in US dollars."""
        return RecordedSpend(limit_usd, RecordLog(self.folder / PAYMENTS_FILE))

    def tasks(self, spec: str, controls: Sequence[str]) -> list[Task]:
        """Returns what a scorer has not been asked yet. Pairs on which a server failed are asked again."""
        facts = self.plan["scorers"].get(spec)
        done = (
            set() if facts is None else {key for key, record in latest(self._log(facts)).items() if is_settled(record)}
        )
        return [
            (index, condition)
            for condition in (GIVEN, *controls)
            for index in range(len(self.pairs))
            if condition in self._prompts[index] and (str(index), condition) not in done
        ]

    def measure(self, spec: str, scorer: "PairScorer", controls: Sequence[str], *, batch_size: int) -> None:
        """
        Asks a scorer what it has not been asked yet. Answers are kept even if this fails.

        Args:
            spec (`str`), scorer ([`~evaluation.scorers.PairScorer`]):
                The scorer, and its name on the command line.
            controls (`Sequence[str]`):
                Names of [`~evaluation.pair_controls.CONTROLS`].
            batch_size (`int`):
                Number of pairs that are given to it at once.

        Raises:
            `ValueError`: If the scorer has changed since the folder was begun.
            [`~endpoints.BudgetReached`]: If the limit is reached.
            [`~endpoints.ServerError`]: If its server would refuse every request.
        """
        log = self._begin(spec, scorer)
        tasks = self.tasks(spec, controls)
        with tqdm(total=len(tasks), desc=spec, unit="pair") as bar:
            for start in range(0, len(tasks), batch_size):
                for records in self._ask(scorer, tasks[start : start + batch_size]):
                    log.append(records)
                    bar.update(len(records))

    def save_images(self, examples: Sequence[dict[str, Any]]) -> None:
        """Writes the images that the examples of the results name."""
        for example in examples:
            for side, image in zip(("chosen", "rejected"), self.pairs.images(int(example["pair"])), strict=True):
                path = self.folder / example[side]
                if not path.is_file():
                    path.parent.mkdir(exist_ok=True)
                    write_atomically(path, _png(image))

    def _check(self, now: dict[str, Any]) -> None:
        for key, what in (("kind", "kind of run"), ("dataset", "dataset"), ("num_pairs", "number of pairs")):
            if self.plan.get(key) != now[key]:
                raise ValueError(
                    f"{self.folder} holds a run with another {what}: it was {self.plan.get(key)!r} and is {now[key]!r}. Name "
                    "another folder."
                )
        if self.plan["digest"] != now["digest"]:
            raise ValueError(
                f"The prompts or images of {self.pairs.name} have changed since {self.folder} was begun. Restore them, or "
                "name another folder."
            )

    def _begin(self, spec: str, scorer: "PairScorer") -> RecordLog:
        known = self.plan["scorers"].get(spec)
        name = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', spec)[-40:]}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}.jsonl"
        facts = {
            "file": f"{RECORDS_FOLDER}/{name}",
            "trained_on": scorer.trained_on,
            "is_pairwise": scorer.is_pairwise,
            "fingerprint": fingerprint_of(spec),
        }
        if known is not None and known["fingerprint"] != facts["fingerprint"]:
            raise ValueError(
                f"The files of {spec} have changed since {self.folder} was begun. Restore them, or name another folder."
            )
        (self.folder / RECORDS_FOLDER).mkdir(exist_ok=True)
        self.plan["scorers"][spec] = facts
        write_record(self.folder / PLAN_FILE, self.plan)
        return self._log(facts)

    def _log(self, facts: dict[str, Any]) -> RecordLog:
        return RecordLog(self.folder / facts["file"])

    def _show(self, task: Task) -> Shown:
        index, condition = task
        images = self.pairs.images(index)
        chosen, rejected = map(ImageOps.mirror, images) if condition == "flip" else images
        return self._prompts[index][condition], chosen, rejected

    def _ask(self, scorer: "PairScorer", tasks: Sequence[Task]) -> Iterator[list[dict[str, Any]]]:
        """
        Yields lists of records; raises an error that ends the run only after yielding the answers received before it.
        """
        shown = [self._show(task) for task in tasks]
        if scorer.is_pairwise:
            yield from _compare_all(scorer, tasks, shown)  # type: ignore[arg-type]
        else:
            yield from _score_all(scorer, tasks, shown)


def _score_all(scorer: "PairScorer", tasks: Sequence[Task], shown: Sequence[Shown]) -> Iterator[list[dict[str, Any]]]:
    prompts, chosen, rejected = (list(column) for column in zip(*shown, strict=True))
    started = time.perf_counter()
    try:
        scores = scorer.score(prompts * 2, chosen + rejected)
    except (EndpointError, ValueError) as error:
        if len(tasks) > 1 and not _ends_all(error):
            half = len(tasks) // 2  # bisect to find the pair that fails
            yield from _score_all(scorer, tasks[:half], shown[:half])
            yield from _score_all(scorer, tasks[half:], shown[half:])
            return
        yield [_key(tasks[0]) | _failure(error) | {"seconds": time.perf_counter() - started}]
        return
    seconds = (time.perf_counter() - started) / len(tasks)
    records = []
    for task, first, second in zip(tasks, scores[: len(tasks)], scores[len(tasks) :], strict=True):
        answers = {"chosen": _score_record(first), "rejected": _score_record(second)}
        records.append(_key(task) | answers | _costs(first, second) | {"seconds": seconds})
    yield records


def _compare_all(
    scorer: "PairwiseScorer", tasks: Sequence[Task], shown: Sequence[Shown]
) -> Iterator[list[dict[str, Any]]]:
    """Asks about all pairs concurrently, because most of the time is spent waiting for a server."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(_compare, scorer, *pair) for pair in shown]
    seconds = (time.perf_counter() - started) / len(tasks)
    ends = [future.exception() for future in futures]
    yield [
        _key(task) | future.result() | {"seconds": seconds}
        for task, future, end in zip(tasks, futures, ends, strict=True)
        if end is None
    ]
    for end in filter(None, ends):
        raise end


def _compare(scorer: "PairwiseScorer", prompt: str, chosen: Image, rejected: Image) -> dict[str, Any]:
    """Asks in both orders, and translates the scorer's `"first"` and `"second"` to `"chosen"` and `"rejected"`."""
    verdicts: list[dict[str, Any]] = []
    answers: list[Comparison] = []
    for names, images in ((("chosen", "rejected"), (chosen, rejected)), (("rejected", "chosen"), (rejected, chosen))):
        try:
            answer = scorer.compare(prompt, *images)
        except (EndpointError, ValueError) as error:
            failed, known = _failure(error), _costs(*answers)
            served = sorted({*failed["served_models"], *known["served_models"]})
            return failed | {"cost": failed["cost"] + known["cost"], "served_models": served}
        meaning = {"first": names[0], "second": names[1], "tie": "tie", None: None}
        verdicts.append({"first": names[0], "preferred": meaning[answer.preferred], "raw": answer.raw})
        answers.append(answer)
    return {"verdicts": verdicts} | _costs(*answers)


def _key(task: Task) -> dict[str, Any]:
    return {"pair": str(task[0]), "condition": task[1]}


def _costs(*answers: "Score | Comparison") -> dict[str, Any]:
    served = {answer.served_model for answer in answers if answer.served_model is not None}
    return {"cost": float(sum(answer.cost for answer in answers)), "served_models": sorted(served)}


def _score_record(score: "Score") -> dict[str, Any]:
    """Converts a score for JSON; a score that is not finite becomes `None`."""
    if score.mean is None or not math.isfinite(score.mean):
        raw = score.raw if score.mean is None else f"the score is {score.mean}"
        return {"mean": None, "std": None, "raw": raw}
    return {"mean": float(score.mean), "std": None if score.std is None else float(score.std), "raw": score.raw}


def _failure(error: Exception) -> dict[str, Any]:
    if _ends_all(error):
        raise error
    if isinstance(error, BadAnswer):
        served = [] if error.served_model is None else [error.served_model]
        failure = {"reason": "refused or malformed answer", "message": str(error), "raw": error.raw}
        return {"failure": failure, "cost": error.cost, "served_models": served}
    reason = "no answer from the server" if isinstance(error, ServerError) else "error"
    return {"failure": {"reason": reason, "message": str(error), "raw": None}, "cost": 0.0, "served_models": []}


def _ends_all(error: Exception) -> bool:
    """Whether every other request would fail as well."""
    if isinstance(error, EndpointError) and not isinstance(error, (BadAnswer, ServerError)):
        return True
    return isinstance(error, BudgetReached) or (isinstance(error, ServerError) and error.is_final)


def is_settled(record: Mapping[str, Any]) -> bool:
    """Whether asking again would give the same result."""
    return record.get("failure", {}).get("reason") not in _PASSING


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """
    Reads a folder that [`PairRun`] wrote.

    Returns:
        `tuple`: the plan, the records of the pairs, and those of each scorer, all that were ever written, as
        [`~evaluation.pair_tables.make_results`] takes them.

    Raises:
        `ValueError`: If the folder holds no such run, or a file is damaged.
    """
    plan = read_record(folder / PLAN_FILE)
    if plan.get("kind") != "pairs":
        raise ValueError(f"{folder} holds no run of `evaluate pairs`: its {PLAN_FILE} is missing or of another kind.")
    records = {spec: list(RecordLog(folder / facts["file"])) for spec, facts in plan["scorers"].items()}
    return plan, list(RecordLog(folder / PAIRS_FILE)), records


def fingerprint_of(spec: str) -> str | None:
    """Returns a short hash of the files of a scorer whose model is a folder; `None` for any other."""
    folder = Path(spec.partition(":")[2])
    return fingerprint(folder) if ":" in spec and folder.is_dir() else None


def replay_pairs(folder: Path) -> dict[str, Any]:
    """
    Makes the tables of a run again from its records, without its dataset or any model.

    Args:
        folder (`Path`):
            The folder of the run. `results.json` and `results.md` are written there, and for each scorer the files for
            its model's repository, see [`~evaluation.sharing.write_shared_pairs`].

    Returns:
        `dict`: See [`~evaluation.pair_tables.make_results`].

    Raises:
        `ValueError`: If the folder holds no such run, or a file is damaged.
    """
    results = make_results(*read_run(folder))
    write_record(folder / RESULTS_FILE, results)
    write_atomically(folder / TABLES_FILE, describe_pairs(results))
    write_shared_pairs(folder, results)
    return results


def _png(image: Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
