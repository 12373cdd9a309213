"""Drawing a placed scene: flat shapes with exact anti-aliasing on a nearly grey background."""

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
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size={image_size} is too small to show shapes; use at least {MIN_IMAGE_SIZE}.")
    canvas = _render_background(style, image_size)
    for placed in objects:
        radius, x, y = (value * image_size for value in (placed.radius, placed.x, placed.y))
        left, right = max(int(x - radius) - 1, 0), min(int(x + radius) + 2, image_size)
        top, bottom = max(int(y - radius) - 1, 0), min(int(y + radius) + 2, image_size)
        dx = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)
        dy = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)
        distance = signed_distance(placed.entity.shape, dx, dy, radius)
        coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        patch = canvas[top:bottom, left:right]
        patch += coverage * (style.colors[placed.entity].astype(np.float32) - patch)
    return Image.fromarray((canvas + 0.5).astype(np.uint8), "RGB")


def _render_background(style: Style, image_size: int) -> np.ndarray:
    """Background `(image_size, image_size, 3)`, float32, 0 to 255."""
    centers = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    x, y = centers, centers[:, None]
    along = np.float32(np.cos(style.angle)) * (x - 0.5) + np.float32(np.sin(style.angle)) * (y - 0.5)
    if style.pattern == "gradient":
        mix = along / np.float32(1.42) + 0.5
    elif style.pattern == "stripes":
        mix = 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / style.period))
    else:
        mix = ((np.floor(x / style.period) + np.floor(y / style.period)) % 2).astype(np.float32)
    first, second = style.background.astype(np.float32)
    canvas = first + mix[..., None] * (second - first)
    if style.noise:
        noise = np.random.default_rng(style.noise_seed).standard_normal((image_size, image_size, 1), dtype=np.float32)
        canvas += np.float32(style.noise) * noise
    return np.clip(canvas, 0, 255)


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
