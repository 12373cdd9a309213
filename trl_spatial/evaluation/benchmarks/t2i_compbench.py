"""T2I-CompBench++: two objects in a relation, in the image plane or in depth, from an object detector's boxes."""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
    _read,
    images_of,
)
from .numbering import number_images
from .t2i_compbench_rules import (
    OFFICIAL_PHRASES_2D,
    OFFICIAL_PHRASES_3D,
    PHRASES_2D,
    PHRASES_3D,
    RelationResult,
    find_fixed,
    find_official_2d,
    find_official_3d,
    fixed_relation,
    official_relation_score,
    official_size,
    read_prompt,
)


_COMMIT = "1b7094991a57f3c22abdd4f6e8ba6c1a15517073"
_DATA = f"https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/{_COMMIT}/examples/dataset/"
_PEOPLE = ("girl", "boy", "man", "woman")
# nouns that no label of the official detectors equals (2D) or contains (3D), so that they are never found
_UNLABELED_2D = frozenset({"bag", "computer", "cow", "mouse", "painting", "phone", "sofa", "table", "wallet"})
_UNLABELED_3D = frozenset({"painting", "wallet"})


def _check_official_name(name: str) -> None:
    """Raises an error if the official program cannot read a number from the file name."""
    try:
        int(name.split("_")[1].split(".")[0])
    except (IndexError, ValueError):
        raise OfficialError(
            f"{name!r} has no number after its first '_', such as 'a cat near a dog_000000.png' has."
        ) from None


def _official_names(item: Item) -> list[str]:
    """Returns the nouns of a prompt as labels of the official detector, which has one label for all people."""
    return ["person" if noun in _PEOPLE else noun for noun in item.data["nouns"]]


class ImageResult(NamedTuple):
    """Whether both objects were found in an image, whether they are in the relation, and the score with the official weights."""

    has_both: bool
    is_right: bool
    score: float


class T2ICompBench(Benchmark):
    """
    Base class of the two spatial parts.

    Attributes:
        phrases (`Mapping[str, str]`), official_phrases (`Mapping[str, str | None]`):
            Words of prompts → relation; and those of the official program, in the order in which it searches for them.
        unlabeled (`Set[str]`):
            Nouns for which the official detector has no label.
        min_score (`float`):
            Lower scores of images become 0.
    """

    source = f"https://github.com/Karine-Huang/T2I-CompBench/tree/{_COMMIT}"
    license = "MIT"
    paper = "https://huggingface.co/papers/2307.06350"
    detector_threshold = 0.5
    num_images = 10

    phrases: ClassVar[Mapping[str, str]]
    official_phrases: ClassVar[Mapping[str, str | None]]
    unlabeled: ClassVar[Set[str]]
    min_score: ClassVar[float]

    @staticmethod
    @abstractmethod
    def find_official(labels: Sequence[str], nouns: Sequence[str]) -> list[int | None]:
        """Finds the box of each noun as the official program does: its index in `labels`, or `None`."""

    def load(self, folder: Path) -> list[Item]:
        path = folder / self.files[0].name
        items: list[Item] = []
        known: dict[str, int] = {}
        for row, line in enumerate(_read(path).splitlines(), start=1):
            text = line.strip()
            if text in known or "/" in text or "_" in text:
                reason = (
                    f"repeats line {known[text]}" if text in known else "has a '/' or '_', and no official file name"
                )
                raise ValueError(f"{path}, line {row}: the prompt {text!r} {reason}.")
            try:
                prompt = read_prompt(text, self.phrases)
            except ValueError as error:
                raise ValueError(f"{path}, line {row}: {error}") from None
            known[text] = row
            data = {"nouns": [prompt.first, prompt.second], "relation": prompt.relation}
            items.append(Item(f"{row - 1:03d}", text, data))
        return items

    def image_path(self, item: Item, number: int) -> str:
        return f"samples/{item.prompt}_{number:06d}.png"

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        """
        Assigns files to images.

        The official program scores every file in `samples`, and reads the prompt before the first `_` in its name. In the fixed
        protocol the number after the last `_` is the image's; where one is too large, because the official generator counts over
        all prompts, the images of that prompt are numbered in their order.

        Raises:
            `ValueError`: If two files are the same image, by the fixed protocol.
        """
        ids = {item.prompt: item.id for item in items}
        named, counts = [], Counter[str]()
        for file in files:
            folder, _, name = file.rpartition("/")
            if protocol == "official":
                prompt = name.split("_")[0]
                if folder == "samples" and prompt in ids:
                    named.append((ids[prompt], counts[prompt], file))
                    counts[prompt] += 1
                continue
            parts = re.fullmatch(r"(.+)_(\d+)\.(?:png|jpe?g|webp)", name, re.IGNORECASE)
            if folder in ("", "samples") and parts is not None and parts[1] in ids:
                named.append((ids[parts[1]], int(parts[2]), file))
        if protocol == "official":
            return {(id, number): file for id, number, file in named}
        return number_images(named, self.num_images)

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        nouns = list(item.data["nouns"])
        key, classes = "boxes", nouns
        if protocol == "official":
            classes = [noun for noun in _official_names(item) if noun not in self.unlabeled]
            key = "boxes" if classes == nouns else "boxes of the official labels"
        options: dict[str, Any] = {"classes": list(dict.fromkeys(classes))}
        if "depth" in self.judges:
            options["depth"] = True
        return [Question(key, "boxes", options=options)] if classes else []

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        by_id = {item.id: item for item in items}
        scores = [
            self.official_image_score(by_id[id], number, evidence) for id, number in evidence.images if id in by_id
        ]
        if not scores:
            raise OfficialError("There are no images in the folder 'samples': it divides by zero.")
        return {"avg score": float(sum(scores) / len(scores))}

    def official_image_score(self, item: Item, number: int, evidence: Evidence) -> float:
        """
        Returns the score of an image in the official program.

        Raises:
            [`OfficialError`]: If it would stop at this image.
        """
        name = evidence.images[item.id, number].rpartition("/")[2]
        _check_official_name(name)
        if not item.data["nouns"]:
            raise OfficialError(f"There is no noun in the prompt {item.prompt!r}.")
        asked = self.questions(item, "official")
        if not asked:  # none of the nouns is a label of the official detector
            return 0.0
        reply = evidence.reply(item, number, asked[0].key)
        if reply is None:
            raise OfficialError(f"The detector failed at {name!r}.")
        boxes = reply["boxes"]
        places = self.find_official([box["label"] for box in boxes], _official_names(item))
        found = [boxes[place] for place in places if place is not None]
        relation_score = 0.0
        if len(found) == 2:
            prompt = name.split("_")[0]
            phrase = next((phrase for phrase in self.official_phrases if phrase in prompt), None)
            scale = np.tile(np.divide(official_size(*reply["size"]), reply["size"]), 2)
            first, second = (tuple(box["box"] * scale) for box in found)
            depths = found[0].get("depth_transposed"), found[1].get("depth_transposed")
            relation_score = official_relation_score(phrase, first, second, depths)
        return self._image_score(found, relation_score)

    def _image_score(self, found: Sequence[Mapping[str, Any]], relation_score: float) -> float:
        """Adds up a quarter of the confidence of each object found and half the score of their relation."""
        score = sum(0.25 * box["score"] for box in found) + relation_score / 2
        return 0.0 if score < self.min_score else score

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        images = images_of(items, self.num_images)
        ids = [item.id for item, _ in images]
        relations = np.array([item.data["relation"] for item, _ in images])
        results = [self.fixed_image_result(item, number, evidence) for item, number in images]
        has_both, is_right, scores = np.array(results, dtype=float).reshape(-1, 3).T  # each (num_images,)
        by_relation = [
            Metric(f"relation: {name}", is_right[relations == name], np.array(ids)[relations == name].tolist())
            for name in dict.fromkeys(relations.tolist())
        ]
        return [
            Metric("relation", is_right, ids, is_headline=True),
            *by_relation,
            Metric("both objects", has_both, ids),
            Metric("score", scores, ids),
        ]

    def fixed_image_result(self, item: Item, number: int, evidence: Evidence) -> ImageResult:
        """Judges an image; in one that is missing or could not be judged, nothing is right."""
        reply = evidence.reply(item, number, self.questions(item, "fixed")[0].key)
        if (item.id, number) not in evidence.images or reply is None:
            return ImageResult(False, False, 0.0)
        boxes = reply["boxes"]
        places = find_fixed([box["label"] for box in boxes], item.data["nouns"])
        found = [boxes[place] for place in places if place is not None]
        relation = RelationResult(False, 0.0)
        if len(found) == 2:
            # if both have the same name, either may be the first
            orders = [found, found[::-1]] if len(set(item.data["nouns"])) == 1 else [found]
            relation = max(
                fixed_relation(
                    item.data["relation"],
                    first["box"],
                    second["box"],
                    reply["size"],
                    (first.get("depth"), second.get("depth")),
                )
                for first, second in orders
            )
        return ImageResult(len(found) == 2, relation.is_right, self._image_score(found, relation.score))


class T2ICompBench2D(T2ICompBench):
    """T2I-CompBench++'s 2D-spatial validation prompts: left, right, top, bottom, near."""

    name = "t2i-compbench-2d"
    title = "T2I-CompBench++ 2D-Spatial"
    files = (
        DataFile(
            "spatial_val.txt",
            _DATA + "spatial_val.txt",
            "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
        ),
    )
    judges = frozenset({"detector"})
    phrases = PHRASES_2D
    official_phrases = OFFICIAL_PHRASES_2D
    find_official = staticmethod(find_official_2d)
    unlabeled = _UNLABELED_2D
    min_score = 0.5


class T2ICompBench3D(T2ICompBench):
    """T2I-CompBench++'s 3D-spatial validation prompts: in front of, behind, hidden by."""

    name = "t2i-compbench-3d"
    title = "T2I-CompBench++ 3D-Spatial"
    files = (
        DataFile(
            "3d_spatial_val.txt",
            _DATA + "3d_spatial_val.txt",
            "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9",
        ),
    )
    judges = frozenset({"detector", "depth"})
    phrases = PHRASES_3D
    official_phrases = OFFICIAL_PHRASES_3D
    find_official = staticmethod(find_official_3d)
    unlabeled = _UNLABELED_3D
    min_score = 0.0
