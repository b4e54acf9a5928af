"""A document with questions: reading it from files, and turning it into tokens, chat template included."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import punctuation
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headwise import strict_json
from headwise.bounded import MOST_BYTES, read_bytes
from headwise.errors import BadInput
from headwise.evals import template
from headwise.evals.models import reference_path
from headwise.evals.seams import following_ids, unclosed
from headwise.evals.template import Rendered

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
UNKNOWN_IN_CONTEXT, UNKNOWN_IN_QUESTION = 0.05, 0.20  # of the tokens; beyond, an answer means nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question, and the phrases a right answer contains (none: not known)."""

    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A document ready for a model: the context is compressed, each question then follows it."""

    context: Int[Tensor, "1 tokens"]
    questions: tuple[Int[Tensor, " _"], ...]  # each of its own length


def bundled() -> tuple[str, list[Asked]]:
    """The document and questions that come with the package."""
    folder = reference_path()
    return read_text(folder / "demo.txt"), read_questions(folder / "demo.jsonl")


def read_text(path: Path, *, newline: str | None = None) -> str:
    """A document, the ends of its lines as "\\n"; with newline="\\n" as they are.

    Raises BadInput if it cannot be read, is no text or is empty.
    """
    try:
        data = read_bytes(path, MOST_BYTES, "the document")
    except OSError as error:
        raise BadInput(f"cannot read the document {path}: {error.strerror}.") from error
    text = _decoded(data, f"the document {path}")
    if newline is None:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise BadInput(f"the document {path} is empty.")
    return text


def _decoded(data: bytes, what: str) -> str:
    """UTF-8 text. Raises BadInput for anything else, saying what it is."""
    start = data[:1024].removeprefix(codecs.BOM_UTF8).lstrip()
    for magic, kind in FORMATS.items():
        if start.startswith(magic):
            raise BadInput(f"{what} is {kind}, not text; convert it to a text file (UTF-8) first.")
    for mark, encoding in ENCODINGS.items():
        if data.startswith(mark):
            raise BadInput(f"{what} is {encoding}, not UTF-8 text; save it as UTF-8 first.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{what} is not UTF-8 text (byte {error.start}); convert it to a text file.") from error
    if "\0" in text:
        raise BadInput(
            f"{what} is not UTF-8 text: it has zero bytes, as binary files and UTF-16 have; convert it first."
        )
    return text


def require_whole(text: str, what: str) -> None:
    """Raise BadInput for half a character, which JSON and the command line let through: no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{what} holds half a character (a lone surrogate, character {error.start + 1}). Write the whole character."
        ) from error


def read_questions(path: Path) -> list[Asked]:
    """Questions from JSON lines such as {"question": "Who ...?", "answers": ["Ada"]}; "answers" may be left out.

    Raises BadInput, naming the line.
    """
    try:
        data = read_bytes(path, MOST_BYTES, "the file of questions")
        lines = _decoded(data, f"the file of questions {path}").split("\n")
    except OSError as error:
        raise BadInput(f"cannot read questions from {path}: {error}.") from error
    asked = [_parse_question(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not asked:
        raise BadInput(f"{path} holds no questions.")
    return asked


def _parse_question(line: str, place: str) -> Asked:
    try:
        found = strict_json.loads(line)
    except ValueError:
        found = None
    match found:
        case {"question": str(question)} if question.strip():
            answers = found.get("answers", [])
            if isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers):
                return Asked(question=question, answers=tuple(answers))
    raise BadInput(f"{place} is no question; write {_EXAMPLE} on one line.")


def tokenize(
    tokenizer: Any,
    context: str,
    questions: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    separator: str = "\n\n",
    prefixes: Sequence[str] | None = None,
    chat: bool = True,
    split_special_tokens: bool = False,
) -> Tokens:
    """Tokens of a document and its questions, in the tokenizer's chat template if it has one and `chat` is set.

    The message is the context, a separator (an empty line) and the question. The split lies after the context, so the
    template's opening is part of what is compressed, and its end, which starts the model's turn, is part of each
    question, and so is what the answer is made to begin with (`prefixes`). Models that can think before they answer are
    asked not to.

    As everywhere in transformers, the text of a control token (`<|im_end|>`, `</s>`) becomes that token, wherever it
    stands. With `split_special_tokens` it is text in the document and the questions, and a token in the template only;
    the template's parts are then tokenized apart from them.

    Raises BadInput, also where the tokenizer does not know the words, or the template does not show the message.
    """
    if not questions or any(not question.strip() for question in questions):
        raise BadInput("a question is empty." if questions else "there is no question to ask.")
    require_whole(context, "the document")
    for text in (*questions, *(prefixes or ())):
        require_whole(text, f"the question {text[:40]!r}")
    templated = chat and getattr(tokenizer, "chat_template", None) is not None
    write = template.chat(tokenizer) if templated else str
    start = template.opening(write, context)
    ends = [template.ending(write, context, start, separator + question) for question in questions]
    read = _Reader(tokenizer=tokenizer, apart=split_special_tokens)
    head = read.head(start, special=not templated)
    tails = [read.tail(end, prefix) for end, prefix in zip(ends, prefixes or [""] * len(ends), strict=True)]
    _require_known(tokenizer, head, UNKNOWN_IN_CONTEXT, context, "the document")
    for question, tail in zip(questions, tails, strict=True):
        _require_known(tokenizer, tail, UNKNOWN_IN_QUESTION, question, f"the question {question!r}")
    return Tokens(
        context=torch.tensor([head], dtype=torch.long, device=device),
        questions=tuple(torch.tensor(tail, dtype=torch.long, device=device) for tail in tails),
    )


def text_ids(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before every text, and the tokens of this one. Raises BadInput if it lacks the words."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    _require_known(tokenizer, ids, UNKNOWN_IN_CONTEXT, text, "the text")
    started, alone = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    started = unclosed(tokenizer, started)
    return started[: len(started) - len(alone)], ids


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """Tokenizes parts of a conversation as one text, or the template's own apart from what is in the message."""

    tokenizer: Any
    apart: bool

    def head(self, start: Rendered, *, special: bool) -> list[int]:
        """Up to the document's end; `special`: with the tokens that the tokenizer puts before any text."""
        if self.apart:
            ids = self._ids(start.own, follows=False)
            ids += self._text_ids(start.text, special=special, follows=bool(start.own))
        else:
            ids = self._ids(start.own + start.text, special=special, follows=False)
        return unclosed(self.tokenizer, ids) if special else ids

    def tail(self, end: Rendered, prefix: str) -> list[int]:
        """A question, and what the answer begins with."""
        if self.apart:
            return self._text_ids(end.text) + self._ids(end.own + prefix)
        return self._ids(end.text + end.own + prefix)

    def _ids(self, text: str, *, special: bool = False, follows: bool = True, **options: bool) -> list[int]:
        if not text and not special:
            return []
        if follows:
            return following_ids(self.tokenizer, text, **options)
        return self.tokenizer(text, add_special_tokens=special, **options)["input_ids"]

    def _text_ids(self, text: str, *, special: bool = False, follows: bool = True) -> list[int]:
        """Tokens of text in which nothing is a control token."""
        bare = self._ids(text, follows=follows, split_special_tokens=True)
        if {*bare} & {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}:
            raise BadInput(
                f"{type(self.tokenizer).__name__} makes control tokens of text even with split_special_tokens: take "
                "them out of the document and the questions."
            )
        return self._ids(text, special=True, follows=False, split_special_tokens=True) if special else bare


def _require_known(tokenizer: Any, ids: list[int], limit: float, text: str, what: str) -> None:
    """Raise BadInput if more than `limit` of the tokens stand for words the tokenizer does not know."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return  # a tokenizer of bytes knows every word; some give the unknown token another use
    share = ids.count(unknown) / max(1, len(ids))
    if share > limit:
        words = dict.fromkeys(word.strip(punctuation) or word for word in text.split())
        strange = islice((word for word in words if unknown in tokenizer(word)["input_ids"]), 3)
        raise BadInput(
            f"this model does not know {share:.0%} of the words of {what}, such as {', '.join(strange)}: its answers "
            "would mean nothing. Give a model that knows them, such as --model Qwen/Qwen3-4B."
        )
