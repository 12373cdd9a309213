"""Asks judges about the images of a benchmark, and records every answer."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..endpoints import BadAnswer, ServerError
from ..judges.vision import VisionModel
from ..store import RecordLog
from .benchmarks.base import Question


_BATCH = 16  # images that a detector sees together
_FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class Task:
    """
    An image and what is asked about it.

    Args:
        item (`str`), file (`str`):
            Id of its prompt, and its file.
        questions (`Sequence[Question]`):
            The questions.
    """

    item: str
    file: str
    questions: Sequence[Question]


@dataclass(frozen=True)
class Judges:
    """
    Who is asked, by role.

    Args:
        vision ([`~judges.vision.VisionModel`], *optional*):
            Answers questions.
        detectors (`Mapping[str, Callable]`):
            `"first"` and, where a benchmark has two, `"second"` → detector.
        colors (`Callable`, *optional*):
            Names the color of a crop.
        depth (`Callable`, *optional*):
            Depth of each pixel, 0 to 255, near is large.
        names (`Mapping[str, str]`):
            Role → name, for the records.
    """

    vision: VisionModel | None
    detectors: Mapping[str, Callable[..., Any]]
    colors: Callable[..., str] | None
    depth: Callable[[Image.Image], np.ndarray] | None
    names: Mapping[str, str]


def unanswered(tasks: Sequence[Task], log: RecordLog) -> list[Task]:
    """The tasks without the questions that are answered. What failed because of a server is asked again."""
    done = {(record["item"], record["file"], record["question"]) for record in log if record.get("error") is None}
    remaining = []
    for task in tasks:
        questions = [question for question in task.questions if (task.item, task.file, question.key) not in done]
        if questions:
            remaining.append(Task(task.item, task.file, questions))
    return remaining


def ask_judges(
    tasks: Sequence[Task],
    judges: Judges,
    open_image: Callable[[str], Image.Image],
    log: RecordLog,
    *,
    progress: bool = True,
) -> None:
    """
    Asks everything that is not answered yet. Each answer is recorded within a second.

    Args:
        tasks (`Sequence[Task]`):
            The images and questions.
        judges ([`Judges`]):
            Who is asked.
        open_image (`Callable`):
            File → RGB image.
        log ([`~store.RecordLog`]):
            The answers.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Raises:
        [`~endpoints.BudgetReached`], [`~endpoints.ServerError`]: If the limit is reached, or every other call would fail too.
    """
    remaining = unanswered(tasks, log)
    spoken = [_only(task, lambda question: question.kind != "boxes") for task in remaining]
    seen = [_only(task, lambda question: question.kind == "boxes") for task in remaining]
    total = sum(len(task.questions) for task in remaining)
    with (
        tqdm(total=total, desc="judging", unit="question", disable=not progress or not total) as bar,
        _Writer(log) as write,
    ):
        for records in _detect(list(filter(None, seen)), judges, open_image):
            write(records)
            bar.update(len(records))
        for records in _converse(list(filter(None, spoken)), judges, open_image):
            write(records)
            bar.update(len(records))


def _only(task: Task, condition: Callable[[Question], bool]) -> Task | None:
    questions = [question for question in task.questions if condition(question)]
    return Task(task.item, task.file, questions) if questions else None


class _Writer:
    """Collects records and writes them every second: a flush to the disk for each of 10,000 answers would take minutes."""

    def __init__(self, log: RecordLog):
        self.log, self.records, self.written = log, list[dict[str, Any]](), time.monotonic()

    def __enter__(self) -> Callable[[Sequence[dict[str, Any]]], None]:
        return self.add

    def __exit__(self, *error: Any) -> None:
        self.log.append(self.records)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        self.records.extend(records)
        if time.monotonic() - self.written > _FLUSH_SECONDS:
            self.log.append(self.records)
            self.records, self.written = [], time.monotonic()


def _converse(
    tasks: Sequence[Task], judges: Judges, open_image: Callable[[str], Image.Image]
) -> Iterator[list[dict[str, Any]]]:
    """Records of the questions to the vision-language model, image by image."""
    if not tasks:
        return
    model = judges.vision
    assert model is not None

    def ask_all(task: Task) -> list[dict[str, Any]]:
        image = open_image(task.file)
        return [
            ask_question(model, image, question) | {"item": task.item, "file": task.file}
            for question in task.questions
        ]

    for _, result in model.map(ask_all, tasks):
        if isinstance(result, Exception):
            raise result
        yield [record | {"judge": judges.names["vision"]} for record in result]


def ask_question(model: VisionModel, image: Image.Image, question: Question) -> dict[str, Any]:
    """
    Asks a question until there are as many usable replies as are wanted, or it has been asked as often as it may be.

    Returns:
        `dict`: `question`, `replies` in their order (`None` for a call that failed), `served_model`, `cost`, `seconds` and, if the
        last call failed, `error`.
    """
    start = time.perf_counter()
    record: dict[str, Any] = {"question": question.key, "replies": [], "served_model": None, "cost": 0.0}
    num_usable = 0
    for attempt in range(question.max_tries):
        record.pop("error", None)
        try:
            if question.kind == "probabilities":
                answer = model.probabilities(image, question.text, question.options["spellings"])
                reply = answer.data
            else:
                answer = model.answer(image, question.text, vote=attempt, **question.options)
                reply = answer.text
            record["cost"] += answer.cost
            record["served_model"] = answer.served_model
        except BadAnswer as error:
            reply = error.raw
            record["cost"] += error.cost
            record["served_model"] = error.served_model
        except ServerError as error:
            if error.is_final:
                raise
            reply, record["error"] = None, str(error)
        record["replies"].append(reply)
        num_usable += reply is not None and question.is_usable(reply)
        if num_usable == question.num_replies:
            break
    return record | {"cost": round(record["cost"], 8), "seconds": round(time.perf_counter() - start, 4)}


def _detect(
    tasks: Sequence[Task], judges: Judges, open_image: Callable[[str], Image.Image]
) -> Iterator[list[dict[str, Any]]]:
    """Records of the questions to detectors, in batches of one detector and one view."""
    groups: dict[tuple[str, str], list[tuple[Task, Question]]] = defaultdict(list)
    for task in tasks:
        for question in task.questions:
            groups[question.options.get("detector", "first"), question.options.get("view", "")].append(
                (task, question)
            )
    for (role, view), asked in groups.items():
        for start in range(0, len(asked), _BATCH):
            batch = asked[start : start + _BATCH]
            began = time.perf_counter()
            pictures = [open_image(task.file) for task, _ in batch]
            found = find_boxes(judges, role, view, pictures, [question.options for _, question in batch])
            seconds = (time.perf_counter() - began) / len(batch)
            yield [
                {
                    "item": task.item,
                    "file": task.file,
                    "question": question.key,
                    "judge": judges.names[role],
                    "replies": [reply],
                    "served_model": None,
                    "cost": 0.0,
                    "seconds": round(seconds, 4),
                }
                for (task, question), reply in zip(batch, found, strict=True)
            ]
