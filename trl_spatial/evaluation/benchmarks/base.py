"""The interface of a benchmark: its prompts, the layout of its images, the questions to judges, and the metrics."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from ...preferences.images import load_image


Protocol = Literal["official", "fixed"]
PROTOCOLS: tuple[Protocol, ...] = ("official", "fixed")
# (id of the item, number of the image)
ImageKey = tuple[str, int]


class OfficialError(ValueError):
    """The official program would stop here. The message names the cause."""


@dataclass(frozen=True)
class DataFile:
    """
    A file with a benchmark's prompts.

    Args:
        name (`str`):
            Its name in the folder of the benchmark's data.
        url (`str`):
            Where it is published, at a commit.
        sha256 (`str`):
            Hash of its content, in hexadecimal digits.
    """

    name: str
    url: str
    sha256: str


@dataclass(frozen=True)
class Item:
    """
    A prompt of a benchmark.

    Args:
        id (`str`):
            Identifies it among all items.
        prompt (`str`):
            The text that generators are given.
        data (`Mapping[str, Any]`):
            The row of the benchmark's file, as JSON.
        is_spatial (`bool`):
            Whether it belongs to the benchmark's spatial part.
    """

    id: str
    prompt: str
    data: Mapping[str, Any]
    is_spatial: bool = True


@dataclass(frozen=True)
class Question:
    """
    A question to a judge about an image.

    Args:
        key (`str`):
            Identifies it among the questions about an image. Questions with the same key are the same question.
        kind (`str`):
            `"text"`: words are asked for, and the reply is a string. `"probabilities"`: the reply is
            `{"probabilities": {token: its probability of being the first of the answer}, "tokens": {spelling: [token,
            ...]}}`, tokens as text, and every spelling of `options` split into tokens. `"boxes"`: the reply is
            `{"size": [width, height], "boxes": [{"label", "score", "box": [left, top, right, bottom]}, ...]}`, most
            confident first, with `"color"` and `"depth"` where `options` asks.
        text (`str`, *optional*):
            The words of the question.
        options (`Mapping[str, Any]`, *optional*):
            For `"boxes"`: `classes`, names of what to look for; `colors`, those of them whose color is to be named; `depth`,
            whether to add the mean depth in each box, as `depth` and, with rows and columns exchanged, `depth_transposed` (0 to
            255, near is bright); `detector`, `"first"` or `"second"`; `view`, a change of the image beforehand.
            For `"text"`: `max_tokens` and `temperature`. For `"probabilities"`: `spellings`, the answers that may be accepted.
        num_replies (`int`, *optional*, defaults to `1`):
            How many usable replies are wanted.
        max_tries (`int`, *optional*, defaults to `1`):
            The most times it is asked.
        is_usable (`Callable[[Any], bool]`, *optional*):
            Whether a reply can be read. By default every reply can.
    """

    key: str
    kind: Literal["text", "probabilities", "boxes"]
    text: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    num_replies: int = 1
    max_tries: int = 1
    is_usable: Callable[[Any], bool] = lambda reply: True


@dataclass(frozen=True)
class Evidence:
    """
    The images of a benchmark, and the replies of judges about them.

    Args:
        images (`Mapping[tuple[str, int], str]`):
            Id of an item and number of the image → its file, of the images that are there and can be read.
        replies (`Mapping[tuple[str, int, str], Sequence[Any]]`):
            Id of an item, number of the image and key of the question → replies in their order; `None` for a call that failed.
    """

    images: Mapping[ImageKey, str]
    replies: Mapping[tuple[str, int, str], Sequence[Any]]

    def numbers(self, item: Item) -> list[int]:
        """Returns the numbers of the existing images of an item, sorted."""
        return self._numbers.get(item.id, [])

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        numbers: dict[str, list[int]] = {}
        for id, number in sorted(self.images):
            numbers.setdefault(id, []).append(number)
        return numbers

    def reply(self, item: Item, number: int, key: str) -> Any:
        """The last reply to a question, or `None` if there is none."""
        replies = self.replies.get((item.id, number, key), ())
        return replies[-1] if replies else None


@dataclass(frozen=True)
class Metric:
    """
    A number of a table, with the values it is computed from: their mean, or the mean of the means of their groups.

    Args:
        name (`str`):
            Name of the metric, in the benchmark's words.
        values (`np.ndarray` of shape `(num_values,)`):
            For example, 1 for each image that is right and 0 for each other.
        items (`Sequence[str]` of length `num_values`):
            Id of the item that each value is about. Values of one item succeed and fail together.
        groups (`Sequence[str]` of length `num_values`, *optional*):
            Group of each value. If not set, all are in one group.
        is_headline (`bool`, *optional*, defaults to `False`):
            Whether it is the number that people quote.
    """

    name: str
    values: np.ndarray
    items: Sequence[str]
    groups: Sequence[str] | None = None
    is_headline: bool = False

    @property
    def estimate(self) -> float:
        """The number; NaN if there are no values."""
        return mean_of_groups(
            self.values, np.zeros(len(self.values), int) if self.groups is None else np.asarray(self.groups)
        )


def mean_of_groups(values: np.ndarray, groups: np.ndarray) -> float:
    """Mean over the groups of the mean of their values; NaN if there are none."""
    if len(values) == 0:
        return float("nan")
    _, group_of = np.unique(groups, return_inverse=True)
    return float((np.bincount(group_of, values) / np.bincount(group_of)).mean())


class Benchmark(ABC):
    """
    A benchmark of text-to-image models. It draws no images and asks no judges itself: it specifies what to draw, where
    images are stored and what to ask, and computes metrics from the answers.

    Attributes:
        name (`str`), title (`str`):
            Its name on the command line and in tables.
        source (`str`), license (`str`), paper (`str`):
            Where it is published, at a commit; the license of its data; its paper.
        files (`tuple[DataFile, ...]`):
            Its data. None is part of this package.
        num_images (`int`):
            Images for each prompt.
        judges (`frozenset[str]`):
            Roles of the judges that are asked: some of `"vision"`, `"detector"`, `"second_detector"`, `"colors"`,
            `"depth"`.
        detector_threshold (`float`), counting_threshold (`float`, *optional*):
            Score above which boxes count, and the same in prompts about numbers, if that is different.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    license: ClassVar[str]
    paper: ClassVar[str]
    files: ClassVar[tuple[DataFile, ...]]
    num_images: ClassVar[int]
    judges: ClassVar[frozenset[str]]
    detector_threshold: ClassVar[float] = 0.3
    counting_threshold: ClassVar[float | None] = None

    @abstractmethod
    def load(self, folder: Path) -> list[Item]:
        """
        Reads its prompts.

        Args:
            folder (`Path`):
                Folder of its `files`.

        Raises:
            `ValueError`: If a file is missing or damaged; the message names the file and the row.
        """

    @abstractmethod
    def image_path(self, item: Item, number: int) -> str:
        """Returns where an image is written in the official layout, relative to the folder of images."""

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        """
        Assigns files to images.

        Args:
            items (`Sequence[Item]`):
                The prompts.
            files (`Sequence[str]`):
                Every file in the folder of images, relative to it, with `/`, sorted.
            protocol (`str`):
                `"official"`: as the official program does, `"fixed"`: as it means to.

        Returns:
            `dict`: Id of an item and number of the image → its file. Missing images are left out.
        """
        known = set(files)
        paths = {
            (item.id, number): self.image_path(item, number) for item in items for number in range(self.num_images)
        }
        return {key: path for key, path in paths.items() if path in known}

    def check_folder(self, folder: Path, items: Sequence[Item]) -> None:  # noqa: B027 - most have only images there
        """
        Compares metadata stored beside the images with the prompts that the images are assigned to.

        Raises:
            `ValueError`: If they disagree; the message names the file.
        """

    def finish(self, folder: Path, items: Sequence[Item]) -> None:  # noqa: B027 - most have nothing to complete
        """Completes the official layout after images were drawn, if it has more than one file per image."""

    def open(self, folder: Path, file: str) -> Image.Image:
        """
        Reads an image that [`assign`] has named.

        Raises:
            `ValueError`: If it cannot be read.
        """
        return load_image(folder / PurePosixPath(file))

    @abstractmethod
    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        """Returns the questions to judges about each image of an item."""

    @abstractmethod
    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        """
        Computes the numbers that the official program prints, with its bugs: name → number; `None` for undefined ones.

        Raises:
            [`OfficialError`]: If it would stop.
        """

    @abstractmethod
    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        """Computes the metrics without its bugs. Every expected image and question counts, as wrong if missing."""


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """
    Reads a file of JSON objects, one per line.

    Raises:
        `ValueError`: If the file is missing, or a line is not an object.
    """
    rows = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is {line[:80]!r}, not a JSON object.")
        rows.append(row)
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None


def images_of(items: Iterable[Item], num_images: int) -> list[tuple[Item, int]]:
    """Every image that is expected."""
    return [(item, number) for item in items for number in range(num_images)]
