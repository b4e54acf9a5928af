"""Make the tables of a report: the best methods, quality, fidelity, cost.

Made from a Summary; results.py writes them as Markdown, page.py puts them on the page.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter

from headwise.report.draw.markup import NONE, Entry, Table
from headwise.report.quality.cells import Overall
from headwise.report.quality.records import NATIVE, NO_METHODS, ORACLE
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

    def entry(self, estimate: Estimate) -> Entry:
        """Return value and interval as a table's entry."""
        ends = [self._written(end) for end in (estimate.low, estimate.high) if end is not None]
        return Entry(text=self._written(estimate.value), margin=" to ".join(ends) or NONE)

    def _written(self, value: float) -> str:
        return f"{self.factor * value:.{self.decimals}f}"

    def rank(self, estimate: Estimate) -> float:
        """Return a number that is the less, the better an estimate is."""
        return estimate.value if self.low else -estimate.value

    def best(self, estimates: Sequence[Estimate]) -> Estimate | None:
        """Return the best of some; None if there is none."""
        return min(estimates, key=self.rank, default=None)


PERCENT = Style(factor=100.0, decimals=1)
PERPLEXITY = Style(decimals=2, low=True)
DIVERGENCE = Style(decimals=3, low=True)


def headline(summary: Summary) -> Table:
    """Return the best method at every keep, by its mean; of every kind of entries by itself."""
    (score, style), rows = _judged_by(summary), []
    kinds = dict.fromkeys(curve.entries for curve in summary.curves)
    for keep, entries in product(summary.keeps, kinds):
        methods = [s for s in summary.settings(keep) if s.method not in NO_METHODS and s.entries == entries]
        estimates = {setting: estimate for setting in methods if (estimate := score(summary.overall[setting]))}
        best = style.best([*estimates.values()])
        if best is None:
            continue
        winners = [setting for setting, estimate in estimates.items() if estimate.value == best.value]
        names = ", ".join(setting.method for setting in winners[:NAMED])
        more = f" and {len(winners) - NAMED} more" if len(winners) > NAMED else ""
        fraction = summary.kv_fraction(winners[0], summary.scored or summary.predicted)
        share = summary.overall[winners[0]].of_full
        value = style.entry(best), PERCENT.entry(share) if share else Entry()
        name = keep if entries == NATIVE else f"{keep}, {entries}"
        rows.append((name, (Entry(text=names + more), Entry(text=f"{100 * fraction:.1f}"), *value)))
    columns = ("best method", "KV bytes, %", "score, %" if summary.scored else "perplexity", "of full, %")
    return Table(title="The best at every keep", columns=columns, rows=tuple(rows), first="keep")


def frontier(summary: Summary) -> list[Table]:
    """Return settings that no other one matches in fewer bytes, if entries are stored in several ways."""
    score, style = _judged_by(summary)
    tasks, found = summary.scored or summary.predicted, []
    for setting, result in summary.overall.items():
        estimate = score(result)
        if estimate and setting.method not in NO_METHODS:
            found.append((summary.kv_fraction(setting, tasks), estimate, setting))
    best, rows = None, []
    for fraction, estimate, setting in sorted(found, key=lambda one: (one[0], style.rank(one[1]))):
        if best is None or style.rank(estimate) < best:
            best = style.rank(estimate)
            share = summary.overall[setting].of_full
            cells = Entry(text=setting.keep), Entry(text=f"{100 * fraction:.1f}"), style.entry(estimate)
            rows.append((setting.curve.name, (*cells, PERCENT.entry(share) if share else Entry())))
    columns = ("keep", "KV bytes, %", "score, %" if summary.scored else "perplexity", "of full, %")
    title = "The frontier: nothing as good takes fewer bytes"
    return [Table(title=title, columns=columns, rows=tuple(rows))] * (summary.quantised and bool(rows))


def _judged_by(summary: Summary) -> tuple[Measure, Style]:
    """Return the measure that says which method is the best, and its style."""
    return (attrgetter("score"), PERCENT) if summary.scored else (attrgetter("perplexity"), PERPLEXITY)


def quality(summary: Summary, keep: str) -> Table:
    """Return methods by tasks at one keep, with the full cache for comparison."""
    settings = summary.settings(keep)
    overall = [summary.overall[setting] for setting in settings]
    columns = {"KV bytes, %": [Entry(text=f"{100 * result.cost.kv_fraction:.1f}") for result in overall]}
    if len(summary.scored) > 1:
        columns[f"mean of {len(summary.scored)}"] = _entries([result.score for result in overall], settings, PERCENT)
    if summary.full and summary.full.of_full:
        full_share, *shares = _entries([result.of_full for result in overall], settings, PERCENT)
        columns["of full, %"] = [replace(full_share, margin=""), *shares]
    if len(summary.predicted) > 1:
        heading = f"mean of {len(summary.predicted)}, perplexity ↓"
        columns[heading] = _entries([result.perplexity for result in overall], settings, PERPLEXITY)
    for task in summary.tasks:
        cells = [summary.cells.get((setting, task)) for setting in settings]
        style, heading = (PERPLEXITY, f"{task.label} ↓") if task.perplexity else (PERCENT, task.label)
        columns[heading] = _entries([cell and cell.quality for cell in cells], settings, style)
    return _table(f"Scores in % at keep {keep}", settings, columns)


def fidelity(summary: Summary) -> list[Table]:
    """Return how close predictions are to the full cache's, if that was measured."""
    agreement, divergence, tables = "Tokens of the full cache's answers", "KL divergence from the full cache", []
    for title, get, style in (
        (f"{agreement} that are predicted too, %", attrgetter("agreement"), PERCENT),
        (f"{divergence}, nats per token ↓", attrgetter("kl"), DIVERGENCE),
    ):
        columns = {}
        for keep in summary.keeps:
            settings = [curve.at(keep) for curve in summary.curves]
            estimates = [get(summary.overall[setting]) if setting in summary.overall else None for setting in settings]
            if any(estimates):
                columns[f"keep {keep}"] = _entries(estimates, settings, style)
        if columns:
            tables.append(_table(title, [curve.at("") for curve in summary.curves], columns))
    return tables


def cost(summary: Summary, keep: str) -> Table:
    """Return measured memory and time at one keep, with bars."""
    settings = summary.settings(keep)
    costs = [summary.overall[setting].cost for setting in settings]
    most = max(max(each.peak_kv_bytes, each.kv_bytes) for each in costs)
    columns = {
        "KV cache": _bars([each.kv_bytes for each in costs], size, most),
        "peak while reading": _bars([each.peak_kv_bytes for each in costs], size, most),
        "decoding step, ms": _bars([each.step_ms for each in costs], "{:.2f}".format),
        "prefill, s": _bars([each.prefill_seconds for each in costs], "{:.3g}".format),
        "prefill shared by": [Entry(text=f"{each.prefill_shared_by:.3g}") for each in costs],
    }
    return _table(f"Memory and time at keep {keep}", settings, columns)


def size(number: int | float) -> str:
    """Return bytes as a text, in MiB or whatever fits."""
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
    name = setting.curve.name
    return f"{name} (sees the answers)" if setting.method == ORACLE else name


def _bars(values: Sequence[float | None], say: Callable[[float], str], largest: float = 0.0) -> list[Entry]:
    largest = largest or max((value for value in values if value), default=1.0)
    return [Entry() if value is None else Entry(text=say(value), share=value / largest) for value in values]


def _entries(estimates: Sequence[Estimate | None], settings: Sequence[Setting], style: Style) -> list[Entry]:
    """Return entries. The best method is marked, and those whose interval overlaps its own; yardsticks are not."""
    is_method = [setting.method not in NO_METHODS for setting in settings]
    methods = [estimate for estimate, own in zip(estimates, is_method, strict=True) if estimate and own]
    best = style.best(methods) if len(methods) > 1 else None
    return [
        _marked(style.entry(estimate), estimate, best if own else None) if estimate else Entry()
        for estimate, own in zip(estimates, is_method, strict=True)
    ]


def _marked(entry: Entry, estimate: Estimate, best: Estimate | None) -> Entry:
    if best is None:
        return entry
    wins = estimate.value == best.value
    return replace(entry, best=wins, close=not wins and _overlap(estimate, best))


def _overlap(left: Estimate, right: Estimate) -> bool:
    if left.low is None or left.high is None or right.low is None or right.high is None:
        return False
    return left.low <= right.high and right.low <= left.high
