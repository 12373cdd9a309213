"""GenEval: objects, counts, colors and positions, from an object detector's boxes."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...judges.geneval import (
    COUNTING_THRESHOLD,
    Detection,
    GenEvalResult,
    Requirement,
    Specification,
    geneval_name,
    judge,
    read_specification,
)
from ...store import write_atomically
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


_COMMIT = "af4902f24d3ca90ebbb446dd9891a59e0f82725f"
_BOXES = "boxes"
_SPATIAL_TAG = "position"


class GenEval(Benchmark):
    """
    GenEval: 553 prompts, each with what an image should show. A position is that of the most confident boxes, by
    [`~judges.geneval.relative_positions`].

    The folder of images has a folder for each prompt, named by its row. As the official programs write it, each also holds its row in
    `metadata.jsonl`. The official program judges by that; here it has to agree with the number of the folder.
    """

    name = "geneval"
    title = "GenEval"
    source = f"https://github.com/djghosh13/geneval/tree/{_COMMIT}"
    license = "MIT"
    paper = "https://huggingface.co/papers/2310.11513"
    files = (
        DataFile(
            "evaluation_metadata.jsonl",
            f"https://raw.githubusercontent.com/djghosh13/geneval/{_COMMIT}/prompts/evaluation_metadata.jsonl",
            "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        ),
    )
    num_images = 4
    judges = frozenset({"detector", "colors"})
    counting_threshold = COUNTING_THRESHOLD

    def load(self, folder: Path) -> list[Item]:
        path = folder / self.files[0].name
        return [_read_row(row, index, path) for index, row in enumerate(read_json_lines(path))]

    def image_path(self, item: Item, number: int) -> str:
        return f"{item.id}/samples/{number:04d}.png"

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        """
        Assigns files to images.

        The official program takes every file whose name begins with digits and `.png`, however many there are.
        """
        if protocol == "fixed":
            paths = {(item.id, n): self.image_path(item, n) for item, n in images_of(items, self.num_images)}
            return match_files(paths, files)
        ids = {int(item.id): item.id for item in items}
        of_item: dict[str, list[str]] = defaultdict(list)
        for file in files:
            found = re.fullmatch(r"(\d+)/samples/\d+\.png[^/]*", file)
            if found and int(found[1]) in ids:
                of_item[ids[int(found[1])]].append(file)
        return {(id, number): file for id, names in of_item.items() for number, file in enumerate(names)}

    def check_folder(self, folder: Path, items: Sequence[Item]) -> None:
        by_number = {int(item.id): item for item in items}
        for path in sorted(folder.glob("*/samples")):
            name = path.parent.name
            if (item := by_number.get(int(name)) if name.isdecimal() else None) is not None:
                _check_metadata(path.with_name("metadata.jsonl"), item)

    def finish(self, folder: Path, items: Sequence[Item]) -> None:
        for item in items:
            (folder / item.id / "samples").mkdir(parents=True, exist_ok=True)
            write_atomically(folder / item.id / "metadata.jsonl", json.dumps(item.data) + "\n")

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        specification = read_specification(item.data)
        colored = {required.class_name for required in specification.include if required.color is not None}
        options = {"classes": specification.class_names, "colors": sorted(colored)}
        return [Question(_BOXES, "boxes", options=options)]

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        by_tag: dict[str, list[bool]] = defaultdict(list)
        by_row: dict[str, list[bool]] = defaultdict(list)
        for item in items:
            specification = official_specification(item.data)
            for number in evidence.numbers(item):
                reply = evidence.reply(item, number, _BOXES)
                if reply is None:
                    raise OfficialError(f"The detector failed at {evidence.images[item.id, number]}.")
                is_right = judge_reply(specification, reply).correct
                by_tag[item.data["tag"]].append(is_right)
                by_row[json.dumps(item.data)].append(is_right)  # the program groups equal rows as one prompt
        if not by_tag:
            raise OfficialError("There are no images, of which it cannot make a summary.")
        tags = {tag: float(np.mean(values)) for tag, values in by_tag.items()}
        return {
            "overall": float(np.mean(list(tags.values()))),
            **tags,
            "correct images": float(np.mean(np.concatenate(list(by_tag.values())))),
            "correct prompts": float(np.mean([any(values) for values in by_row.values()])),
        }

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        images = images_of(items, self.num_images)
        ids = [item.id for item, _ in images]
        tags = [item.data["tag"] for item, _ in images]
        values = np.array([_is_right(item, number, evidence) for item, number in images], dtype=float)
        metrics = [Metric("overall", values, ids, tags, is_headline=True)]
        for tag in dict.fromkeys(tags):
            metrics.append(_part(tag, values, ids, [tag == other for other in tags], tag == _SPATIAL_TAG))
        relations = [_relations(item) for item, _ in images]
        for relation in sorted(set().union(*relations)):
            metrics.append(_part(f"position: {relation}", values, ids, [relation in some for some in relations]))
        by_item = values.reshape(-1, self.num_images)
        metrics.append(Metric("correct images", values, ids))
        metrics.append(Metric("correct prompts", by_item.max(axis=1), [item.id for item in items]))
        return metrics


def _read_row(row: Mapping[str, Any], index: int, path: Path) -> Item:
    where = f"{path}, row {index + 1}"
    for key in ("tag", "prompt"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{where} has the `{key}` {row.get(key)!r}, which should be a text.")
    try:
        read_specification(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Item(f"{index:05d}", row["prompt"], row, is_spatial=row["tag"] == _SPATIAL_TAG)


def _check_metadata(path: Path, item: Item) -> None:
    """Raises an error unless the file beside an item's images holds its row: folders may be numbered differently."""
    rows = read_json_lines(path) if path.is_file() else []
    if len(rows) != 1:
        raise ValueError(
            f"{path} should hold one line, the row of the prompt that the images were drawn for, and "
            f"{f'has {len(rows)}' if path.is_file() else 'is missing'}. Write the row of {item.prompt!r} into it, if the images are of that prompt."
        )
    if rows[0] != dict(item.data):
        shown = rows[0].get("prompt") if rows[0].get("prompt") != item.prompt else rows[0]
        raise ValueError(
            f"{path} says that the images were drawn for {shown!r}, but row {int(item.id)} of the benchmark, counted from 0, is "
            f"{item.prompt!r}. Name each folder by the row of its prompt, or name the file with these prompts' rows with --data."
        )


def official_specification(row: Mapping[str, Any]) -> Specification:
    """
    Reads a row as the official program does: unchecked, so that a position with an unknown name never holds.

    Raises:
        [`OfficialError`]: If an object has no class or no number.
    """
    try:
        include, exclude = (
            tuple(
                Requirement(geneval_name(entry["class"]), entry["count"], entry.get("color"), entry.get("position"))
                for entry in row.get(key) or ()
            )
            for key in ("include", "exclude")
        )
    except KeyError as error:
        raise OfficialError(f"There is no {error} in an object of {json.dumps(row)}.") from None
    return Specification(include, exclude, row["tag"])


def judge_reply(specification: Specification, reply: Mapping[str, Any]) -> GenEvalResult:
    """
    Judges an image by the boxes in it.

    Args:
        specification ([`~judges.geneval.Specification`]):
            What should be there.
        reply (`Mapping[str, Any]`):
            What the detector said: see [`~evaluation.benchmarks.base.Question`].

    Raises:
        [`OfficialError`]: If a position refers to what is named later, which no checked row does.
    """
    # of two equally confident boxes, the official program takes the later one first
    rows = reply["boxes"][::-1]
    detections = [Detection(row["label"], row["score"], tuple(row["box"])) for row in rows]
    colors = {found: row.get("color", "") for found, row in zip(detections, rows, strict=True)}
    try:
        return judge(specification, detections, colors.__getitem__)
    except IndexError:
        raise OfficialError(f"A position in {specification} refers to an object that is named later.") from None


def _is_right(item: Item, number: int, evidence: Evidence) -> bool:
    reply = evidence.reply(item, number, _BOXES)
    return reply is not None and judge_reply(read_specification(item.data), reply).correct


def _relations(item: Item) -> set[str]:
    include = read_specification(item.data).include
    return {required.position[0] for required in include if required.position is not None}


def _part(
    name: str, values: np.ndarray, ids: Sequence[str], is_chosen: Sequence[bool], is_headline: bool = False
) -> Metric:
    """Makes a metric of the chosen images."""
    chosen = [i for i, is_one in enumerate(is_chosen) if is_one]
    return Metric(name, values[chosen], [ids[i] for i in chosen], is_headline=is_headline)
