"""Measure whole models, candidate by candidate, for `headwise bench generate` and `headwise bench memory`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.commands.bench.options import parse_count, resolve_device
from headwise.commands.bench.rows import Columns, print_rows
from headwise.commands.console import progress_bar
from headwise.files.terminal import numbers, size, split

if TYPE_CHECKING:
    from headwise.bench.candidates import Settings

COLUMNS: Columns = {
    "tokens": "tokens",
    "candidate": "candidate",
    "prefill s": lambda row: f"{row['prefill_s']:.2f}",
    "ms/token": lambda row: f"{row['ms_per_token']:.1f}",
    "faster": lambda row: f"{row['speedup_vs_full']:.2f}x",
    "attention": lambda row: f"{row['attention_share']:.0%}",
    "KV held": lambda row: size(row["kv_bytes"]),
    "peak": lambda row: size(row["peak_bytes"]),
    "peak falls by": lambda row: "-" if row["saved_bytes"] is None else size(row["saved_bytes"]),
    "claimed": lambda row: "-" if row["saved_bytes"] is None else size(row["claimed_saved_bytes"]),
}


def settings_for(
    *,
    model: str,
    layers: int | None,
    methods: str,
    keep: float,
    tokens: str,
    new_tokens: int,
    batch: int,
    dtype: str,
    device: str,
    threads: int | None,
    kvpress: Path | None,
    entries: str,
) -> "list[Settings]":
    """Return settings for every number of tokens. Raises BadInput if one is wrong."""
    from headwise.bench.candidates import Settings, default_methods

    return [
        Settings(
            model=model,
            layers=layers,
            methods=default_methods(split(methods), kvpress),
            keep=keep,
            tokens=n,
            new_tokens=new_tokens,
            batch=batch,
            dtype=dtype,
            device=resolve_device(device),
            threads=threads,
            kvpress=kvpress,
            entries=entries,
        )
        for n in numbers(tokens, parse_count)
    ]


def measure(benchmark: str, settings: "list[Settings]", *, as_json: bool) -> None:
    """Check all budgets, then measure one context after the other, and print the rows."""
    from headwise.bench.candidates import run

    for setting in settings:
        setting.require_budgets()
    rows = []
    with progress_bar("candidates") as progress:
        for setting in settings:
            rows += run(benchmark, setting, progress=progress)
    print_rows([asdict(row) for row in rows], _title(settings[0]), COLUMNS, as_json=as_json)


def _title(settings: "Settings") -> str:
    """Return what all contexts have in common."""
    shared = f"Keep {settings.keep:g}, {settings.dtype}, batch {settings.batch}"
    yardstick = "full = transformers' DynamicCache; peaks above the loaded model's"
    stored = "" if settings.entries == "native" else f", entries in {settings.entries}"
    return f"{shared}{stored}; {yardstick}. Model: {settings.model}"
