"""A table of two ways to read the same contexts, in pieces: for docs/results/bounded-reading.md.

    headwise eval ... --reading exact --out runs/ruler-4096/exact
    headwise eval ... --reading evict --out runs/ruler-4096/evict
    python recipes/readings_table.py runs/ruler-4096 [runs/text-4096 ...]

Only samples count that both have measured. A loss is exact less evict of the score, and evict less exact of the KL.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

WAYS = ("exact", "evict")
Row = tuple[str, float]  # method and keep
Measured = Mapping[tuple[str, int], Mapping[str, Any]]  # by task and index


def measured(folder: Path) -> dict[Row, dict[tuple[str, int], dict[str, Any]]]:
    """All records of a run, by method and keep."""
    found: dict[Row, dict[tuple[str, int], dict[str, Any]]] = {}
    for path in sorted(folder.glob("records*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            row = record["method"], float(record["keep"])
            found.setdefault(row, {})[record["task"], record["index"]] = record
    return found


def table(place: Path) -> list[str]:
    """Lines for one set of tasks."""
    exact, evict = (measured(place / way) for way in WAYS)
    lines = [
        f"| {place.name} | keep | score: exact | evict | loss | nats: exact | evict | loss | peak: exact | evict |"
    ]
    lines.append("|" + "---|" * 10)
    for (method, keep), once in exact.items():
        other = evict.get((method, keep), {})
        common = [sample for sample in once if sample in other]
        if common:
            lines.append(line(method, keep, [once[s] for s in common], [other[s] for s in common]))
    return lines


def line(method: str, keep: float, once: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """One method at one keep, over the same samples."""

    def mean(records: list[dict[str, Any]], name: str) -> float | None:
        return fmean(record[name] for record in records) if all(r.get(name) is not None for r in records) else None

    score, kl = ([mean(records, name) for records in (once, other)] for name in ("score", "kl"))
    peaks = [fmean(r["peak_kv_bytes"] / r["full_kv_bytes"] for r in records) for records in (once, other)]
    cells = [method, f"{keep:g}", *compared(score, lost=-1, digits=3), *compared(kl, lost=1, digits=4)]
    return f"| {' | '.join([*cells, *(f'{peak:.2f}' for peak in peaks)])} |"


def compared(pair: list[float | None], *, lost: int, digits: int) -> list[str]:
    """Both, and by how much the second is worse."""
    first, second = pair
    if first is None or second is None:
        return ["", "", ""]
    return [f"{first:.{digits}f}", f"{second:.{digits}f}", f"{lost * (second - first) + 0.0:+.{digits}f}"]


def main() -> None:
    """Print a table for every folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="+", help="folders with a run in exact/ and one in evict/")
    for place in parser.parse_args().places:
        samples = {key for found in measured(place / WAYS[0]).values() for key in found}
        print(f"{place.name}: {len(samples)} samples of {len({task for task, _ in samples})} tasks\n")
        print("\n".join(table(place)), end="\n\n")


if __name__ == "__main__":
    main()
