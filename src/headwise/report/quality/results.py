"""Write a report: folders of `headwise eval` in, a web page, a table, a summary and a picture out.

records.py reads, summary.py counts, page.py, picture.py and this module write. For files of `headwise bench`, see
speed.py.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headwise.errors import BadInput
from headwise.files.terminal import shown
from headwise.files.writing import replacing, require_file
from headwise.report.draw.charts import charts
from headwise.report.draw.markup import plain
from headwise.report.quality import tables
from headwise.report.quality.cells import Cell, Task
from headwise.report.quality.notes import explanations, warnings
from headwise.report.quality.page import page
from headwise.report.quality.records import Results, load
from headwise.report.quality.statistics import Setting
from headwise.report.quality.summary import Summary, summarise
from headwise.report.speed import benchmarks, speed

FORMATS = (".html", ".htm")
BESIDE = (".csv", ".md", ".png")
FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # the last four: as wide as Chinese characters, and taken alike


def write_report(sources: Sequence[Path], out: Path, *, tell: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Write the page `out` (.html), and beside it the same as .csv, .md and .png. Return their paths, the page first.

    Sources are folders of `headwise eval`, or files of `headwise bench`. All files are written, or none. Only the .png
    needs matplotlib: without it the .png is left out, and `tell` is called with a sentence that says so.

    Raises BadInput if sources are of both kinds, were written by something else, or are damaged, and if the page cannot
    be written there. Raises WriteFailed if the system fails.
    """
    paths = _paths(out, sources)
    if _are_benchmarks(sources):
        sections = benchmarks.load(sources)
        texts = [speed.page(sections), as_csv(speed.rows(sections)), speed.markdown(sections)]
        drawn = speed.charts_by_name(sections)
    else:
        results = load(sources)
        summaries = summaries_by_name(results)
        texts = [page(summaries, results.duplicates), table(summaries), markdown(summaries, results.duplicates)]
        drawn = {name: charts(summary) for name, summary in summaries.items()}
    contents = [text.encode(errors="replace") for text in texts]  # half a character is no text
    try:
        from headwise.report.draw.picture import draw  # matplotlib, which is optional
    except ImportError as error:
        tell(f"{paths.pop()} is left out, for it needs matplotlib ({error}): pip install 'headwise[plot]'.")
    else:
        contents.append(draw(drawn))
    with ExitStack() as stack:
        for path, content in zip(paths, contents, strict=True):
            stack.enter_context(replacing(path)).write_bytes(content)
    return paths


def summaries_by_name(results: Results) -> dict[str, Summary]:
    """Return summaries of all sections, each under a name that no other has."""
    summaries = {}
    for section in results.sections:
        model, config_hash, dtype, protocol = section.identity
        name = f"{model}, {dtype}, {protocol}"
        alike = [x for x in results.sections if x.identity._replace(config_hash=config_hash) == section.identity]
        summaries[f"{name}, configuration {config_hash}" if len(alike) > 1 else name] = summarise(section)
    return summaries


def table(summaries: Mapping[str, Summary]) -> str:
    """Return CSV with a row for every method, keep, kind of entries and task."""
    return as_csv(_row(summary, *key, cell) for summary in summaries.values() for key, cell in summary.cells.items())


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return CSV with all columns that any row has. No cell is a formula to a spreadsheet."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_cell, names))
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return file.getvalue()


def _cell(value: Any) -> Any:
    """Return a value for CSV. A text that a spreadsheet would take for a formula gets an apostrophe."""
    if not isinstance(value, str):
        return value
    text = shown(value)
    return f"'{text}" if text.lstrip()[:1] in FORMULA and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _row(summary: Summary, setting: Setting, task: Task, cell: Cell) -> dict[str, str | float | None]:
    identity, quality = summary.section.identity, cell.quality
    return {
        **{name: getattr(identity, name) for name in ("model", "config_hash", "dtype", "protocol")},
        "task": task.name,
        "length": task.length,
        **setting._asdict(),
        "n": cell.samples,
        "score": None if task.perplexity else quality.value,
        "perplexity": quality.value if task.perplexity else None,
        "lo": quality.low,
        "hi": quality.high,
        "kl": cell.kl and cell.kl.value,
        "agreement": cell.agreement and cell.agreement.value,
        **asdict(cell.cost),
    }


def markdown(summaries: Mapping[str, Summary], duplicates: int) -> str:
    """Return Markdown: what was run, the best methods, and the tables."""
    lines = ["# headwise eval", ""]
    if duplicates:
        lines += [f"{duplicates:,} records that repeat a sample at the same method and keep are left out.", ""]
    for name, summary in summaries.items():
        lines += [f"## {plain(name)}", "", *(f"Mind: {plain(warning)}\n" for warning in warnings(summary))]
        for run in summary.section.runs:
            versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
            when = f"{run.started}, " if run.started else ""
            facts = f"{when}{run.hardware} ({run.device}), {run.samples} samples, seed {run.seed}; {versions}"
            lines += [plain(facts), "", f"    {' '.join(run.command.split())}", ""]
        blocks = [tables.headline(summary), *tables.frontier(summary)]
        blocks += [tables.quality(summary, keep) for keep in summary.keeps]
        blocks += [*tables.fidelity(summary), *(tables.cost(summary, keep) for keep in summary.keeps)]
        lines += [block.markdown() for block in blocks]
        lines += [*(f"- {plain(note)}" for note in explanations(summary)), ""]
    return shown("\n".join(lines), lines=True)


def _are_benchmarks(sources: Sequence[Path]) -> bool:
    """Return whether these are files of `headwise bench`. Raises BadInput if only some are files."""
    files = [path for path in sources if not path.is_dir() and (path.exists() or path.suffix == ".json")]
    if files and len(files) < len(sources):
        raise BadInput(
            f"{files[0]} is a file, others are folders: name files of 'headwise bench ... --json', or folders of "
            "'headwise eval --out DIR', and make a report of each."
        )
    return bool(files)


def _paths(out: Path, sources: Sequence[Path]) -> list[Path]:
    """Return the paths of the page and the files beside it. Raises BadInput if one cannot be written."""
    if out.suffix.lower() not in FORMATS:
        raise BadInput(f"{out}: a report is a web page; name an .html file.")
    paths = [out, *(out.with_suffix(suffix) for suffix in BESIDE)]
    for path in paths:
        require_file(path, inputs=sources)
    return paths
