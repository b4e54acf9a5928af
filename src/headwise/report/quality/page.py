"""Write the report as one web page that needs nothing else: for any browser and width, light and dark.

Most of it is plain HTML. The page's script singles out methods and keeps, and colours the maps of heads and of tokens
from numbers in the page.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from math import sqrt
from typing import Any

import numpy as np
from jaxtyping import Float

from headwise.report.draw import svg
from headwise.report.draw.charts import charts
from headwise.report.draw.template import facts_html, filled
from headwise.report.quality import tables
from headwise.report.quality.notes import explanations, warnings
from headwise.report.quality.records import Run, TokenMap
from headwise.report.quality.statistics import Curve, Setting
from headwise.report.quality.summary import Summary

EXACT = 2**16 - 1  # how a share of 1 is written
SCALE = (0, 0.05, 0.15, 0.3, 0.6, 1)  # shares in the legend of the maps: a shade is a share's square root


def page(summaries: Mapping[str, Summary], duplicates: int) -> str:
    """Return the page of all sections, by their names."""
    models = ", ".join(dict.fromkeys(summary.section.identity.model for summary in summaries.values()))
    records = sum(len(summary.section.records) for summary in summaries.values())
    dropped = f" {duplicates:,} that repeat a sample at the same method and keep are left out." if duplicates else ""
    links = "".join(f'<a href="#s{index}">{escape(name)}</a>' for index, name in enumerate(summaries))
    parts = {
        "title": escape(f"{models}: quality from a smaller KV cache"),
        "subtitle": escape(f"{records:,} records of headwise eval.{dropped}"),
        "links": f"<nav>{links}</nav>" if len(summaries) > 1 else "",
        "sections": "".join(_section(index, *named) for index, named in enumerate(summaries.items())),
        "data": _json([_data(summary) for summary in summaries.values()]),
    }
    return filled("headwise.report.draw", "page.html", parts)


def _section(number: int, name: str, summary: Summary) -> str:
    drawn = charts(summary)
    lines = max((chart.lines for chart in drawn), key=len, default=())
    numbers = {line.method: line.number for line in lines}
    fidelity = "".join(table.html(numbers) for table in tables.fidelity(summary))
    keeps = enumerate(map(escape, summary.keeps))
    buttons = (f'<button type="button" value="{index}">{keep}</button>' for index, keep in keeps)
    parts = {
        "number": str(number),
        "name": escape(name),
        "warnings": "".join(f"<p>{escape(warning)}</p>" for warning in warnings(summary)),
        "headline": tables.headline(summary).html()
        + "".join(table.html(numbers) for table in tables.frontier(summary)),
        "runs": _runs(summary.section.runs),
        "charts": "".join(map(svg.draw, drawn)),
        "legend": svg.legend(lines),
        "keeps": "".join(buttons),
        "quality": _keep_blocks([tables.quality(summary, keep).html(numbers) for keep in summary.keeps]),
        "scale": "".join(f'<span style="left:{sqrt(share):.1%}">{share:.0%}</span>' for share in SCALE),
        "cost": _keep_blocks([tables.cost(summary, keep).html(numbers) for keep in summary.keeps]),
        "fidelity": f"<h3>Fidelity</h3>{fidelity}" if fidelity else "",
        "tokens": filled("headwise.report.quality", "tokens.html", {}) if summary.section.maps else "",
        "notes": "".join(f"<li>{escape(note)}</li>" for note in explanations(summary)),
    }
    return filled("headwise.report.quality", "section.html", parts)


def _keep_blocks(blocks: Sequence[str]) -> str:
    """Return one block for every keep; the page shows one at a time."""
    return "".join(f'<div data-keep="{index}">{block}</div>' for index, block in enumerate(blocks))


def _runs(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return _run(runs[0])
    headings = (
        f"{run.started or run.model}, seed {run.seed}, {len(run.tasks)} tasks, {len(run.methods)} methods"
        for run in runs
    )
    return "".join(
        f"<details{' open' * (index == 0)}><summary>{escape(text)}</summary>{_run(run)}</details>"
        for index, (run, text) in enumerate(zip(runs, headings, strict=True))
    )


def _run(run: Run) -> str:
    facts = {
        "model": f"{run.model}, {run.dtype} on {run.device}",
        "hardware": run.hardware,
        "started": run.started or "not known",
        "samples": f"{run.samples} of each task, seed {run.seed}" + (f", {run.length} tokens" if run.length else ""),
        "tasks": ", ".join(run.tasks),
        "methods": ", ".join(run.methods),
        "keeps": ", ".join(run.keeps),
        "entries": ", ".join(run.entries),
        "protocol": run.protocol,
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "configuration": run.config_hash or "not known",
    }
    return facts_html(facts, run.command)


def _data(summary: Summary) -> dict[str, Any]:
    """Return what the script draws: kept shares by method and keep, and the maps of tokens."""
    budgets = {curve.name: [_share(summary, curve.at(keep)) for keep in summary.keeps] for curve in summary.curves}
    contexts = {(x.task, x.index, x.tokens): f"{x.task}, sample {x.index}" for x in summary.section.maps}
    order = {context: index for index, context in enumerate(contexts)}
    shape = summary.section.runs[0].shape
    return {
        "layers": shape.layers,
        "heads": shape.kv_heads,
        "budgets": budgets,
        "contexts": [{"name": name, "tokens": _spaced(tokens)} for (_, _, tokens), name in contexts.items()],
        "maps": [{"context": order[x.task, x.index, x.tokens], **_map(x)} for x in summary.section.maps],
    }


def _spaced(tokens: Sequence[str]) -> Sequence[str]:
    """Return tokens with a space before them, where the tokenizer decodes single tokens without it."""
    return tokens if any(token[:1] == " " for token in tokens) else [f" {token}" for token in tokens]


def _share(summary: Summary, setting: Setting) -> str | None:
    if setting not in summary.overall:
        return None
    kept: Float[np.ndarray, "layers kv_heads"] = summary.overall[setting].kept
    return _base64((EXACT * kept.clip(0, 1)).round().astype("<u2"))


def _map(token_map: TokenMap) -> dict[str, Any]:
    return {
        "name": f"{Curve(token_map.method, token_map.entries).name}, keep {token_map.keep}",
        "heads": token_map.heads,
        "kept": _base64(np.packbits(token_map.kept, axis=-1)),
    }


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _json(value: Any) -> str:
    """Return JSON for a script element, without the character that could end the element."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
