"""Tables of what recipes/real_models.py has measured, in Markdown: for docs/results/real-models.md.

    python recipes/real_models_tables.py runs [--page docs/results/real-models.md]

With --page they replace what stands between the page's two marks. Intervals are those of `headwise report`. A task of
RULER that the full cache does not answer says little about a method: means are over the tasks it answers, the others
are named. LongBench's scores are low by nature (overlap of words): its means are over all its tasks.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from headwise.report.quality.records import FULL, RUN, Record, load
from headwise.report.quality.statistics import Estimate, Setting
from headwise.report.quality.summary import Summary, summarise

START, END = "<!-- made by recipes/real_models_tables.py -->", "<!-- end -->"
ANSWERED = 0.5  # score of the full cache, of RULER
MAIN_KEEP = "0.15"


def main() -> None:
    """Write or print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that recipes/real_models.py has made")
    parser.add_argument("--page", type=Path, help="page to put them into")
    asked = parser.parse_args()
    text = "\n".join(pages(asked.runs))
    if asked.page is None:
        print(text)
    else:
        put_between(asked.page, START, END, text)


def put_between(path: Path, start: str, end: str, text: str) -> None:
    """Put a text between the two marks of a page."""
    page = path.read_text(encoding="utf-8")
    (before, rest), (_, after) = page.split(start), page.split(end)
    assert end in rest
    path.write_text(f"{before}{start}\n\n{text}\n{end}{after}", encoding="utf-8")


def pages(runs: Path) -> Iterator[str]:
    """A section for every model, set and protocol."""
    folders: dict[tuple[str, str, str], list[Path]] = {}
    for run in sorted(runs.glob(f"*/*/*/*/{RUN}")):
        model, name, protocol, _ = run.relative_to(runs).parent.parts
        folders.setdefault((model, name, protocol), []).append(run.parent)
    order = ("ruler-1k", "books", "longbench-2k", "ruler-2k", "ruler-4k", "others")
    for (model, name, protocol), found in sorted(
        folders.items(), key=lambda item: (item[0][0], order.index(item[0][1]), item[0][2])
    ):
        sections = load(found).sections
        (whole,) = sections
        methods = json.loads((found[0] / RUN).read_text(encoding="utf-8"))["methods"]
        records = sorted(fully_measured(whole.records), key=lambda record: methods.index(record.method))
        least = 0.0 if name.startswith("longbench") else ANSWERED
        yield from section(summarise(replace(whole, records=tuple(records))), f"{model}, {name}, {protocol}", least)


def fully_measured(records: Sequence[Record]) -> list[Record]:
    """Those of samples that every method was measured on: means over other samples would not compare."""
    found: dict[tuple[str, int], set[Setting]] = {}
    for record in records:
        found.setdefault((record.task, record.index), set()).add(Setting(record.method, record.keep, record.entries))
    wanted = set().union(*found.values())
    return [record for record in records if found[(record.task, record.index)] == wanted]


def section(summary: Summary, title: str, least: float) -> Iterator[str]:
    """One set: the mean over tasks that the full cache has at least this score of, then every task at one keep."""
    full = Setting(FULL, "1")
    counts = [summary.cells[full, task].samples for task in summary.tasks]
    samples = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
    yield f"### {title}\n"
    if summary.predicted and not summary.scored:
        yield f"{samples} passages. KL to the full cache, nats per token of the text that follows.\n"
        yield from table(summary, "kl", 3)
        return
    answered = [task for task in summary.tasks if summary.cells[full, task].quality.value >= least]
    left = [task.label for task in summary.tasks if task not in answered]
    names = {task.name for task in answered}
    some = replace(summary.section, records=tuple(r for r in summary.section.records if r.task in names))
    told = f" Left out, for the full cache answers less than half: {', '.join(left)}." if left else ""
    yield f"{samples} samples a task, {len(answered)} tasks.{told}\n"
    if answered:
        yield "Score, as a share of the full cache's:\n"
        part = summarise(some)
        yield from table(part, "of_full", 2)
    yield f"KL to the full cache, nats per token of its answers, all {len(summary.tasks)} tasks:\n"
    yield from table(summary, "kl", 3)
    keep = MAIN_KEEP if MAIN_KEEP in summary.keeps else summary.keeps[-1]
    yield f"Score of every task at {keep}:\n"
    yield from tasks_table(summary, keep)


def table(summary: Summary, measure: str, digits: int) -> Iterator[str]:
    """Methods by keeps."""
    yield f"| | {' | '.join(summary.keeps)} |"
    yield f"|---|{'---|' * len(summary.keeps)}"
    for curve in summary.curves:
        cells = []
        for keep in summary.keeps:
            found = summary.overall.get(curve.at(keep))
            cells.append(shown(getattr(found, measure) if found else None, digits))
        yield f"| `{curve.name}` | {' | '.join(cells)} |"
    yield ""


def tasks_table(summary: Summary, keep: str) -> Iterator[str]:
    """Methods by tasks."""
    yield f"| | {' | '.join(task.label for task in summary.tasks)} |"
    yield f"|---|{'---|' * len(summary.tasks)}"
    rows: Sequence[Setting] = [Setting(FULL, "1"), *(curve.at(keep) for curve in summary.curves)]
    for setting in rows:
        cells = [summary.cells.get((setting, task)) for task in summary.tasks]
        texts = [f"{cell.quality.value:.2f}" if cell else "" for cell in cells]
        if any(texts):
            yield f"| `{setting.curve.name}` | {' | '.join(texts)} |"
    yield ""


def shown(found: Estimate | None, digits: int) -> str:
    """A mean and its interval."""
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


if __name__ == "__main__":
    main()
