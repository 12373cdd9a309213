"""
A world of household things on a table: scenes, their descriptions, their pictures, and a checker of the pictures.
"""

from .checking import check_tabletop
from .placing import PlacedItem, is_possible, place_tabletop, sample_sizes
from .raycasting import MIN_IMAGE_SIZE, Rendering, render_tabletop
from .sampling import MAX_RELATIONS, sample_tabletop_graph
from .things import NOUNS, SCENES, Item
from .wording import Description, describe_tabletop, parse_tabletop, scene_of


__all__ = [
    "MAX_RELATIONS",
    "MIN_IMAGE_SIZE",
    "NOUNS",
    "SCENES",
    "Description",
    "Item",
    "PlacedItem",
    "Rendering",
    "check_tabletop",
    "describe_tabletop",
    "is_possible",
    "parse_tabletop",
    "place_tabletop",
    "render_tabletop",
    "sample_sizes",
    "sample_tabletop_graph",
    "scene_of",
]
