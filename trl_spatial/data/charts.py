"""Plots the statistics of a dataset."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..preferences.faults import clip
from .counts import QUANTITIES, Quantity, SplitStatistics, mean_of, tabulate


# From the palette of Okabe and Ito: distinguishable with any kind of color vision, and in gray.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_INK, _QUIET, _RULE = "#1c1c22", "#5f6069", "#e3e3e8"
_STYLE = {
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _QUIET,
    "axes.titlecolor": _INK,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _RULE,
    "text.color": _INK,
    "xtick.color": _QUIET,
    "xtick.labelcolor": _INK,
    "ytick.color": _QUIET,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}
_styled = style.context(["default", _STYLE])
_NUM_COLUMNS = 3


@_styled
def save_statistics(statistics: Mapping[str, SplitStatistics], path: str | Path, *, title: str) -> None:
    """
    Plot the statistics of a dataset to a PNG file: one panel per quantity, with one bar per split in each group. The
    bars of a split add up to 100 %, so that a small split can be compared with a large one.
    """
    shown = [quantity for quantity in QUANTITIES if tabulate(quantity, statistics)]
    num_columns = min(_NUM_COLUMNS, len(shown)) or 1
    num_rows = -(-len(shown) // num_columns) or 1
    figure = Figure(
        figsize=(4.9 * num_columns, 0.9 + 3.7 * num_rows),
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15),
        dpi=120,
    )
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    colors = {split: _COLORS[i % len(_COLORS)] for i, split in enumerate(statistics)}
    for axes, quantity in zip(panels, shown, strict=False):
        _draw_panel(axes, quantity, statistics, colors)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.legend(
        handles=[Patch(color=colors[split], label=_describe(split, found)) for split, found in statistics.items()],
        title=clip(title, 36 * num_columns),
        title_fontproperties={"size": 14, "weight": "bold"},
        alignment="left",
        loc="outside upper left",
        ncols=2 * num_columns - 1,
        fontsize=11,
        borderpad=0.2,
    )
    FigureCanvasAgg(figure).print_png(path)


def _describe(split: str, statistics: SplitStatistics) -> str:
    return f"{split}, {statistics.num_checked:,} row{'' if statistics.num_checked == 1 else 's'}"


def _draw_panel(
    axes: Axes, quantity: Quantity, statistics: Mapping[str, SplitStatistics], colors: Mapping[str, str]
) -> None:
    groups = tabulate(quantity, statistics)
    counts = np.array([counts for _, counts in groups], dtype=float)  # (num_groups, num_splits)
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    labels = [clip(label, 24) for label, _ in groups]
    thickness = 0.8 / len(statistics)
    for i, split in enumerate(statistics):
        positions = np.arange(len(groups)) + (i - (len(statistics) - 1) / 2) * thickness
        draw = axes.bar if quantity.is_number else axes.barh
        draw(positions, shares[:, i], 0.92 * thickness, color=colors[split])
    axes.set_title(quantity.title[0].upper() + quantity.title[1:])
    share_axis, name_axis = (axes.yaxis, axes.xaxis) if quantity.is_number else (axes.xaxis, axes.yaxis)
    share_axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    share_axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    share_axis.set_label_text(f"share of {quantity.unit}")
    share_axis.grid(visible=True)
    name_axis.set_ticks(range(len(groups)), labels)
    name_axis.set_tick_params(length=0)
    if quantity.is_number:
        if sum(map(len, labels)) > 30:
            axes.tick_params(axis="x", rotation=45)
        means = [
            f"{split} {mean_of(c):.2f}" for split, found in statistics.items() if (c := found.counts[quantity.name])
        ]
        axes.set_xlabel(f"mean: {', '.join(means)}")
        middle, half_width = (len(groups) - 1) / 2, max(len(groups) + 0.2, 4.2) / 2  # a few bars stay narrow
        axes.set_xlim(middle - half_width, middle + half_width)
    else:
        axes.set_ylim(max(len(groups) - 0.4, 3.6), -0.6)  # inverted: the first group, the most frequent, is on top
