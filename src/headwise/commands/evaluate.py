"""`headwise eval`: evaluate methods on tasks, against the full cache."""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.console import print_json, print_table, progress_bar
from headwise.commands.inputs import parse_entries, parse_keeps, parse_methods
from headwise.commands.loading import choose_methods, load_launched
from headwise.commands.options import (
    SEEDS,
    AsJson,
    Chunk,
    Device,
    Dtype,
    EntriesList,
    Keeps,
    Methods,
    Model,
    Protocol,
    Reading,
)
from headwise.commands.tables import all_native, number, without
from headwise.errors import BadInput
from headwise.files.strict_json import MOST
from headwise.files.terminal import complain, count
from headwise.methods.keep import Keep
from headwise.methods.reading import require_reading
from headwise.models.places import find
from headwise.tasks.task import require_protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.evals.records import Record, RunFolder
    from headwise.evals.run import Evaluation, Summary
    from headwise.models.processes import Processes
    from headwise.tasks.suites import Sizes
    from headwise.tasks.task import Task

Tasks = Annotated[
    str,
    typer.Option(help="Suites or suite:task,task of mini-ruler, ruler, longbench; file:X.jsonl; perplexity:X.txt."),
]
Samples = Annotated[int, typer.Option(min=1, max=MOST, help="Documents per task.")]
Seed = Annotated[int, typer.Option(min=0, max=SEEDS, help="Seed of the evaluation split; no training data has it.")]
Length = Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of document, question and answer.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for records; a killed run goes on there.")]
DataDir = Annotated[Path | None, typer.Option(help="Where RULER's and LongBench's data lie.")]
Fidelity = Annotated[bool, typer.Option(help="Also measure KL and agreement with the full cache.")]
Timed = Annotated[int, typer.Option(min=0, max=MOST, help="Samples per task of which single steps are timed.")]
Rows = Annotated[int, typer.Option(min=1, max=MOST, help="Sequences decoded together, at most.")]
Brief = Annotated[bool, typer.Option("--brief", help="Short records, without answers and maps: for a repository.")]

# Fields of --json.
AGREED = ("method", "keep", "entries", "task", "length", "samples", "accuracy", "full_accuracy", "kv_fraction")


def evaluate(
    model: Model = "reference",
    tasks: Tasks = "mini-ruler",
    methods: Methods = "full,snapkv,keydiff,adakv,expected+global",
    keep: Keeps = "0.15",
    entries: EntriesList = "native",
    samples: Samples = 20,
    seed: Seed = 0,
    length: Length = 512,
    out: Out = None,
    protocol: Protocol = "query-agnostic",
    data_dir: DataDir = None,
    fidelity: Fidelity = True,
    timed: Timed = 1,
    rows: Rows = 256,
    prefill_chunk_size: Chunk = None,
    reading: Reading = "exact",
    brief: Brief = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure quality and memory of methods on tasks, against the full cache. Also under 'accelerate launch'."""
    names, keeps, stored = _parse_options(methods, keep, entries, protocol, reading, out)
    source = find(model)
    from headwise.evals.run import summarise
    from headwise.tasks.suites import Sizes, parse_tasks, with_data

    named = parse_tasks(tasks, whole=partial(with_data, data_dir=data_dir, tell=complain))
    processes, loaded, tokenizer = load_launched(source, dtype, device, shared_out=False)
    names = choose_methods(names, loaded, quiet=processes.rank > 0)
    sizes = Sizes(samples=samples, length=length, seed=seed, data_dir=data_dir)
    made = _make_tasks(named, loaded, tokenizer, sizes)
    chosen = {"seed": seed, "protocol": protocol, "fidelity": fidelity, "timed": timed, "rows": rows, "brief": brief}
    evaluation = _evaluation(made, names, keeps, stored, prefill_chunk_size, reading=reading, **chosen)
    folder = None if out is None else _folder(out, loaded, model, evaluation, length, processes)
    records = _measure(loaded, tokenizer, evaluation, folder, processes)
    measured = f"Up to {count(range(samples), 'sample')} per task, {length} tokens, seed {seed}, {protocol}"
    if processes.rank == 0:
        _print(f"{measured}. Model: {model}", [row for row in summarise(records) if row.method in names], as_json)


def _parse_options(
    methods: str, keep: str, entries: str, protocol: str, reading: str, out: Path | None
) -> tuple[list[str], list[Keep], list[str]]:
    """Return methods, keeps and entries. Raises BadInput for all errors that can be known without the model."""
    from headwise.evals.records import require_place

    names, keeps, stored = parse_methods(methods, oracle=reading == "exact"), parse_keeps(keep), parse_entries(entries)
    require_protocol(protocol)
    require_reading(reading, *stored)
    if out is not None:
        require_place(out)
    return names, keeps, stored


def _make_tasks(
    named: Sequence[tuple[str, str]], model: "PreTrainedModel", tokenizer: Any, sizes: "Sizes"
) -> "list[Task]":
    """Return the tasks. Raises BadInput if the model has no room for them; a user's documents are checked later."""
    from headwise.models.families import view
    from headwise.tasks.suites import SUITES, make_tasks

    tasks = make_tasks(named, tokenizer, sizes)
    limit = view(model).max_positions
    if sizes.length > limit and any(SUITES[suite].sized for suite, _ in named):
        raise BadInput(f"--length {sizes.length}: this model was made for {limit} tokens; give as many or fewer.")
    return tasks


def _evaluation(
    tasks: "Sequence[Task]",
    methods: Sequence[str],
    keeps: Sequence[Keep],
    entries: Sequence[str],
    prefill_chunk_size: int | None,
    **chosen: Any,
) -> "Evaluation":
    """Return what to measure, as the library takes it."""
    from headwise.evals.run import Evaluation

    lists = {"tasks": tuple(tasks), "methods": tuple(methods), "keeps": tuple(keeps), "entries": tuple(entries)}
    return Evaluation(**lists, prefill_chunk_size=prefill_chunk_size, **chosen)


def _folder(
    out: Path, model: "PreTrainedModel", name: str, evaluation: "Evaluation", length: int, processes: "Processes"
) -> "RunFolder":
    """Return the folder for records, with the command line that made them. Each process writes its own part."""
    from headwise.evals.records import RunFolder
    from headwise.evals.run import manifest

    run_facts = manifest(model, name, evaluation, length, shlex.join(["headwise", *sys.argv[1:]]))
    return RunFolder(out, run_facts, rank=processes.rank if processes.number > 1 else None)


def _measure(
    model: "PreTrainedModel",
    tokenizer: Any,
    evaluation: "Evaluation",
    folder: "RunFolder | None",
    processes: "Processes",
) -> "list[Record]":
    """Return all records of the evaluation, and show progress."""
    from headwise.evals.run import evaluate as run

    with progress_bar("samples") as progress:
        return run(model, tokenizer, evaluation, folder=folder, processes=processes, progress=progress)


def _print(title: str, summaries: "Sequence[Summary]", as_json: bool) -> None:
    if as_json:
        print_json([_fields(summary) for summary in summaries])
        return
    header = ["task", "method", "keep", "entries", "KV of full", "accuracy", "95%", "full cache", "KL", "agreement"]
    hidden = ["entries"] * all_native(summary.entries for summary in summaries)
    print_table(title, *without(hidden, header, [_cells(summary) for summary in summaries]))


def _fields(summary: "Summary") -> dict[str, Any]:
    """Return what --json says of a method on a task. Only the oracle has the field `sees_answers`."""
    fields = {**asdict(summary), "task": summary.task.removeprefix("mini-ruler:")}
    return {name: fields[name] for name in AGREED + ("sees_answers",) * summary.sees_answers}


def _cells(summary: "Summary") -> list[str]:
    from headwise.report.quality.statistics import interval

    accuracy = number(summary.accuracy)
    if summary.nll is not None and summary.accuracy is None:
        accuracy = f"ppl {math.exp(summary.nll):.3f}"
    ends = interval(summary.scores)
    return [
        summary.task,
        f"{summary.method} (sees the answers)" if summary.sees_answers else summary.method,
        str(summary.keep),
        summary.entries,
        f"{summary.kv_fraction:.1%}",
        accuracy,
        "-" if ends is None else f"{ends.low:.2f}-{ends.high:.2f}",
        number(summary.full_accuracy),
        number(summary.kl),
        number(summary.agreement),
    ]
