"""Compares an image with a scene graph, from its pixels alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .graph import Entity, Relation, SceneGraph
from .locating import locate_objects
from .relations import RELATIONS, LocatedObject, Verdict
from .segmentation import is_noise, to_array


__all__ = ["RelationCheck", "SceneCheck", "check_scene", "locate_objects"]


@dataclass(frozen=True)
class RelationCheck:
    """The verdict on one relation of a graph in an image, and the measurement behind it, in canvas units."""

    relation: Relation
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class SceneCheck:
    """
    What an image shows of a scene graph: a check per relation, all objects found, largest first, and entities that are
    missing, duplicated, or not named. `remark` says what an image without objects is: blank or noise.

    Sizes are not judged: no two objects of a graph differ only in their size word, so a wrong size never turns an
    image into one of another scene.
    """

    relations: list[RelationCheck]
    objects: list[LocatedObject]
    missing: list[Entity]
    duplicated: list[Entity]
    extra: list[LocatedObject]
    remark: str | None = None

    @property
    def is_correct(self) -> bool:
        """Whether every entity occurs exactly once and every relation is satisfied."""
        return not (self.missing or self.duplicated) and all(c.verdict == Verdict.SATISFIED for c in self.relations)

    @property
    def reasons(self) -> list[str]:
        """Everything that keeps the image from being correct, in words."""
        return [
            *([self.remark] if self.remark else []),
            *(f"{entity} is missing" for entity in self.missing),
            *(f"{entity} is there more than once" for entity in self.duplicated),
            *(f"{c.relation} is {c.verdict}: {c.reason}" for c in self.relations if c.verdict != Verdict.SATISFIED),
        ]


def check_scene(image: Image.Image | np.ndarray, graph: SceneGraph) -> SceneCheck:
    """
    Compare an image with a scene graph, from its pixels alone.

    Args:
        image (`PIL.Image.Image` or `np.ndarray` of shape `(height, width, 3)` and type `uint8`):
            The image, see [`locate_objects`].
        graph ([`SceneGraph`]):
            What it should show.

    Returns:
        [`SceneCheck`]: a verdict with its reason per relation, and which entities are missing or duplicated. A relation
        of such an entity is undecidable.

    Example:

    ```python
    >>> check = check_scene(render_scene(graph, seed=0), graph)
    >>> check.is_correct, check.reasons
    (True, [])
    ```
    """
    objects = locate_objects(image)
    found = {
        entity: [o for o in objects if (o.color, o.shape) == (entity.color, entity.shape)] for entity in graph.entities
    }
    named = {(entity.color, entity.shape) for entity in graph.entities}
    return SceneCheck(
        relations=[_check_relation(relation, found, objects) for relation in graph.relations],
        objects=objects,
        missing=[entity for entity, matches in found.items() if not matches],
        duplicated=[entity for entity, matches in found.items() if len(matches) > 1],
        extra=[o for o in objects if (o.color, o.shape) not in named],
        remark=None if objects else ("the image is noise" if is_noise(to_array(image)) else "the image is blank"),
    )


def _check_relation(
    relation: Relation, found: dict[Entity, list[LocatedObject]], objects: Sequence[LocatedObject]
) -> RelationCheck:
    for entity in relation.arguments:
        matches = found[entity]
        if len(matches) == 1:
            continue
        if matches:
            reason = f"{entity} is there {len(matches)} times"
        else:
            others = sorted({o.shape for o in objects if o.color == entity.color})
            seen = f"; of that color there is: {', '.join(others)}" if others else ""
            reason = f"{entity} is missing{seen}"
        return RelationCheck(relation, Verdict.UNDECIDABLE, reason)
    arguments = [found[entity][0] for entity in relation.arguments]
    return RelationCheck(relation, *RELATIONS[relation.name].check(arguments, relation.region))
