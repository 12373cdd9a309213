"""Asks judges about the images of a benchmark, and records every answer."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ..endpoints import BadAnswer, ServerError
from ..judges.vision import VisionModel
from ..store import RecordLog
from .benchmarks.base import Question
from .boxes import find_boxes
from .roles import Judges


_BATCH = 16  # images per call of a detector
_FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class Task:
    """
    An image and the questions about it.

    Args:
        item (`str`), file (`str`):
            Id of its prompt, and its file.
        questions (`Sequence[Question]`):
            The questions.
    """

    item: str
    file: str
    questions: Sequence[Question]


def answered(log: Iterable[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    """Returns (id of the item, file, key) of each answered question."""
    return {
        (record["item"], record["file"], record["question"])
        for record in log
        if "error" not in record and "unreadable" not in record
    }


def unanswered(tasks: Sequence[Task], log: RecordLog) -> list[Task]:
    """Returns the tasks without answered questions. Failed requests and unreadable images are tried again."""
    done = answered(log)
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
            The judges to ask.
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
    """Buffers records and writes them every second: syncing each of 10,000 answers to disk would take minutes."""

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
    """Asks the vision-language model; yields the records of each image."""
    if not tasks:
        return
    model, name = judges.vision, judges.names["vision"]
    assert model is not None

    def ask_all(task: Task) -> list[dict[str, Any]]:
        try:
            image = open_image(task.file)
        except ValueError as error:
            return _unreadable(task, name, error)
        return [
            _record(task, question.key, name) | ask_question(model, image, question) for question in task.questions
        ]

    for _, result in model.map(ask_all, tasks):
        if isinstance(result, Exception):
            raise result
        yield result


def _record(task: Task, question: str, judge: str) -> dict[str, Any]:
    return {
        "item": task.item,
        "file": task.file,
        "question": question,
        "judge": judge,
        "replies": [],
        "served_model": None,
        "cost": 0.0,
        "seconds": 0.0,
    }


def _unreadable(task: Task, judge: str, error: ValueError) -> list[dict[str, Any]]:
    return [_record(task, question.key, judge) | {"unreadable": str(error)} for question in task.questions]


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
    """Asks the detectors, in batches with the same detector and view; yields the records of each batch."""
    groups: dict[tuple[str, str], list[tuple[Task, Question]]] = defaultdict(list)
    for task in tasks:
        for question in task.questions:
            shown_to = question.options.get("detector", "first"), question.options.get("view", "")
            groups[shown_to].append((task, question))
    for (place, view), asked in groups.items():
        judge = judges.names["second_detector" if place == "second" else "detector"]
        for start in range(0, len(asked), _BATCH):
            began = time.perf_counter()
            records, shown = [], []
            for task, question in asked[start : start + _BATCH]:
                try:
                    image = open_image(task.file)
                except ValueError as error:
                    records += _unreadable(Task(task.item, task.file, [question]), judge, error)
                    continue
                shown.append((image, question))
                records.append(_record(task, question.key, judge))
            if shown:
                images, questions = zip(*shown, strict=True)
                found = iter(find_boxes(judges, place, view, images, [question.options for question in questions]))
                seconds = round((time.perf_counter() - began) / len(shown), 4)
                answered = (record for record in records if "unreadable" not in record)
                for record, reply in zip(answered, found, strict=True):
                    record.update(replies=[reply], seconds=seconds)
            yield records
