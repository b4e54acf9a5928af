"""Read a document and questions from files. Imports no torch, so that a wrong file is refused at once."""

import codecs
from dataclasses import dataclass
from pathlib import Path

from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.bounded import MOST_BYTES, read_bytes
from headwise.models.places import reference_path

_EXAMPLE = '{"question": "Who ...?", "answers": ["Ada"]}'
FORMATS = {  # files that are no text, by how they begin; some are all ASCII
    b"%PDF-": "a PDF file",
    b"%FDF-": "a PDF form",
    b"%!PS": "a PostScript file",
    b"{\\rtf": "an RTF file",
    b"PK\x03\x04": "a ZIP archive (as .docx, .odt and .epub files are)",
    b"PK\x05\x06": "an empty ZIP archive",
    b"\xd0\xcf\x11\xe0": "an Office file (.doc, .xls or .ppt)",
    b"\x1f\x8b": "a gzip archive",
    b"BZh91AY&SY": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x7fELF": "a program",
    b"MZ\x90": "a program",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"SQLite format 3\x00": "a database",
}
ENCODINGS = {  # by the mark that such text begins with; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question, and the phrases a right answer contains (none: not known)."""

    question: str
    answers: tuple[str, ...] = ()


def bundled() -> tuple[str, list[Asked]]:
    """Return the document and questions that come with the package."""
    folder = reference_path()
    return read_text(folder / "demo.txt"), read_questions(folder / "demo.jsonl")


def read_text(path: Path, *, newline: str | None = None) -> str:
    """Read a document. Its lines end in "\\n"; with newline="\\n" they end as in the file.

    Raises BadInput if it cannot be read, is no text or is empty.
    """
    try:
        data = read_bytes(path, MOST_BYTES, "the document")
    except OSError as error:
        raise BadInput(f"cannot read the document {path}: {error.strerror}.") from error
    text = _decode(data, f"the document {path}")
    if newline is None:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise BadInput(f"the document {path} is empty.")
    return text


def _decode(data: bytes, name: str) -> str:
    """Decode UTF-8 text. Raises BadInput if it is anything else, and says what."""
    start = data[:1024].removeprefix(codecs.BOM_UTF8).lstrip()
    for magic, kind in FORMATS.items():
        if start.startswith(magic):
            raise BadInput(f"{name} is {kind}, not text; convert it to a text file (UTF-8) first.")
    for mark, encoding in ENCODINGS.items():
        if data.startswith(mark):
            raise BadInput(f"{name} is {encoding}, not UTF-8 text; save it as UTF-8 first.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text (byte {error.start}); convert it to a text file.") from error
    if "\0" in text:
        raise BadInput(
            f"{name} is not UTF-8 text: it has zero bytes, as binary files and UTF-16 have; convert it first."
        )
    return text


def require_whole(text: str, name: str) -> None:
    """Raise BadInput if a text holds half a character. JSON and the command line accept it; no tokenizer does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{name} holds half a character (a lone surrogate, character {error.start + 1}). Write the whole character."
        ) from error


def read_questions(path: Path) -> list[Asked]:
    """Read questions from JSON lines such as {"question": "Who ...?", "answers": ["Ada"]}; "answers" are optional.

    Raises BadInput, naming the line.
    """
    try:
        data = read_bytes(path, MOST_BYTES, "the file of questions")
        lines = _decode(data, f"the file of questions {path}").split("\n")
    except OSError as error:
        raise BadInput(f"cannot read questions from {path}: {error}.") from error
    questions = [_parse_question(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise BadInput(f"{path} holds no questions.")
    return questions


def _parse_question(line: str, place: str) -> Asked:
    try:
        record = strict_json.loads(line)
    except ValueError:
        record = None
    match record:
        case {"question": str(question)} if question.strip():
            answers = record.get("answers", [])
            if isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers):
                return Asked(question=question, answers=tuple(answers))
    raise BadInput(f"{place} is no question; write {_EXAMPLE} on one line.")
