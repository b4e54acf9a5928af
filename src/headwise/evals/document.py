"""A document with questions: reading it from files, and turning it into tokens, chat template included."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.errors import BadInput
from headwise.evals.models import reference_path

_MARK = "\u241efact\u241e"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question, and the phrases a right answer contains (none: not known)."""

    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A document ready for a model: the context is compressed, each question then follows it."""

    context: Int[Tensor, "1 tokens"]
    questions: tuple[Int[Tensor, " question_tokens"], ...]


def bundled() -> tuple[str, list[Asked]]:
    """The document and questions that come with the package."""
    folder = reference_path()
    return (folder / "demo.txt").read_text(), read_questions(folder / "demo.jsonl")


def read_text(path: Path) -> str:
    """A document. Raises BadInput if it cannot be read or is empty."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the document {path}: {error}.") from error
    if not text.strip():
        raise BadInput(f"the document {path} is empty.")
    return text


def read_questions(path: Path) -> list[Asked]:
    """Questions from JSON lines such as {"question": "Who ...?", "answers": ["Ada"]}; "answers" may be left out."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        asked = [Asked(question=line["question"], answers=tuple(line.get("answers", ()))) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f'cannot read questions from {path}: {error!r}. Each line is JSON such as {{"question": "Who ...?", '
            '"answers": ["Ada"]}.'
        ) from error
    if not asked:
        raise BadInput(f"{path} holds no questions.")
    return asked


def tokenize(tokenizer: Any, context: str, questions: list[str], *, device: torch.device | str = "cpu") -> Tokens:
    """Tokens of a document and its questions, in the tokenizer's chat template if it has one.

    The split lies after the context, so the template's opening is part of what is compressed, and its end, which starts
    the model's turn, is part of each question.
    """
    if any(not question.strip() for question in questions):
        raise BadInput("a question is empty.")
    before, after = _template(tokenizer)
    head = tokenizer(before + context, add_special_tokens=not before)["input_ids"]
    if not before and head and head[-1] == tokenizer.eos_token_id:
        head = head[:-1]  # some tokenizers close every text, but this one goes on
    tails = [tokenizer(f"\n\n{q}{after}", add_special_tokens=False)["input_ids"] for q in questions]
    return Tokens(
        context=torch.tensor([head], dtype=torch.long, device=device),
        questions=tuple(torch.tensor(tail, dtype=torch.long, device=device) for tail in tails),
    )


def _template(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and after a user's message; nothing if there is no template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "", ""
    message = [{"role": "user", "content": _MARK}]
    before, _, after = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False).partition(
        _MARK
    )
    return before, after
