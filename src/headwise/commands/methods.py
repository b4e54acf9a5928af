"""`headwise methods`: list all methods, and which of them are ready for a model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.console import print_json, print_table
from headwise.commands.options import AsJson
from headwise.errors import BadInput
from headwise.files.terminal import say

if TYPE_CHECKING:
    from headwise.models.table import Row, Table

OfModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub id, folder, or 'reference': what is ready for this model.")
]
Files = Annotated[Path | None, typer.Option(help="With --model: a folder with budgets and gates of your own.")]


OfFamilies = Annotated[bool, typer.Option("--families", help="Which types of models work, with which methods.")]


def methods(model: OfModel = None, files: Files = None, families: OfFamilies = False, as_json: AsJson = False) -> None:
    """List every scorer, allocator and short name, with its paper; with --model what is ready for it, and what not."""
    if families:
        _print_families(as_json)
        return
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


def _print_families(as_json: bool) -> None:
    """Print the table of model types that comes with headwise."""
    from headwise.models.table import table

    known = table()
    if as_json:
        print_json(asdict(known))
        return
    supported = [row for row in known.families if row.supported]
    every = [row for row in supported if len(row.methods) == len(known.methods)]
    print_table(
        f"Model types of transformers {known.transformers}",
        ["type", "layers", "methods", "why not"],
        [[row.type, row.layers, _methods_told(row, known), _reasons(row)] for row in known.families],
    )
    say(
        f"{len(supported)} of {len(known.families)} types are supported, {len(every)} with every method that was tried "
        f"({', '.join(known.methods)}), by transformers {known.transformers}. A tiny random model of each was tried."
    )


def _methods_told(row: "Row", known: "Table") -> str:
    """The methods of a row in few words."""
    if not row.supported:
        return "no"
    missing = [name for name in known.methods if name not in row.methods]
    return f"all but {', '.join(missing)}" if missing else "every"


def _reasons(row: "Row") -> str:
    """Why a row, or some of its methods, are refused."""
    return row.refused or "; ".join(
        dict.fromkeys(why.partition(" cannot be used: ")[2] or why for why in row.without.values())
    )


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
