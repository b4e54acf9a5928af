"""`headwise bench prefill`: measure what methods add to the reading of a context."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from headwise.commands.bench.options import (
    Batch,
    Dtype,
    Keep,
    Layers,
    Model,
    Rounds,
    Threads,
    Tokens,
    parse_count,
    resolve_device,
)
from headwise.commands.bench.rows import Columns, print_rows
from headwise.commands.console import progress_bar
from headwise.commands.options import AsJson, Device, Methods
from headwise.files.terminal import numbers, size, split

if TYPE_CHECKING:
    from headwise.bench.prefill import Settings

COLUMNS: Columns = {
    "tokens": "tokens",
    "batch": "batch",
    "candidate": "candidate",
    "s": lambda row: f"{row['seconds']:.2f}",
    "longer by": lambda row: f"{row['overhead']:.1%}",
    "of it ours": lambda row: "-" if row["ours_share"] is None else f"{row['ours_share']:.2%}",
    "KV held": lambda row: size(row["kv_bytes"]),
}


def prefill(
    model: Model = "random-llama-1b",
    layers: Layers = None,
    methods: Methods = "lkv,keydiff,snapkv,expected",
    keep: Keep = 0.15,
    tokens: Tokens = "8192",
    batch: Batch = 1,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    threads: Threads = None,
    rounds: Rounds = 5,
    as_json: AsJson = False,
) -> None:
    """Measure what methods add to the reading of a context, on any model, in turns with the full cache."""
    from headwise.bench.prefill import Settings

    settings = [
        Settings(
            model=model,
            layers=layers,
            methods=tuple(split(methods)),
            keep=keep,
            tokens=n,
            batch=batch,
            dtype=dtype,
            device=resolve_device(device),
            threads=threads,
            rounds=rounds,
        )
        for n in numbers(tokens, parse_count)
    ]
    title = f"Reading a context, {dtype}, keep {keep:g}; full = transformers' DynamicCache. Model: {model}"
    _measure(settings, title, as_json)


def _measure(settings: "list[Settings]", title: str, as_json: bool) -> None:
    """Check all budgets, then measure one context after the other, and print the rows."""
    from headwise.bench.prefill import run

    for setting in settings:
        setting.require_budgets()
    rows = []
    with progress_bar("rounds") as progress:
        for setting in settings:
            rows += run(setting, progress=progress)
    print_rows([asdict(row) for row in rows], title, COLUMNS, as_json=as_json)
