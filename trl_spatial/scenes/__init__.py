"""An exact small world: scene graphs, their descriptions, their images, and a checker that reads the images."""

from .checking import RelationCheck, SceneCheck, check_scene, locate_objects
from .dataset import describe_changes, make_preference_dataset, make_prompt_dataset
from .graph import COLORS, SPLITS, Entity, Phrase, Relation, SceneGraph, mirror, sample_entities
from .layout import LayoutError, PlacedObject, is_placeable, place_scene, place_together, sample_radii
from .perturbation import Operation, perturb, sample_graph
from .placements import REGIONS
from .relations import RELATIONS, LocatedObject, RelationKind, Verdict
from .rendering import Style, render_layout, render_scene, sample_style
from .shapes import SHAPES
from .wording import describe_scene, parse_description


__all__ = [
    "COLORS",
    "REGIONS",
    "RELATIONS",
    "SHAPES",
    "SPLITS",
    "Entity",
    "LayoutError",
    "LocatedObject",
    "Operation",
    "Phrase",
    "PlacedObject",
    "Relation",
    "RelationCheck",
    "RelationKind",
    "SceneCheck",
    "SceneGraph",
    "Style",
    "Verdict",
    "check_scene",
    "describe_changes",
    "describe_scene",
    "is_placeable",
    "locate_objects",
    "make_preference_dataset",
    "make_prompt_dataset",
    "mirror",
    "parse_description",
    "perturb",
    "place_scene",
    "place_together",
    "render_layout",
    "render_scene",
    "sample_entities",
    "sample_graph",
    "sample_radii",
    "sample_style",
]
