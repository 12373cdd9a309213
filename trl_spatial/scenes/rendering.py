"""Draws a placed scene: flat shapes with exact anti-aliasing on a nearly gray background."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .graph import COLORS, Entity, SceneGraph
from .layout import PlacedObject, place_together
from .shapes import signed_distance


MIN_IMAGE_SIZE = 16


@dataclass(frozen=True)
class Style:
    """
    Everything about an image that says nothing about where objects are. The images of a pair share it: two background colors
    `(2, 3)`, 0 to 255, and how a `"gradient"`, `"stripes"` or `"checks"` mix them (`angle` in radians, `period` in canvas units), the
    standard deviation and the seed of its noise, and the color of every object.
    """

    background: np.ndarray
    pattern: str
    angle: float
    period: float
    noise: float
    noise_seed: int
    colors: dict[Entity, np.ndarray]


def sample_style(entities: Sequence[Entity], rng: np.random.Generator) -> Style:
    """Draw a background and a shade of every object's color."""
    lightness = rng.uniform(30, 235)
    tint = rng.uniform(-10, 10, size=(1, 3))
    contrast = rng.uniform(-22, 22)
    background = np.clip(np.array([[lightness], [lightness + contrast]]) + tint, 0, 255)
    colors = {}
    for entity in entities:
        shade = np.array(COLORS[entity.color]) * rng.uniform(0.93, 1.05) + rng.uniform(-8, 8, size=3)
        colors[entity] = np.clip(shade, 0, 255)
    return Style(
        background=background,
        pattern=("gradient", "stripes", "checks")[rng.integers(3)],
        angle=float(rng.uniform(0, 2 * np.pi)),
        period=float(rng.uniform(0.08, 0.3)),
        noise=float(rng.choice([0.0, 2.0, 4.0])),
        noise_seed=int(rng.integers(2**31)),
        colors=colors,
    )


def render_layout(objects: Sequence[PlacedObject], style: Style, image_size: int = 64) -> Image.Image:
    """Draw placed objects, in drawing order, as an RGB image of `image_size` pixels."""
    return Image.fromarray(draw_layouts([objects], style, image_size)[0], "RGB")


def draw_layouts(layouts: Sequence[Sequence[PlacedObject]], style: Style, image_size: int) -> list[np.ndarray]:
    """
    Draw several layouts in one style as arrays `(image_size, image_size, 3)`, uint8. Their background, which takes longer
    than the objects, is drawn once.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size={image_size} is too small to show shapes; use at least {MIN_IMAGE_SIZE}.")
    mix, noise = _mix_background(style, image_size), None
    if style.noise:
        noise = np.random.default_rng(style.noise_seed).standard_normal((image_size, image_size), dtype=np.float32)
        noise *= np.float32(style.noise)
    covered = [[_cover(placed, image_size) for placed in objects] for objects in layouts]
    images = [np.empty((image_size, image_size, 3), np.uint8) for _ in layouts]
    # one channel after another: NumPy is slow along an axis of length three, and allocating large arrays is slow
    for channel, (first, second) in enumerate(style.background.astype(np.float32).T):
        background = mix * (second - first)
        background += first
        if noise is not None:
            background += noise
        np.clip(background, 0, 255, out=background)
        for image, objects, parts in zip(images, layouts, covered, strict=True):
            canvas = background.copy()
            for placed, (window, coverage) in zip(objects, parts, strict=True):
                patch = canvas[window]
                patch += coverage * (np.float32(style.colors[placed.entity][channel]) - patch)
            canvas += 0.5
            image[..., channel] = canvas
    return images


def _cover(placed: PlacedObject, image_size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """
    Return the window of an image that contains an object, and the share of each pixel in it that the object covers.
    """
    radius, x, y = (value * image_size for value in (placed.radius, placed.x, placed.y))
    left, right = max(int(x - radius) - 1, 0), min(int(x + radius) + 2, image_size)
    top, bottom = max(int(y - radius) - 1, 0), min(int(y + radius) + 2, image_size)
    dx = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)
    distance = signed_distance(placed.entity.shape, dx, dy, radius)
    return (slice(top, bottom), slice(left, right)), np.minimum(np.maximum(0.5 - distance, 0.0), 1.0)


def _mix_background(style: Style, image_size: int) -> np.ndarray:
    """Return the share of the second background color in each pixel: `(image_size, image_size)`, float32."""
    centers = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    x, y = centers, centers[:, None]
    if style.pattern == "checks":
        return ((np.floor(x / style.period) + np.floor(y / style.period)) % 2).astype(np.float32)
    along = np.float32(np.cos(style.angle)) * (x - 0.5) + np.float32(np.sin(style.angle)) * (y - 0.5)
    if style.pattern == "gradient":
        return along / np.float32(1.42) + 0.5
    return 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / style.period))


def render_scene(graph: SceneGraph, *, seed: int, image_size: int = 64) -> Image.Image:
    """
    Place and draw a scene graph: an RGB image of `image_size` pixels in which every relation holds. The same seed, of sizes, places,
    background and shades, gives the same image.

    Raises:
        [`LayoutError`]: if no layout satisfies the graph.
    """
    rng = np.random.default_rng(seed)
    style = sample_style(graph.entities, rng)
    (layout,) = place_together([graph], rng)
    return render_layout(layout, style, image_size)
