"""`headwise report`: write a web page, a table, a summary and a picture of evaluations or benchmarks."""

from pathlib import Path
from typing import Annotated

import typer

from headwise.commands.console import print_json
from headwise.commands.options import AsJson
from headwise.files.terminal import complain, say

Sources = Annotated[
    list[Path], typer.Argument(help="Folders of 'headwise eval --out', or files of 'headwise bench ... --json'.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Page to write; .csv, .md and .png go beside it.")]


def report(sources: Sources, out: Out = Path("report.html"), as_json: AsJson = False) -> None:
    """Write quality against measured bytes, or speed and memory, as a web page, a table, a summary and a picture."""
    from headwise.report.quality.results import write_report

    written = [str(path) for path in write_report(sources, out, tell=complain)]
    if as_json:
        print_json({"written": written})
    else:
        say(", ".join(written))
