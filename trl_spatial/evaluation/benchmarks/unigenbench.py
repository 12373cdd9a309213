"""UniGenBench++: the test points of a prompt, judged in one call per image."""

import ast
import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

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
)
from .matching import match_files


COMMIT = "49d0bcebb0b9418d975d3957c2fee10f34811d14"
LAYOUT = "Entity Layout"
CONFIRMED = f"{LAYOUT}, also when asked what is not met"
# The official program stops at any other test point, even at different capitalization.
TEST_POINTS = frozenset(
    {
        *(f"Relationship - {kind}" for kind in ("Comparison", "Composition", "Inclusion", "Similarity")),
        *(f"Compound - {kind}" for kind in ("Imagination", "Feature Matching")),
        *(f"Attribute - {kind}" for kind in ("Size", "Expression", "Quantity", "Material", "Color", "Shape")),
        *(f"{LAYOUT} - {kind}" for kind in ("Two-Dimensional Space", "Three-Dimensional Space")),
        *(f"Action - {kind} (Character/Anthropomorphic)" for kind in ("Full-body", "Hand")),
        *(f"Action - {kind}" for kind in ("Animal", "Contact Interaction", "Non-contact Interaction", "State")),
        *(f"Grammar - {kind}" for kind in ("Negation", "Pronoun Reference", "Consistency")),
        *("World Knowledge", "Style", "Text Generation", "Logical Reasoning"),
    }
)
# (hits, number of judgments)
Tally = tuple[int, int]


def parse_reply(text: str | None, num_points: int) -> tuple[Any, Any] | None:
    """
    Reads a reply as the official program does: Python literals in the first `<analysis>` and the first `<score>`, both as long
    as there are test points. The scores may still not be a list.

    Args:
        text (`str`, *optional*):
            The reply; `None` if the call failed.
        num_points (`int`):
            Number of test points.

    Returns:
        `tuple`: analysis and scores; or `None` where the official program asks again.

    Raises:
        [`OfficialError`]: If it would stop.
    """
    analysis, scores = (re.search(f"<{tag}>(.*?)</{tag}>", text or "", re.DOTALL) for tag in ("analysis", "score"))
    if analysis is None or scores is None:
        return None
    try:
        read = ast.literal_eval(analysis[1].strip()), ast.literal_eval(scores[1].strip())
        is_complete = len(read[0]) == num_points and len(read[1]) == num_points
    except (ValueError, SyntaxError):
        return None
    except (TypeError, MemoryError, RecursionError) as error:
        raise OfficialError(f"The official program stops at the reply {text!r}: {error}.") from None
    return read if is_complete else None


def official_scores(replies: Iterable[str | None], num_points: int) -> list[Any] | None:
    """
    Returns the scores of an image in the official table, from the first reply that parses. It is stored as JSON but
    read as Python, so a reply with `True`, `False` or `None` in it is lost.

    Returns:
        `list` of length `num_points`; or `None` if the image is left out of the table.

    Raises:
        [`OfficialError`]: If the official program would stop.
    """
    parsed = next((parsed for text in replies if (parsed := parse_reply(text, num_points)) is not None), None)
    if parsed is None:
        return None
    try:
        stored = json.dumps(parsed, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OfficialError(f"The official program cannot store the reply {parsed!r}: {error}.") from None
    try:
        scores = ast.literal_eval(stored)[1]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return scores if isinstance(scores, list) else None


def fixed_scores(text: str | None, num_points: int) -> list[bool] | None:
    """Whether each test point is met, `True` counting as 1; `None` if a reply is unusable."""
    try:
        parsed = parse_reply(text, num_points)
    except OfficialError:
        return None
    if parsed is None or not isinstance(parsed[1], (list, tuple)):
        return None
    return [score == 1 for score in parsed[1]]


def tally(judged: Iterable[tuple[Sequence[str], Sequence[Any]]]) -> tuple[dict[str, Tally], dict[str, Tally]]:
    """
    Adds up scores as the official program does.

    Args:
        judged (iterable of `tuple`):
            Test points and scores of each image.

    Returns:
        `tuple[dict, dict]`: Hits and number of judgments of the primary dimensions, whose names keep the space before the dash, and
        of the test points.
    """
    primary: dict[str, Tally] = {}
    points: dict[str, Tally] = {}
    for names, scores in judged:
        for name, score in zip(names, scores, strict=True):
            for table, key in ((primary, name.split("-", 1)[0]), (points, name)):
                hits, total = table.get(key, (0, 0))
                table[key] = (hits + (score == 1), total + 1)
    return primary, points


def primary_dimension(point: str) -> str:
    """Returns `"Entity Layout"` for `"Entity Layout - Two-Dimensional Space"`, and a name without a dash unchanged."""
    return point.split("-", 1)[0].strip()


class _UniGenBench(Benchmark):
    """
    One call per image judges all test points with 0 or 1. The question is in our words, not the official ones. `fixed`
    asks about the layout twice, what is met and what is not, because the correct answer is always "met".
    """

    source = f"https://github.com/CodeGoat24/UniGenBench/tree/{COMMIT}"
    license = "CC BY 4.0"
    paper = "https://huggingface.co/papers/2510.18701"
    num_images = 4
    judges = frozenset({"vision"})

    def load(self, folder: Path) -> list[Item]:
        path = folder / self.files[0].name
        columns = ["index", "prompt_en", "sub_dims_en"]
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from None
        if reader.fieldnames != columns:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {columns}.")
        items: dict[str, Item] = {}
        for number, row in enumerate(rows, start=1):
            item = _read_row(row, f"{path}, row {number} (index {row['index']!r})")
            if item.id in items:
                raise ValueError(f"{path}, row {number} has the index {item.id} of an earlier row.")
            items[item.id] = item
        return list(items.values())

    def image_path(self, item: Item, number: int) -> str:
        return f"{item.id}_{number}.png"

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        if protocol == "official":
            return super().assign(items, files, protocol)
        paths = {
            (item.id, number): self.image_path(item, number) for item, number in images_of(items, self.num_images)
        }
        return match_files(paths, files)

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        points = _described_points(item)
        asked = [_question("test points", item.prompt, points, "it is met")]
        layout = [(point, description) for point, description in points if primary_dimension(point) == LAYOUT]
        if protocol == "fixed" and layout:
            asked.append(_question("layout, negated", item.prompt, layout, "it is not met"))
        return asked

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        self._check_official(items, evidence)
        judged = []
        for item, number in images_of(items, self.num_images):
            points = item.data["Testpoints"]
            scores = official_scores(evidence.replies.get((item.id, number, "test points"), ()), len(points))
            if scores is not None:
                judged.append((points, scores))
        primary, points = (
            {name: round(hits / total, 4) for name, (hits, total) in table.items()} for table in tally(judged)
        )
        # not printed by the program; the leaderboard shows the mean of the primary dimensions
        overall = float(np.mean(list(primary.values()))) if primary else None
        return {"overall": overall, **primary, **points}

    def _check_official(self, items: Sequence[Item], evidence: Evidence) -> None:
        for item in items:
            if "fault" in item.data:
                raise OfficialError(
                    f"The official program stops at item {item.id}: {item.data['fault']}. Give it a repaired file with --data."
                )
            for point in item.data["Testpoints"]:
                if point not in TEST_POINTS:
                    raise OfficialError(
                        f"The official program stops at the unknown test point {point!r} of item {item.id}."
                    )
        for item, number in images_of(items, self.num_images):
            if (item.id, number) not in evidence.images:
                raise OfficialError(f"The official program stops without the image {self.image_path(item, number)!r}.")

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        hits: list[bool] = []
        ids: list[str] = []
        points: list[str] = []
        confirmed: list[bool] = []
        for item, number in images_of(items, self.num_images):
            names = [point.strip() for point in item.data["Testpoints"]]
            is_met = fixed_scores(evidence.reply(item, number, "test points"), len(names)) or [False] * len(names)
            layout = [met for name, met in zip(names, is_met, strict=True) if primary_dimension(name) == LAYOUT]
            is_unmet = fixed_scores(evidence.reply(item, number, "layout, negated"), len(layout)) or [True] * len(
                layout
            )
            confirmed += [met and not unmet for met, unmet in zip(layout, is_unmet, strict=True)]
            hits += is_met
            ids += [item.id] * len(names)
            points += names
        values, dimensions = np.array(hits, float), [primary_dimension(point) for point in points]
        metrics = [Metric("overall", values, ids, dimensions, is_headline=True)]
        for name in sorted({*dimensions, *points}):
            chosen = [i for i, pair in enumerate(zip(dimensions, points, strict=True)) if name in pair]
            chosen_ids = [ids[i] for i in chosen]
            metrics.append(Metric(name, values[chosen], chosen_ids, is_headline=name == LAYOUT))
            if name == LAYOUT:
                # a judge that always says 1, or always 0, scores 0 here
                metrics.append(Metric(CONFIRMED, np.array(confirmed, float), chosen_ids, is_headline=True))
        return metrics


class UniGenBenchShort(_UniGenBench):
    """UniGenBench++ with short English prompts."""

    name = "unigenbench-short"
    title = "UniGenBench++ (short)"
    files = (
        DataFile(
            "test_prompts_en.csv",
            f"https://raw.githubusercontent.com/CodeGoat24/UniGenBench/{COMMIT}/data/test_prompts_en.csv",
            "f82e8ce854985ef963378eaaf8ce12f2e3a57dd6f53e1aea84a61fbeadfe4459",
        ),
    )


class UniGenBenchLong(_UniGenBench):
    """UniGenBench++ with long English prompts. A comma is missing in row 509, at which the official program stops."""

    name = "unigenbench-long"
    title = "UniGenBench++ (long)"
    files = (
        DataFile(
            "test_prompts_en_long.csv",
            f"https://raw.githubusercontent.com/CodeGoat24/UniGenBench/{COMMIT}/data/test_prompts_en_long.csv",
            "5d2c3d642cc4923504b662ad15b425c2d161a137884701881e00c2691a697253",
        ),
    )


def _described_points(item: Item) -> list[tuple[str, str]]:
    return list(zip(item.data["Testpoints"], item.data["Testpoint Description"], strict=True))


def _question(key: str, prompt: str, points: Sequence[tuple[str, str]], one_means: str) -> Question:
    requirements = "\n".join(
        f"{number}. {point}: {description}" for number, (point, description) in enumerate(points, start=1)
    )
    text = f"""This image was made for the prompt "{prompt}".

Look at the image, and decide for each of these {len(points)} points whether it shows what the prompt asks for:
{requirements}

Go by what can be seen. If you cannot see that a point is met, it is not met.
Reply with two lists of exactly {len(points)} entries each, in the order of the points, and nothing else:
<analysis>["what you see about point 1", ...]</analysis>
<score>[for point 1: 1 if {one_means} and 0 otherwise, ...]</score>"""
    return Question(
        key=key,
        kind="text",
        text=text,
        options={"max_tokens": 4096, "temperature": 1.0},
        max_tries=11,
        is_usable=lambda reply: fixed_scores(reply, len(points)) is not None,
    )


def _read_row(row: Mapping[str, Any], place: str) -> Item:
    """Reads and checks a row of the table; `place` identifies it in errors."""
    if not all(isinstance(value, str) for value in row.values()) or not row["prompt_en"].strip():
        raise ValueError(f"{place} needs exactly an index, a prompt and its test points.")
    if not row["index"].isdecimal():
        raise ValueError(f"{place}: the index must be a whole number.")
    data = _read_test_points(row["sub_dims_en"], place)
    is_spatial = any(primary_dimension(point) == LAYOUT for point in data["Testpoints"])
    return Item(str(int(row["index"])), row["prompt_en"], data, is_spatial)


def _read_test_points(text: str, place: str) -> dict[str, Any]:
    """Reads the JSON of a row, repairing one missing comma; if it did, the entry `"fault"` says so."""
    fault = {}
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        # between two adjacent values, only a comma can be missing
        try:
            data = json.loads(f"{text[: error.pos]},{text[error.pos :]}")
        except json.JSONDecodeError:
            raise ValueError(f"{place}: sub_dims_en is not JSON: {error}.") from None
        fault = {"fault": f"sub_dims_en is not JSON ({error}), and was read with a comma there"}
    points, descriptions = (
        data.get(key) if isinstance(data, dict) else None for key in ("Testpoints", "Testpoint Description")
    )
    if not _are_texts(points) or not _are_texts(descriptions):
        raise ValueError(f"{place}: sub_dims_en needs lists of texts, 'Testpoints' and 'Testpoint Description'.")
    if len(points) != len(descriptions):
        raise ValueError(f"{place} has {len(points)} test points and {len(descriptions)} descriptions.")
    return {**data, **fault}


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
