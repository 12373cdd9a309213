"""Detects objects for a benchmark's questions, with colors and depths."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..judges import views
from ..judges.pictures import crop_object
from .benchmarks.t2i_compbench_rules import official_size
from .roles import Judges


def find_boxes(
    judges: Judges, detector: str, view: str, images: Sequence[Image.Image], options: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """
    Detects objects.

    Args:
        judges ([`~evaluation.roles.Judges`]):
            The judges to ask.
        detector (`str`):
            `"first"` or `"second"`.
        view (`str`):
            A change of the images beforehand, or `""`.
        images (`Sequence[Image.Image]`):
            RGB images.
        options (`Sequence[Mapping[str, Any]]`):
            Options of the question about each, see [`~evaluation.benchmarks.base.Question`].

    Returns:
        `list[dict]`: The reply for each image, in pixels of the unchanged one.
    """
    find = judges.detectors[detector]
    shown = [views.apply(view, image) for image in images] if view else list(images)
    found = find(shown, [list(asked.get("classes", ())) for asked in options])
    replies = []
    for image, detections, asked in zip(images, found, options, strict=True):
        rows: list[dict[str, Any]] = [
            {"label": detection.label, "score": float(detection.score), "box": [float(edge) for edge in detection.box]}
            for detection in detections
        ]
        for row, detection in zip(rows, detections, strict=True):
            if row["label"] in asked.get("colors", ()):
                assert judges.colors is not None
                row["color"] = judges.colors(crop_object(image, detection), row["label"])
        rows.sort(key=lambda row: -row["score"])
        if asked.get("depth"):
            assert judges.depth is not None
            add_depths(rows, judges.depth(image))
        replies.append({"size": list(image.size), "boxes": rows})
    return replies


def add_depths(rows: Sequence[dict[str, Any]], depth: np.ndarray) -> None:
    """
    Adds the mean depth in each box.

    Args:
        rows (`Sequence[dict]`):
            Boxes of a reply. They get `depth`, and `depth_transposed`, which is what T2I-CompBench's program reads: it resizes the
            depth map in whole numbers to [`~evaluation.benchmarks.t2i_compbench_rules.official_size`], in which its boxes are,
            too, and exchanges rows and columns. `None` where no pixel is in the box.
        depth (`np.ndarray` of shape `(height, width)`):
            Depth of each pixel of the image, 0 to 255.
    """
    size = depth.shape[::-1]
    new_size = official_size(*size)
    picture = Image.fromarray(depth.astype(np.uint8)).resize(new_size, Image.Resampling.BILINEAR)
    transposed = np.asarray(picture).T
    scale = np.tile(np.divide(new_size, size), 2)
    for row in rows:
        row["depth"] = _mean_in(row["box"], depth)
        row["depth_transposed"] = _mean_in(row["box"] * scale, transposed)


def _mean_in(box: Sequence[float], values: np.ndarray) -> float | None:
    """Returns the mean of values `(height, width)` in a box, truncated to whole pixels; `None` if it has no pixels."""
    left, top, right, bottom = (max(0, int(edge)) for edge in box)
    part = values[top:bottom, left:right]
    return float(part.mean()) if part.size else None
