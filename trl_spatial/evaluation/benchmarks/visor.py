"""
VISOR: two objects, one to the left of, to the right of, above or below the other, from an object detector's boxes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...judges.geneval import geneval_name
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
    _read,
    images_of,
)
from .matching import match_files


THRESHOLD = 0.1  # boxes with a higher score count
# relation → (axis on which centers are compared, sign of the first coordinate minus the second)
RELATIONS = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}
_COMMIT = "b9e368b73422aad655cc7121648beaca5c94563b"
_BOXES = "boxes"


class ImageResult(NamedTuple):
    """Whether both objects were found in an image, and whether they are in the relation."""

    has_both: bool
    is_right: bool


class VISOR(Benchmark):
    """
    VISOR on its prompts SR2D: 25,280 with a relation of two things. Their file also has 6,400 without a relation,
    which are skipped, as in the official program.
    """

    name = "visor"
    title = "VISOR"
    source = f"https://github.com/microsoft/VISOR/tree/{_COMMIT}"
    license = "MIT"
    paper = "https://huggingface.co/papers/2212.10015"
    files = (
        DataFile(
            "text_spatial_rel_phrases.json",
            f"https://raw.githubusercontent.com/microsoft/VISOR/{_COMMIT}/text_spatial_rel_phrases.json",
            "ebe9b1199fd3c00aeb32f04b17d947319f40eb6edb87e97621277e5b61379048",
        ),
    )
    detector_threshold = THRESHOLD
    num_images = 4
    judges = frozenset({"detector"})

    def load(self, folder: Path) -> list[Item]:
        path = folder / self.files[0].name
        try:
            rows = json.loads(_read(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path} should hold a list of rows, not {type(rows).__name__}.")
        items = [_read_row(row, index, f"{path}, row {index + 1}") for index, row in enumerate(rows)]
        return [item for item in items if item is not None]

    def image_path(self, item: Item, number: int) -> str:
        return f"{item.id}_{number}.png"

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        """
        Assigns files to images.

        The official program takes every image of a prompt, however many there are.
        """
        if protocol == "fixed":
            paths = {(item.id, n): self.image_path(item, n) for item, n in images_of(items, self.num_images)}
            return match_files(paths, files)
        ids = {item.id for item in items}
        named = ((file, re.fullmatch(r"(0|[1-9]\d*)_(0|[1-9]\d*)\.png", file)) for file in files)
        return {(found[1], int(found[2])): file for file, found in named if found and found[1] in ids}

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        return [Question(_BOXES, "boxes", options={"classes": _objects(item.data)})]

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        num_right: list[int] = []  # number of correct images of each prompt that has any
        results: list[ImageResult] = []
        for item in items:
            of_item = [_official_result(item, number, evidence) for number in evidence.numbers(item)]
            results += of_item
            if of_item:
                num_right.append(sum(result.is_right for result in of_item))
        num_both = sum(result.has_both for result in results)
        if num_both == 0:
            found = "both objects were found in none" if results else "there are none"
            raise OfficialError(f"It divides by the number of images with both objects: {found}.")
        accuracy, conditional = 100 * num_both / len(results), 100 * sum(num_right) / num_both
        return {
            "OA": accuracy,
            "VISOR_uncond": accuracy * conditional / 100,
            "VISOR_cond": conditional,
            **{f"VISOR_{n}": 100 * float(np.mean(np.array(num_right) >= n)) for n in range(1, 5)},
        }

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        images = images_of(items, self.num_images)
        ids = np.array([item.id for item, _ in images], dtype=str)
        relations = np.array([item.data["rel_type"] for item, _ in images], dtype=str)
        results = [_fixed_result(item, number, evidence) for item, number in images]
        has_both, is_right = np.array(results, dtype=float).reshape(-1, 2).T  # each (num_images,)
        num_right = is_right.reshape(-1, self.num_images).sum(axis=1)

        def part(name: str, values: np.ndarray, is_chosen: np.ndarray, is_headline: bool = False) -> Metric:
            return Metric(name, values[is_chosen], ids[is_chosen].tolist(), is_headline=is_headline)

        everywhere, is_both = np.ones(len(ids), bool), has_both > 0
        return [
            part("VISOR_uncond", is_right, everywhere, is_headline=True),
            part("VISOR_cond", is_right, is_both, is_headline=True),
            part("OA", has_both, everywhere),
            *(Metric(f"VISOR_{n}", (num_right >= n).astype(float), [item.id for item in items]) for n in range(1, 5)),
            *(part(f"VISOR_uncond: {name}", is_right, relations == name) for name in RELATIONS),
            *(part(f"VISOR_cond: {name}", is_right, (relations == name) & is_both) for name in RELATIONS),
        ]


def _read_row(row: Any, index: int, where: str) -> Item | None:
    """Reads and checks a row; returns `None` if it has no relation of two things."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {row!r}, which should be a JSON object.")
    if row.get("unique_id") != index:  # images are named by it, but the official program counts rows
        raise ValueError(f"{where} has the `unique_id` {row.get('unique_id')!r}, which should be {index}.")
    relation, num_objects = row.get("rel_type"), row.get("num_objects")
    if num_objects == 1 or (num_objects == 2 and relation == "and"):
        return None
    if num_objects != 2 or relation not in RELATIONS:
        raise ValueError(
            f"{where} has the `rel_type` {relation!r} of {num_objects!r} objects, which should be one of {', '.join(RELATIONS)}, of 2."
        )
    for key in ("obj_1_attributes", "obj_2_attributes"):
        names = row.get(key)
        if not isinstance(names, list) or not names or not isinstance(names[0], str) or not names[0].strip():
            raise ValueError(f"{where} has the `{key}` {names!r}, which should be a list that begins with a name.")
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f"{where} has the `text` {row.get('text')!r}, which should be a prompt.")
    return Item(str(index), row["text"], row)


def _objects(row: Mapping[str, Any]) -> list[str]:
    return [row["obj_1_attributes"][0], row["obj_2_attributes"][0]]


def judge_boxes(boxes: Sequence[Mapping[str, Any]], objects: Sequence[str], relation: str) -> ImageResult:
    """
    Judges an image by the boxes in it: some box of the first object and some of the second are in the relation, by any distance.

    Args:
        boxes (`Sequence[Mapping[str, Any]]`):
            `label`, `score` and `box` of each, as in [`~evaluation.benchmarks.base.Question`].
        objects (`Sequence[str]` of length 2):
            Names of the two.
        relation (`str`):
            A key of `RELATIONS`. Any other never holds.

    Returns:
        `ImageResult`: The relation is not right unless both objects were found.
    """
    axis, sign = RELATIONS.get(relation, (0, 0))
    # multiplied by the relation's sign, so that the relation holds if some first coordinate exceeds some second one
    first, second = ([sign * center[axis] for center in find_centers(boxes, name)] for name in objects)
    has_both = bool(first and second)
    return ImageResult(has_both, has_both and max(first) > min(second))


def find_centers(boxes: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Returns the centers, in pixels, of the boxes of an object whose score counts."""
    return [
        ((row["box"][0] + row["box"][2]) / 2, (row["box"][1] + row["box"][3]) / 2)
        for row in boxes
        if row["score"] > THRESHOLD and geneval_name(row["label"]) == geneval_name(name)
    ]


def _judge_reply(item: Item, reply: Mapping[str, Any]) -> ImageResult:
    return judge_boxes(reply["boxes"], _objects(item.data), item.data["rel_type"])


def _official_result(item: Item, number: int, evidence: Evidence) -> ImageResult:
    reply = evidence.reply(item, number, _BOXES)
    if reply is None:
        raise OfficialError(f"The detector failed at {evidence.images[item.id, number]}.")
    return _judge_reply(item, reply)


def _fixed_result(item: Item, number: int, evidence: Evidence) -> ImageResult:
    reply = evidence.reply(item, number, _BOXES)
    return ImageResult(False, False) if reply is None else _judge_reply(item, reply)
