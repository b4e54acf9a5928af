"""What the tables of a report say: the best, quality, fidelity, cost.

Made from a Summary; results.py writes them as Markdown, page.py puts them on the page.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from headwise.report.draw.markup import NONE, Entry, Table
from headwise.report.quality.cells import Overall
from headwise.report.quality.records import NO_METHODS, ORACLE
from headwise.report.quality.statistics import Estimate, Setting
from headwise.report.quality.summary import Summary

Measure = Callable[[Overall], Estimate | None]
NAMED = 3  # methods that are named where more are equally good


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """How an estimate is written, and whether less is better."""

    factor: float = 1.0
    decimals: int
    low: bool = False

    def entry(self, found: Estimate) -> Entry:
        """Value and interval."""
        ends = [self._written(end) for end in (found.low, found.high) if end is not None]
        return Entry(text=self._written(found.value), margin=" to ".join(ends) or NONE)

    def _written(self, value: float) -> str:
        return f"{self.factor * value:.{self.decimals}f}"

    def best(self, found: Sequence[Estimate]) -> Estimate | None:
        """The best of some."""
        return (min if self.low else max)(found, key=attrgetter("value"), default=None)


PERCENT = Style(factor=100.0, decimals=1)
PERPLEXITY = Style(decimals=2, low=True)
DIVERGENCE = Style(decimals=3, low=True)


def headline(summary: Summary) -> Table:
    """The best method at every keep, by its mean."""
    score: Measure = attrgetter("score" if summary.scored else "perplexity")
    style, rows = PERCENT if summary.scored else PERPLEXITY, []
    for keep in summary.keeps:
        methods = [setting for setting in summary.settings(keep) if setting.method not in NO_METHODS]
        found = {setting: known for setting in methods if (known := score(summary.overall[setting]))}
        best = style.best([*found.values()])
        if best is None:
            continue
        winners = [setting for setting, known in found.items() if known.value == best.value]
        names = ", ".join(setting.method for setting in winners[:NAMED])
        more = f" and {len(winners) - NAMED} more" if len(winners) > NAMED else ""
        fraction = summary.kv_fraction(winners[0], summary.scored or summary.predicted)
        share = summary.overall[winners[0]].of_full
        value = style.entry(best), PERCENT.entry(share) if share else Entry()
        rows.append((keep, (Entry(text=names + more), Entry(text=f"{100 * fraction:.1f}"), *value)))
    columns = ("best method", "KV bytes, %", "score, %" if summary.scored else "perplexity", "of full, %")
    return Table(title="The best at every keep", columns=columns, rows=tuple(rows), first="keep")


def quality(summary: Summary, keep: str) -> Table:
    """Methods by tasks at one keep, the full cache for comparison."""
    settings = summary.settings(keep)
    overall = [summary.overall[setting] for setting in settings]
    columns = {"KV bytes, %": [Entry(text=f"{100 * found.cost.kv_fraction:.1f}") for found in overall]}
    if len(summary.scored) > 1:
        columns[f"mean of {len(summary.scored)}"] = _entries([one.score for one in overall], settings, PERCENT)
    if summary.full and summary.full.of_full:
        whole, *shares = _entries([one.of_full for one in overall], settings, PERCENT)
        columns["of full, %"] = [replace(whole, margin=""), *shares]
    if len(summary.predicted) > 1:
        heading = f"mean of {len(summary.predicted)}, perplexity ↓"
        columns[heading] = _entries([one.perplexity for one in overall], settings, PERPLEXITY)
    for task in summary.tasks:
        cells = [summary.cells.get((setting, task)) for setting in settings]
        style, heading = (PERPLEXITY, f"{task.label} ↓") if task.perplexity else (PERCENT, task.label)
        columns[heading] = _entries([cell and cell.quality for cell in cells], settings, style)
    return _table(f"Scores in % at keep {keep}", settings, columns)


def fidelity(summary: Summary) -> list[Table]:
    """How close predictions are to the full cache's, where that was measured."""
    agreement, divergence, tables = "Tokens of the full cache's answers", "KL divergence from the full cache", []
    for title, get, style in (
        (f"{agreement} that are predicted too, %", attrgetter("agreement"), PERCENT),
        (f"{divergence}, nats per token ↓", attrgetter("kl"), DIVERGENCE),
    ):
        columns = {}
        for keep in summary.keeps:
            settings = [Setting(method, keep) for method in summary.methods]
            found = [get(summary.overall[setting]) if setting in summary.overall else None for setting in settings]
            if any(found):
                columns[f"keep {keep}"] = _entries(found, settings, style)
        if columns:
            tables.append(_table(title, [Setting(method, "") for method in summary.methods], columns))
    return tables


def cost(summary: Summary, keep: str) -> Table:
    """Measured memory and time at one keep, with bars."""
    settings = summary.settings(keep)
    found = [summary.overall[setting].cost for setting in settings]
    most = max(max(one.peak_kv_bytes, one.kv_bytes) for one in found)
    columns = {
        "KV cache": _bars([one.kv_bytes for one in found], size, most),
        "peak while reading": _bars([one.peak_kv_bytes for one in found], size, most),
        "decoding step, ms": _bars([one.step_ms for one in found], "{:.2f}".format),
        "prefill, s": _bars([one.prefill_seconds for one in found], "{:.3g}".format),
        "prefill shared by": [Entry(text=f"{one.prefill_shared_by:.3g}") for one in found],
    }
    return _table(f"Memory and time at keep {keep}", settings, columns)


def size(number: int | float) -> str:
    """Bytes, as MiB or whatever fits."""
    unit = 0
    while abs(number) >= 1000 and unit < 4:
        number, unit = number / 1024, unit + 1
    return f"{number:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def _table(title: str, settings: Sequence[Setting], columns: Mapping[str, Sequence[Entry]]) -> Table:
    rows = zip(*columns.values(), strict=True)
    return Table(
        title=title,
        columns=tuple(columns),
        rows=tuple((_row_name(setting), entries) for setting, entries in zip(settings, rows, strict=True)),
    )


def _row_name(setting: Setting) -> str:
    return f"{ORACLE} (sees the answers)" if setting.method == ORACLE else setting.method


def _bars(values: Sequence[float | None], say: Callable[[float], str], most: float = 0.0) -> list[Entry]:
    most = most or max((value for value in values if value), default=1.0)
    return [Entry() if value is None else Entry(text=say(value), share=value / most) for value in values]


def _entries(found: Sequence[Estimate | None], settings: Sequence[Setting], style: Style) -> list[Entry]:
    """The best of several methods is marked, and whose interval overlaps its own; yardsticks are no methods."""
    methods = [one for one, setting in zip(found, settings, strict=True) if one and setting.method not in NO_METHODS]
    best = style.best(methods) if len(methods) > 1 else None
    return [
        _marked(style.entry(one), one, best if setting.method not in NO_METHODS else None) if one else Entry()
        for one, setting in zip(found, settings, strict=True)
    ]


def _marked(entry: Entry, found: Estimate, best: Estimate | None) -> Entry:
    if best is None:
        return entry
    wins = found.value == best.value
    return replace(entry, best=wins, close=not wins and _overlap(found, best))


def _overlap(one: Estimate, other: Estimate) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high
