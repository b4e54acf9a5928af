"""Make charts: lines and their axes, and quality against measured bytes of a Summary. The numbers only.

svg.py draws them on the page, picture.py as a picture. Both give many lines different colours, dashes and markers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log, log10
from operator import attrgetter
from statistics import fmean

from headwise.report.quality.cells import Overall, Task
from headwise.report.quality.statistics import Estimate
from headwise.report.quality.summary import Summary

BANDED = 6  # lines up to which all bands are drawn: more of them hide each other
LOGARITHMIC = 4.0  # from such a ratio of bytes on
TICKS = 7  # labels of a logarithmic axis, at most
BYTES = "KV bytes, % of the full cache's, measured"
Measure = Callable[[Overall], Estimate | None]
# For people who see colours otherwise: Okabe and Ito's, without their yellow and black, which are lost on some page.
COLOURS, DASHES, MARKERS = 6, 4, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A setting: its share of the bytes, and its quality (in percent, or perplexity). Or a measured time."""

    label: str  # what it is, but for its line
    x: float
    y: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A method, perhaps with the kind of its entries.

    Its number says how it is drawn, the same in all charts of a model. A thin line was not measured.
    """

    method: str
    number: int
    points: tuple[Point, ...]
    thin: bool = False

    @property
    def style(self) -> tuple[int, int, int]:
        """Numbers of colour, dash and marker; no two of a hundred lines share all of them."""
        return self.number % COLOURS, self.number // COLOURS % DASHES, self.number % MARKERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Lines, the best first, and the full cache's value."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    full: Estimate | None = None
    x_label: str = BYTES
    loglog: bool = False

    @property
    def named(self) -> tuple[Line, ...]:
        """The first line of every number; only these show their names."""
        first_by_number = {line.number: line for line in reversed(self.lines)}
        return tuple(line for line in self.lines if first_by_number[line.number] is line)

    @property
    def banded(self) -> bool:
        """Whether there is room for all intervals."""
        return len(self.lines) <= BANDED

    @property
    def x_range(self) -> tuple[float, float]:
        """Ends of the horizontal axis: a little more than the points take."""
        xs = [point.x for line in self.lines for point in line.points]
        low, high = min(xs), max(xs)
        if self.logarithmic:
            return low / 1.06, high * 1.06
        margin = max(0.04 * (high - low), (0.2 * high - (high - low)) / 2)  # no microscope on settings of one keep
        return low - margin, high + margin

    @property
    def logarithmic(self) -> bool:
        """Whether the horizontal axis is logarithmic: keeps are often halved."""
        if self.loglog:
            return True
        xs = [point.x for line in self.lines for point in line.points]
        return min(xs) > 0 and max(xs) >= LOGARITHMIC * min(xs)

    @property
    def y_range(self) -> tuple[float, float]:
        """Ends of the vertical axis: a little more than the points and their intervals take."""
        estimates = [point.y for line in self.lines for point in line.points]
        estimates += [self.full] if self.full else []
        ys = [end for estimate in estimates for end in (estimate.value, estimate.low, estimate.high) if end is not None]
        if self.loglog:
            return min(ys) / 1.15, max(ys) * 1.15
        margin = 0.04 * (max(ys) - min(ys)) or 0.05 * abs(max(ys)) or 1.0
        return min(ys) - margin, max(ys) + margin

    @property
    def x_ticks(self) -> list[float]:
        """Labels of the horizontal axis: the points' own values, if they are few and both axes are logarithmic."""
        xs = sorted({point.x for line in self.lines for point in line.points})
        if self.loglog and len(xs) <= TICKS:
            return xs
        return log_ticks(*self.x_range) if self.logarithmic else ticks(*self.x_range)

    @property
    def y_ticks(self) -> list[float]:
        """Labels of the vertical axis."""
        return log_ticks(*self.y_range) if self.loglog else ticks(*self.y_range)

    def x_share(self, value: float) -> float:
        """Return where on the horizontal axis a value is, from 0 to 1."""
        return _share(value, self.x_range, self.logarithmic)

    def y_share(self, value: float) -> float:
        """Return where on the vertical axis a value is, from 0 to 1."""
        return _share(value, self.y_range, self.loglog)


def _share(value: float, ends: tuple[float, float], logarithmic: bool) -> float:
    scale = log if logarithmic else float
    low, high = map(scale, ends)
    return (scale(value) - low) / (high - low)


def charts(summary: Summary) -> list[Chart]:
    """Return charts of the mean score, its share of the full cache's, and mean perplexity, of those that are known."""
    scored, predicted = summary.scored, summary.predicted
    drawn = [
        Chart(
            title=f"Mean score {_over(scored)}, %",
            unit="%",
            lines=_lines(summary, scored, attrgetter("score"), 100.0),
            full=_of_full_cache(summary, attrgetter("score"), 100.0),
        ),
        Chart(
            title="The same, % of the full cache's score",
            unit="% of the full cache's score",
            lines=_lines(summary, scored, attrgetter("of_full"), 100.0),
            full=_of_full_cache(summary, attrgetter("of_full"), 100.0),
        ),
        Chart(
            title=f"Perplexity {_over(predicted)} (less is better)",
            unit="perplexity",
            lines=_lines(summary, predicted, attrgetter("perplexity"), 1.0)[::-1],
            full=_of_full_cache(summary, attrgetter("perplexity"), 1.0),
        ),
    ]
    return [chart for chart in drawn if chart.lines]


def _over(tasks: Sequence[Task]) -> str:
    return f"over {len(tasks)} tasks" if len(tasks) > 1 else "on one task"


def _of_full_cache(summary: Summary, get: Measure, factor: float) -> Estimate | None:
    estimate = get(summary.full) if summary.full else None
    return estimate.times(factor) if estimate else None


def _lines(summary: Summary, tasks: Sequence[Task], get: Measure, factor: float) -> tuple[Line, ...]:
    """Return the lines of all methods, from the highest to the lowest."""
    lines = []
    for number, curve in enumerate(summary.curves):
        points = []
        for setting in map(curve.at, summary.keeps):
            estimate = get(summary.overall[setting]) if setting in summary.overall else None
            if estimate:
                x = 100 * summary.kv_fraction(setting, tasks)
                label = f"keep {setting.keep}, {x:.3g}% of the bytes"
                points.append(Point(label=label, x=x, y=estimate.times(factor)))
        if points:
            points.sort(key=lambda point: point.x)
            lines.append(Line(method=curve.name, number=number, points=tuple(points)))
    return tuple(sorted(lines, key=lambda line: -fmean(point.y.value for point in line.points)))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers within a range, at most so many."""
    rough = (high - low) / most
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [number * step for number in range(ceil(low / step), floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 of every decade within a range; other round numbers if it is short, powers of ten if long."""
    powers = [10.0**decade for decade in range(floor(log10(low)), ceil(log10(high)) + 1)]
    values = [digit * power for power in powers for digit in (1, 2, 5) if low <= digit * power <= high]
    if len(values) < 2:
        return ticks(low, high)
    return values if len(values) <= TICKS else [power for power in powers if low <= power <= high]
