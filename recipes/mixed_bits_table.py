"""A table of what recipes/real_models.py has measured with --entries auto: for docs/results/small-entries.md.

    python recipes/mixed_bits_table.py runs/MODEL/books/query-agnostic/books

Every cell has the mean KL and the measured share of the bytes.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

NATIVE_BYTES = {"2.5%bytes": "5%bytes", "7.5%bytes": "15%bytes", "12.5%bytes": "25%bytes"}  # of 32 bits, of 16
KINDS = ("native", "int8", "k8v4", "int4", "auto")


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of one task")
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for line in (parser.parse_args().folder / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["method"] != "full":
            share = record["kv_bytes"] / record["full_kv_bytes"]
            found[str(record["keep"]), record["entries"]].append((record["kl"], share))
    print(f"| bytes of 16 bits | {' | '.join(KINDS)} |\n|{'---|' * (len(KINDS) + 1)}")
    for keep, native in NATIVE_BYTES.items():
        cells = [found[native if kind == "native" else keep, kind] for kind in KINDS]
        said = [f"{fmean(kl for kl, _ in cell):.4f}, {fmean(share for _, share in cell):.2%}" for cell in cells]
        print(f"| {native.removesuffix('bytes')} | {' | '.join(said)} |")


if __name__ == "__main__":
    main()
