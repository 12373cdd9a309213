"""SpatialGenEval: ten multiple-choice questions about each image, each with five votes."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from .base import (
    Benchmark,
    DataFile,
    Evidence,
    ImageKey,
    Item,
    Metric,
    OfficialError,
    Protocol,
    Question,
    images_of,
    read_json_lines,
)
from .matching import match_files


COMMIT = "8b294b5fd0bca204fcfbf2cd74b75d9c359e40f6"
DIMENSIONS = (
    *("Object", "Attribute"),
    *("Position", "Orientation", "Layout", "Comparison", "Proximity", "Occlusion", "Motion", "Causal"),
)
NUM_BASIC = 2  # the first two dimensions are not spatial
NUM_VOTES, MIN_VOTES = 5, 4
_TRIES_PER_VOTE = 5
_NONE = "E"  # the option that the image shows none of the others: never correct, always last
_OPTION = re.compile(r"(?:[,;.]?\s+|,)([A-E]):\s")
_ANSWER = re.compile(
    r"[\W_]*(?:(?:question|q)?\s*\d{1,2}\s*[.):-][\W_]*)?(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?[\W_]*)?"
    r"([A-E])[*_\"'\])]*\s*(?:[-–—.:)]|$)",
    re.IGNORECASE,
)


def split_question(text: str) -> tuple[str, dict[str, str]]:
    """
    Splits a question of the benchmark into its text and its options.

    Returns:
        `tuple[str, dict]`: The question, and letter → option.

    Raises:
        `ValueError`: If it is not followed by options A, B, C, mostly D, and E.
    """
    question, _, rest = text.partition("Options:")
    before, *parts = _OPTION.split(f" {rest.strip()}")
    options = dict(zip(parts[::2], parts[1::2], strict=True))
    if before.strip() or "".join(parts[::2]) not in ("ABCDE", "ABCE"):
        raise ValueError(f"needs 'Options: A: …, B: …, C: …, D: …, E: None', and is {text!r}")
    return question.strip(), options


def official_letters(text: str | None, num_questions: int) -> list[str] | None:
    """
    Returns the first character of each non-empty line; `None` if the number of lines is not the number of questions.
    """
    lines = [line.strip() for line in (text or "").split("\n") if line.strip()]
    return [line[0] for line in lines] if lines and len(lines) == num_questions else None


def read_letters(text: str | None, num_questions: int) -> list[str] | None:
    """
    Returns the letter that each line of an answer begins with, after a number, Markdown or "Answer:". Lines without
    one are ignored; `None` if the number of letters is not the number of questions.
    """
    found = [match[1].upper() for line in (text or "").splitlines() if (match := _ANSWER.match(line))]
    return found if len(found) == num_questions else None


def select_options(votes: Sequence[str], min_votes: int = MIN_VOTES) -> tuple[list[str], bool]:
    """
    Counts votes on a question.

    Returns:
        `tuple[list[str], bool]`: The options with enough votes and `True`; if there are none, the most frequent ones and `False`.
    """
    counts = Counter(votes)
    accepted = [option for option, count in counts.items() if count >= min_votes]
    most = max(counts.values(), default=0)
    return accepted or [option for option, count in counts.items() if count == most], bool(accepted)


def check_votes(
    answers: Sequence[str | None], votes: Sequence[Sequence[str]], min_votes: int = MIN_VOTES
) -> list[bool]:
    """
    Returns which questions are answered correctly.

    Args:
        answers (`Sequence[str]`):
            The right option of each question; `None` if there is none.
        votes (`Sequence[Sequence[str]]`):
            The options that each vote names; one that is too short says nothing about the last questions.
        min_votes (`int`, *optional*, defaults to `4`):
            Votes that the right option needs.
    """
    hits = []
    for i, answer in enumerate(answers):
        options, is_accepted = select_options([vote[i] for vote in votes if len(vote) > i], min_votes)
        hits.append(is_accepted and answer in options)
    return hits


def shown_options(item: Item, vote: int) -> list[dict[str, str]]:
    """
    Returns the options of each question as one vote sees them, letter → option, "" for none of them. They are
    shuffled, and shifted by one place from vote to vote, so that no letter is correct in four votes of five.
    """
    shown = []
    for i, text in enumerate(item.data["questions"]):
        _, options = split_question(text)
        letters = [letter for letter in options if letter != _NONE]
        shuffled = sorted(letters, key=lambda letter: blake2b(f"{item.id}/{i}/{letter}".encode()).digest())
        shuffled = [shuffled[(place + vote) % len(letters)] for place in range(len(letters))]
        shown.append({letter: options[old] for letter, old in zip(letters, shuffled, strict=True)} | {_NONE: ""})
    return shown


class SpatialGenEval(Benchmark):
    """
    Five votes on ten questions with four options and "None". The questions are the benchmark's, the instructions
    around them ours. Two questions have a key that is none of their options. `fixed` leaves them out, and the data of
    their items list them as `faults`.
    """

    name = "spatialgeneval"
    title = "SpatialGenEval"
    source = f"https://github.com/AMAP-ML/SpatialGenEval/tree/{COMMIT}"
    license = "none named"
    paper = "https://huggingface.co/papers/2601.20354"
    files = (
        DataFile(
            "SpatialGenEval_T2I_Prompts.jsonl",
            f"https://raw.githubusercontent.com/AMAP-ML/SpatialGenEval/{COMMIT}/eval/SpatialGenEval_T2I_Prompts.jsonl",
            "af1d206f5773a754e903596734a85ac4c818db85570aa2e5d6b873b41e609280",
        ),
    )
    num_images = 1
    judges = frozenset({"vision"})

    def load(self, folder: Path) -> list[Item]:
        path = folder / self.files[0].name
        items: dict[str, Item] = {}
        for number, row in enumerate(read_json_lines(path), start=1):
            item = _read_row(row, f"{path}, row {number} (id {row.get('id')!r})")
            if item.id in items:
                raise ValueError(f"{path}, row {number} has the id {item.id} of an earlier row.")
            items[item.id] = item
        return list(items.values())

    def image_path(self, item: Item, number: int) -> str:
        return f"{int(item.id):06d}.png" if number == 0 else f"{int(item.id):06d}_{number}.png"

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        if protocol == "fixed":
            expected = images_of(items, self.num_images)
            return match_files({(item.id, number): self.image_path(item, number) for item, number in expected}, files)
        if self.num_images > 1:
            return {}
        # the official program takes all entries of the folder, sorted by name
        entries = sorted({file.partition("/")[0] for file in files})
        known = set(files)
        return {(item.id, 0): entry for item, entry in zip(items, entries, strict=False) if entry in known}

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        if not _is_complete(item):
            return []
        num_questions = len(item.data["questions"])
        if protocol == "official":
            return [
                _question(
                    "five votes",
                    item.data["questions"],
                    NUM_VOTES,
                    lambda reply: official_letters(reply, num_questions) is not None,
                )
            ]
        return [
            _question(
                f"vote {vote}",
                _shuffled_questions(item, vote),
                1,
                lambda reply: read_letters(reply, num_questions) is not None,
            )
            for vote in range(NUM_VOTES)
        ]

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        if self.num_images > 1:
            raise OfficialError("The official program takes one image for each prompt.")
        # the script goes through the folder once for each scene, past its end if images are missing
        if len({item.data["scene"] for item in items}) > 1 and (items[-1].id, 0) not in evidence.images:
            raise OfficialError("The official script stops if there are fewer images than prompts.")
        table = [hits for item in items if (hits := _official_hits(item, evidence)) is not None]
        if not table:
            raise OfficialError("The official program stops if no image has five usable answers.")
        columns = [round(sum(column) / len(table), 3) for column in zip(*table, strict=False)]
        numbers = {
            "avg_acc": sum(columns) / len(DIMENSIONS),
            "basic_acc": sum(columns[:NUM_BASIC]) / NUM_BASIC,
            "spatial_acc": sum(columns[NUM_BASIC:]) / (len(DIMENSIONS) - NUM_BASIC),
            **dict(zip(DIMENSIONS, columns, strict=False)),
        }
        return {name: float(f"{number:.3f}") for name, number in numbers.items()}

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        values: list[bool] = []
        chances: list[float] = []
        ids: list[str] = []
        dimensions: list[str] = []
        for item, number in images_of(items, self.num_images):
            keys = _right_options(item)
            hits = check_votes(keys, _fixed_votes(item, number, evidence))
            options = shown_options(item, 0)
            answerable = [i for i, key in enumerate(keys) if key is not None]
            values += [hits[i] for i in answerable]
            chances += [1 / (len(options[i]) - 1) for i in answerable]
            ids += [item.id] * len(answerable)
            dimensions += [DIMENSIONS[i] for i in answerable]
        hit, chance = np.array(values, float), np.array(chances)
        # 0 for a judge that picks an option at random, 1 for one that is always right
        corrected = (hit - chance) / (1 - chance)

        def metric(name: str, values: np.ndarray, chosen: Sequence[str], is_headline: bool = False) -> Metric:
            places = [i for i, dimension in enumerate(dimensions) if dimension in chosen]
            groups = [dimensions[i] for i in places]
            return Metric(name, values[places], [ids[i] for i in places], groups, is_headline)

        spatial = DIMENSIONS[NUM_BASIC:]
        return [
            metric("spatial_acc", hit, spatial, is_headline=True),
            metric("spatial_acc, corrected for chance", corrected, spatial, is_headline=True),
            metric("basic_acc", hit, DIMENSIONS[:NUM_BASIC]),
            metric("avg_acc", hit, DIMENSIONS),
            *(metric(dimension, hit, [dimension]) for dimension in DIMENSIONS),
        ]


def _question(key: str, questions: Sequence[str], num_replies: int, is_usable: Callable[[Any], bool]) -> Question:
    lines = "\n".join(question.strip() for question in questions)
    text = f"""Here are {len(questions)} multiple-choice questions about this image. Answer them by what the image shows, not by what you know or expect.

{lines}

Write {len(questions)} lines and nothing else, one for each question, in the order of the questions. Begin a line with the letter of the right option and a colon, and say on the same line why. If the image does not tell, the right option is E."""
    return Question(
        key=key,
        kind="text",
        text=text,
        options={"max_tokens": 2048, "temperature": 1.0},
        num_replies=num_replies,
        max_tries=num_replies * _TRIES_PER_VOTE,
        is_usable=is_usable,
    )


def _shuffled_questions(item: Item, vote: int) -> list[str]:
    lines = []
    for text, shown in zip(item.data["questions"], shown_options(item, vote), strict=True):
        question, options = split_question(text)
        choices = ", ".join(f"{letter}: {option or options[_NONE]}" for letter, option in shown.items())
        lines.append(f"{question} Options: {choices}")
    return lines


def _is_complete(item: Item) -> bool:
    """Whether the official program asks about the item."""
    return bool(item.prompt and item.data["questions"] and item.data["answers"])


def _official_hits(item: Item, evidence: Evidence) -> list[bool] | None:
    """Returns which questions are answered correctly, or `None` if the official program skips the item."""
    replies = evidence.replies.get((item.id, 0, "five votes"), ()) if _is_complete(item) else ()
    read = [official_letters(reply, len(item.data["questions"])) for reply in replies]
    votes = [letters for letters in read if letters is not None]
    return check_votes(item.data["answers"], votes) if len(votes) == NUM_VOTES else None


def _right_options(item: Item) -> list[str | None]:
    """
    Returns the text of the correct options, because in some questions two options are equal; `None` if the keyed
    option does not exist.
    """
    return [
        split_question(text)[1].get(answer)
        for text, answer in zip(item.data["questions"], item.data["answers"], strict=True)
    ]


def _fixed_votes(item: Item, number: int, evidence: Evidence) -> list[list[str]]:
    votes = []
    for vote in range(NUM_VOTES):
        letters = read_letters(evidence.reply(item, number, f"vote {vote}"), len(item.data["questions"]))
        if letters is not None:
            shown = shown_options(item, vote)
            votes.append([options.get(letter, "") for options, letter in zip(shown, letters, strict=True)])
    return votes


def _read_row(row: Mapping[str, Any], place: str) -> Item:
    """Reads and checks a row of the file; `place` identifies it in errors."""
    for key in ("id", "scene", "prompt"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{place}: {key!r} is {row.get(key)!r}, not a text.")
    if not row["id"].isdecimal():
        raise ValueError(f"{place}: 'id' must be a number in digits, such as '000001'.")
    if row.get("question_type") != list(DIMENSIONS):
        raise ValueError(f"{place}: 'question_type' is {row.get('question_type')!r}, not {list(DIMENSIONS)}.")
    for key in ("questions", "answers"):
        texts = row.get(key)
        if not isinstance(texts, list) or len(texts) != len(DIMENSIONS) or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{place}: {key!r} must be a list of {len(DIMENSIONS)} texts.")
    faults = []
    for number, (question, answer) in enumerate(zip(row["questions"], row["answers"], strict=True), start=1):
        try:
            _, options = split_question(question)
        except ValueError as error:
            raise ValueError(f"{place}: question {number} {error}.") from None
        if answer not in ("A", "B", "C", "D"):
            raise ValueError(f"{place}: the answer {answer!r} to question {number} is none of A, B, C and D.")
        if answer not in options:
            faults.append(f"question {number} has no option {answer}, which is its answer")
    return Item(row["id"], row["prompt"], {**row, "faults": faults} if faults else dict(row))
