"""Turn a document with questions into tokens, chat template included."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from string import punctuation
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.errors import BadInput
from headwise.methods.method import Method
from headwise.tasks import template
from headwise.tasks.seams import following_ids, unclosed
from headwise.tasks.template import Rendered
from headwise.tasks.texts import Asked as Asked
from headwise.tasks.texts import bundled as bundled
from headwise.tasks.texts import read_questions as read_questions
from headwise.tasks.texts import read_text as read_text
from headwise.tasks.texts import require_whole as require_whole

UNKNOWN_IN_CONTEXT, UNKNOWN_IN_QUESTION = 0.05, 0.20  # of the tokens; with more of them, an answer means nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A document ready for a model: the context is compressed, then each question follows it."""

    context: Int[Tensor, "1 tokens"]
    questions: tuple[Int[Tensor, " _"], ...]  # each of its own length


def prompt(
    tokenizer: Any,
    document: str,
    questions: str | Sequence[str],
    *,
    device: torch.device | str = "cpu",
    split_special_tokens: bool = False,
) -> Tokens:
    """Return the tokens of a document and of questions about it, in the chat template if there is one.

    >>> prompt = headwise.prompt(tokenizer, document, ["Who signed it?"], device=model.device)
    >>> cache = headwise.compress(model, prompt.context, keep=0.15)
    >>> model.generate(**cache.fork().inputs(prompt.questions[0]), max_new_tokens=64)

    Parameters
    ----------
    document
        The text to compress. It may be "" if a cache was loaded: questions do not depend on it.
    questions
        One question, or several.
    device
        Where the tokens are.
    split_special_tokens
        Whether the text of a control token stays text, see `tokenize`.

    Returns
    -------
    Tokens
        `context` [1, tokens] and `questions`, a tensor [tokens] each. A question follows the context directly, and
        ends where the model's turn begins.

    Raises
    ------
    BadInput
        If a question is empty, or the tokenizer does not know the words, see `tokenize`.
    """
    questions = [questions] if isinstance(questions, str) else questions
    return tokenize(tokenizer, document, questions, device=device, split_special_tokens=split_special_tokens)


def instructed(method: str | Method, tokenizer: Any, *, chat: bool = True) -> Method:
    """Return the method with its instruction in this tokenizer's tokens, if the model repeats the context (KVzip).

    The instruction ends the user's message in the chat template, and the model's turn begins; without a template, or
    without `chat`, it is a paragraph of its own. A tokenizer that lacks its words gives none. Raises BadInput if the
    method is unknown, or the template does not show a message.
    """

    def follow(text: str) -> tuple[int, ...]:
        templated = chat and getattr(tokenizer, "chat_template", None) is not None
        write = template.chat(tokenizer) if templated else str
        start = template.opening(write, "a")  # any document
        end = template.ending(write, "a", start, f"\n\n{text}")
        ids = following_ids(tokenizer, end.text + (end.own if templated else "\n\n"))
        return () if _unknown_token(tokenizer) in ids else tuple(ids)

    return Method.parse(method).instructed(follow)


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
    """Return the tokens of a document and its questions, in the chat template if there is one and `chat` is set.

    The message is the context, a separator (an empty line) and the question. The split lies after the context: the
    template's opening is compressed, and its end, which starts the model's turn, is part of each question. Each answer
    begins with its prefix in `prefixes`, which is part of the question, too. Models that can think before they answer
    are asked not to.

    As everywhere in transformers, the text of a control token (`<|im_end|>`, `</s>`) becomes that token, wherever it
    stands. With `split_special_tokens` it is text in the document and the questions, and a token in the template only;
    the template's parts are then tokenized apart from them.

    Raises BadInput if a question is empty, the tokenizer does not know the words, or the template does not show the
    message.
    """
    _require_texts(context, questions, prefixes or ())
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


def _require_texts(context: str, questions: Sequence[str], prefixes: Sequence[str]) -> None:
    if not questions or any(not question.strip() for question in questions):
        raise BadInput("a question is empty." if questions else "there is no question to ask.")
    require_whole(context, "the document")
    for text in (*questions, *prefixes):
        require_whole(text, f"the question {text[:40]!r}")


def text_ids(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens that come before every text, and those of this one. Raises BadInput if it has unknown words."""
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
        """Return the tokens up to the document's end. `special`: add those that the tokenizer puts before any text."""
        if self.apart:
            ids = self._ids(start.own, follows=False)
            ids += self._text_ids(start.text, special=special, follows=bool(start.own))
        else:
            ids = self._ids(start.own + start.text, special=special, follows=False)
        return unclosed(self.tokenizer, ids) if special else ids

    def tail(self, end: Rendered, prefix: str) -> list[int]:
        """Return the tokens of a question, and of what the answer begins with."""
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
        """Return the tokens of a text in which nothing is a control token."""
        bare = self._ids(text, follows=follows, split_special_tokens=True)
        if {*bare} & {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}:
            raise BadInput(
                f"{type(self.tokenizer).__name__} makes control tokens of text even with split_special_tokens: take "
                "them out of the document and the questions."
            )
        return self._ids(text, special=True, follows=False, split_special_tokens=True) if special else bare


def _require_known(tokenizer: Any, ids: list[int], limit: float, text: str, name: str) -> None:
    """Raise BadInput if more than `limit` of the tokens stand for words the tokenizer does not know."""
    unknown = _unknown_token(tokenizer)
    if unknown is None:
        return
    share = ids.count(unknown) / max(1, len(ids))
    if share > limit:
        words = dict.fromkeys(word.strip(punctuation) or word for word in text.split())
        strange = islice((word for word in words if unknown in tokenizer(word)["input_ids"]), 3)
        raise BadInput(
            f"this model does not know {share:.0%} of the words of {name}, such as {', '.join(strange)}: its answers "
            "would mean nothing. Give a model that knows them, such as --model Qwen/Qwen3-4B."
        )


def _unknown_token(tokenizer: Any) -> int | None:
    """Return the token for unknown words; None if there is none (tokens are bytes), or it has another use, too."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return None
    return unknown
