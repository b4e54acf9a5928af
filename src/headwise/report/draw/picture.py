"""Draw a report's charts as a picture, for a paper or a README. Needs matplotlib; results.py can do without it."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from statistics import fmean
from textwrap import fill, shorten
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from headwise.report.draw.charts import Chart, Line

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e1",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a model's name may hold a dollar sign
}
COLOURS = ("#0072b2", "#d55e00", "#00825f", "#b5539b", "#b07d00", "#3a9bd9")  # the page's, on white
DASHES = ("-", (0, (4, 2)), (0, (1, 1.4)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "os^Dv"
INK = "#1a1a19"
WIDTH, HEIGHT, AROUND, LABEL = 6.4, 3.0, 0.9, 0.16  # inches: a chart with labels, its axes, what is around, a label


def draw(charts: Mapping[str, Sequence[Chart]]) -> bytes:
    """Return a PNG: models down, charts across."""
    rows = {name: row for name, row in charts.items() if row}
    columns = max(map(len, rows.values()), default=1)
    heights = [max(HEIGHT, LABEL * len(row[0].lines)) for row in rows.values()]
    with matplotlib.rc_context(STYLE):
        size = columns * WIDTH, sum(heights) + AROUND * len(heights) or HEIGHT
        figure = Figure(figsize=size, layout="constrained")
        ratios = [height + AROUND for height in heights]
        if not rows:
            figure.text(0.5, 0.5, "There is no curve to draw; see the tables.", ha="center")
        for index, (name, row) in enumerate(rows.items()):
            part = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=ratios)[index, 0]
            part.suptitle(fill(name, int(14 * size[0])), fontsize=10, fontweight="bold", x=0.01, ha="left")
            grid = part.subplots(1, columns, squeeze=False)[0]
            for axes, chart in zip(grid, row, strict=False):
                _chart(axes, chart, LABEL / heights[index])
            for axes in grid[len(row) :]:
                axes.set_visible(False)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=130, facecolor="white")
    return file.getvalue()


def _chart(axes: Axes, chart: Chart, pitch: float) -> None:
    axes.set(title=chart.title, xlabel=chart.x_label)
    axes.set_xscale("log" if chart.logarithmic else "linear")
    axes.set_yscale("log" if chart.loglog else "linear")
    for axis, values in ((axes.xaxis, chart.x_ticks), (axes.yaxis, chart.y_ticks)):
        axis.set_minor_locator(NullLocator())
        axis.set_ticks(values, [f"{value:.7g}" for value in values])
    axes.set(xlim=chart.x_range, ylim=chart.y_range)
    if chart.full:
        y = chart.full.value
        axes.plot(chart.x_range, [y, y], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        place = (chart.x_range[0], y)
        text = axes.annotate(f"full cache {y:.4g}", place, (4, 4), textcoords="offset points", fontsize=8, zorder=5)
        text.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8})
    for line in reversed(chart.lines):  # the best on top
        _line(axes, line, chart.banded)
    _labels(axes, chart, pitch)


def _line(axes: Axes, line: Line, banded: bool) -> None:
    colour, dash, marker = line.style
    x, y = [point.x for point in line.points], [point.y.value for point in line.points]
    if line.thin:
        axes.plot(x, y, color=COLOURS[colour], linestyle=(0, (4, 3)), linewidth=0.9)
        return
    style = {"color": COLOURS[colour], "linestyle": DASHES[dash], "marker": MARKERS[marker]}
    axes.plot(x, y, **style, linewidth=1.4, markersize=4.5)
    intervals = [(p.x, p.y.low, p.y.high) for p in line.points if p.y.low is not None and p.y.high is not None]
    if len(intervals) == 1:
        axes.vlines(*intervals[0], color=COLOURS[colour], alpha=0.5, linewidth=1.2)
    elif banded and intervals:
        xs, low, high = zip(*intervals, strict=True)
        axes.fill_between(xs, low, high, color=COLOURS[colour], alpha=0.14, linewidth=0)


def _labels(axes: Axes, chart: Chart, pitch: float) -> None:
    """Write names at the end of the lines where these are further apart, and move names apart where they meet."""
    left, right = ([chart.y_share(line.points[index].y.value) for line in chart.named] for index in (0, -1))
    on_left = bool(np.ptp(left) >= np.ptp(right))
    index, align = (0, "right") if on_left else (-1, "left")
    room = _make_room(axes, chart, left=on_left)
    edge = room - 0.02 if on_left else 1.02 - room
    lines = sorted(chart.named, key=lambda line: line.points[index].y.value)
    targets = np.array([chart.y_share(line.points[index].y.value) for line in lines])
    for line, place in zip(lines, apart(targets, pitch), strict=True):
        end, colour = line.points[index], COLOURS[line.style[0]]
        arrow = {"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
        arrow |= {"relpos": (float(on_left), 0.5)}
        style = {"color": colour, "fontsize": 8, "va": "center", "ha": align, "arrowprops": arrow}
        axes.annotate(_short(line.method), (end.x, end.y.value), (edge, place), textcoords="axes fraction", **style)


def _make_room(axes: Axes, chart: Chart, *, left: bool) -> float:
    """Make room for names beside the lines, and return its share of the axis."""
    letters = max(len(_short(line.method)) for line in chart.named)
    share = min(0.45, 0.065 * (letters + 4) / WIDTH)
    low, high = np.log(chart.x_range) if chart.logarithmic else np.array(chart.x_range)
    room = (high - low) * share / (1 - share)
    ends = np.array([low - room, high] if left else [low, high + room])
    axes.set_xlim(*(np.exp(ends) if chart.logarithmic else ends))
    return share


def _short(method: str) -> str:
    return shorten(method, 34, placeholder="…") if " " in method else method[:34]


def apart(targets: Float[np.ndarray, " labels"], gap: float) -> Float[np.ndarray, " labels"]:
    """Return places within 0..1, at least a gap from one to the next, as close to the targets as that allows.

    Targets ascend. Those that are too close move away from their middle, with all others that they then meet.
    """
    groups: list[list[float]] = []  # of labels that touch: where the group begins if a label is at its target
    for index, place in enumerate(targets):
        groups.append([place - index * gap])
        while len(groups) > 1 and fmean(groups[-2]) >= fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    starts = np.repeat([fmean(group) for group in groups], [len(group) for group in groups])
    return starts.clip(gap / 2, max(gap / 2, 1 - (len(targets) - 0.5) * gap)) + gap * np.arange(len(targets))
