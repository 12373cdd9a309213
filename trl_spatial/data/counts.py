"""Counts what is in a preference dataset."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..preferences.rows import ImageFacts
from ..scenes import parse_description


MAX_NAMES = 15  # names shown of a categorical quantity; the rest is one group
MAX_BINS = 12
MAX_NAMES_KEPT = 50  # names in the JSON: there may be as many scenes as rows


@dataclass(frozen=True)
class Quantity:
    """
    A quantity that is counted.

    Args:
        name (`str`):
            Its name in JSON.
        title (`str`):
            Its name in reports.
        unit (`str`):
            What is counted, in the plural.
        is_number (`bool`, *optional*, defaults to `False`):
            Whether its values are numbers, which have an order and a mean.
    """

    name: str
    title: str
    unit: str
    is_number: bool = False


QUANTITIES = (
    Quantity("relations_per_prompt", "relations per prompt", "rows", is_number=True),
    Quantity("words_per_prompt", "words per prompt", "rows", is_number=True),
    Quantity("levels", "level: changed relations", "rows", is_number=True),
    Quantity("relations", "kinds of relations", "relations"),
    Quantity("operations", "kinds of changes", "changes"),
    Quantity("objects_per_scene", "objects per scene", "rows", is_number=True),
    Quantity("scenes", "scenes", "rows"),
    Quantity("generators", "generators", "rows"),
    Quantity("image_sizes", "sizes of images", "images"),
    Quantity("image_modes", "modes of images", "images"),
)


@dataclass
class SplitStatistics:
    """
    The statistics of one split.

    Args:
        num_rows (`int`):
            Rows of the split.
        share (`float`):
            Its share of the rows of all splits, from 0 to 1.
        num_checked (`int`):
            Rows that were looked at.
        num_prompts (`int`), num_images (`int`):
            Different prompts, and different images in the columns `chosen` and `rejected`, by their pixels.
        num_scenes (`int`, *optional*):
            Different values of the column `scene`, if there is one.
        counts (`dict[str, Counter]`):
            Name of a quantity in `QUANTITIES` → value → how often it is there.
    """

    num_rows: int
    share: float
    num_checked: int = 0
    num_prompts: int = 0
    num_images: int = 0
    num_scenes: int | None = None
    counts: dict[str, Counter] = field(default_factory=lambda: {quantity.name: Counter() for quantity in QUANTITIES})

    def add(self, row: Mapping[str, Any], images: Sequence[ImageFacts]) -> None:
        """
        Count one row.

        Args:
            row (`Mapping[str, Any]`):
                Values of the columns that are there. Nulls are not counted.
            images (`Sequence[ImageFacts]`):
                Those of its images that could be decoded.
        """
        self.num_checked += 1
        if isinstance(row.get("prompt"), str):
            self.counts["words_per_prompt"][len(row["prompt"].split())] += 1
        for column, name in (("level", "levels"), ("generator", "generators")):
            if row.get(column) is not None:
                self.counts[name][row[column]] += 1
        for column, key in (("relations", "relation"), ("operations", "operation")):
            self.counts[column].update(kinds_of(row.get(column), key) or ())
        relations = kinds_of(row.get("relations"), "relation")
        if relations is not None:
            self.counts["relations_per_prompt"][len(relations)] += 1
        if row.get("scene"):
            self._add_scene(row["scene"])
        self.counts["image_sizes"].update(f"{image.width}x{image.height}" for image in images)
        self.counts["image_modes"].update(image.mode for image in images)

    def _add_scene(self, scene: str) -> None:
        """Counts the objects of a scene that `describe_scene` wrote; any other scene is counted by name."""
        try:
            self.counts["objects_per_scene"][len(parse_description(scene).entities)] += 1
        except ValueError:
            self.counts["scenes"][scene] += 1

    def to_dict(self) -> dict[str, Any]:
        """The statistics for JSON: the 50 most frequent names, and all numbers with mean and range."""
        result = {
            name: getattr(self, name) for name in ("num_rows", "share", "num_checked", "num_prompts", "num_images")
        }
        result["num_scenes"] = self.num_scenes
        for quantity in QUANTITIES:
            if counts := self.counts[quantity.name]:
                result[quantity.name] = _summarize(counts, quantity)
        return result


def kinds_of(value: Any, key: str) -> list[str] | None:
    """
    Return the value of `key`, `"relation"` or `"operation"`, in each entry of a list: `"not given"` for a null, and
    `None` if there is no list. An entry may be the value itself, a string; datasets before 4.0 turned the list into a
    mapping of lists.
    """
    entries = value.get(key) if isinstance(value, dict) else value
    if entries is None:
        return None
    kinds = [entry.get(key) if isinstance(entry, dict) else entry for entry in entries]
    return ["not given" if kind is None else str(kind) for kind in kinds]


def mean_of(counts: Counter) -> float:
    """Mean of counted numbers."""
    return sum(value * count for value, count in counts.items()) / counts.total()


def _summarize(counts: Counter, quantity: Quantity) -> dict[str, Any]:
    summary: dict[str, Any] = {"num_values": counts.total(), "num_different": len(counts)}
    if quantity.is_number:
        summary |= {"mean": mean_of(counts), "min": min(counts), "max": max(counts)}
        return summary | {"counts": {str(value): counts[value] for value in sorted(counts)}}
    return summary | {"counts": dict(counts.most_common(MAX_NAMES_KEPT))}


def tabulate(quantity: Quantity, statistics: Mapping[str, SplitStatistics]) -> list[tuple[str, list[int]]]:
    """
    Return the counts of a quantity in few groups, for a report: (label, count in each split). Numbers are sorted, in
    at most 12 bins of equal width; names are sorted by count, with the rarest in one group. Empty if nothing was
    counted.
    """
    counters = [split.counts[quantity.name] for split in statistics.values()]
    total = sum(counters, Counter())
    if not total:
        return []
    if quantity.is_number:
        return _bins(counters, min(total), max(total))
    names = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))]
    rest = names[MAX_NAMES:] if len(names) > MAX_NAMES + 1 else []
    groups = [(name, [counts[name] for counts in counters]) for name in names[: len(names) - len(rest)]]
    if rest:
        groups.append((f"{len(rest)} others", [sum(counts[name] for name in rest) for counts in counters]))
    return groups


def _bins(counters: Sequence[Counter], low: int, high: int) -> list[tuple[str, list[int]]]:
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < MAX_BINS)
    groups = []
    for start in range(low // width * width, high + 1, width):
        label = str(start) if width == 1 else f"{start}-{start + width - 1}"
        inside = [sum(count for value, count in c.items() if start <= value < start + width) for c in counters]
        groups.append((label, inside))
    return groups
