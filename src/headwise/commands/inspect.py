"""`headwise inspect`: show what a file is, and draw it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.commands.console import print_json, print_table
from headwise.commands.options import AsJson
from headwise.errors import BadInput
from headwise.files.writing import require_file
from headwise.tasks.texts import read_text

Artifact = Annotated[Path, typer.Argument(help="A file written by headwise: a cache, a budget, gates ...")]
Plot = Annotated[
    bool, typer.Option("--plot", help="Draw a budget or gates (needs headwise[plot]), or what a cache has kept.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Plot to write: .png, .svg or .pdf; of a cache .html.")]
Ratio = Annotated[float | None, typer.Option(help="Kept fraction at which budgets are drawn; left out: 0.15.")]
Beside = Annotated[Path | None, typer.Option(help="Of gates: a budget or gates to draw beside them.")]
Document = Annotated[
    Path | None, typer.Option("--context", "-c", help="Of a cache: the document it was made from (UTF-8).")
]
Tokenizer = Annotated[
    str | None, typer.Option("--model", "-m", help="Of a cache: whose tokenizer; left out: the folder it names.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show all of its header, and its tensors.")]


def inspect(
    path: Artifact,
    plot: Plot = False,
    out: Out = None,
    ratio: Ratio = None,
    beside: Beside = None,
    context: Document = None,
    model: Tokenizer = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Show what a saved cache or artifact is, and what it was made for. Draw budgets, gates and caches."""
    from headwise.report.inspect.facts import facts
    from headwise.report.inspect.summary import SPREAD, spread, summary

    options = {"--out": out, "--ratio": ratio, "--beside": beside, "--context": context, "--model": model}
    for name, value in options.items():
        if value is not None and not plot:
            raise BadInput(f"{name} {value} is of a plot: add --plot.")
    header = facts(path)
    if plot:
        header["plot"] = str(_plot(header["kind"], path, out, 0.15 if ratio is None else ratio, beside, context, model))
    if as_json:
        print_json(header)
        return
    drawn = [("plot", header["plot"])] if plot else []
    print_table(str(path), ["field", "value"], [*summary(path, header), *drawn])
    budgets = header.pop("budgets", {})
    if budgets:
        print_table("share of the context that is kept, by the keep of the whole cache", SPREAD, spread(budgets))
    if verbose:
        _print_all(header, budgets)


def _plot(
    kind: str,
    path: Path,
    out: Path | None,
    ratio: float,
    beside: Path | None,
    context: Path | None,
    model: str | None,
) -> Path:
    """Draw a file as its kind is drawn. Return the path of the drawing. Raises BadInput if an option does not fit."""
    if beside is not None and kind != "gates":
        raise BadInput(f"--beside {beside} is drawn beside gates; {path} is a {kind}.")
    if kind == "cache":
        return _plot_cache(path, out or path.with_suffix(".html"), context, model)
    if context is not None or model is not None:
        raise BadInput(f"--context and --model are for the plot of a cache; {path} is a {kind}.")
    return _plot_budgets(kind, path, out or path.with_suffix(".png"), ratio, beside)


def _plot_cache(path: Path, target: Path, context: Path | None, model: str | None) -> Path:
    """Draw the document, with the words that the cache has kept."""
    from headwise.report.inspect.kept import plot

    if context is None:
        raise BadInput("the words that a cache keeps are those of its document: name the file with --context.")
    require_file(target, inputs=[path, context])
    plot(path, target, context=context, text=read_text(context), model=model)
    return target


def _plot_budgets(kind: str, path: Path, target: Path, ratio: float, beside: Path | None) -> Path:
    """Draw what every head keeps, of gates or of a budget."""
    require_file(target, inputs=[path] if beside is None else [path, beside])
    if kind == "gates":
        from headwise.report.inspect.gates import plot as draw_gates

        draw_gates(path, target, ratio=ratio, beside=beside)
    else:
        from headwise.artifacts.budget import Budget
        from headwise.report.inspect.budget import plot as draw_budget

        draw_budget(Budget.load(path), target, ratio=ratio)
    return target


def _print_all(header: dict[str, Any], budgets: dict[str, Any]) -> None:
    """Print all of a file's header, what the heads of every layer keep, and the tensors."""
    tensors = header.pop("tensors")
    print_table("header", ["field", "value"], list(_fields(header)))
    if budgets:
        print_table(
            "share of the context that a layer's heads keep on average (least to most), by the keep of the whole cache",
            ["layer", *budgets],
            [
                [str(layer), *(_spread(fractions[index]) for fractions in budgets.values())]
                for index, layer in enumerate(header["origin"]["shape"]["layers"])
            ],
        )
    print_table("tensors", ["name", "dtype", "shape"], [[n, t["dtype"], str(t["shape"])] for n, t in tensors.items()])


def _fields(header: dict[str, Any]) -> Iterator[list[str]]:
    """Yield rows of a file's metadata; a nested field is named field.part."""
    for name, value in header.items():
        nested = {f"{name}.{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
        yield from ([key, v if isinstance(v, str) else json.dumps(v)] for key, v in nested.items())


def _spread(fractions: Sequence[float]) -> str:
    return f"{sum(fractions) / len(fractions):.1%} ({min(fractions):.1%} to {max(fractions):.1%})"
