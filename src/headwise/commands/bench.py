"""`headwise bench`: thin commands, as in cli.py, of which they are a part."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.commands.console import print_json, print_table, progress_bar
from headwise.files.strict_json import MOST
from headwise.files.terminal import numbers, say, size, split

app = typer.Typer(help="Speed and memory, next to the full cache and to what memory allows, measured in the same run.")

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Hub id, folder, or random-llama-1b, random-llama-8b, random-narrow."),
]
Layers = Annotated[int | None, typer.Option(min=1, max=MOST, help="Of a random model; left out: as many as it has.")]
Keep = Annotated[float, typer.Option("--keep", "-k", help="Share kept.")]
Methods = Annotated[str, typer.Option(help="Comma-separated; see 'headwise methods'.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Tokens = Annotated[str, typer.Option(help="Of context; comma-separated.")]
Batch = Annotated[int, typer.Option(min=1, max=MOST, help="Sequences.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Threads = Annotated[int | None, typer.Option(min=1, max=MOST, help="Of PyTorch on the CPU; left out: its default.")]
KVPress = Annotated[
    Path | None, typer.Option(help="The Python of an environment with kvpress: its head-wise path is measured too.")
]


def counted(text: str) -> int:
    """One of several numbers of an option. Raises ValueError, which `numbers` tells."""
    number = int(text)
    if number > MOST:
        raise ValueError(f"{text[:40]} is more than {MOST}")
    return number


@app.command("decode", epilog="Example: headwise bench decode --dtype bfloat16,float32 --keep 0.1,0.2 --json")
def decode(
    tokens: Tokens = "32768",
    keep: Annotated[str, typer.Option("--keep", "-k", help="Shares kept; comma-separated.")] = "0.2",
    batch: Annotated[str, typer.Option(help="Sequences; comma-separated.")] = "1",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; comma-separated.")] = "bfloat16,float32",
    threads: Annotated[str, typer.Option(help="Comma-separated.")] = "1",
    skewed: Annotated[bool, typer.Option(help="Some heads keep much more than others.")] = True,
    rounds: Annotated[int, typer.Option(min=1, max=MOST, help="Runs of each candidate; the median counts.")] = 15,
    kvpress: KVPress = None,
    as_json: AsJson = False,
) -> None:
    """One decoding step of one layer of Llama-3.1-8B on the CPU: every kernel, checked against float64 first."""
    import torch

    from headwise.bench.decode import Settings, run
    from headwise.evals.run import hardware, versions

    grid = [
        Settings(tokens=n, keep=k, batch=b, dtype=d, threads=t, skewed=skewed, rounds=rounds, kvpress=kvpress)
        for d, n, k, b, t in product(
            split(dtype),
            numbers(tokens, counted),
            numbers(keep, float),
            numbers(batch, counted),
            numbers(threads, counted),
        )
    ]
    rows = []
    with progress_bar("settings") as progress:
        for done, settings in enumerate(grid):
            progress(done, len(grid), f"{settings.tokens} tokens, keep {settings.keep:g}, {settings.dtype}")
            rows += run(settings)
    about = {"hardware": hardware(torch.device("cpu")), "versions": versions()}
    _print_rows(
        [asdict(row) | about for row in rows],
        "One layer, one step: full = transformers' SDPA over the whole cache; floor = reading what must be read.",
        {
            "dtype": "dtype",
            "tokens": "tokens",
            "keep": "keep",
            "batch": "batch",
            "threads": "threads",
            "candidate": "candidate",
            "ms": lambda row: f"{row['ms']:.2f}",
            "faster": lambda row: f"{row['speedup_vs_full']:.1f}x",
            "of floor": lambda row: f"{row['times_floor']:.2f}x",
            "error": lambda row: f"{row['rel_error']:.1e}",
            "PyTorch's": lambda row: f"{row['plain_error']:.1e}",
        },
        as_json,
    )


@app.command("prefill", epilog="Example: headwise bench prefill --methods lkv,snapkv --tokens 8192 --dtype float32")
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
    rounds: Annotated[int, typer.Option(min=1, max=MOST, help="Runs of each candidate; the median counts.")] = 5,
    as_json: AsJson = False,
) -> None:
    """What methods add to the reading of a context, on any model: in turns with the full cache."""
    from headwise.bench.prefill import Settings, run

    settings = [
        Settings(
            model=model,
            layers=layers,
            methods=tuple(split(methods)),
            keep=keep,
            tokens=n,
            batch=batch,
            dtype=dtype,
            device=_device(device),
            threads=threads,
            rounds=rounds,
        )
        for n in numbers(tokens, counted)
    ]
    for one in settings:
        one.require_budgets()
    rows = []
    with progress_bar("rounds") as progress:
        for one in settings:
            rows += run(one, progress=progress)
    _print_rows(
        [asdict(row) for row in rows],
        f"Reading a context, {dtype}, keep {keep:g}; full = transformers' DynamicCache. Model: {model}",
        {
            "tokens": "tokens",
            "batch": "batch",
            "candidate": "candidate",
            "s": lambda row: f"{row['seconds']:.2f}",
            "longer by": lambda row: f"{row['overhead']:.1%}",
            "of it ours": lambda row: "-" if row["ours_share"] is None else f"{row['ours_share']:.2%}",
            "KV held": lambda row: size(row["kv_bytes"]),
        },
        as_json,
    )


@app.command("generate", epilog="Example: headwise bench generate --methods snapkv+adakv,lkv --tokens 8192 --keep 0.15")
def generate(
    model: Model = "random-llama-1b",
    layers: Layers = None,
    methods: Methods = "snapkv+adakv",
    keep: Keep = 0.15,
    tokens: Tokens = "8192",
    new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Decoded; the median step counts.")] = 64,
    batch: Batch = 1,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    threads: Threads = None,
    kvpress: KVPress = None,
    as_json: AsJson = False,
) -> None:
    """A whole model: reading, decoding and the memory of both, every candidate in a process of its own."""
    _candidates(
        "generate", model, layers, methods, keep, tokens, new_tokens, batch, dtype, device, threads, kvpress, as_json
    )


@app.command("memory", epilog="Example: headwise bench memory --tokens 2048,4096,8192 --methods keydiff,lkv")
def memory(
    model: Model = "random-narrow",
    layers: Layers = None,
    methods: Methods = "keydiff,snapkv+adakv",
    keep: Keep = 0.15,
    tokens: Tokens = "2048,4096,8192",
    new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Decoded after the context.")] = 8,
    batch: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = None,
    kvpress: KVPress = None,
    as_json: AsJson = False,
) -> None:
    """Memory really held, over contexts: the peak of a process (of a GPU's allocator) against the bytes claimed."""
    _candidates(
        "memory", model, layers, methods, keep, tokens, new_tokens, batch, dtype, device, threads, kvpress, as_json
    )


def _candidates(
    benchmark: str,
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
    as_json: bool,
) -> None:
    from headwise.bench.candidates import Settings, default_methods, run

    settings = [
        Settings(
            model=model,
            layers=layers,
            methods=default_methods(split(methods), kvpress),
            keep=keep,
            tokens=n,
            new_tokens=new_tokens,
            batch=batch,
            dtype=dtype,
            device=_device(device),
            threads=threads,
            kvpress=kvpress,
        )
        for n in numbers(tokens, counted)
    ]
    for one in settings:
        one.require_budgets()
    rows = []
    with progress_bar("candidates") as progress:
        for one in settings:
            rows += run(benchmark, one, progress=progress)
    shown: dict[str, str | Callable[[dict[str, Any]], str]] = {
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
    title = f"Keep {keep:g}, {dtype}, batch {batch}; full = transformers' DynamicCache; peaks above the loaded model's"
    _print_rows([asdict(row) for row in rows], f"{title}. Model: {model}", shown, as_json)


def _device(name: str) -> str:
    from headwise.models.loading import find_device

    return str(find_device(name))


def _print_rows(
    rows: list[dict[str, Any]],
    title: str,
    shown: dict[str, str | Callable[[dict[str, Any]], str]],
    as_json: bool,
) -> None:
    """Of a benchmark: a list of objects as JSON, or a table, each column a field or made of the row."""
    rows = [row | {"command": shlex.join(["headwise", *sys.argv[1:]])} for row in rows]
    if as_json:
        print_json(rows)
        return
    for about in dict.fromkeys((row["hardware"], tuple(row["versions"].items())) for row in rows):
        say(f"{about[0]}; " + ", ".join(f"{name} {version}" for name, version in about[1]))
    cells = [[f"{row[how]}" if isinstance(how, str) else how(row) for how in shown.values()] for row in rows]
    print_table(title, list(shown), cells)
