"""Tables and the picture of what recipes/real_models.py has measured with --entries: for docs/results/small-entries.md.

    python recipes/small_entries_tables.py runs [--page docs/results/small-entries.md]

Models ran in float32, where a native number takes twice the bytes that it has in use. So bytes here are shares of a
cache of 16-bit numbers with everything kept. Codes and scales count as they are; so do the few native entries beside
them, the first 4 tokens, with the 32 bits that they had. With --page the tables replace what stands between the page's
marks, and the picture is written beside it, under its name with .png.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from real_models_tables import fully_measured, put_between, shown

from headwise.kernels.quantised import ENTRIES, NATIVE
from headwise.report.quality.records import FULL, RUN, load
from headwise.report.quality.statistics import Setting
from headwise.report.quality.summary import summarise

START, END = "<!-- made by recipes/small_entries_tables.py -->", "<!-- end -->"
SHARES = (0.05, 0.1, 0.15, 0.25)  # of the bytes
NEAR = 0.12  # as near, relatively, a setting's bytes must be to such a share; the table says how many they are
KINDS = (NATIVE, *ENTRIES)
QUANTISED = "quantised.json"  # of a model: what recipes/compare_quantised.py has written
THEIRS = "QuantizedCache, "
SCORED = {"ruler-1k": "RULER at 1,024 tokens", "longbench-2k": "LongBench at 2,048 tokens"}  # sets of real_models.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One way to store a share of the entries: its bytes, and how far it is from the full cache."""

    entries: str
    keep: str
    share: float  # of the bytes
    kl: float
    said: str  # KL with its interval


def main() -> None:
    """Write or print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that recipes/real_models.py has made")
    parser.add_argument("--page", type=Path, help="page to put them into")
    asked = parser.parse_args()
    places = {path.name: path / "books" / "query-agnostic" / "books" for path in models(asked.runs)}
    books = {name: points(place) for name, place in places.items() if (place / RUN).is_file()}
    stored = {path.name: read_stored(path / QUANTISED) for path in models(asked.runs) if (path / QUANTISED).is_file()}
    text = "\n".join([*book_tables(books), *scored_tables(asked.runs), *stored_table(stored)])
    if asked.page is None:
        print(text)
        return
    put_between(asked.page, START, END, text)
    draw(books, stored, asked.page.with_suffix(".png"))


def models(runs: Path) -> list[Path]:
    """The folders of models."""
    return sorted((path for path in runs.iterdir() if path.is_dir()), reverse=True)


def points(folder: Path) -> list[Point]:
    """Every setting that was measured on all passages of a folder."""
    (section,) = load([folder]).sections
    summary = summarise(replace(section, records=fully_measured(section.records)))
    shares: dict[Setting, list[float]] = {}
    for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        setting = Setting(record["method"], record["keep"], record["entries"])
        shares.setdefault(setting, []).append(share_of_16_bits(record))
    found = []
    for setting, estimates in summary.overall.items():
        if setting.method != FULL and estimates.kl is not None:
            said = shown(estimates.kl, 4 if estimates.kl.value < 0.01 else 3)
            found.append(
                Point(
                    entries=setting.entries,
                    keep=setting.keep,
                    share=fmean(shares[setting]),
                    kl=estimates.kl.value,
                    said=said,
                )
            )
    return found


def share_of_16_bits(record: dict[str, Any]) -> float:
    """Bytes of a record, of those that the full cache has in 16 bits. Native entries beside codes keep their 32."""
    whole = record["full_kv_bytes"] if record["entries"] == NATIVE else record["full_kv_bytes"] / 2
    return record["kv_bytes"] / whole


def comparable(found: list[Point]) -> list[Point]:
    """Without keeps in bytes of float32, but for native entries, for which they are what they are in 16 bits."""
    return [p for p in found if p.entries == NATIVE or "bytes" not in p.keep]


def book_tables(books: dict[str, list[Point]]) -> Iterator[str]:
    """Of book text: everything kept, a quarter, and at equal bytes."""
    for model, found in books.items():
        yield f"### {model}, book text\n\nKL to the full cache, nats per token (95%), and the bytes it takes.\n"
        yield f"| | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}"
        for keep in ("1", "0.25"):
            cells = [next((p for p in found if (p.entries, p.keep) == (kind, keep)), None) for kind in KINDS]
            told = [f"{p.said}, {100 * p.share:.1f}% of the bytes" if p else "" for p in cells]
            yield f"| keep {keep} | {' | '.join(told)} |"
        for share in SHARES:
            near = [p for p in comparable(found) if abs(p.share / share - 1) <= NEAR]
            cells = [
                min((p for p in near if p.entries == kind), key=lambda p: abs(p.share - share), default=None)
                for kind in KINDS
            ]
            told = [f"{p.said}, {100 * p.share:.1f}%, keep {p.keep}" if p else "" for p in cells]
            yield f"| {100 * share:.0f}% of the bytes | {' | '.join(told)} |"
        yield ""


def scored_tables(runs: Path) -> Iterator[str]:
    """Of RULER and LongBench: mean scores over tasks, and KL on the full cache's answers."""
    for name, told in SCORED.items():
        for path in models(runs):
            folders = sorted(run.parent for run in path.glob(f"{name}/query-agnostic/*/{RUN}"))
            if folders:
                yield f"### {path.name}, {told}\n"
                yield from scored_table(folders)


def scored_table(folders: list[Path]) -> Iterator[str]:
    """The table of the tasks in some folders."""
    (section,) = load(folders).sections
    records = fully_measured(section.records)
    summary = summarise(replace(section, records=records))
    samples = len({(record.task, record.index) for record in records})
    full = summary.overall[Setting(FULL, "1")].score
    yield f"{samples} samples of {len(summary.tasks)} tasks, query-agnostic. Full cache: {shown(full, 3)}.\n"
    yield f"| | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}"
    for keep in summary.keeps:
        cells = [summary.overall.get(Setting("lkv", keep, kind)) for kind in KINDS]
        if any(cells):
            yield f"| keep {keep}: score | {' | '.join(shown(c.score, 3) if c else '' for c in cells)} |"
            yield f"| keep {keep}: nats | {' | '.join(shown(c.kl, 4) if c else '' for c in cells)} |"
    yield ""


def read_stored(path: Path) -> dict[str, Any]:
    """What was measured with everything kept, ours and QuantizedCache."""
    return json.loads(path.read_text(encoding="utf-8"))


def stored_table(models: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Everything kept, in every way to store it."""
    if not models:
        return
    passages = ", ".join(f"{found['passages']} passages for {model}" for model, found in models.items())
    yield f"### Everything kept, beside transformers' QuantizedCache\n\nNats from the full cache. {passages}.\n"
    yield f"| stored as | bits per number, with scales | {' | '.join(models)} |\n|---|---|{'---|' * len(models)}"
    for name, figures in next(iter(models.values()))["stored"].items():
        cells = [f"{found['stored'][name]['kl']:.5f}" for found in models.values()]
        yield f"| {name} | {figures['bits']:.2f} | {' | '.join(cells)} |"
    yield ""


def draw(books: dict[str, list[Point]], stored: dict[str, dict[str, Any]], path: Path) -> None:
    """Nats against bytes, a curve for every way to store entries; both axes in powers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, len(books), sharey=True, squeeze=False)[0]
    for place, (model, found) in zip(axes, books.items(), strict=True):
        for kind in KINDS:
            curve = sorted((p for p in comparable(found) if p.entries == kind and p.kl > 1e-6), key=lambda p: p.share)
            place.plot([100 * p.share for p in curve], [p.kl for p in curve], marker="o", label=f"lkv, {kind}")
        theirs = {k: v for k, v in stored.get(model, {"stored": {}})["stored"].items() if k.startswith(THEIRS)}
        for marker, (name, at) in zip("x+*1", theirs.items(), strict=False):
            place.plot(100 * at["bits"] / 16, at["kl"], marker, color="black", label=name)
        place.set(xscale="log", yscale="log", title=model, xlabel="bytes, % of the 16-bit cache")
        ticks = (5, 10, 15, 25, 50, 100)
        place.set_xticks(ticks, [str(tick) for tick in ticks])
        place.minorticks_off()
        place.grid(alpha=0.3)
    axes[0].set_ylabel("nats from the full cache")
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
