"""The shapes of the world and their outlines."""

from functools import cache

import numpy as np


SHAPES = ("circle", "square", "triangle", "diamond")


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """
    Signed distance to the outline of a `"circle"`, `"square"`, `"triangle"` (apex up) or `"diamond"`, negative inside, exact next to the
    edges, at offsets from its center. `radius` is half its width and height; all in one unit.
    """
    if shape == "circle":
        return np.sqrt(dx**2 + dy**2) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - radius
    if shape == "diamond":
        return (np.abs(dx) + np.abs(dy) - radius) / np.sqrt(2.0)
    if shape == "triangle":
        slope = (2.0 * np.abs(dx) - (dy + radius)) / np.sqrt(5.0)
        return np.maximum(slope, dy - radius)
    raise ValueError(f"No outline for shape {shape!r}; choose one of {SHAPES}.")


@cache
def _points_inside(shape: str, resolution: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates of the points of a grid that are inside a shape of radius 1."""
    grid = (np.arange(resolution) + 0.5) / resolution * 2 - 1
    rows, columns = np.nonzero(signed_distance(shape, grid, grid[:, None], 1.0) < 0)
    return grid[columns], grid[rows]


def hidden_share(front: str, behind: str, dx: float, dy: float) -> float:
    """Share of the shape `behind` that `front`, of the same radius and shifted by `(dx, dy)` radii, covers."""
    x, y = _points_inside(behind)
    return float((signed_distance(front, x - dx, y - dy, 1.0) < 0).mean())


@cache
def hiding_offset(front: str, behind: str, axis: int, sign: int, share: float) -> float:
    """Shift along an axis (0: x, 1: y), in radii, at which `front` covers a given share of `behind`."""
    low, high = 0.0, 2.0  # the covered share is largest at 0, and 0 at 2
    for _ in range(20):
        middle = (low + high) / 2
        shift = (sign * middle, 0.0) if axis == 0 else (0.0, sign * middle)
        low, high = (middle, high) if hidden_share(front, behind, *shift) > share else (low, middle)
    return (low + high) / 2
