"""`headwise generate`: compress a document, and ask one question."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.console import print_json, progress_bar
from headwise.commands.inputs import files_read, read_document, require_entries
from headwise.commands.loading import choose_methods, load_model
from headwise.commands.options import (
    AsJson,
    Chunk,
    Device,
    Document,
    Dtype,
    Entries,
    Keep,
    Model,
    NewTokens,
    Reading,
    SplitSpecial,
)
from headwise.errors import BadInput
from headwise.files.writing import require_file
from headwise.methods.keep import Keep as ParsedKeep
from headwise.methods.keep import parse_keep
from headwise.methods.names import require_names
from headwise.methods.reading import require_reading
from headwise.methods.registry import AUTO, FULL
from headwise.models.places import find

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.evals.answers import Memory
    from headwise.tasks.document import Tokens

Question = Annotated[list[str], typer.Option("--question", "-q", help="What to ask: one question.")]
Method = Annotated[
    str, typer.Option(help="See 'headwise methods'; 'auto': the model's default; 'full' keeps everything.")
]
Save = Annotated[Path | None, typer.Option(help="Where to save the compressed document, for headwise.load.")]


def generate(
    question: Question,
    model: Model = "reference",
    context: Document = None,
    method: Method = AUTO,
    keep: Keep = "0.15",
    entries: Entries = "native",
    max_new_tokens: NewTokens = 256,
    prefill_chunk_size: Chunk = None,
    reading: Reading = "exact",
    split_special_tokens: SplitSpecial = False,
    save: Save = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compress a document, ask one question, stream the answer."""
    _require_single(question)
    parsed, stored = parse_keep(keep), require_entries(entries)
    _require_method(method, reading, stored)
    if save is not None:
        _require_place(save, model, method, context)
    text, _ = read_document(context, question, None)
    source = find(model)
    from headwise.commands.streaming import AnswerStreamer
    from headwise.evals.answers import answer, require_possible

    loaded, tokenizer = load_model(source, dtype, device)
    tokens = _tokens(loaded, tokenizer, text, question, split_special_tokens)
    (name,) = choose_methods([method], loaded)
    require_possible(loaded, [name], [parsed], tokens, entries=[stored], reading=reading)
    pieces = {"prefill_chunk_size": prefill_chunk_size, "reading": reading}
    memory = _read(loaded, tokenizer, tokens, name, parsed, stored, **pieces)
    kv_bytes = memory.nbytes
    if save is not None:
        _save(memory, save)
    streamer = None if as_json else AnswerStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (said,) = answer(loaded, tokenizer, memory, tokens, max_new_tokens=max_new_tokens, streamer=streamer)
    if as_json:
        print_json({"method": name, **_kept(name, parsed, stored), "answer": said, "kv_bytes": kv_bytes})


def _require_method(method: str, reading: str, entries: str) -> None:
    require_names([method])
    if require_reading(reading, entries) != "exact" and method == FULL:
        raise BadInput(f"--reading {reading} is for methods that compress: 'full' keeps everything in memory.")


def _kept(method: str, keep: ParsedKeep, entries: str) -> dict[str, Any]:
    return {"keep": 1.0, "entries": "native"} if method == FULL else {"keep": keep.value, "entries": entries}


def _require_single(questions: list[str]) -> None:
    if len(questions) > 1:
        raise BadInput(
            f"generate answers one question, and {len(questions)} are given: 'headwise compare' asks several, and "
            "--save keeps the document for another one."
        )


def _require_place(save: Path, model: str, method: str, context: Path | None) -> None:
    """Raise BadInput unless there will be something to save, and it can be written there."""
    if method == FULL or not os.path.isdir(save.parent):
        raise BadInput(f"--save {save}: name a file in a folder that exists, and a method that compresses.")
    require_file(save, inputs=files_read(model, [method], context))


def _tokens(
    model: "PreTrainedModel", tokenizer: Any, text: str, questions: list[str], split_special_tokens: bool
) -> "Tokens":
    """Return document and question as tokens. Raises BadInput if the model has no room for them."""
    from headwise.evals.answers import room_for_answers
    from headwise.models.families import view
    from headwise.models.room import require_room
    from headwise.tasks.document import tokenize

    require_room(tokenizer, text, view(model).max_positions)
    tokens = tokenize(tokenizer, text, questions, device=model.device, split_special_tokens=split_special_tokens)
    room_for_answers(model, tokens)
    return tokens


def _read(
    model: "PreTrainedModel",
    tokenizer: Any,
    tokens: "Tokens",
    method: str,
    keep: ParsedKeep,
    entries: str,
    **pieces: Any,
) -> "Memory":
    """Read and compress the document, and show progress."""
    from headwise.evals.answers import read_context
    from headwise.tasks.document import instructed

    used = method if method == FULL else instructed(method, tokenizer)
    with progress_bar("tokens") as progress:
        return read_context(model, tokens.context, used, keep, entries=entries, progress=progress, **pieces)


def _save(memory: "Memory", path: Path) -> None:
    from headwise.cache.cache import RaggedCache

    assert isinstance(memory, RaggedCache)
    memory.save(path)
