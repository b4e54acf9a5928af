"""`headwise shrink`: write a small copy of gates or of a budget."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from headwise.commands.console import print_json
from headwise.commands.options import AsJson
from headwise.files.terminal import say, size
from headwise.files.writing import require_file

Artifact = Annotated[Path, typer.Argument(help="Gates or a budget.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The small copy to write.")]
MadeFor = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub id of the model that it was made for; left out: as it is."),
]


def shrink(path: Artifact, out: Out, model: MadeFor = None, as_json: AsJson = False) -> None:
    """Write a copy that is small enough to share: gates in half precision, budgets without the curves for pictures."""
    from headwise.offline.shrink import shrink as run

    require_file(out, inputs=[path])
    small = run(path, out, model=model)
    if as_json:
        print_json({"path": str(out), **asdict(small)})
        return
    say(f"{out}: {size(small.bytes_after)} instead of {size(small.bytes_before)}.")
    say(f"A head's share changes by at most {small.changed:.5f}; at least {small.shared:.1%} of its entries stay.")
