"""The plot of `methods.py`: spatial accuracy against passes through the transformer."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trl_spatial.statistics import accuracy_interval


def draw_curves(
    path: Path,
    curves: dict[str, list[list[dict[str, float]]]],
    panels: dict[str, list[str]],
    baseline: str,
    num_images: int,
) -> None:
    """
    Plots the spatial accuracy on validation prompts against the passes, one panel per question.

    Args:
        path (`Path`):
            Path of the PNG file.
        curves (`dict[str, list[list[dict[str, float]]]]`):
            Method → for each seed, its points, with `passes` and `spatial_accuracy`.
        panels (`dict[str, list[str]]`):
            Question → the methods that answer it.
        baseline (`str`):
            The method drawn in black.
        num_images (`int`):
            Number of images per point and seed, for 95 % intervals that pool the seeds.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(2, -(-len(panels) // 2), sharex=True, sharey=True, squeeze=False)
    for axes, (question, methods) in zip(all_axes.flat, panels.items(), strict=False):
        colors = {method: "black" if method == baseline else f"C{number}" for number, method in enumerate(methods)}
        for method in [method for method in methods if method in curves]:
            _draw_method(axes, method, curves[method], colors[method], num_images)
        axes.set_title(question)
        axes.grid(color="0.9")
        if axes.has_data():
            axes.legend(loc="upper left", fontsize="small", frameon=False)
    for axes in all_axes[-1]:
        axes.set_xlabel("passes through the transformer, thousands")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("spatial accuracy, validation")
    figure.savefig(path, dpi=110)


def _draw_method(axes, method: str, seeds: list[list[dict[str, float]]], color: str, num_images: int) -> None:
    num_points = min(len(points) for points in seeds)
    passes = np.mean([[point["passes"] for point in points[:num_points]] for points in seeds], axis=0) / 1000
    shares = np.mean([[point["spatial_accuracy"] for point in points[:num_points]] for points in seeds], axis=0)
    num_all = num_images * len(seeds)
    intervals = [accuracy_interval(np.arange(num_all) < round(share * num_all)) for share in shares.tolist()]
    below = [max(share - interval.low, 0.0) for share, interval in zip(shares, intervals, strict=True)]
    above = [max(interval.high - share, 0.0) for share, interval in zip(shares, intervals, strict=True)]
    axes.errorbar(
        passes, shares, [below, above], color=color, marker="o", markersize=4, elinewidth=0.8, capsize=2, label=method
    )
