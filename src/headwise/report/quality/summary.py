"""Summarise all that a report shows of one model: every setting on every task, and over the tasks.

Made from records.py's sections with statistics.py and cells.py; tables.py, charts.py and page.py show it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from headwise.report.quality.cells import Cell, Cost, Overall, Task, cells_of, mean_kept
from headwise.report.quality.records import FULL, NATIVE, Record, Section
from headwise.report.quality.statistics import (
    MEASURES,
    SEED,
    Curve,
    Estimate,
    Means,
    Setting,
    bootstrap,
    mean_of_tasks,
    values_of,
)

ByTask = Mapping[Task, Mapping[str, Means]]
Cells = Mapping[tuple[Setting, Task], Cell]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Summary:
    """One model under one protocol. The full cache is the first setting, if it was evaluated, and none of `curves`."""

    section: Section
    curves: tuple[Curve, ...]
    keeps: tuple[str, ...]  # from the fewest bytes to the most
    tasks: tuple[Task, ...]
    scored: tuple[Task, ...]  # whose mean is the score: those that every method has
    predicted: tuple[Task, ...]  # of perplexity, likewise
    cells: Cells
    overall: Mapping[Setting, Overall]

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the methods of the curves."""
        return tuple(dict.fromkeys(curve.method for curve in self.curves))

    @property
    def quantised(self) -> bool:
        """Return whether any entries are stored in fewer bits."""
        return any(curve.entries != NATIVE for curve in self.curves)

    @property
    def full(self) -> Overall | None:
        """The full cache's results; None if it was not evaluated."""
        return next((overall for setting, overall in self.overall.items() if setting.method == FULL), None)

    def settings(self, keep: str) -> list[Setting]:
        """Return the full cache, then every method at this keep."""
        return [setting for setting in self.overall if setting.method == FULL or setting.keep == keep]

    def kv_fraction(self, setting: Setting, tasks: Sequence[Task]) -> float:
        """Return measured bytes over the full cache's; every task counts the same."""
        return fmean(self.cells[setting, task].cost.kv_fraction for task in tasks)


def summarise(section: Section) -> Summary:
    """Return means and intervals of all records of a section. The same records give the same numbers."""
    settings, grouped = _settings(section.records), _grouped(section.records)
    generator = np.random.default_rng(SEED)
    means = {task: bootstrap(values_of(records, settings), generator) for task, records in grouped.items()}
    cells = {
        (setting, task): cell
        for task, records in grouped.items()
        for setting, cell in cells_of(task, records, settings, means[task]).items()
    }
    having = {name: [task for task in means if means[task][name].known.any()] for name in MEASURES}
    having["nll"] = [task for task in having["nll"] if task.perplexity]  # elsewhere it is of the full cache's answers
    tasks_of = {name: _shared(tasks, settings, cells) for name, tasks in having.items()}
    overall = _overall(settings, tasks_of, means, cells)
    return Summary(
        section=section,
        curves=tuple(dict.fromkeys(setting.curve for setting in overall if setting.method != FULL)),
        keeps=tuple(_keeps(section.records)),
        tasks=tuple(grouped),
        scored=tasks_of["score"],
        predicted=tasks_of["nll"],
        cells=cells,
        overall=overall,
    )


def _keeps(records: Sequence[Record]) -> list[str]:
    """Return keeps in the order of measured bytes: a keep may be a fraction, a number of tokens or bytes."""
    fractions: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.method != FULL:
            fractions[record.keep].append(record.kv_bytes / record.full_kv_bytes)
    return sorted(fractions, key=lambda keep: fmean(fractions[keep]))


def _settings(records: Sequence[Record]) -> list[Setting]:
    """Return the full cache first, then methods as they come, by entries, each from its fewest bytes to its most."""
    settings = dict.fromkeys(map(Setting.of, records))
    methods = {method: index for index, method in enumerate(dict.fromkeys(setting.method for setting in settings))}
    stored = {entries: index for index, entries in enumerate(dict.fromkeys(setting.entries for setting in settings))}
    keeps = {keep: index for index, keep in enumerate(_keeps(records))}
    return sorted(
        settings, key=lambda s: (s.method != FULL, methods[s.method], stored[s.entries], keeps.get(s.keep, -1))
    )


def _grouped(records: Sequence[Record]) -> dict[Task, list[Record]]:
    """Return records by task and length, in the order in which they come."""
    grouped: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        grouped[record.task, record.length].append(record)
    names = [name for name, _ in grouped]
    suites = {name.partition(":")[0] if ":" in name else None for name in names}
    tasks = {}
    for (name, length), of_task in grouped.items():
        short = name.partition(":")[2] if len(suites) == 1 and None not in suites else name
        label = short if names.count(name) == 1 else f"{short} ({length})"
        perplexity = all(record.score is None for record in of_task)
        tasks[Task(name=name, length=length, label=label, perplexity=perplexity)] = of_task
    return tasks


def _shared(tasks: Sequence[Task], settings: Sequence[Setting], cells: Cells) -> tuple[Task, ...]:
    """Return tasks that every method has, so that means over them compare; all tasks if there is no such task."""
    curves = {setting.curve for setting in settings}

    def complete(task: Task) -> bool:
        return {setting.curve for setting in settings if (setting, task) in cells} == curves

    return tuple(task for task in tasks if complete(task)) or tuple(tasks)


def _overall(
    settings: Sequence[Setting], tasks_of: Mapping[str, tuple[Task, ...]], means: ByTask, cells: Cells
) -> dict[Setting, Overall]:
    over = {
        name: _estimates(tasks, [means[task][name] for task in tasks], settings) for name, tasks in tasks_of.items()
    }
    scored = tasks_of["score"]
    paired, yardstick = ([means[task][name] for task in scored] for name in ("paired", "yardstick"))
    of_full = mean_of_tasks(paired).over(mean_of_tasks(yardstick)).estimates() if scored else [None] * len(settings)
    common_tasks = _shared(tuple(means), settings, cells)
    overall = {}
    for index, setting in enumerate(settings):
        own_cells = [cell for (cell_setting, _), cell in cells.items() if cell_setting == setting]
        if not own_cells:
            continue
        common = [cells[setting, task] for task in common_tasks if (setting, task) in cells] or own_cells
        nll = over["nll"][index]
        overall[setting] = Overall(
            score=over["score"][index],
            of_full=_without_interval(of_full[index]) if setting.method == FULL else of_full[index],
            perplexity=nll and nll.exp(),
            kl=over["kl"][index],
            agreement=over["agreement"][index],
            cost=Cost.mean([cell.cost for cell in common]),
            kept=mean_kept([cell.kept for cell in common]),
        )
    return overall


def _estimates(tasks: Sequence[Task], means: Sequence[Means], settings: Sequence[Setting]) -> list[Estimate | None]:
    return mean_of_tasks(means).estimates() if tasks else [None] * len(settings)


def _without_interval(estimate: Estimate | None) -> Estimate | None:
    """Return the value alone: the full cache's share of its own score is certain."""
    return estimate and Estimate(value=estimate.value)
