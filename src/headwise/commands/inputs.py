"""Read what options name: a document and its questions, lists of methods, keeps and entries, and files."""

import os
from collections.abc import Sequence
from pathlib import Path

from headwise.errors import BadInput
from headwise.files.terminal import split
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.names import require_names
from headwise.methods.registry import HUB
from headwise.shapes import AUTO, KINDS, NATIVE
from headwise.tasks.texts import Asked, bundled, read_questions, read_text

ENTRIES = (NATIVE, *KINDS)


def read_document(
    context: Path | None, question: Sequence[str] | None, questions: Path | None
) -> tuple[str, list[Asked]]:
    """Return the document, or the bundled one, and its questions. Raises BadInput if a document has no questions."""
    asked = [Asked(question=text) for text in question or ()] + (read_questions(questions) if questions else [])
    if context is None:
        text, bundled_questions = bundled()
        return text, asked or bundled_questions
    if not asked:
        raise BadInput("a document needs questions: add --question 'Who ...?' or --questions FILE.jsonl.")
    return read_text(context), asked


def files_read(model: str, methods: Sequence[str], text: Path | None) -> list[Path]:
    """Return the files that a command reads: the model's, those that methods name, and a text or a folder's texts."""
    of_model = [*Path(model).iterdir()] if os.path.isdir(model) else []
    texts = [] if text is None else [text]
    if text is not None and os.path.isdir(text):
        texts = [file for file in text.iterdir() if file.suffix in (".jsonl", ".txt", ".md")]
    named = [part.partition("@")[2] for method in methods for part in method.split("+") if "@" in part]
    return [*of_model, *texts, *(Path(name) for name in named if not name.startswith(HUB))]


def parse_methods(text: str, *, oracle: bool = False) -> list[str]:
    """Return the methods of a list. Raises BadInput if one is unknown. `oracle`: allow that yardstick."""
    names = split(text)
    require_names(names, oracle=oracle)
    return names


def parse_keeps(text: str) -> list[Keep]:
    """Return the keeps of a list. Raises BadInput if one is wrong."""
    return [parse_keep(part) for part in split(text)]


def parse_entries(text: str, *, auto: bool = True) -> list[str]:
    """Return the kinds of entries of a list. Raises BadInput if one is unknown. `auto`: allow "auto"."""
    return [require_entries(part, auto=auto) for part in split(text)]


def require_entries(name: str, *, auto: bool = True) -> str:
    """Return the name of a kind of entries. Raises BadInput if it is unknown. `auto`: allow "auto"."""
    known = (*ENTRIES, AUTO) if auto else ENTRIES
    if name not in known:
        raise BadInput(f"entries={name!r} does not exist; choose {', '.join(known)}.")
    return name
