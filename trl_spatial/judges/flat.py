"""Exact judges for the flat world: they read objects, colors and depth from the pixels, without a model."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..scenes import COLORS, SHAPES, Entity, LocatedObject, Relation, SceneGraph, locate_objects, render_scene
from ..scenes.locating import UNKNOWN
from ..scenes.segmentation import segment
from ..scenes.shapes import signed_distance
from .geneval import Detection


NO_COLOR = "none"
_IGNORED = {"a", "an", "the", "small", "large"}  # articles, and sizes, which are not judged
# Pixels, in each direction, by which two outlines must overlap to do more than touch.
_LEAST_OVERLAP = 2
SELF_TEST_SIZE = 256


def draw_pair(left: Entity, right: Entity) -> Image.Image:
    """Draws a picture of two things, one on the left and one on the right."""
    sides = (Relation("at", (left,), "left edge"), Relation("at", (right,), "right edge"))
    return render_scene(SceneGraph((left, right), sides), seed=0, image_size=SELF_TEST_SIZE)


class FlatDetector:
    """
    Finds the shapes of the flat world, all with a score of 1. A [`~judges.loading.ClassDetector`].

    A class is a shape with or without its color, such as "red circle", "circle" or "small red circles"; words for sizes are
    ignored. Without classes, all are found, by color and shape. The box is around the whole outline, also where a part of it is
    hidden; the mask is what can be seen.
    """

    name = "flat"
    takes_classes = True
    labels = (*(f"{color} {shape}" for color in COLORS for shape in SHAPES), *SHAPES)

    @property
    def self_test(self) -> tuple[Image.Image, str]:
        """See [`~judges.checked_detector.CheckedDetector`]."""
        first, second = Entity("red", "circle"), Entity("blue", "diamond")
        return draw_pair(first, second), first.look

    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]] | None = None
    ) -> list[list[Detection]]:
        """Detects the objects, of `classes` if given, in each RGB image of at least 24 pixels."""
        asked = [None] * len(images) if classes is None else classes
        return [self._find(image, names) for image, names in zip(images, asked, strict=True)]

    def _find(self, image: Image.Image, names: Sequence[str] | None) -> list[Detection]:
        found = []
        for located in _known(image):
            labels = [f"{located.color} {located.shape}"] if names is None else dict.fromkeys(names)
            box = _box(located, image)
            found += [Detection(label, 1.0, box, located.mask) for label in labels if _is_called(located, label)]
        return found


class FlatColors:
    """Names the colors of the flat world."""

    name = "flat"

    def __call__(self, crop: Image.Image, class_name: str) -> str:
        """
        Returns the flat world's name of the color of the object that fills a crop, or `"none"` if there is none. Only
        pixels inside the outline of the shape in `class_name` count.
        """
        labels = segment(np.asarray(crop.convert("RGB"))).labels
        shape = next((shape for shape in SHAPES if shape in class_name.lower()), "square")
        x, y = ((np.arange(length) + 0.5) / length * 2 - 1 for length in crop.size)
        inside = labels[(signed_distance(shape, x, y[:, None], 1.0) < 0) & (labels >= 0)]
        return list(COLORS)[np.bincount(inside).argmax()] if len(inside) else NO_COLOR


class FlatDepth:
    """
    Depth of pictures of the flat world, from which object hides which: 0 for the background, then one step per object
    of a stack, up to 255 for the top of the highest stack.

    Each shape counts as a square card around its outline. So the mean depth in an object's box compares the order in which the
    objects lie, not how much of its box a shape fills.
    """

    name = "flat"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """
        Returns the depth of each pixel of an RGB image: float32 `(height, width)`, 0 (background) to 255 (nearest).
        """
        objects = _known(image)
        levels = _levels(objects, image)
        depth = np.zeros((image.height, image.width), dtype=np.float32)
        for level, located in sorted(zip(levels, objects, strict=True), key=lambda pair: pair[0]):
            left, top, right, bottom = _box(located, image)
            depth[round(top) : round(bottom), round(left) : round(right)] = 255 * (1 + level) / (1 + max(levels))
        return depth


def _known(image: Image.Image) -> list[LocatedObject]:
    return [located for located in locate_objects(image) if located.shape != UNKNOWN]


def _box(located: LocatedObject, image: Image.Image) -> tuple[float, float, float, float]:
    """
    Returns the bounding box of an outline, in pixels, clipped to the image. Positions are relative to the canvas, the
    smallest square around the image.
    """
    side = max(image.size)
    edges = []
    for sign in (-1, 1):
        for center, length in ((located.x, image.width), (located.y, image.height)):
            edges.append(min(max((center + sign * located.radius) * side - (side - length) / 2, 0.0), float(length)))
    return edges[0], edges[1], edges[2], edges[3]


def _is_called(located: LocatedObject, name: str) -> bool:
    *words, last = name.lower().split() or [""]
    named = {*words, last.removesuffix("s")} - _IGNORED
    return located.shape in named and named <= {located.color, located.shape}


def _levels(objects: Sequence[LocatedObject], image: Image.Image) -> list[int]:
    """Returns the level of each object: the length of the longest stack of objects below it."""
    side = max(image.size)
    x, y = ((np.arange(length) + 0.5 + (side - length) / 2) / side for length in image.size)
    outlines = [
        signed_distance(located.shape, x - located.x, y[:, None] - located.y, located.radius) < -0.5 / side
        for located in objects
    ]
    levels = [0] * len(objects)
    hides = [
        (upper, lower)
        for upper in range(len(objects))
        for lower in range(len(objects))
        if upper != lower and _hides(upper, lower, objects, outlines)
    ]
    for _ in objects:  # no stack is longer than this
        for upper, lower in hides:
            levels[upper] = min(max(levels[upper], levels[lower] + 1), len(objects))
    return levels


def _hides(upper: int, lower: int, objects: Sequence[LocatedObject], outlines: Sequence[np.ndarray]) -> bool:
    common = outlines[upper] & outlines[lower]
    if common.any(0).sum() < _LEAST_OVERLAP or common.any(1).sum() < _LEAST_OVERLAP:
        return False
    return bool((objects[upper].mask & common).sum() > (objects[lower].mask & common).sum())
