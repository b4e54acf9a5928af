"""`headwise bench decode`: measure one step of one layer, by every kernel."""

from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.bench.options import KVPress, Rounds, Tokens, parse_count
from headwise.commands.bench.rows import Columns, print_rows
from headwise.commands.console import progress_bar
from headwise.commands.options import AsJson
from headwise.files.terminal import numbers, size, split

if TYPE_CHECKING:
    from headwise.bench.decode import Settings

Keeps = Annotated[str, typer.Option("--keep", "-k", help="Shares kept; comma-separated.")]
Batches = Annotated[str, typer.Option(help="Sequences; comma-separated.")]
Dtypes = Annotated[str, typer.Option(help="float32, bfloat16, float16; comma-separated.")]
ThreadCounts = Annotated[str, typer.Option(help="Threads of PyTorch; comma-separated.")]
Entries = Annotated[str, typer.Option(help="How what is kept is stored: native, int8, k8v4, int4; comma-separated.")]
Skewed = Annotated[bool, typer.Option(help="Some heads keep much more than others.")]

TITLE = "One layer, one step: full = transformers' SDPA over the whole cache; floor = reading what must be read."
COLUMNS: Columns = {
    "dtype": "dtype",
    "tokens": "tokens",
    "keep": "keep",
    "batch": "batch",
    "threads": "threads",
    "candidate": "candidate",
    "entries": "entries",
    "ms": lambda row: f"{row['ms']:.2f}",
    "faster": lambda row: f"{row['speedup_vs_full']:.1f}x",
    "read": lambda row: size(row["kv_bytes"]),
    "of floor": lambda row: f"{row['times_floor']:.2f}x",
    "error": lambda row: f"{row['rel_error']:.1e}",
    "PyTorch's": lambda row: f"{row['plain_error']:.1e}",
}


def decode(
    tokens: Tokens = "32768",
    keep: Keeps = "0.2",
    batch: Batches = "1",
    dtype: Dtypes = "bfloat16,float32",
    threads: ThreadCounts = "1",
    entries: Entries = "native",
    skewed: Skewed = True,
    rounds: Rounds = 15,
    kvpress: KVPress = None,
    as_json: AsJson = False,
) -> None:
    """Measure one decoding step of one layer of Llama-3.1-8B on the CPU: every kernel, checked against float64."""
    import torch

    from headwise.bench.decode import run
    from headwise.evals.run import hardware, versions

    common = {"entries": tuple(split(entries)), "skewed": skewed, "rounds": rounds, "kvpress": kvpress}
    grid = _grid(tokens, keep, batch, dtype, threads, common)
    rows = []
    with progress_bar("settings") as progress:
        for done, settings in enumerate(grid):
            progress(done, len(grid), f"{settings.tokens} tokens, keep {settings.keep:g}, {settings.dtype}")
            rows += run(settings)
    machine = {"hardware": hardware(torch.device("cpu")), "versions": versions()}
    print_rows([asdict(row) | machine for row in rows], TITLE, COLUMNS, as_json=as_json)


def _grid(tokens: str, keep: str, batch: str, dtype: str, threads: str, common: dict[str, Any]) -> "list[Settings]":
    """Return settings for every combination of the lists. Raises BadInput if one is wrong."""
    from headwise.bench.decode import Settings

    return [
        Settings(tokens=n, keep=k, batch=b, dtype=d, threads=t, **common)
        for d, n, k, b, t in product(
            split(dtype),
            numbers(tokens, parse_count),
            numbers(keep, float),
            numbers(batch, parse_count),
            numbers(threads, parse_count),
        )
    ]
