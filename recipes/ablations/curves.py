"""The picture of `methods.py`: truth against passes through the transformer."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trl_spatial.statistics import accuracy_interval


def draw_curves(
    path: Path,
    curves: dict[str, list[list[dict[str, float]]]],
    panels: dict[str, list[str]],
    base: float,
    num_images: int,
) -> None:
    """
    Draws the spatial accuracy on validation prompts against the passes, a panel for each question.

    Args:
        path (`Path`):
            Where the picture goes, as PNG.
        curves (`dict[str, list[list[dict[str, float]]]]`):
            Method → for each seed its points, with `passes` and `spatial_accuracy`. All seeds of a method have as many.
        panels (`dict[str, list[str]]`):
            Question → the methods that answer it.
        base (`float`):
            Spatial accuracy before training, a line.
        num_images (`int`):
            Number of images of a point and seed, for the 95 % intervals: bands of all seeds together.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(2, -(-len(panels) // 2), sharex=True, sharey=True, squeeze=False)
    for axes, (question, methods) in zip(all_axes.flat, panels.items(), strict=False):
        axes.axhline(base, color="0.5", linestyle=":", linewidth=1, label="base")
        for number, method in enumerate(methods):
            if method in curves:
                _draw_method(axes, method, curves[method], f"C{number}", num_images)
        axes.set_title(question)
        axes.grid(color="0.9")
        axes.legend(loc="best", fontsize="small", frameon=False)
    for axes in all_axes[-1]:
        axes.set_xlabel("passes through the transformer, thousands")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("spatial accuracy, validation")
    figure.savefig(path, dpi=110)


def _draw_method(axes, method: str, seeds: list[list[dict[str, float]]], color: str, num_images: int) -> None:
    num_points = min(len(points) for points in seeds)
    passes = np.mean([[point["passes"] for point in points[:num_points]] for points in seeds], axis=0) / 1000
    shares = np.array([[point["spatial_accuracy"] for point in points[:num_points]] for points in seeds])
    num_all = num_images * len(seeds)
    intervals = [
        accuracy_interval(np.arange(num_all) < round(share * num_all)) for share in shares.mean(axis=0).tolist()
    ]
    axes.plot(passes, shares.mean(axis=0), color=color, marker="o", markersize=3, label=method)
    axes.fill_between(
        passes, [interval.low for interval in intervals], [interval.high for interval in intervals], color=color, alpha=0.15, linewidth=0
    )  # fmt: skip
