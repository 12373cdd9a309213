"""Charts for a page: each an `<svg>` element that uses the colors of the page."""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from matplotlib.transforms import blended_transform_factory


# A figure is as wide as a column of text on a phone. One unit is one pixel at that width.
_WIDTH = 360
_FONT_SIZE = 13.5
_LONGEST_TITLE = 12  # characters of a title next to its line

# The colors that figures are drawn with, by the custom property of the page that replaces them.
COLORS = {
    name: f"#0a0b{number:02x}" for number, name in enumerate(("ink", "quiet", "rule", "paper", "accent", "second"))
}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trl_spatial",
    "font.sans-serif": ["DejaVu Sans"],  # used to measure text; it is wider than the fonts of pages
    "font.size": _FONT_SIZE,
    "path.simplify": False,  # a curve goes through every measurement
    "figure.dpi": 72,
    "axes.edgecolor": COLORS["quiet"],
    "axes.labelcolor": COLORS["quiet"],
    "axes.labelsize": _FONT_SIZE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": COLORS["rule"],
    "text.color": COLORS["ink"],
    "xtick.color": COLORS["quiet"],
    "xtick.labelsize": _FONT_SIZE,
    "ytick.color": COLORS["quiet"],
    "ytick.labelsize": _FONT_SIZE,
    "xtick.major.pad": 5,
    "ytick.major.pad": 7,
    "ytick.major.size": 0,
    "legend.fontsize": _FONT_SIZE,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}
styled = style.context(["default", _STYLE])


def format_share(share: float, num_digits: int = 1) -> str:
    """Format a share from 0 to 1 in per cent, with a space that does not break."""
    return f"{100 * share:.{num_digits}f}\N{NO-BREAK SPACE}%"


def format_points(difference: float, num_digits: int = 1) -> str:
    """Format a difference of shares in percentage points, with its sign and a real minus."""
    return f"{100 * difference:+.{num_digits}f}".replace("-", "\N{MINUS SIGN}")


@styled
def share_dots(rows: Mapping[str, Mapping[str, float]], name: str, x_label: str, chance: float | None = None) -> str:
    """
    Shares with their intervals, one below another.

    Args:
        rows (`Mapping[str, Mapping[str, float]]`):
            Title → the shares `"estimate"`, `"low"` and `"high"`.
        name (`str`):
            Prefix of ids on the page. The dots are the group `NAME-accuracy`, the intervals `NAME-accuracy-intervals`.
        x_label (`str`):
            What the shares are of.
        chance (`float`, *optional*):
            Share that guessing would give: a line, `NAME-chance`.
    """
    figure, axes = _dot_axes(rows)
    if chance is not None:
        axes.axvline(chance, color=COLORS["quiet"], linestyle=(0, (4, 3)), linewidth=1.2, gid="chance")
        axes.annotate("chance", (chance, 1), xycoords=("data", "axes fraction"), xytext=(0, 5),
                      textcoords="offset points", ha="center", color=COLORS["quiet"])  # fmt: skip
    _plot_dots(axes, rows, format_share)
    set_share_axis(axes.xaxis, spacing=0.5)
    axes.set_xlabel(x_label)
    axes.grid(visible=False, axis="y")
    label = f"Dot plot with 95 % intervals. Share of {x_label}"
    label += "" if chance is None else f", chance at {format_share(chance, 0)}"
    label += ": " + "; ".join(f"{title} {format_share(row['estimate'])}" for title, row in rows.items())
    return to_svg(figure, name, label + ".")


@styled
def difference_dots(rows: Mapping[str, Mapping[str, float]], name: str, x_label: str) -> str:
    """
    Differences of shares with their intervals, one below another, and a line at zero; arguments as for [`share_dots`].
    """
    figure, axes = _dot_axes(rows)
    axes.axvline(0, color=COLORS["quiet"], linestyle=(0, (4, 3)), linewidth=1.2, gid="none")
    _plot_dots(axes, rows, format_points)
    most = max(0.02, *(abs(row[end]) for row in rows.values() for end in ("low", "high")))
    axes.set_xlim(-1.05 * most, 1.05 * most)
    axes.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: format_points(share, 0)))
    axes.set_xlabel(x_label)
    axes.grid(visible=False, axis="y")
    label = f"Dot plot with 95 % intervals. {x_label}: "
    label += "; ".join(f"{title} {format_points(row['estimate'])}" for title, row in rows.items())
    return to_svg(figure, name, label + ".")


def _dot_axes(rows: Mapping[str, Mapping[str, float]]) -> tuple[Figure, Axes]:
    """Makes axes with a line for each row; titles are next to the lines, or above them if they are long."""
    longest = max(map(len, rows))
    is_beside = longest <= _LONGEST_TITLE
    figure, axes = new_figure(
        height=88 + (36 if is_beside else 50) * len(rows),
        left=10 + 8 * longest if is_beside else 14,
        right=66,
        top=28 if is_beside else 40,
        bottom=48,
    )
    axes.set_yticks(range(len(rows)), list(rows) if is_beside else [""] * len(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for position, title in enumerate(() if is_beside else rows):
        axes.annotate(
            title, (0, position), xycoords=("axes fraction", "data"), xytext=(-10, 9), textcoords="offset points",
            color=COLORS["quiet"],
        )  # fmt: skip
    return figure, axes


def _plot_dots(axes: Axes, rows: Mapping[str, Mapping[str, float]], as_text: Callable[[float], str]) -> None:
    plot_intervals(
        axes, list(rows.values()), list(range(len(rows))), "accuracy", color="accent", marker="o", is_filled=True
    )
    for position, row in enumerate(rows.values()):
        axes.annotate(
            as_text(row["estimate"]), (1, position), xycoords=("axes fraction", "data"), xytext=(12, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip


@styled
def reliability_diagram(bins: Sequence[Mapping[str, float]], name: str = "calibration") -> str:
    """
    The accuracy of a reward model by its confidence, for bins with `"confidence"` from 0.5 to 1, `"accuracy"` from 0 to 1, and
    `"num_pairs"`, at least one. A larger dot stands for more pairs. The bins are the group `NAME-bins`, the diagonal `NAME-diagonal`.
    """
    figure, axes = new_figure(height=290, left=58, bottom=50)
    axes.plot([0.5, 1], [0.5, 1], color=COLORS["quiet"], linestyle=(0, (4, 3)), linewidth=1.2, gid="diagonal")
    axes.annotate("calibrated", (0.68, 0.68), xytext=(-6, 6), textcoords="offset points", ha="right",
                  color=COLORS["quiet"])  # fmt: skip
    largest = max(row["num_pairs"] for row in bins)
    areas = [20 + 160 * row["num_pairs"] / largest for row in bins]
    confidence, accuracy = ([row[key] for row in bins] for key in ("confidence", "accuracy"))
    axes.scatter(
        confidence, accuracy, areas, color=COLORS["accent"], alpha=0.85, linewidths=0, clip_on=False, zorder=3,
        gid="bins",
    )  # fmt: skip
    axes.set_xlim(0.5, 1)
    axes.xaxis.set_major_locator(MultipleLocator(0.1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: format_share(share, 0)))
    set_share_axis(axes.yaxis)
    axes.set_xlabel("confidence in the preferred order")
    axes.grid(visible=False, axis="x")
    label = "Reliability diagram. Confidence and share of pairs ranked correctly: "
    label += "; ".join(f"{format_share(row['confidence'])} and {format_share(row['accuracy'])}" for row in bins)
    return to_svg(figure, name, label + ".")


def new_figure(*, height: int, left: int, right: int = 26, top: int = 14, bottom: int = 44) -> tuple[Figure, Axes]:
    """A figure and its axes, with margins in pixels: panels of equal margins are aligned."""
    figure = Figure(figsize=(_WIDTH / 72, height / 72), facecolor="none")
    inner = (left / _WIDTH, bottom / height, 1 - (left + right) / _WIDTH, 1 - (top + bottom) / height)
    axes = figure.add_axes(inner, facecolor="none")
    axes.tick_params(axis="y", labelcolor=COLORS["ink"])
    return figure, axes


def plot_intervals(
    axes: Axes, rows: Sequence[Mapping[str, float]], positions: Sequence[float], gid: str,
    *, color: str, marker: str, is_filled: bool,
) -> None:  # fmt: skip
    """
    Plots estimates and their intervals, one per row.

    Args:
        axes (`matplotlib.axes.Axes`):
            Axes to draw on.
        rows (`Sequence[Mapping[str, float]]` of length `n`):
            `"estimate"`, `"low"` and `"high"`, in units of the horizontal axis.
        positions (`Sequence[float]` of length `n`):
            Their places on the vertical axis.
        gid (`str`):
            Id of the dots; that of the intervals ends in `-intervals`.
        color (`str`), marker (`str`), is_filled (`bool`):
            Name in `COLORS`, shape of the dots, and whether they are filled.
    """
    low, high, estimate = ([row[key] for row in rows] for key in ("low", "high", "estimate"))
    ink = COLORS[color]
    axes.hlines(positions, low, high, color=ink, linewidth=2, gid=f"{gid}-intervals")
    axes.plot(
        estimate, positions, marker, color=ink, markerfacecolor=ink if is_filled else COLORS["paper"], markersize=7,
        markeredgewidth=1.8, label=gid, gid=gid, clip_on=False,
    )  # fmt: skip


def set_share_axis(axis: Axis, spacing: float = 0.25) -> None:
    """Show the whole range of a share, 0 to 1, in per cent."""
    axis.axes.set(**{f"{axis.axis_name}lim": (0, 1)})  # type: ignore[attr-defined]
    axis.set_major_locator(MultipleLocator(spacing))
    axis.set_major_formatter(FuncFormatter(lambda share, _: format_share(share, 0)))


def add_legend(axes: Axes) -> None:
    """Adds the legend as a line above the axes, from the left edge of the figure."""
    transform = blended_transform_factory(axes.figure.transFigure, axes.transAxes)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), bbox_transform=transform, ncols=2, borderpad=0, borderaxespad=1.0,
        handlelength=1.8, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip


def to_svg(figure: Figure, name: str, label: str) -> str:
    """
    Renders the figure as an `<svg>` element that can be on a page with others: ids begin with `name`, colors are the
    page's, text stays text in the page's font, and nothing refers outside.
    """
    buffer = StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    height = re.search(r'viewBox="0 0 \S+ (\S+)"', svg)[1]  # type: ignore[index]
    body = re.search(r"</metadata>(.*)</svg>", svg, flags=re.DOTALL)[1]  # type: ignore[index]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # its selector is *, which would affect the page
    body = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', f"{name}-", body.replace("xlink:href", "href"))
    body = re.sub(r"font: ([\d.]+px) 'DejaVu Sans'[^;\"]*", r"font-size: \1", body)
    for property_name, color in COLORS.items():
        body = body.replace(color, f"var(--{property_name})")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}" stroke-linejoin="round">{body}</svg>'
    )
