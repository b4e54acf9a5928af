"""What is drawn of benchmarks: a step's time by tokens, batch and keep; the peak of memory by tokens. The numbers only.

Made from benchmarks.py's sections; svg.py and picture.py draw them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from headwise.report.draw.charts import Chart, Line, Point
from headwise.report.quality.statistics import Estimate
from headwise.report.speed.benchmarks import Row, Section

AXES = ("tokens", "batch", "keep")
FULL = "full"
WHOLE = (FULL, "kvpress")  # what names of candidates that read the whole cache begin with
FLOOR = "memory floor of what is kept"
MIB, GIB = 2**20, 2**30

Value = tuple[str, int | float, float]  # name, x, y


def curves(section: Section) -> dict[str, list[Chart]]:
    """Charts, by what their rows have in common. Only what has more than one value is an axis."""
    draw = {"decode": _steps, "memory": _peaks}.get(section.benchmark)
    return {name: charts for name, charts in draw(section.rows).items() if charts} if draw else {}


def name_of(row: Row) -> str:
    """The line that a row belongs to. Of a layer's step the keep may be the axis."""
    measures_step = row["benchmark"] == "decode" or row["candidate"] == FULL
    return row["candidate"] if measures_step else f"{row['candidate']}, keep {row['keep']:g}"


def numbers_of(rows: Iterable[Row]) -> dict[str, int]:
    """Numbers of a section's lines."""
    return {name: number for number, name in enumerate(dict.fromkeys([*map(name_of, rows), FLOOR]))}


def _steps(rows: Sequence[Row]) -> dict[str, list[Chart]]:
    numbers = numbers_of(rows)
    return {
        f"{dtype}, {_threads(threads)}": [chart for axis in AXES if (chart := _step(part, axis, numbers))]
        for (dtype, threads), part in _grouped(rows, ("dtype", "threads")).items()
    }


def _step(rows: Sequence[Row], axis: str, numbers: Mapping[str, int]) -> Chart | None:
    same = _most(rows, [*(other for other in AXES if other != axis), "skewed"])
    if len({row[axis] for row in same}) < 2:
        return None
    first = same[0]
    held = {
        "tokens": f"{first['tokens']:,} tokens",
        "batch": f"batch {first['batch']}",
        "keep": f"keep {first['keep']:g}",
    }
    said = ", ".join([*(text for other, text in held.items() if other != axis), heads(first["skewed"])])
    floors = [(FLOOR, row[axis], row["floor_ms"]) for row in same if not row["candidate"].startswith(WHOLE)]
    return Chart(
        title=f"Step by {axis}, ms ({said})",
        unit="ms",
        lines=(
            *_lines([(name_of(row), row[axis], row["ms"]) for row in same], numbers, axis),
            *_lines(floors, numbers, axis, thin=True),
        ),
        x_label=axis,
        loglog=True,
    )


def heads(skewed: bool) -> str:
    """How what is kept is spread over the heads."""
    return "skewed" if skewed else "even"


def _peaks(rows: Sequence[Row]) -> dict[str, list[Chart]]:
    numbers = numbers_of(rows)
    return {
        f"{model}, {dtype}": [chart] if (chart := _peak(part, numbers)) else []
        for (model, dtype), part in _grouped(rows, ("model", "dtype")).items()
    }


def _peak(rows: Sequence[Row], numbers: Mapping[str, int]) -> Chart | None:
    """Measured peaks, and what would be left of the full cache's if all were saved that a cache claims to."""
    same = [row for row in _most(rows, ("batch", "threads", "new_tokens")) if row["peak_bytes"] > 0]
    if len({row["tokens"] for row in same}) < 2:
        return None
    size, unit = (GIB, "GiB") if max(row["peak_bytes"] for row in same) >= 1000 * MIB else (MIB, "MiB")
    saving = [row for row in same if row["saved_bytes"] is not None and row["claimed_saved_bytes"] is not None]
    left = [(row, row["peak_bytes"] + row["saved_bytes"] - row["claimed_saved_bytes"]) for row in saving]
    claimed = [(name_of(row), row["tokens"], peak / size) for row, peak in left if peak > 0]
    held = f"batch {same[0]['batch']}, {same[0]['new_tokens']:,} new tokens, {_threads(same[0]['threads'])}"
    return Chart(
        title=f"Peak by tokens, {unit} ({held})" + ("; dashed: as claimed" if claimed else ""),
        unit=unit,
        lines=(
            *_lines([(name_of(row), row["tokens"], row["peak_bytes"] / size) for row in same], numbers, "tokens"),
            *_lines(claimed, numbers, "tokens", thin=True),
        ),
        x_label="tokens",
        loglog=True,
    )


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def _grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return found


def _most(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows whose values of these fields most rows have; of equally many the first."""
    return max(_grouped(rows, names).values(), key=len)


def _lines(values: Iterable[Value], numbers: Mapping[str, int], axis: str, *, thin: bool = False) -> tuple[Line, ...]:
    """In the order of their numbers; what was measured several times is a median."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, x, y in values:
        found[name][x].append(y)
    return tuple(
        Line(
            method=name if name == FLOOR or not thin else f"{name}, as claimed",
            number=numbers[name],
            points=tuple(
                Point(label=f"{axis} {x:,}", x=float(x), y=Estimate(value=median(ys))) for x, ys in sorted(of.items())
            ),
            thin=thin,
        )
        for name, of in sorted(found.items(), key=lambda item: numbers[item[0]])
    )
