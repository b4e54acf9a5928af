"""`headwise compare`: compare several methods on one document and its questions."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.console import print_json, print_table, progress_bar
from headwise.commands.inputs import parse_entries, parse_keeps, parse_methods, read_document
from headwise.commands.loading import choose_methods, load_model
from headwise.commands.options import (
    AsJson,
    Chunk,
    Device,
    Document,
    Dtype,
    EntriesList,
    Keeps,
    Methods,
    Model,
    NewTokens,
    Protocol,
    Reading,
    SplitSpecial,
)
from headwise.commands.tables import all_native, number, say_sliding, without
from headwise.files.terminal import complain, count, say, size
from headwise.methods.reading import require_reading
from headwise.methods.registry import FULL
from headwise.models.places import find
from headwise.tasks.task import PROTOCOLS, require_protocol
from headwise.tasks.texts import Asked

if TYPE_CHECKING:
    from headwise.evals.compare import Comparison

Question = Annotated[list[str] | None, typer.Option("--question", "-q", help="May be repeated.")]
METHODS = "full,streaming,snapkv,keydiff,adakv,expected+global"
NOT_WHOLE = "streaming,snapkv,keydiff,adakv"  # those that need neither the full cache nor all of the context at once
QuestionFile = Annotated[Path | None, typer.Option(help='Lines such as {"question": "?", "answers": ["!"]}.')]
ShowAnswers = Annotated[
    bool | None,
    typer.Option("--answers/--no-answers", help="Show every answer; left out: if no right ones are known."),
]


def compare(
    model: Model = "reference",
    methods: Methods = METHODS,
    keep: Keeps = "0.15",
    entries: EntriesList = "native",
    context: Document = None,
    question: Question = None,
    questions: QuestionFile = None,
    protocol: Protocol = "query-agnostic",
    max_new_tokens: NewTokens = 32,
    prefill_chunk_size: Chunk = None,
    reading: Reading = "exact",
    split_special_tokens: SplitSpecial = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    answers: ShowAnswers = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods on one document and its questions: memory held, fidelity to the full cache, speed, answers."""
    names, stored = _parse_options(methods, entries, reading)
    require_protocol(protocol)
    chosen: dict[str, Any] = {"keep": parse_keeps(keep), "entries": stored, "protocol": protocol}
    chosen |= {"prefill_chunk_size": prefill_chunk_size, "reading": reading, "max_new_tokens": max_new_tokens}
    text, asked = read_document(context, question, questions)
    source = find(model)
    from headwise.evals.compare import compare as run

    loaded, tokenizer = load_model(source, dtype, device)
    names = choose_methods(names, loaded)
    chosen |= {"methods": [*names, *[FULL] * (reading == "exact")], "split_special_tokens": split_special_tokens}
    with progress_bar("rows") as progress:
        rows = run(loaded, tokenizer, text, asked, **chosen, progress=progress)
    _print(rows, names, asked, protocol=protocol, model=model, answers=answers, as_json=as_json)


def _parse_options(methods: str, entries: str, reading: str) -> tuple[list[str], list[str]]:
    """Return methods and entries. Where the full cache may not fit, methods that need it are not the default."""
    stored = parse_entries(entries)
    require_reading(reading, *stored)
    if reading != "exact" and methods == METHODS:
        methods = NOT_WHOLE
        complain(f"with --reading {reading} the methods are {methods}: the full cache may not fit. Name it to have it.")
    return parse_methods(methods), stored


def _print(
    measured: "Sequence[Comparison]",
    names: Sequence[str],
    asked: Sequence[Asked],
    *,
    protocol: str,
    model: str,
    answers: bool | None,
    as_json: bool,
) -> None:
    """Print the rows of the methods that were named; the full cache is measured even if it was not named."""
    rows = [row for row in measured if row.method in names]
    if as_json:
        hidden = {"sliding_kv_bytes"} | (set() if answers else {"answers"})
        print_json([{k: v for k, v in asdict(row).items() if k not in hidden} for row in rows])
        return
    has_answers = any(a.answers for a in asked)
    asking = "asked of the compressed document" if protocol == PROTOCOLS[0] else "compressed with the document each"
    _print_comparisons(
        f"{count(asked, 'question')} {asking} ({protocol}). Model: {model}", rows, has_answers=has_answers
    )
    if answers if answers is not None else not has_answers:
        full = next((row for row in measured if row.method == FULL), None)
        _print_answers([a.question for a in asked], rows, full)


def _print_comparisons(title: str, rows: "Sequence[Comparison]", *, has_answers: bool) -> None:
    """Print the table, with the share of right answers if some are known."""
    header = [
        "method",
        "keep",
        "entries",
        "KV held",
        "of full",
        "peak KV",
        "right",
        "agreement",
        "KL",
        "reading",
        "ms/token",
    ]
    table = [
        [
            row.method,
            str(row.keep),
            row.entries,
            size(row.kv_bytes),
            f"{row.kv_bytes / row.full_kv_bytes:.1%}",
            size(row.peak_kv_bytes),
            "-" if row.accuracy is None else f"{row.accuracy:.2f}",
            "-" if row.agreement is None else f"{row.agreement:.2f}",
            number(row.kl),
            f"{row.prefill_seconds:.2f} s{'*' * (row.prefill_shared_by > 1)}",
            f"{row.decode_ms_per_token:.1f}",
        ]
        for row in rows
    ]
    hidden = ["right"] * (not has_answers) + _hidden(rows)
    print_table(title, *without(hidden, header, table))
    if any(row.prefill_shared_by > 1 for row in rows):
        say("* One reading of the document served several rows, so its time is not that of one method.")
    say_sliding(rows[0].sliding_kv_bytes)


def _print_answers(questions: Sequence[str], rows: "Sequence[Comparison]", full: "Comparison | None") -> None:
    """Print every question with the full cache's answer if it is known, then the answers that differ from it."""
    for i, question in enumerate(questions):
        expected = None if full is None else full.answers[i].strip()
        cells = [] if full is None else [[FULL, str(full.keep), full.entries, full.answers[i].strip()]]
        for row in rows:
            text = row.answers[i].strip()
            if row.method != FULL:
                cells.append([row.method, str(row.keep), row.entries, "as full" if text == expected else text])
        print_table(question, *without(_hidden(rows), ["method", "keep", "entries", "answer"], cells))


def _hidden(rows: "Sequence[Comparison]") -> list[str]:
    """Return the column that says nothing, if all entries are native."""
    return ["entries"] * all_native(row.entries for row in rows)
