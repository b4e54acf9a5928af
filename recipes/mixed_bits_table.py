"""A table of what recipes/real_models.py has measured with --entries auto: for docs/results/small-entries.md.

    python recipes/mixed_bits_table.py runs/MODEL/books/query-agnostic/books
    python recipes/mixed_bits_table.py runs/MODEL/ruler-1k/query-agnostic/niah_*

Every cell has the mean KL, the mean score where tasks have one, and the measured share of the bytes. Samples that not
every kind has are left out.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

NATIVE_BYTES = {"2.5%bytes": "5%bytes", "7.5%bytes": "15%bytes", "12.5%bytes": "25%bytes"}  # of 32 bits, of 16
KINDS = ("native", "int8", "k8v4", "int4", "auto")


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+", help="of a task")
    found: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = defaultdict(dict)
    for folder in parser.parse_args().folder:
        for line in (folder / "records.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["method"] != "full":
                found[str(record["keep"]), record["entries"]][record["task"], record["index"]] = record
    kinds = [kind for kind in KINDS if any(entries == kind for _, entries in found)]
    samples = set.intersection(*(set(cell) for cell in found.values()))
    print(f"{len(samples)} samples.\n")
    print(f"| bytes of 16 bits | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 1)}")
    for keep, native in NATIVE_BYTES.items():
        cells = [found[native if kind == "native" else keep, kind] for kind in kinds]
        said = [_cell([cell[sample] for sample in sorted(samples)]) for cell in cells]
        print(f"| {native.removesuffix('bytes')} | {' | '.join(said)} |")


def _cell(records: Sequence[dict[str, Any]]) -> str:
    shares = [record["kv_bytes"] / record["full_kv_bytes"] for record in records]
    scores = [record["score"] for record in records if record["score"] is not None]
    score = f"{fmean(scores):.3f}, " if scores else ""
    return f"{score}{fmean(record['kl'] for record in records):.4f}, {fmean(shares):.2%}"


if __name__ == "__main__":
    main()
