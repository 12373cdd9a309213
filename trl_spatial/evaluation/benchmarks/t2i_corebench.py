"""T2I-CoReBench, the part with many relations per scene (C-MR): a checklist for each image, one question per call."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from .base import Benchmark, DataFile, Evidence, ImageKey, Item, Metric, OfficialError, Protocol, Question, images_of
from .matching import match_files
from .yesno import SPATIAL_PARTS, is_answer, make_metric, negate, read_answer


_COMMIT = "5d523d3b1c6a3b0891f5e689fb6754b52e5a56c3"
_TASK = "C-MR"
_FILE = f"{_TASK}.json"
_TWIN = "/negated"
_MESSAGE = """You check the images of a text-to-image model. Below are the prompt that an image was made for, and a question about the image.

Judge by what can be seen in the image and by nothing else. The prompt says what the question means; it is no evidence of what the image shows.
Say "yes" only if the image shows clearly and without doubt that it is so. Say "no" in every other case: if something is missing, hidden, cut off, unclear, or only suggested.
A question with a condition gets "yes" only if the condition and the rest are both clearly true.

Prompt: "{prompt}"
Question: "{question}"

Answer with one word in lower case, yes or no."""


class T2ICoReBench(Benchmark):
    """
    [T2I-CoReBench](https://huggingface.co/papers/2509.03516), C-MR: 90 prompts with 1,545 checks of relations. Its official judge is
    Gemini 2.5 Flash; Qwen2.5-VL-72B and Qwen3-VL are its open ones, whose reading of answers `official` follows.

    The correct answer to every question is yes, so `fixed` also asks their twins, whose correct answer is no.
    """

    name = "t2i-corebench"
    title = "T2I-CoReBench (C-MR)"
    source = f"https://github.com/KwaiVGI/T2I-CoReBench/tree/{_COMMIT}"
    license = "Apache-2.0"
    paper = "https://huggingface.co/papers/2509.03516"
    files = (
        DataFile(
            _FILE,
            f"https://raw.githubusercontent.com/KwaiVGI/T2I-CoReBench/{_COMMIT}/data/{_FILE}",
            "e6c61d517d9c8ccb6925ef9e14affc3157bdfe7bb157fd8bb425454643a62375",
        ),
    )
    num_images = 4
    judges = frozenset({"vision"})

    def load(self, folder: Path) -> list[Item]:
        path = folder / _FILE
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from None
        if not isinstance(rows, dict) or not rows:
            raise ValueError(f"{path} is not a JSON object of prompts.")
        return [_make_item(f"{path}, row {id!r}", id, row) for id, row in rows.items()]

    def image_path(self, item: Item, number: int) -> str:
        return f"{_TASK}/{item.id}-{number}.png"

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        if protocol == "fixed":
            expected = images_of(items, self.num_images)
            return match_files({(item.id, number): self.image_path(item, number) for item, number in expected}, files)
        of_item: dict[str, dict[str, str]] = defaultdict(dict)
        for file in files:
            path = PurePosixPath(file)
            if str(path.parent) == _TASK and path.suffix.lower() == ".png":
                # of images with the same name up to the first dot, the last one's answers are kept
                of_item["-".join(path.name.split("-")[:3])][path.name.split(".")[0]] = file
        return {(item.id, number): file for item in items for number, file in enumerate(of_item[item.id].values())}

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        checks = item.data["questions"]
        asked = {str(i): question for i, question in enumerate(checks)}
        if protocol == "fixed":
            asked |= {f"{i}{_TWIN}": negate(question) for i, question in enumerate(checks)}
        return [
            Question(
                key,
                "text",
                _MESSAGE.replace("{prompt}", item.prompt).replace("{question}", question),
                {"max_tokens": 8192, "temperature": 0.0},
                is_usable=is_answer,
            )
            for key, question in asked.items()
        ]

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        scores = [
            score
            for item in items
            for number in evidence.numbers(item)
            if (score := image_score(official_answers(item, number, evidence))) is not None
        ]
        if not scores:
            raise OfficialError("no answer about any image can be read, so that the program divides by zero.")
        return {"mean_score": fmean(scores)}

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        values: dict[str, list[tuple[str, float]]] = defaultdict(list)
        shares: list[tuple[str, float]] = []
        for item in items:
            are_right, are_opposite = [], []
            for number in sorted({*range(self.num_images), *evidence.numbers(item)}):
                for i, question in enumerate(item.data["questions"]):
                    reply, twin = (read_answer(evidence.reply(item, number, f"{i}{end}")) for end in ("", _TWIN))
                    are_right.append(reply is True)
                    are_opposite.append(reply is True and twin is False)
                    shares += [(item.id, answer) for answer in (reply, twin) if answer is not None]
                    for part, words in SPATIAL_PARTS.items():
                        if words.search(question):
                            values[f"checks: {part}"].append((item.id, reply is True))
            # each image counts once, however many checks it has
            values[_TASK].append((item.id, fmean(are_right)))
            values[f"{_TASK}, right with twins"].append((item.id, fmean(are_opposite)))
        return [
            *(make_metric(name, values[name], is_headline=name == _TASK) for name in sorted(values)),
            make_metric("share of yes, questions and twins (0.5 without a bias)", shares),
        ]


def official_answers(item: Item, number: int, evidence: Evidence) -> list[int | None]:
    """Returns the answer to each check as the official program reads it: 1, 0, or `None` if neither yes nor no."""
    return [parse_reply(evidence.reply(item, number, str(i))) for i in range(len(item.data["questions"]))]


def parse_reply(reply: Any) -> int | None:
    """
    Returns 1 if "yes" occurs anywhere after the thoughts, as a word in lower case, else 0 if "no" does, else `None`.
    """
    words = reply.split("</think>\n\n")[-1] if isinstance(reply, str) else ""
    return 1 if re.search(r"\byes\b", words) else 0 if re.search(r"\bno\b", words) else None


def image_score(answers: Sequence[int | None]) -> float | None:
    """Mean of the answers that could be read; `None` if none could."""
    known = [answer for answer in answers if answer is not None]
    return fmean(known) if known else None


def _make_item(where: str, id: str, row: Any) -> Item:
    if not re.fullmatch(rf"{_TASK}-[^-/]+", id):
        raise ValueError(f"{where} must be named {_TASK}- and a number, such as {_TASK}-001.")
    prompt, checks = (row.get("Prompt"), row.get("Checklist")) if isinstance(row, Mapping) else (None, None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where} has no Prompt.")
    if not isinstance(checks, list) or not checks:
        raise ValueError(f"{where} has no Checklist.")
    questions = [check.get("question") if isinstance(check, Mapping) else None for check in checks]
    for number, question in enumerate(questions, start=1):
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where} has no question in check {number}.")
    return Item(id, prompt, {"questions": questions})
