"""Types of the options that several benchmarks have, and functions that parse them."""

from pathlib import Path
from typing import Annotated

import typer

from headwise.files.strict_json import MOST

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Hub id, folder, or random-llama-1b, random-llama-8b, random-narrow."),
]
Layers = Annotated[int | None, typer.Option(min=1, max=MOST, help="Of a random model; left out: as many as it has.")]
Keep = Annotated[float, typer.Option("--keep", "-k", help="Share kept.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Tokens = Annotated[str, typer.Option(help="Tokens of context; comma-separated.")]
Batch = Annotated[int, typer.Option(min=1, max=MOST, help="Sequences.")]
Entries = Annotated[str, typer.Option(help="How methods store what they keep: native, int8, k8v4 or int4.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Threads of PyTorch on the CPU; left out: its default.")
]
Rounds = Annotated[int, typer.Option(min=1, max=MOST, help="Runs of each candidate; the median counts.")]
KVPress = Annotated[
    Path | None, typer.Option(help="The Python of an environment with kvpress: its head-wise path is measured too.")
]


def parse_count(text: str) -> int:
    """Parse one of several numbers of an option. Raises ValueError, from which `numbers` makes BadInput."""
    number = int(text)
    if number > MOST:
        raise ValueError(f"{text[:40]} is more than {MOST}")
    return number


def resolve_device(name: str) -> str:
    """Return the device that --device means on this machine. Raises BadInput if there is none."""
    from headwise.models.loading import find_device

    return str(find_device(name))
