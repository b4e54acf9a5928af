"""Make charts of benchmarks: a step's time by tokens, batch and keep; the peak of memory by tokens. Numbers only.

Made from benchmarks.py's sections; svg.py and picture.py draw them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from headwise.report.draw.charts import Chart, Line, Point
from headwise.report.quality.statistics import Estimate
from headwise.report.speed.benchmarks import NATIVE, Row, Section

AXES = ("tokens", "batch", "keep")
FULL = "full"
READS_ALL = (FULL, "kvpress")  # what names of candidates that read the whole cache begin with
FLOOR = "memory floor of what is kept"
MIB, GIB = 2**20, 2**30

Value = tuple[str, int | float, float]  # name, x, y


def curves(section: Section) -> dict[str, list[Chart]]:
    """Return charts, by what their rows have in common. A field with a single value is no axis."""
    draw = {"decode": _steps, "memory": _peaks}.get(section.benchmark)
    return {name: charts for name, charts in draw(section.rows).items() if charts} if draw else {}


def name_of(row: Row) -> str:
    """Return the name of the line that a row belongs to. For a layer's step the keep may be the axis."""
    measures_step = row["benchmark"] == "decode" or row["candidate"] == FULL
    name = row["candidate"] if measures_step else f"{row['candidate']}, keep {row['keep']:g}"
    entries = row.get("entries")
    return name if entries in (None, NATIVE) else f"{name}, {entries}"


def numbers_of(rows: Iterable[Row]) -> dict[str, int]:
    """Return the numbers of a section's lines, by their names."""
    return {name: number for number, name in enumerate(dict.fromkeys([*map(name_of, rows), FLOOR]))}


def _steps(rows: Sequence[Row]) -> dict[str, list[Chart]]:
    numbers = numbers_of(rows)
    return {
        f"{dtype}, {_threads(threads)}": [chart for axis in AXES if (chart := _step(part, axis, numbers))]
        for (dtype, threads), part in _group(rows, ("dtype", "threads")).items()
    }


def _step(rows: Sequence[Row], axis: str, numbers: Mapping[str, int]) -> Chart | None:
    comparable = _largest_group(rows, [*(name for name in AXES if name != axis), "skewed"])
    if len({row[axis] for row in comparable}) < 2:
        return None
    first = comparable[0]
    held = {
        "tokens": f"{first['tokens']:,} tokens",
        "batch": f"batch {first['batch']}",
        "keep": f"keep {first['keep']:g}",
    }
    fixed = ", ".join([*(text for name, text in held.items() if name != axis), heads(first["skewed"])])
    kept = [
        row for row in comparable if not row["candidate"].startswith(READS_ALL) and row["entries"] in (None, NATIVE)
    ]
    floors = [(FLOOR, row[axis], row["floor_ms"]) for row in kept]
    return Chart(
        title=f"Step by {axis}, ms ({fixed})",
        unit="ms",
        lines=(
            *_lines([(name_of(row), row[axis], row["ms"]) for row in comparable], numbers, axis),
            *_lines(floors, numbers, axis, thin=True),
        ),
        x_label=axis,
        loglog=True,
    )


def heads(skewed: bool) -> str:
    """Return how kept entries are spread over the heads, as a word."""
    return "skewed" if skewed else "even"


def _peaks(rows: Sequence[Row]) -> dict[str, list[Chart]]:
    numbers = numbers_of(rows)
    return {
        f"{model}, {dtype}": [chart] if (chart := _peak(part, numbers)) else []
        for (model, dtype), part in _group(rows, ("model", "dtype")).items()
    }


def _peak(rows: Sequence[Row], numbers: Mapping[str, int]) -> Chart | None:
    """Return a chart of measured peaks, and of the full cache's peak less what a cache claims to save."""
    comparable = [row for row in _largest_group(rows, ("batch", "threads", "new_tokens")) if row["peak_bytes"] > 0]
    if len({row["tokens"] for row in comparable}) < 2:
        return None
    size, unit = (GIB, "GiB") if max(row["peak_bytes"] for row in comparable) >= 1000 * MIB else (MIB, "MiB")
    saving = [row for row in comparable if row["saved_bytes"] is not None and row["claimed_saved_bytes"] is not None]
    peaks = [(row, row["peak_bytes"] + row["saved_bytes"] - row["claimed_saved_bytes"]) for row in saving]
    claimed = [(name_of(row), row["tokens"], peak / size) for row, peak in peaks if peak > 0]
    first = comparable[0]
    held = f"batch {first['batch']}, {first['new_tokens']:,} new tokens, {_threads(first['threads'])}"
    return Chart(
        title=f"Peak by tokens, {unit} ({held})" + ("; dashed: as claimed" if claimed else ""),
        unit=unit,
        lines=(
            *_lines([(name_of(row), row["tokens"], row["peak_bytes"] / size) for row in comparable], numbers, "tokens"),
            *_lines(claimed, numbers, "tokens", thin=True),
        ),
        x_label="tokens",
        loglog=True,
    )


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def _group(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def _largest_group(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Return the largest group of rows with equal values of these fields; the first of equally large ones."""
    return max(_group(rows, names).values(), key=len)


def _lines(values: Iterable[Value], numbers: Mapping[str, int], axis: str, *, thin: bool = False) -> tuple[Line, ...]:
    """Return lines in the order of their numbers. Several measurements of one point give their median."""
    by_name: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, x, y in values:
        by_name[name][x].append(y)
    return tuple(
        Line(
            method=name if name == FLOOR or not thin else f"{name}, as claimed",
            number=numbers[name],
            points=tuple(
                Point(label=f"{axis} {x:,}", x=float(x), y=Estimate(value=median(ys)))
                for x, ys in sorted(ys_by_x.items())
            ),
            thin=thin,
        )
        for name, ys_by_x in sorted(by_name.items(), key=lambda item: numbers[item[0]])
    )
