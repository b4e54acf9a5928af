"""`headwise bench generate`: measure a whole model, reading and decoding."""

from typing import Annotated

import typer

from headwise.commands.bench.candidates import measure, settings_for
from headwise.commands.bench.options import Batch, Dtype, Entries, Keep, KVPress, Layers, Model, Threads, Tokens
from headwise.commands.options import AsJson, Device, Methods
from headwise.files.strict_json import MOST

NewTokens = Annotated[int, typer.Option(min=1, max=MOST, help="Decoded; the median step counts.")]


def generate(
    model: Model = "random-llama-1b",
    layers: Layers = None,
    methods: Methods = "snapkv+adakv",
    keep: Keep = 0.15,
    tokens: Tokens = "8192",
    new_tokens: NewTokens = 64,
    batch: Batch = 1,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    threads: Threads = None,
    kvpress: KVPress = None,
    entries: Entries = "native",
    as_json: AsJson = False,
) -> None:
    """Measure a whole model: reading, decoding and the memory of both, every candidate in a process of its own."""
    settings = settings_for(
        model=model,
        layers=layers,
        methods=methods,
        keep=keep,
        tokens=tokens,
        new_tokens=new_tokens,
        batch=batch,
        dtype=dtype,
        device=device,
        threads=threads,
        kvpress=kvpress,
        entries=entries,
    )
    measure("generate", settings, as_json=as_json)
