"""`headwise methods`: list all methods, and which of them are ready for a model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.commands.console import print_json, print_table
from headwise.commands.options import AsJson
from headwise.errors import BadInput
from headwise.files.terminal import say

OfModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub id, folder, or 'reference': what is ready for this model.")
]
Files = Annotated[Path | None, typer.Option(help="With --model: a folder with budgets and gates of your own.")]


def methods(model: OfModel = None, files: Files = None, as_json: AsJson = False) -> None:
    """List every scorer, allocator and short name, with its paper; with --model what is ready for it, and what not."""
    if files is not None and model is None:
        raise BadInput(f"--files {files}: name the model that the files are for, with --model.")
    if model is not None:
        _print_ready(model, files, as_json)
        return
    rows = _registered()
    if as_json:
        print_json(rows)
        return
    print_table(
        "A method is scorer+allocator, such as keydiff+adakv, or a short name. 'full' is transformers' own cache.",
        ["kind", "name", "what it does", "arXiv", "vLLM"],
        [[row["kind"], row["name"], row["summary"], row["paper"], "yes" * row["served"]] for row in rows],
    )


def _registered() -> list[dict[str, Any]]:
    """Return a row for every scorer, allocator and short name."""
    from headwise.methods.names import entries_of, paper_of
    from headwise.methods.registry import ALIASES, ALLOCATORS, SCORERS

    parts = [("scorer", SCORERS), ("allocator", ALLOCATORS)]
    rows = [
        {"kind": kind, "name": name, "summary": entry.summary, "paper": entry.paper, "served": entry.served}
        for kind, registry in parts
        for name, entry in registry.items()
    ]
    for name, pair in ALIASES.items():
        scorer, allocator = entries_of(name)
        served = SCORERS[scorer].served and ALLOCATORS[allocator].served
        rows.append({"kind": "alias", "name": name, "summary": pair, "paper": paper_of(name), "served": served})
    return rows


def _print_ready(model: str, files: Path | None, as_json: bool) -> None:
    """Print which methods a model can use as it is, which need a file first, and which it refuses."""
    from headwise.models.available import overview
    from headwise.models.loading import load_config

    available = overview(model, load_config(model), files)
    if as_json:
        print_json(asdict(available))
        return
    use = {"ready": "ready", "make": "make first", "refused": "no"}
    print_table(
        f"Methods for {model}",
        ["method", "use it?", "file made for", "how, or why not"],
        [[row.method, use[row.state], row.made_for, row.command or row.why or row.file] for row in available.methods],
    )
    say(f"Default: {available.default.name}, because {available.default.reason}.")
