"""A document with questions: reading it from files, and turning it into tokens, chat template included."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from string import punctuation
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.errors import BadInput
from headwise.evals.models import reference_path

_MARK = "\u241efact\u241e"  # occurs in no document
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

    Raises BadInput if it cannot be read or is empty.
    """
    try:
        with path.open(encoding="utf-8", newline=newline) as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise BadInput(
            f"the document {path} is not UTF-8 text (byte {error.start}); convert it to a text file."
        ) from error
    except OSError as error:
        raise BadInput(f"cannot read the document {path}: {error.strerror}.") from error
    if not text.strip():
        raise BadInput(f"the document {path} is empty.")
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
        lines = path.read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read questions from {path}: {error}.") from error
    asked = [_parse_question(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not asked:
        raise BadInput(f"{path} holds no questions.")
    return asked


def _parse_question(line: str, place: str) -> Asked:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    match found:
        case {"question": str(question)} if question.strip():
            answers = found.get("answers", [])
            if isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers):
                return Asked(question=question, answers=tuple(answers))
    raise BadInput(f'{place} is no question; write {{"question": "Who ...?", "answers": ["Ada"]}} on one line.')


def tokenize(
    tokenizer: Any,
    context: str,
    questions: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    separator: str = "\n\n",
    prefixes: Sequence[str] | None = None,
    chat: bool = True,
) -> Tokens:
    """Tokens of a document and its questions, in the tokenizer's chat template if it has one and `chat` is set.

    The message is the context, a separator (an empty line) and the question. The split lies after the context, so the
    template's opening is part of what is compressed, and its end, which starts the model's turn, is part of each
    question, and so is what the answer is made to begin with (`prefixes`). Models that can think before they answer are
    asked not to. Raises BadInput, also where the tokenizer does not know the words.
    """
    if not questions or any(not question.strip() for question in questions):
        raise BadInput("a question is empty." if questions else "there is no question to ask.")
    for text in (context, *questions, *(prefixes or ())):
        require_whole(text, repr(text[:40]))
    templated = chat and getattr(tokenizer, "chat_template", None) is not None
    write = partial(_message, tokenizer) if templated else str
    opening = write(f"{context}{_MARK}").partition(_MARK)[0]
    endings = [
        write(f"{_MARK}{separator}{question}").partition(_MARK)[2] + prefix
        for question, prefix in zip(questions, prefixes or [""] * len(questions), strict=True)
    ]
    head = tokenizer(opening, add_special_tokens=not templated)["input_ids"]
    if not templated and head and head[-1] == tokenizer.eos_token_id:
        head = head[:-1]  # some tokenizers close every text, but this one goes on
    tails = [tokenizer(ending, add_special_tokens=False)["input_ids"] for ending in endings]
    _require_known(tokenizer, head, UNKNOWN_IN_CONTEXT, context, "the document")
    for question, tail in zip(questions, tails, strict=True):
        _require_known(tokenizer, tail, UNKNOWN_IN_QUESTION, question, f"the question {question!r}")
    return Tokens(
        context=torch.tensor([head], dtype=torch.long, device=device),
        questions=tuple(torch.tensor(tail, dtype=torch.long, device=device) for tail in tails),
    )


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


def _message(tokenizer: Any, content: str) -> str:
    """The chat template around one message of the user's, up to where the model's turn starts."""
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    if _MARK not in text:
        raise BadInput("this tokenizer's chat template does not show the user's message; set another chat_template.")
    return text
