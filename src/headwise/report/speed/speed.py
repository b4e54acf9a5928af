"""`headwise report` of files of `headwise bench`: their page, summary and rows.

Made from benchmarks.py's sections; curves.py says what is drawn. results.py writes the files.
"""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from headwise.files.terminal import shown
from headwise.report.draw import svg
from headwise.report.draw.charts import Chart
from headwise.report.draw.fields import BENCHMARKS
from headwise.report.draw.markup import NONE, Entry, Table, plain
from headwise.report.draw.template import facts_html, filled
from headwise.report.quality.tables import size
from headwise.report.speed.benchmarks import Row, Section, versions_text
from headwise.report.speed.curves import curves, heads, name_of, numbers_of

TITLE = "Speed and memory, by headwise bench"
POINT = "Point at a candidate to single it out. A click keeps it singled out, in the table too."


def _digits(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


_count, _times, _share, _error = "{:,}".format, "{:.2f}x".format, "{:.1%}".format, "{:.1e}".format
# Fields by the order of their columns: heading, and how a value is written.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("model", str),
    "dtype": ("dtype", str),
    "tokens": ("tokens", _count),
    "keep": ("keep", "{:g}".format),
    "batch": ("batch", _count),
    "threads": ("threads", _count),
    "skewed": ("heads", heads),
    "entries": ("entries", str),
    "new_tokens": ("new tokens", _count),
    "ms": ("step, ms", _digits),
    "seconds": ("prefill, s", _digits),
    "prefill_s": ("prefill, s", _digits),
    "ms_per_token": ("decoding, ms per token", _digits),
    "speedup_vs_full": ("faster than full", _times),
    "floor_ms": ("floor, ms", _digits),
    "times_floor": ("of its floor", _times),
    "overhead": ("overhead", _share),
    "ours_seconds": ("method's own, s", _digits),
    "ours_share": ("method's own", _share),
    "attention_ms": ("attention, ms", _digits),
    "attention_share": ("attention's share", _share),
    "kv_bytes": ("KV held", size),
    "peak_prefill_bytes": ("peak, prefill", size),
    "peak_decode_bytes": ("peak, decoding", size),
    "peak_bytes": ("peak", size),
    "saved_bytes": ("saved", size),
    "claimed_bytes": ("KV claimed", size),
    "claimed_saved_bytes": ("claimed to be saved", size),
    "logits_error": ("error of logits", _error),
    "rel_error": ("error", _error),
    "plain_error": ("PyTorch's error", _error),
}
_MODEL_NOTES = (
    "Peaks are the most bytes held at once, of the whole process or of the GPU's allocator, beyond the loaded model. "
    "KV claimed is the most bytes of keys and values that the cache says it held at once. Saved: against full.",
    "Error: attention while decoding, relative to float64, beside PyTorch's own in the same precision. Error of "
    "logits: after the prefill, relative to full's.",
)
NOTES = {
    "decode": (
        "full is transformers' attention over the whole cache; full, grouped the same with the query heads of a group "
        "folded into one; kvpress reads all of it too, with fake keys. The others are our kernels over what is kept.",
        "The floor is the time of reading what must be read, measured in the same run: what is kept, or the "
        "whole cache. The thin dashed line is that of what is kept.",
        "Error: relative to float64, beside PyTorch's own in the same precision.",
        "Heads are skewed where some keep much more than others, and even where all keep the same.",
    ),
    "prefill": (
        "Overhead is the share by which reading takes longer than with full; the method's own seconds are those spent "
        "in it, here also as a share of full's.",
    ),
    "generate": _MODEL_NOTES,
    "memory": ("Thin dashed lines: the full cache's peak, less what a cache claims to save.", *_MODEL_NOTES),
}


def rows(sections: Sequence[Section]) -> list[Row]:
    """Return the rows of all sections, for a CSV file."""
    return [{**row, "versions": versions_text(row)} for section in sections for row in section.rows]


def table(section: Section) -> Table:
    """Return a table with a line for every row."""
    empty = {name for name in ("entries", "kv_bytes") if all(row.get(name) is None for row in section.rows)}
    shown = [name for name in COLUMNS if name in BENCHMARKS[section.benchmark] and name not in empty]
    return Table(
        title=f"headwise bench {section.benchmark}",
        columns=tuple(COLUMNS[name][0] for name in shown),
        rows=tuple((name_of(row), tuple(_entry(row, name) for name in shown)) for row in section.rows),
        first="candidate",
    )


def _entry(row: Row, name: str) -> Entry:
    return Entry(text=NONE if row[name] is None else COLUMNS[name][1](row[name]))


def charts_by_name(sections: Sequence[Section]) -> dict[str, list[Chart]]:
    """Return the charts of all sections, for the picture."""
    return {f"{section.name}; {name}": charts for section in sections for name, charts in curves(section).items()}


def markdown(sections: Sequence[Section]) -> str:
    """Return Markdown: what was run, and the tables."""
    lines = [f"# {TITLE}", ""]
    for section in sections:
        lines += [f"## {plain(section.name)}", "", *(f"{plain(versions)}\n" for versions in section.versions)]
        lines += [f"    {' '.join(command.split())}\n" for command in section.commands]
        lines += [table(section).markdown(), *(f"- {plain(note)}" for note in NOTES[section.benchmark]), ""]
    return shown("\n".join(lines), lines=True)


def page(sections: Sequence[Section]) -> str:
    """Return one web page that needs nothing else."""
    number = sum(len(section.rows) for section in sections)
    links = "".join(f'<a href="#s{index}">{escape(section.name)}</a>' for index, section in enumerate(sections))
    parts = {
        "title": TITLE,
        "subtitle": f"{number:,} row{'s' * (number > 1)} of headwise bench.",
        "links": f"<nav>{links}</nav>" if len(sections) > 1 else "",
        "sections": "".join(_section(index, section) for index, section in enumerate(sections)),
        "data": "[]",
    }
    return filled("headwise.report.draw", "page.html", parts)


def _section(index: int, section: Section) -> str:
    by_name, numbers = curves(section), numbers_of(section.rows)
    facts = {"hardware": section.hardware, "versions": "; ".join(section.versions)}
    parts = {
        "number": str(index),
        "name": escape(section.name),
        "facts": facts_html(facts, "\n".join(section.commands)),
        "charts": "".join(f"<h3>{escape(name)}</h3>{_charts(charts)}" for name, charts in by_name.items()),
        "point": POINT if by_name else "",
        "table": table(section).html(numbers if by_name else {}),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in NOTES[section.benchmark]),
    }
    return filled("headwise.report.speed", "speed.html", parts)


def _charts(charts: Sequence[Chart]) -> str:
    lines = {line.number: line for chart in charts for line in chart.named}
    legend = svg.legend([lines[number] for number in sorted(lines)])
    return f'<div class="charts">{"".join(map(svg.draw, charts))}</div><div class="legend">{legend}</div>'
