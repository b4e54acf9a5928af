"""Write what a reader must know to judge a report's numbers: what may be wrong, and how they were made."""

from collections.abc import Sequence

from headwise.report.draw.markup import CLOSE, NONE
from headwise.report.quality.cells import Task
from headwise.report.quality.records import FULL, NATIVE, ORACLE
from headwise.report.quality.statistics import RESAMPLES
from headwise.report.quality.summary import Summary

NAMED = 8  # of several, so many are named


def warnings(summary: Summary) -> list[str]:
    """Return what may be wrong with the numbers."""
    return [*_missing(summary), *_mixed(summary)]


def explanations(summary: Summary) -> list[str]:
    """Return notes that always hold."""
    costs = [overall.cost for overall in summary.overall.values()]
    sliding = max(cost.sliding_kv_bytes / cost.full_kv_bytes for cost in costs)
    left_whole = f" Sliding-window layers are left whole: {sliding:.1%} of the full cache." if sliding else ""
    return [
        f"In brackets: a 95% interval, from {RESAMPLES:,} reweightings of the samples within each task (a Bayesian "
        "bootstrap). Scores and agreement are averaged with one imagined sample more, half right and half wrong: of "
        "right or wrong answers this is Jeffreys' interval, and few samples have a wide one even where all of them are "
        f"right. Perplexity and divergence are spread by Student's t; {NONE}: unknown, for there is a single sample. "
        "Other seeds and other models are not in it.",
        f"Bold: the best method. {CLOSE}: its interval overlaps the best one's. All methods see the same samples, so "
        "differences within the intervals can be real.",
        *_yardstick(summary),
        *_entries(summary),
        f"KV bytes are measured: keys and values in storage after the context has been cut.{left_whole}",
        "A decoding step is one token of one sequence, measured alone. decode_seconds, in the CSV file, were measured "
        "in batches and are shared out among their sequences: not a latency. One prefill serves all methods and keeps "
        "whose scorers can watch the same one: its seconds are not what each of them alone would take. Times are "
        "medians over samples.",
    ]


def _yardstick(summary: Summary) -> list[str]:
    """Return what the oracle is, if it was evaluated."""
    text = (
        f"{ORACLE} is no method that could be used, but a yardstick: it was shown the questions and the full cache's "
        "answers, and keeps the entries that these look at most. It says what can be reached at a keep."
    )
    return [text] * (ORACLE in summary.methods)


def _entries(summary: Summary) -> list[str]:
    """Return what names with a kind of entries are, if there are any."""
    kinds = dict.fromkeys(curve.entries for curve in summary.curves if curve.entries != NATIVE)
    text = (
        f"{', '.join(kinds)} behind a method's name: what is kept is stored in fewer bits, but for the first tokens; "
        "bytes include the scales. A name alone is eviction alone. At keep 1 nothing is evicted: that is quantisation "
        "alone. At the same share of the entries fewer bits take fewer bytes: compare at equal KV bytes."
    )
    return [text] * bool(kinds)


def _missing(summary: Summary) -> list[str]:
    lines, averaged = [], {*summary.scored, *summary.predicted}
    if left_out := [task.label for task in summary.tasks if task not in averaged]:
        lines.append(f"Not every method has {_first_names(left_out)}: means are over the other tasks.")
    without = [setting for setting, mean in summary.overall.items() if mean.score is None and mean.perplexity is None]
    if lacking := [f"{setting.curve.name} at keep {setting.keep}" for setting in without]:
        lines.append(f"No mean, for some of its tasks are missing: {_first_names(lacking)}.")
    if partial := [task.label for task in summary.tasks if _uneven(summary, task)]:
        lines.append(f"Not all methods have the same number of samples on {_first_names(partial)}.")
    if summary.full is None:
        lines.append(f"The full cache (method {FULL}) was not evaluated: nothing says what its score would be.")
    if not summary.methods:
        lines.append("No method but the full cache has been evaluated yet.")
    return lines


def _first_names(names: Sequence[str]) -> str:
    """Return the first of the names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _uneven(summary: Summary, task: Task) -> bool:
    return len({cell.samples for (_, cell_task), cell in summary.cells.items() if cell_task == task}) > 1


def _mixed(summary: Summary) -> list[str]:
    lines = []
    machines = dict.fromkeys(f"{run.hardware} ({run.device})" for run in summary.section.runs)
    if len(machines) > 1:
        lines.append(f"Times come from different machines and do not compare: {'; '.join(machines)}.")
    versions = {tuple(sorted(record.versions.items())) for record in summary.section.records}
    if len(versions) > 1:
        listed = "; ".join(", ".join(map(" ".join, pairs)) for pairs in sorted(versions))
        lines.append(f"Records come from different versions: {listed}.")
    return lines
