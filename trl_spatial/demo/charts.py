"""The charts that only the demo's report has."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..figures.charts import (
    COLORS,
    add_legend,
    format_share,
    new_figure,
    plot_intervals,
    set_share_axis,
    styled,
    to_svg,
)


@styled
def reward_curve(training: Mapping[str, Any]) -> str:
    """
    The reward over the updates: on the training prompts of each update, and on held-out prompts. One of the lists `"steps"` and
    `"evaluations"`, of mappings with `"step"` and `"reward"`, may be empty. The lines are the groups `reward-training` and
    `reward-held-out`.
    """
    steps, evaluations = training["steps"], training["evaluations"]
    figure, axes = new_figure(height=262, left=54, top=40, bottom=48)
    _plot_curve(axes, steps, "reward", "training prompts", "training", color="quiet", linewidth=1.2)
    _plot_curve(axes, evaluations, "reward", "held-out prompts", "held-out", color="accent", marker="o")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _finish_curves(axes, training)
    first, last = (evaluations or steps)[0], (evaluations or steps)[-1]
    label = (
        f"Line chart. Mean reward by update: {first['reward']:.2f} at update {first['step']}, "
        f"{last['reward']:.2f} at update {last['step']}."
    )
    return to_svg(figure, "reward", label)


@styled
def truth_curve(training: Mapping[str, Any]) -> str:
    """
    The verdicts of the rules on images of held-out prompts over the updates: `"evaluations"` has at least one mapping with `"step"`
    and the shares `"spatial_accuracy"` and `"objects_present"`. The horizontal axis is that of [`reward_curve`], so that one chart
    can be read below the other. The lines are the groups `truth-spatial-accuracy` and `truth-objects-present`.
    """
    evaluations = training["evaluations"]
    figure, axes = new_figure(height=262, left=54, top=40, bottom=48)
    _plot_curve(
        axes, evaluations, "objects_present", "objects present", "objects-present",
        color="second", marker="s", linestyle="--", linewidth=1.5,
    )  # fmt: skip
    _plot_curve(
        axes, evaluations, "spatial_accuracy", "spatial accuracy", "spatial-accuracy", color="accent", marker="o"
    )
    set_share_axis(axes.yaxis)
    _finish_curves(axes, training)
    shown = (
        f"at update {row['step']} {format_share(row['spatial_accuracy'])}, with all objects present "
        f"{format_share(row['objects_present'])}"
        for row in (evaluations[0], evaluations[-1])
    )
    label = f"Line chart. Share of held-out images that show their prompt: {'; '.join(shown)}."
    return to_svg(figure, "truth", label)


@styled
def relation_dots(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> str:
    """
    The spatial accuracy of the prompts with each relation, before and after training: name of a relation → the shares
    `"estimate"`, `"low"` and `"high"`, for the same relations. The dots are the groups `relations-before` and `relations-after`,
    the intervals `relations-before-intervals` and `relations-after-intervals`.
    """
    names = list(after)
    figure, axes = new_figure(height=72 + 29 * len(names), left=82, top=40)
    for key, rows, offset, color, marker, is_filled in (
        ("before", before, -0.16, "second", "s", False),
        ("after", after, 0.16, "accent", "o", True),
    ):
        positions = [names.index(name) + offset for name in rows]
        plot_intervals(axes, list(rows.values()), positions, key, color=color, marker=marker, is_filled=is_filled)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    set_share_axis(axes.xaxis)
    axes.grid(visible=False, axis="y")
    add_legend(axes)
    label = "Dot plot with 95 % intervals. Spatial accuracy by relation, before and after training: " + (
        "; ".join(
            name.replace("_", " ") + " " + ", ".join(format_share(rows[name]["estimate"]) for rows in (before, after))
            for name in names
        )
    )
    return to_svg(figure, "relations", label + ".")


def _plot_curve(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, label: str, gid: str, *, color: str, linewidth: float = 2,
    marker: str = "", linestyle: str = "-",
) -> None:  # fmt: skip
    if rows:
        axes.plot(
            [row["step"] for row in rows], [row[key] for row in rows], color=COLORS[color], linewidth=linewidth,
            linestyle=linestyle, marker=marker, markersize=5, label=label, gid=gid, clip_on=False,
        )  # fmt: skip


def _finish_curves(axes: Axes, training: Mapping[str, Any]) -> None:
    steps = [row["step"] for row in (*training["steps"], *training["evaluations"])]
    axes.set_xlim(0, max(*steps, 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("update")
    axes.grid(visible=False, axis="x")
    add_legend(axes)
