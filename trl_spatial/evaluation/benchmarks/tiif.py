"""TIIF-Bench: short and long prompts of 39 types, and a list of yes/no questions about each image."""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np

from .base import Benchmark, DataFile, Evidence, ImageKey, Item, Metric, Protocol, Question, read_json_lines
from .layouts import find_model
from .matching import match_files
from .tiif_files import FILES
from .yesno import SPATIAL_PARTS, make_metric, negate, read_answer


_COMMIT = "3aae7504d2546516eaec2fea82fde9ae445dfea3"
_SETS = ("testmini", "test")
_LENGTHS = {"short": "short_description", "long": "long_description"}
_SUFFIXES = (".png", ".jpg", ".jpeg", "webp")
_MOST_TRIES = 10  # the official program retries without limit
_REASONING = ("numeracy", "comparison", "differentiation", "negation")
# group → types, as in the official tables
BASIC = {
    "Attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
    "Relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
    "Reasoning": _REASONING,
}
ADVANCED = {
    "Attribute+Relation": (
        *("action+color", "action+texture"),
        *(f"{attribute}+{space}" for attribute in ("color", "shape", "texture") for space in ("2d", "3d")),
    ),
    "Attribute+Reasoning": tuple(f"{kind}+{attribute}" for kind in _REASONING for attribute in ("color", "texture")),
    "Relation+Reasoning": tuple(f"{kind}+{space}" for kind in _REASONING for space in ("2d", "3d")),
    "Text Generation": ("text",),
    "Style Control": ("style",),
}
REAL = {"Complex": ("real_world",)}
GROUPS = BASIC | ADVANCED | REAL
_HEADLINE = "Relation"
# the official program draws one of three messages with the same meaning
TEMPLATES = (
    """Look closely at the image, and answer these yes/no questions about what it shows:

##QUESTIONS##

Write one line for each question, in the order of the questions. Each line begins with "yes" or "no", and then gives the reason. Write as many lines as there are questions, and nothing else.""",
    """Here are yes/no questions about the image. Study it closely, then answer each of them:

##QUESTIONS##

Your answers stand in the order of the questions, each on a line of its own that begins with "yes" or "no" and goes on with the reason. One question needs one line. Add nothing to the answers, and make sure that there are as many as questions.""",
    """Examine the image with care and answer these yes/no questions:

##QUESTIONS##

1. A line for each answer: "yes" or "no", then a short reason.
2. The answers keep the order of the questions.
3. As many answers as questions, and no other words.""",
)
_NUMBERING = re.compile(r"[\W_]*(?:question\s*|q)?\d+\s*[.):]", re.IGNORECASE)


class TIIF(Benchmark):
    """
    [TIIF-Bench](https://huggingface.co/papers/2506.02161), by default its part testmini. All questions about an image are asked in one
    message. Its official judges are GPT-4o and Qwen2.5-VL-72B.

    For spatial types, `fixed` also asks the twins of the questions about relations, which have the opposite answer.
    """

    name = "tiif"
    title = "TIIF-Bench"
    source = f"https://github.com/A113N-W3I/TIIF-Bench/tree/{_COMMIT}"
    license = "none stated"
    paper = "https://huggingface.co/papers/2506.02161"
    files = tuple(
        DataFile(name, f"https://raw.githubusercontent.com/A113N-W3I/TIIF-Bench/{_COMMIT}/data/{quote(name)}", sha256)
        for name, sha256 in FILES.items()
    )
    num_images = 1
    judges = frozenset({"vision"})

    def load(self, folder: Path) -> list[Item]:
        """See [`Benchmark.load`]. The folder holds `testmini_prompts` and `testmini_eval_prompts`, or those of `test`."""
        found = [name for name in _SETS if (folder / f"{name}_prompts").is_dir()]
        if len(found) != 1:
            wrong = "both sets of prompts" if found else "no folder testmini_prompts or test_prompts"
            raise ValueError(f"{folder} has {wrong}. It must have one of them, with its folder of questions.")
        prompts = _list_files(folder / f"{found[0]}_prompts", "_prompts.jsonl")
        questions = _list_files(folder / f"{found[0]}_eval_prompts", "_eval_prompts.jsonl")
        if lonely := sorted(prompts.keys() ^ questions.keys()):
            raise ValueError(
                f"{folder} has only one of the two files, prompts and questions, for {', '.join(lonely)}."
            )
        items: list[Item] = []
        for name in sorted(prompts):
            items += _load_type(prompts[name], questions[name])
        return items

    def image_path(self, item: Item, number: int) -> str:
        return _path(item, find_model((), ()))

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        model = find_model(files, {item.data["type"] for item in items})
        paths = {(item.id, 0): _path(item, model) for item in items}
        if protocol == "fixed":
            return match_files(paths, files)
        similar: dict[str, list[str]] = defaultdict(list)
        for file in files:
            path = PurePosixPath(file)
            if path.name.lower().endswith(_SUFFIXES):
                similar[str(path.parent / path.name.split(".")[0])].append(file)
        candidates = {key: similar[path.removesuffix(".png")] for key, path in paths.items()}
        return {key: files_[0] for key, files_ in candidates.items() if files_}

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        asked = item.data["questions"]
        if protocol == "official":
            template = choose_template(random.Random(item.id))
            return [
                Question(
                    "official",
                    "text",
                    fill_template(template, asked),
                    {"temperature": 1.0},
                    max_tries=_MOST_TRIES,
                    is_usable=lambda reply: parse_reply(reply, len(asked)) is not None,
                )
            ]
        twins = [negate(asked[i]) for i in relation_questions(item)]
        return [
            Question(
                key,
                "text",
                fill_template(TEMPLATES[0], wanted),
                {"temperature": 0.0},
                is_usable=_can_read(len(wanted)),
            )
            for key, wanted in (("fixed", asked), ("negated", twins))
            if wanted
        ]

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        counts = count_correct(items, evidence)
        accuracies = {column: correct / total if total else np.nan for column, (correct, total) in counts.items()}
        rounded = {column: float(f"{accuracy:.4f}") for column, accuracy in accuracies.items()}
        numbers = rounded | {"Mean_Accuracy": float(f"{_mean(accuracies.values()):.4f}")}
        nine: dict[str, list[float]] = {length: [] for length in _LENGTHS}
        for prefix, groups in (("Basic", BASIC), ("Advanced", ADVANCED), ("Real", REAL)):
            whole = "Real_World" if prefix == "Real" else prefix
            types = {f"{whole}_Following_Overall - Overall": sum(groups.values(), ())}
            types |= {f"{prefix}_{group} - {group}": members for group, members in groups.items()}
            for name, members in types.items():
                for length in _LENGTHS:
                    score = _mean(rounded.get(f"{member}|{length}", np.nan) for member in members)
                    numbers[f"{name}|{length}"] = float(np.round(score, 4))
                    if not name.endswith("- Overall"):
                        nine[length].append(score)
        numbers |= {
            f"Overall average score of 9 sub-attributes|{k}": float(np.round(_mean(v), 4)) for k, v in nine.items()
        }
        return {name: None if np.isnan(number) else number for name, number in numbers.items()}

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        group_of = {type: group for group, types in GROUPS.items() for type in types}
        values: dict[str, list[tuple[str, float]]] = defaultdict(list)
        kinds: dict[str, list[str]] = defaultdict(list)
        for item in items:
            type, length, keys = item.data["type"], item.data["length"], item.data["answers"]
            found = _read_all(item, evidence, "fixed", len(item.data["questions"]))
            are_right = [
                i < len(found) and found[i] is not None and found[i] == (key == "yes") for i, key in enumerate(keys)
            ]
            for is_right in are_right:
                values[f"{type}, {length}"].append((item.id, is_right))
                if type in group_of:
                    values[f"{group_of[type]}, {length}"].append((item.id, is_right))
                    kinds[f"{group_of[type]}, {length}"].append(type)
                    values[f"overall, {length}"].append((item.id, is_right))
                    kinds[f"overall, {length}"].append(group_of[type])
            _add_relations(item, found, are_right, evidence, values)
        headlines = {f"{_HEADLINE}, {length}" for length in _LENGTHS}
        names = sorted(values, key=lambda name: (name not in headlines, name.split(", ")[0] not in GROUPS, name))
        return [
            Metric(metric.name, metric.values, metric.items, kinds.get(name), is_headline=name in headlines)
            for name in names
            for metric in [make_metric(name, values[name])]
        ]


def choose_template(generator: random.Random) -> str:
    """Draws one of the messages, as the official program does."""
    return generator.choice(TEMPLATES)


def fill_template(template: str, questions: Sequence[str]) -> str:
    """Fills a message with its questions, one per line."""
    return template.replace("##QUESTIONS##", "\n".join(question.strip() for question in questions))


def parse_reply(reply: Any, num_questions: int) -> list[str] | None:
    """
    Returns the answers in a reply, as the official program finds them: lines that begin with "yes" or "no". `None` if
    their number is not that of the questions.
    """
    if not isinstance(reply, str):
        return None
    found = [re.match(r"(yes|no)\b", line.strip(), re.IGNORECASE) for line in reply.strip().split("\n")]
    answers = [match[1].lower() for match in found if match]
    return answers if len(answers) == num_questions else None


def read_lines(reply: Any, num_questions: int) -> list[bool] | None:
    """As [`parse_reply`], but lines may be numbered, bold, quoted or items of a list; `True` is yes."""
    if not isinstance(reply, str):
        return None
    lines = [_NUMBERING.sub("", line.strip(), count=1) for line in reply.rpartition("</think>")[2].split("\n")]
    answers = [answer for answer in map(read_answer, lines) if answer is not None]
    return answers if len(answers) == num_questions else None


def count_correct(items: Sequence[Item], evidence: Evidence) -> dict[str, tuple[int, int]]:
    """
    Returns the counts of the official tables: `"TYPE|LENGTH"` → (correct answers, questions). Missing images and
    unreadable replies do not count; answers are paired with the key up to the length of the shorter one.
    """
    counts: dict[str, tuple[int, int]] = {}
    for item in items:
        column = f"{item.data['type']}|{item.data['length']}"
        correct, total = counts.setdefault(column, (0, 0))
        reply = evidence.reply(item, 0, "official") if (item.id, 0) in evidence.images else None
        pairs = list(zip(item.data["answers"], parse_reply(reply, len(item.data["questions"])) or (), strict=False))
        counts[column] = correct + sum(key == answer for key, answer in pairs), total + len(pairs)
    return counts


def relation_questions(item: Item) -> list[int]:
    """Finds the questions of a spatial item that are about positions. Most others ask whether something exists."""
    if not item.is_spatial:
        return []
    return [i for i, question in enumerate(item.data["questions"]) if SPATIAL_PARTS["spatial"].search(question)]


def _add_relations(
    item: Item,
    found: Sequence[bool | None],
    are_right: Sequence[bool],
    evidence: Evidence,
    values: dict[str, list[tuple[str, float]]],
) -> None:
    """Adds the results of the questions about relations, and of their twins, to `values`."""
    chosen = relation_questions(item)
    twins = _read_all(item, evidence, "negated", len(chosen))
    for i, twin in zip(chosen, twins, strict=True):
        is_opposite = twin is not None and found[i] is not None and twin != found[i]
        values["questions about relations"].append((item.id, are_right[i]))
        values["questions about relations, right with their twins"].append((item.id, are_right[i] and is_opposite))
        for part in ("front and behind", "orientation"):
            if SPATIAL_PARTS[part].search(item.data["questions"][i]):
                values[f"questions about {part}"].append((item.id, are_right[i]))
        for answer in (found[i], twin):
            if answer is not None:
                values["share of yes, questions and twins (0.5 without a bias)"].append((item.id, answer))


def _read_all(item: Item, evidence: Evidence, key: str, num_questions: int) -> Sequence[bool | None]:
    return read_lines(evidence.reply(item, 0, key), num_questions) or [None] * num_questions


def _can_read(num_questions: int) -> Callable[[Any], bool]:
    return lambda reply: read_lines(reply, num_questions) is not None


def _mean(values: Any) -> float:
    """Returns the mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _path(item: Item, model: str) -> str:
    return f"{item.data['type']}/{model}/{_LENGTHS[item.data['length']]}/{item.data['index']}.png"


def _list_files(folder: Path, ending: str) -> dict[str, Path]:
    """Returns the files of a folder by their names without `ending`."""
    return {path.name.removesuffix(ending): path for path in folder.glob(f"*{ending}")}


def _load_type(prompts: Path, questions: Path) -> list[Item]:
    """Loads the items of one type."""
    prompt_rows, question_rows = read_json_lines(prompts), read_json_lines(questions)
    if not prompt_rows or len(prompt_rows) != len(question_rows):
        raise ValueError(
            f"{prompts} has {len(prompt_rows)} rows and {questions} has {len(question_rows)}. They must have the same number, and at least one."
        )
    type = prompt_rows[0].get("type")
    for path, rows in ((prompts, prompt_rows), (questions, question_rows)):
        for number, row in enumerate(rows, start=1):
            if not isinstance(type, str) or not type or row.get("type") != type:
                raise ValueError(f"{path}, row {number} has the type {row.get('type')!r}, and the first row {type!r}.")
    items = []
    is_spatial = re.search(r"(?:^|\+)[23]d", type) is not None  # type: ignore[arg-type]
    for length, column in _LENGTHS.items():
        for index, (row, asked) in enumerate(zip(prompt_rows, question_rows, strict=True)):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise ValueError(f"{prompts}, row {index + 1} has no {column}.")
            texts, answers = _read_questions(asked, f"{questions}, row {index + 1}")
            data = {"type": type, "length": length, "index": index, "questions": texts, "answers": answers}
            items.append(Item(f"{type}/{length}/{index}", row[column], data, is_spatial))
    return items


def _read_questions(row: dict[str, Any], where: str) -> tuple[list[str], list[str]]:
    texts, answers = row.get("yn_question_list"), row.get("yn_answer_list")
    for name, value in (("yn_question_list", texts), ("yn_answer_list", answers)):
        if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"{where} has {value!r} for {name}, which must be a list of texts.")
    assert isinstance(texts, list) and isinstance(answers, list)
    answers = [answer.strip().lower() for answer in answers]
    if len(texts) != len(answers) or not set(answers) <= {"yes", "no"}:
        raise ValueError(f"{where} has {len(texts)} questions and the answers {answers}: each needs its yes or no.")
    return texts, answers
