"""Scene graphs: objects and the relations between them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from .placements import REGIONS
from .relations import RELATIONS
from .shapes import SHAPES


# Saturated colors, told apart by hue; backgrounds are nearly gray. A seam between two of them can look like a third.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (246, 140, 20),
    "yellow": (240, 220, 30),
    "green": (26, 168, 60),
    "cyan": (34, 200, 214),
    "blue": (40, 78, 222),
    "purple": (132, 44, 200),
    "pink": (244, 76, 180),
}
# Size word → range of half the width of an object, in canvas units.
RADII: dict[str | None, tuple[float, float]] = {"small": (0.07, 0.09), "large": (0.15, 0.18), None: (0.09, 0.13)}


@dataclass(frozen=True, order=True)
class Entity:
    """
    One object of a scene.

    Args:
        color (`str`):
            A key of `COLORS`.
        shape (`str`):
            One of `SHAPES`.
        size (`str`, *optional*):
            `"small"`, `"large"` or nothing said.
    """

    color: str
    shape: str
    size: str | None = None

    def __post_init__(self):
        for field, value, allowed in (
            ("color", self.color, COLORS),
            ("shape", self.shape, SHAPES),
            ("size", self.size, RADII),
        ):
            if value not in allowed:
                raise ValueError(f"Entity has {field}={value!r}; choose one of {list(allowed)}.")

    @property
    def look(self) -> str:
        """What it is, without its size: no two objects of a scene look the same."""
        return f"{self.color} {self.shape}"

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape) if word)


@dataclass(frozen=True, order=True)
class Phrase:
    """
    An object of a scene that is known only by its name, in free text.

    Args:
        text (`str`):
            Its name without an article, such as `"chipped blue mug"`.
    """

    text: str

    @property
    def look(self) -> str:
        """The name in lower case."""
        return self.text.lower()

    def __str__(self) -> str:
        return self.text


# An object of a scene in any world: hashable, its string is its name, and no two in a scene have the same `look`.
Thing: TypeAlias = Any


@dataclass(frozen=True)
class Relation:
    """
    One relation between entities.

    Args:
        name (`str`):
            A key of `RELATIONS`.
        arguments (`tuple[Thing, ...]`):
            The entities, in the order of the relation's wording.
        region (`str`, *optional*):
            A key of `REGIONS`; for `at` only.
    """

    name: str
    arguments: tuple[Thing, ...]
    region: str | None = None

    def __post_init__(self):
        if self.name not in RELATIONS:
            raise ValueError(f"Unknown relation {self.name!r}; choose one of {list(RELATIONS)}.")
        expected, given = RELATIONS[self.name].num_arguments, len(self.arguments)
        if given != expected and not (self.name == "row_order" and given > expected):
            raise ValueError(f"Relation {self.name!r} takes {expected} arguments, got {given}: {self}.")
        if len(set(self.arguments)) != given:
            raise ValueError(f"Relation {self} names an entity twice.")
        if (self.name == "at") != (self.region is not None):
            raise ValueError(f"Relation {self}: `region` belongs to `at`, and `at` needs one.")
        if self.region is not None and self.region not in REGIONS:
            raise ValueError(f"Unknown region {self.region!r}; choose one of {list(REGIONS)}.")

    def __str__(self) -> str:
        return f"{self.name}({', '.join([*map(str, self.arguments), *([self.region] if self.region else [])])})"


@dataclass(frozen=True)
class SceneGraph:
    """
    Objects and the relations that hold between them. Two graphs are equal if they say the same, whatever the order.

    Args:
        entities (`tuple[Thing, ...]`):
            The objects; no two look the same.
        relations (`tuple[Relation, ...]`):
            What is said of them.
    """

    entities: tuple[Thing, ...]
    relations: tuple[Relation, ...] = ()

    def __post_init__(self):
        if len({entity.look for entity in self.entities}) != len(self.entities):
            raise ValueError(f"Two entities look the same in {[str(entity) for entity in self.entities]}.")
        for relation in self.relations:
            if unknown := [str(entity) for entity in relation.arguments if entity not in self.entities]:
                raise ValueError(f"Relation {relation} names {unknown}, not among the scene's entities.")

    def __eq__(self, other) -> bool:
        return isinstance(other, SceneGraph) and (set(self.entities), sorted(map(str, self.relations))) == (
            set(other.entities),
            sorted(map(str, other.relations)),
        )

    def __hash__(self) -> int:
        return hash((frozenset(self.entities), frozenset(map(str, self.relations))))

    @property
    def split(self) -> str:
        """Split of the scene. It depends only on the set of objects, which a perturbation does not change, so no set
        of objects is ever in two splits."""
        return split_of(self.entities)


# Relations and sides that a mirror exchanges; all others stay the same.
_MIRRORED_RELATIONS = {"left_of": "right_of", "right_of": "left_of"}
_MIRRORED_SIDES = {"left": "right", "right": "left"}


def mirror(graph: SceneGraph) -> SceneGraph:
    """The graph that the horizontally mirrored image shows: left and right exchanged in relations and regions, rows reversed."""
    relations = []
    for relation in graph.relations:
        name = _MIRRORED_RELATIONS.get(relation.name, relation.name)
        arguments = relation.arguments[::-1] if name == "row_order" else relation.arguments
        region = relation.region and " ".join(_MIRRORED_SIDES.get(word, word) for word in relation.region.split())
        relations.append(Relation(name, arguments, region))
    return SceneGraph(graph.entities, tuple(relations))


SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def split_of(entities: Sequence[Thing]) -> str:
    """Split that a set of entities belongs to, by a hash of their looks."""
    key = ",".join(sorted(entity.look for entity in entities))
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    for split, size in SPLITS.items():
        if share < size:
            return split
        share -= size
    return split


def sample_entities(
    rng: np.random.Generator,
    num_objects: int,
    split: str | None = None,
    size_probability: float = 0.0,
    colors: Sequence[str] = tuple(COLORS),
    shapes: Sequence[str] = SHAPES,
) -> tuple[Entity, ...]:
    """
    Draw objects of pairwise different colors, if need be from one split only. `size_probability` is that of a size word.

    Raises:
        `ValueError`: If there are too few colors, or `split` or a shape is unknown.
    """
    if not 1 <= num_objects <= len(colors):
        raise ValueError(f"num_objects={num_objects} must be between 1 and {len(colors)}: no two share a color.")
    if not shapes:
        raise ValueError(f"shapes={shapes!r} is empty; choose from {list(SHAPES)}.")
    if split is not None and split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; choose one of {list(SPLITS)}.")
    while True:
        entities = tuple(
            Entity(
                colors[int(color)],
                shapes[int(rng.integers(len(shapes)))],
                ("small", "large")[rng.integers(2)] if rng.random() < size_probability else None,
            )
            for color in rng.permutation(len(colors))[:num_objects]
        )
        if split is None or split_of(entities) == split:
            return entities
