"""Make calibration data: contexts with questions, from files or made here. Never from an evaluation.

    FILE.jsonl    one object per line: {"context": "...", "questions": ["...", ...], "domain": "records",
                  "following": "..."}
    FILE.txt      plain text, also .md: the model's own continuation of it is the future, or questions are made for it
    FOLDER        all such files in it, in the order of their names
    builtin[:N]   N contexts made here (default 24)

For the bundled model builtin are the tasks of mini_ruler/ from the splits "calibration" and "train", whose seeds no
evaluation can reach. That mix is demanding on purpose: a profile from easy contexts, with few questions on sparse
content, underfunds the heads that dense retrieval needs. Every other tokenizer gets natural language (texts/).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from reprlib import repr as shown
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.offline.texts.example import Example
from headwise.offline.texts.mix import natural
from headwise.offline.texts.own import cut_up, with_questions
from headwise.tasks.document import read_text, require_whole, tokenize
from headwise.tasks.mini_ruler.lexicon import Lexicon
from headwise.tasks.mini_ruler.suite import generate
from headwise.tasks.mini_ruler.tasks import lexicon_for
from headwise.tasks.seams import unclosed

__all__ = ["Example", "Questions", "builtin", "count_tokens", "encode", "load_examples", "to_json_lines"]

BUILTIN = "builtin"
DEFAULT_CONTEXTS, TRAINING_CONTEXTS = 24, 160
MOST_CONTEXTS = 100_000
MIN_LENGTH = 64  # tokens of a context
LONGEST = 4096  # tokens of a context in the bundled model's language
NATURAL_LENGTHS = (512, 1024)  # tokens of contexts in natural language, in turn
PLAIN = (".txt", ".md")
TASKS = (
    "niah_multikey_dense",
    "niah_multivalue",
    "vt",
    "niah_multikey_dense",
    "niah_multiquery",
    "cwe",
    "niah_multikey",
    "fwe",
)

Questions = str | int | None  # "auto", "none", or how many of each context at most


def load_examples(
    source: str,
    tokenizer: Any,
    *,
    max_positions: int,
    split: str = "calibration",
    default: int = DEFAULT_CONTEXTS,
    length: int | None = None,
    contexts: int | None = None,
    questions: Questions = None,
) -> list[Example]:
    """Return examples from a file, a folder or "builtin[:N]".

    Plain texts are used whole, unless `length`, `contexts` or questions="auto" is given: then they are cut into
    contexts. A line of JSON is a context as it is.

    Parameters
    ----------
    source
        A .jsonl, .txt or .md file, a folder of them, or "builtin[:N]".
    max_positions
        Positions of the model, in tokens.
    split
        "calibration" or "train", from which builtin examples are made.
    default
        How many contexts are made or cut where `contexts` is None.
    length
        Tokens of a context, at most; None: see `builtin`.
    contexts
        How many contexts there are, at most.
    questions
        "auto" also asks of texts that have no questions, a number asks at most so many of each context, "none"
        leaves the continuation of a context as the only future, None takes questions as they are.

    Returns
    -------
    list of Example
        In the order of the files.

    Raises
    ------
    BadInput
        If a file cannot be read or a line is wrong (it names both), or a number is out of range.
    """
    _require(length, contexts, questions, max_positions)
    name, _, count = source.partition(":")
    if name == BUILTIN:
        number = _builtin_count(source, count, contexts, default)
        examples = builtin(tokenizer, number, max_positions=max_positions, split=split, length=length)
        return [_limit_questions(example, questions) for example in examples]
    texts = _read_all(source)
    examples = [example for example, _ in texts]
    cutting = (length, contexts) != (None, None) or questions == "auto"
    if cutting and any(plain for _, plain in texts):
        lengths = [each - _special_tokens(tokenizer) for each in _lengths(length, max_positions, NATURAL_LENGTHS)]
        examples = cut_up(texts, count_tokens(tokenizer), lengths, contexts or default)
    if contexts is not None and len(examples) > contexts:
        examples = [examples[len(examples) * n // contexts] for n in range(contexts)]
    if questions == "auto":
        examples = [with_questions(example, Random(f"{split} {number}")) for number, example in enumerate(examples)]
    return [_limit_questions(example, questions) for example in examples]


def _read_all(source: str) -> list[tuple[Example, bool]]:
    """Read the examples of a file or folder, and whether each is a plain text. Raises BadInput if there is none."""
    path = Path(source)
    files = sorted(p for p in path.iterdir() if p.suffix in {".jsonl", *PLAIN}) if path.is_dir() else [path]
    texts = [(example, file.suffix != ".jsonl") for file in files for example in _read(file)]
    if not texts:
        raise BadInput(f"{source} holds no examples: give a .jsonl, .txt or .md file, a folder of them, or {BUILTIN}.")
    return texts


def builtin(
    tokenizer: Any,
    count: int,
    *,
    max_positions: int,
    seed: int = 0,
    split: str = "calibration",
    length: int | None = None,
) -> list[Example]:
    """Make `count` contexts in the language that the tokenizer knows, of `length` tokens at most.

    If `length` is None, it is 512 and 1,024 in turn, or a quarter and half of the model's positions if that is less
    (for the bundled model always, up to 4,096). `split` is "calibration" or "train"; neither shares a source or a seed
    with the other or with an evaluation. Raises BadInput for another split.
    """
    if split not in ("calibration", "train"):
        raise BadInput(f"split={split!r}: contexts are made for calibration or train, never from what evaluates.")
    if _knows_english(tokenizer):
        lengths = _lengths(length, max_positions, NATURAL_LENGTHS)
        room = [each - _special_tokens(tokenizer) for each in lengths]
        return natural(count_tokens(tokenizer), count, room, seed, split)
    lexicon = lexicon_for(tokenizer)
    lengths = _lengths(length, max_positions, (LONGEST, LONGEST))
    return [
        _make(lexicon, number, lengths[number // len(TASKS) % len(lengths)], seed, split) for number in range(count)
    ]


def to_json_lines(examples: Sequence[Example]) -> str:
    """Return the content of a file in which `load_examples` finds the same examples."""
    return "".join(json.dumps(asdict(example)) + "\n" for example in examples)


def encode(
    tokenizer: Any, example: Example, *, device: torch.device | str
) -> tuple[Int[Tensor, "1 tokens"], tuple[Int[Tensor, " _"], ...]]:
    """Return the tokens of the context and of each question.

    Without questions, the context's last token is the question: it starts the answer. Raises BadInput if that leaves
    no context.
    """
    if example.questions:
        tokens = tokenize(tokenizer, example.context, list(example.questions), device=device)
        return tokens.context, tokens.questions
    require_whole(example.context, repr(example.context[:40]))
    ids = torch.tensor([unclosed(tokenizer, tokenizer(example.context)["input_ids"])], dtype=torch.long, device=device)
    if ids.shape[1] < 2:
        raise BadInput("a calibration text needs at least two tokens.")
    return ids[:, :-1], (ids[0, -1:],)


def _make(lexicon: Lexicon, number: int, length: int, seed: int, split: str) -> Example:
    task = TASKS[number % len(TASKS)]
    sample = generate(task, lexicon=lexicon, length=length, seed=seed, index=number, split=split)
    return Example(context=sample.context, questions=tuple(q.prompt for q in sample.questions), domain=task)


def _knows_english(tokenizer: Any) -> bool:
    """Return whether the tokenizer knows English words. The bundled one has some 500 words and knows no others."""
    ids = tokenizer("A gardener reads 17 letters", add_special_tokens=False)["input_ids"]
    return tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def count_tokens(tokenizer: Any) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text, without special ones."""
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _special_tokens(tokenizer: Any) -> int:
    """Return how many tokens the tokenizer puts around every text."""
    return tokenizer.num_special_tokens_to_add()


def _lengths(length: int | None, max_positions: int, limits: tuple[int, int]) -> list[int]:
    """Return the tokens of contexts, in turn."""
    if length is not None:
        return [length]
    return [min(limit, max_positions // part) for limit, part in zip(limits, (4, 2), strict=True)]


def _require(length: int | None, contexts: int | None, questions: Questions, max_positions: int) -> None:
    if length is not None and not MIN_LENGTH <= length < max_positions:
        raise BadInput(
            f"length={length}: a context has {MIN_LENGTH} tokens or more, and fewer than the {max_positions} "
            "positions of this model, since questions and answers follow it."
        )
    if contexts is not None and not 0 < contexts <= MOST_CONTEXTS:
        raise BadInput(f"contexts={shown(contexts)}: give a number from 1 to {MOST_CONTEXTS}.")
    if questions not in (None, "auto", "none") and (isinstance(questions, str) or questions < 1):
        raise BadInput(f"questions={shown(questions)}: write auto, none, or how many of each context at most.")


def _builtin_count(source: str, count: str, contexts: int | None, default: int) -> int:
    """Return how many contexts `builtin` makes."""
    if count and not (count.isdecimal() and len(count) <= 9 and 0 < int(count) <= MOST_CONTEXTS):
        raise BadInput(
            f"data={shown(source)}: write {BUILTIN} or {BUILTIN}:N with a number of contexts, at most {MOST_CONTEXTS}."
        )
    if count and contexts is not None and int(count) != contexts:
        raise BadInput(f"data={source} and contexts={contexts} are two numbers of contexts: give one of them.")
    return int(count or contexts or default)


def _limit_questions(example: Example, questions: Questions) -> Example:
    """Return the example with at most so many questions, from all over the list."""
    if questions in (None, "auto"):
        return example
    limit, available = 0 if isinstance(questions, str) else questions, example.questions
    if len(available) <= limit:
        return example
    return replace(example, questions=tuple(available[len(available) * n // limit] for n in range(limit)))


def _read(file: Path) -> list[Example]:
    if file.suffix != ".jsonl":
        return [Example(context=read_text(file), domain=file.stem)]
    text = read_text(file, newline="\n")
    return [_parse(line, f"{file}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse(line: str, where: str) -> Example:
    try:
        record = strict_json.loads(line)
        context, questions, domain = record["context"], record.get("questions", []), record.get("domain", "text")
        following = record.get("following", "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f'{where}: {error!r}. Each line is JSON such as {{"context": "...", "questions": ["..."]}}.'
        ) from error
    if not _texts([context, domain]) or not isinstance(questions, list) or not _texts(questions):
        raise BadInput(f"{where}: context, domain and every question must be text that is not empty.")
    if not isinstance(following, str):
        raise BadInput(f"{where}: following must be the text that comes after the context.")
    return Example(context=context, questions=tuple(questions), domain=domain, following=following)


def _texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)
