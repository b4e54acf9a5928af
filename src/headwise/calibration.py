"""Calibration data: contexts with questions, from files or made here. Never from an evaluation seed.

    FILE.jsonl    one object per line: {"context": "...", "questions": ["...", ...], "domain": "records"}
    FILE.txt      plain text: the model's own continuation of it is the future
    FOLDER        all such files in it, in the order of their names
    builtin[:N]   N contexts made here (default 24): the tasks of mini_ruler.py from the split "calibration", whose
                  seeds no evaluation can reach, and code; several lengths, up to 40 questions on each

The builtin mix is demanding on purpose: a profile from easy contexts, with few questions on sparse content, underfunds
the heads that dense retrieval needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from headwise import strict_json
from headwise.errors import BadInput
from headwise.evals.document import read_text, require_whole, tokenize
from headwise.evals.lexicon import Lexicon
from headwise.evals.mini_ruler import generate, seeded_generator
from headwise.evals.seams import unclosed
from headwise.evals.suites import lexicon_for

BUILTIN = "builtin"
DEFAULT_CONTEXTS = 24
MOST_CONTEXTS = 100_000
LONGEST = 4096  # tokens of a builtin context
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A context and what may be asked of it; without questions the model's continuation of it is the future."""

    context: str
    questions: tuple[str, ...] = ()
    domain: str = "text"


def load_examples(
    source: str, tokenizer: Any, *, max_positions: int, split: str = "calibration", default: int = DEFAULT_CONTEXTS
) -> list[Example]:
    """Examples from a file, a folder or "builtin[:N]" (made from `split`). Raises BadInput naming file and line."""
    name, _, count = source.partition(":")
    if name == BUILTIN:
        if count and not (count.isdecimal() and len(count) <= 9 and 0 < int(count) <= MOST_CONTEXTS):
            raise BadInput(
                f"data={shown(source)}: write {BUILTIN} or {BUILTIN}:N with a number of contexts, at most "
                f"{MOST_CONTEXTS}."
            )
        return builtin(tokenizer, int(count or default), max_positions=max_positions, split=split)
    path = Path(source)
    files = sorted(p for p in path.iterdir() if p.suffix in {".jsonl", ".txt"}) if path.is_dir() else [path]
    examples = [example for file in files for example in _read(file)]
    if not examples:
        raise BadInput(f"{source} holds no examples: give a .jsonl or .txt file, a folder of them, or {BUILTIN}.")
    return examples


def builtin(
    tokenizer: Any, count: int, *, max_positions: int, seed: int = 0, split: str = "calibration"
) -> list[Example]:
    """The demanding mix; contexts of a quarter and half of the model's positions, at most 4096 tokens.

    `split` is "calibration" or "train"; neither shares a seed with the other or with an evaluation.
    """
    if split not in ("calibration", "train"):
        raise BadInput(f"split={split!r}: contexts are made for calibration or train, never from what evaluates.")
    lexicon = lexicon_for(tokenizer)
    lengths = [min(LONGEST, max_positions // 4), min(LONGEST, max_positions // 2)]
    return [
        _make(lexicon, number, lengths[number // len(TASKS) % 2], seed, tokenizer, split) for number in range(count)
    ]


def encode(
    tokenizer: Any, example: Example, *, device: torch.device | str
) -> tuple[Int[Tensor, "1 tokens"], tuple[Int[Tensor, " _"], ...]]:
    """Context and question tokens. Without questions the context's last token is the query that starts the answer."""
    if example.questions:
        tokens = tokenize(tokenizer, example.context, list(example.questions), device=device)
        return tokens.context, tokens.questions
    require_whole(example.context, repr(example.context[:40]))
    ids = torch.tensor([unclosed(tokenizer, tokenizer(example.context)["input_ids"])], dtype=torch.long, device=device)
    if ids.shape[1] < 2:
        raise BadInput("a calibration text needs at least two tokens.")
    return ids[:, :-1], (ids[0, -1:],)


def _make(lexicon: Lexicon, number: int, length: int, seed: int, tokenizer: Any, split: str) -> Example:
    task = TASKS[number % len(TASKS)]
    if number % len(TASKS) == len(TASKS) - 2 and _knows_code(tokenizer):
        return _code(lexicon, number, length, seed, split)
    sample = generate(task, lexicon=lexicon, length=length, seed=seed, index=number, split=split)
    return Example(context=sample.context, questions=tuple(q.prompt for q in sample.questions), domain=task)


def _knows_code(tokenizer: Any) -> bool:
    ids = tokenizer("def f(): return 17", add_special_tokens=False)["input_ids"]
    return tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def _code(lexicon: Lexicon, number: int, length: int, seed: int, split: str) -> Example:
    """A module of small functions, and what some of them return."""
    rng = seeded_generator(split, task="code", length=length, seed=seed, index=number)
    lines: list[str] = []
    functions: dict[str, int] = {}
    while lexicon.count_tokens("\n".join(lines)) < length * 7 // 8:
        name = "_".join(lexicon.draw_keys(rng, 2))
        functions[name] = int(rng.integers(100, 10_000))
        lines.append(f"def {name}():\n    return {functions[name]}\n")
    asked = rng.permutation(np.array(list(functions)))[:40]
    questions = tuple(f"What does {name}() return? Answer with the number only." for name in asked.tolist())
    return Example(context="\n".join(lines), questions=questions, domain="code")


def _read(file: Path) -> list[Example]:
    if file.suffix != ".jsonl":
        return [Example(context=read_text(file), domain=file.stem)]
    text = read_text(file, newline="\n")
    return [_parse(line, f"{file}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse(line: str, where: str) -> Example:
    try:
        record = strict_json.loads(line)
        context, questions, domain = record["context"], record.get("questions", []), record.get("domain", "text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f'{where}: {error!r}. Each line is JSON such as {{"context": "...", "questions": ["..."]}}.'
        ) from error
    if not _texts([context, domain]) or not isinstance(questions, list) or not _texts(questions):
        raise BadInput(f"{where}: context, domain and every question must be text that is not empty.")
    return Example(context=context, questions=tuple(questions), domain=domain)


def _texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)
