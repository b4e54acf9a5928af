"""`headwise bench memory`: measure the memory that is really held."""

from typing import Annotated

import typer

from headwise.commands.bench.candidates import measure, settings_for
from headwise.commands.bench.options import Batch, Dtype, Entries, Keep, KVPress, Layers, Model, Threads, Tokens
from headwise.commands.options import AsJson, Device, Methods
from headwise.files.strict_json import MOST

NewTokens = Annotated[int, typer.Option(min=1, max=MOST, help="Decoded after the context.")]


def memory(
    model: Model = "random-narrow",
    layers: Layers = None,
    methods: Methods = "keydiff,snapkv+adakv",
    keep: Keep = 0.15,
    tokens: Tokens = "2048,4096,8192",
    new_tokens: NewTokens = 8,
    batch: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = None,
    kvpress: KVPress = None,
    entries: Entries = "native",
    as_json: AsJson = False,
) -> None:
    """Measure memory really held, over contexts: the peak of a process (of a GPU's allocator) against claimed bytes."""
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
    measure("memory", settings, as_json=as_json)
