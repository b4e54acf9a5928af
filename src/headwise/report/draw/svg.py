"""Draw charts as inline SVG. Colours are the page's variables, so that they follow its light or dark theme.

All elements of a line carry `data-m`, by which the page's script singles it out.
"""

from collections.abc import Sequence
from html import escape

from headwise.report.draw.charts import Chart, Line, Point
from headwise.report.quality.statistics import Estimate

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 56
# Around (0, 0): circle, square, triangle, diamond, triangle on its tip. The page's style makes them larger.
MARKERS = (
    "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "M-.9-.9h1.8v1.8h-1.8z",
    "M0-1.15l1.1 1.9h-2.2z",
    "M0-1.3l1.15 1.3l-1.15 1.3l-1.15-1.3z",
    "M0 1.15l1.1-1.9h-2.2z",
)


class _Place:
    """Places of values on the drawing."""

    def __init__(self, chart: Chart):
        self.chart = chart

    def x(self, value: float) -> str:
        return f"{LEFT + self.chart.x_share(value) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        return f"{HEIGHT - BOTTOM - self.chart.y_share(value) * (HEIGHT - TOP - BOTTOM):.1f}"


def draw(chart: Chart) -> str:
    """Return a figure with its title."""
    place = _Place(chart)
    lines = "".join(_line(line, place, chart.unit) for line in reversed(chart.lines))  # the best on top
    banded = " banded" if chart.banded else ""
    return (
        f'<figure class="chart{banded}"><figcaption>{escape(chart.title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
        f"{_axes(chart, place)}{_full(chart.full, place)}{lines}{_label(chart.full, place)}</svg></figure>"
    )


def legend(lines: Sequence[Line]) -> str:
    """Return a button for every line."""
    return "".join(
        f'<button type="button" data-m="{line.number}" aria-pressed="false">'
        f'<svg viewBox="0 0 40 14" aria-hidden="true"><path class="line {_stroke(line)}" d="M1 7H39"/>'
        f"{_mark(line, '20', '7')}</svg><span>{escape(line.method).replace('+', '+<wbr>')}</span></button>"
        for line in lines
    )


def _axes(chart: Chart, place: _Place) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for value in chart.y_ticks:
        y = place.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y}" dy=".35em" text-anchor="end">{value:.6g}</text>')
    for value in chart.x_ticks:
        x = place.x(value)
        parts.append(f'<path class="grid" d="M{x} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 7}" dy=".8em" text-anchor="middle">{value:.7g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    return "".join(parts)


def _full(full: Estimate | None, place: _Place) -> str:
    if full is None:
        return ""
    y, edge = place.y(full.value), WIDTH - RIGHT
    band = ""
    if full.low is not None and full.high is not None:
        high, low = place.y(full.high), place.y(full.low)
        band = f'<path class="band ink" d="M{LEFT} {high}H{edge}V{low}H{LEFT}z"/>'
    return f'<g class="full">{band}<path class="line ink" d="M{LEFT} {y}H{edge}"/></g>'


def _label(full: Estimate | None, place: _Place) -> str:
    """Return the label of the full cache. It is on top of the lines, or nobody could read it."""
    if full is None:
        return ""
    y = place.y(full.value)
    return f'<g class="full"><text x="{LEFT + 6}" y="{y}" dy="-.4em">full cache {full.value:.4g}</text></g>'


def _line(line: Line, place: _Place, unit: str) -> str:
    positions = [(place.x(point.x), place.y(point.y.value)) for point in line.points]
    path = "M" + "L".join(f"{x} {y}" for x, y in positions)
    tips = [_tip(line, point, unit) for point in line.points]
    marks = "".join(_mark(line, x, y, tip) for (x, y), tip in zip(positions, tips, strict=True))
    return (
        f'<g class="m" data-m="{line.number}">{_band(line, place)}<path class="hit" d="{path}">'
        f'<title>{escape(line.method)}</title></path><path class="line {_stroke(line)}" d="{path}"/>{marks}</g>'
    )


def _band(line: Line, place: _Place) -> str:
    """Return the intervals of a line as a band, or as whiskers if there is a single point."""
    ends = [(place.x(p.x), p.y.low, p.y.high) for p in line.points]
    bounds = [(x, place.y(low), place.y(high)) for x, low, high in ends if low is not None and high is not None]
    if len(bounds) < 2:
        return "".join(f'<path class="whisker {_stroke(line)}" d="M{x} {low}V{high}"/>' for x, low, high in bounds)
    there = "L".join(f"{x} {high}" for x, _, high in bounds)
    back = "L".join(f"{x} {low}" for x, low, _ in reversed(bounds))
    return f'<path class="band {_stroke(line)}" d="M{there}L{back}z"/>'


def _tip(line: Line, point: Point, unit: str) -> str:
    interval = "" if point.y.low is None else f" ({point.y.low:.4g} to {point.y.high:.4g})"
    return f"{line.method}, {point.label}: {point.y.value:.4g}{interval} {unit}"


def _mark(line: Line, x: str, y: str, tip: str = "") -> str:
    if line.thin:
        return ""
    colour, _, marker = line.style
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<g transform="translate({x} {y})"><path class="mark c{colour}" d="{MARKERS[marker]}">{title}</path></g>'


def _stroke(line: Line) -> str:
    colour, dash, _ = line.style
    return f"c{colour} thin" if line.thin else f"c{colour} d{dash}"
