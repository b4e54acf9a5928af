"""Types of the options that several commands have: their names and help."""

from pathlib import Path
from typing import Annotated

import typer

from headwise.files.strict_json import MOST

SEEDS = 2**63 - 1  # the largest

Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, or 'reference' (bundled).")]
Keep = Annotated[str, typer.Option("--keep", "-k", help="What to retain: 0.15, 15%, 1024tok, 2GiB or 5%bytes.")]
Entries = Annotated[str, typer.Option(help="How kept entries are stored: native, int8, k8v4, int4 or auto.")]
EntriesList = Annotated[str, typer.Option("--entries", help="Comma-separated: native,int8,k8v4,int4,auto.")]
Keeps = Annotated[str, typer.Option("--keep", "-k", help="Comma-separated: 0.15,0.25.")]
Methods = Annotated[str, typer.Option(help="Comma-separated; see 'headwise methods'.")]
Protocol = Annotated[str, typer.Option(help="query-agnostic, or query-aware.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]

# Of a document that is read and asked about.
Document = Annotated[
    Path | None, typer.Option("--context", "-c", help="Text file (UTF-8); left out: the bundled document.")
]
Chunk = Annotated[int | None, typer.Option(min=1, max=MOST, help="Read the context in pieces of so many tokens.")]
Reading = Annotated[
    str, typer.Option(help="exact; evict: pieces are cut as they are read; offload: layers wait outside of memory.")
]
NewTokens = Annotated[
    int, typer.Option(min=1, max=MOST, help="Longest answer; it ends at the model's last position at the latest.")
]
SplitSpecial = Annotated[
    bool, typer.Option("--split-special-tokens", help="Control tokens in document and questions are text.")
]

# Of texts for calibration and training.
Data = Annotated[str, typer.Option(help="FILE.jsonl, FILE.txt, FILE.md, a folder of them, or builtin[:N].")]
Length = Annotated[int | None, typer.Option(min=1, max=MOST, help="Tokens of a context, at most.")]
Contexts = Annotated[int | None, typer.Option(min=1, max=MOST, help="How many contexts are made of the data.")]
Questions = Annotated[
    str | None, typer.Option(help="auto: also made for texts that have none; none; or how many of each context.")
]
Sink = Annotated[int, typer.Option(min=0, max=MOST, help="First tokens that every head keeps first.")]
Window = Annotated[int, typer.Option(min=0, max=MOST, help="Last tokens that every head keeps next.")]
