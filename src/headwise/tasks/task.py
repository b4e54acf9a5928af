"""The parts of a task: a context, questions right after it, and how an answer is judged. Imports no torch.

A `Suite` makes `Task`s; the evaluation (run.py) knows nothing else of them. A new suite is one file, and its line in
suites.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise.errors import BadInput

PROTOCOLS = ("query-agnostic", "query-aware")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question after the context, and its answers."""

    prompt: str
    answers: tuple[str, ...]  # `Task.judge` compares the model's answer with these
    answer_prefix: str = ""  # the model's turn is made to begin with it, after the chat template's opening
    classes: tuple[str, ...] = ()  # all labels, where an answer is one of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A context with questions that can each be asked right after it.

    `verbatim`: context and prompt follow each other as they are (official prompts); otherwise an empty line separates
    them. `chat`: the tokenizer's chat template goes around them, if it has one. `continues`: the tokens of a context
    and of the text that follows it. That text is predicted, and nothing is answered; context and prompt only show
    these tokens as text.
    """

    context: str
    questions: tuple[Question, ...]
    max_new_tokens: int
    verbatim: bool = False
    chat: bool = True
    continues: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A named source of samples. `judge(prediction, question)` is from 0 to 1 (right); None: nothing is answered."""

    name: str  # with its suite: mini-ruler:vt
    length: int  # tokens that its samples are made for, or cut to
    num_samples: int
    sample: Callable[[int], Sample] = field(repr=False)
    judge: Callable[[str, Question], float] | None = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How many samples each task has, how long, and from which seed.

    Attributes
    ----------
    samples
        How many samples each task has, at most.
    length
        Tokens of a sample.
    seed
        What samples are drawn from, from 0 on.
    data_dir
        The folder of data that are not in the package.

    Raises
    ------
    BadInput
        A number is out of range.
    """

    samples: int
    length: int
    seed: int = 0
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 1 or self.seed < 0:
            raise BadInput(
                f"samples={self.samples} and length={self.length} must be at least 1, seed={self.seed} at least 0."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A family of tasks. `names` are all of them, or empty where a name is a file.

    `make(names, tokenizer, sizes)` makes the tasks of these names; it raises BadInput where data is missing or wrong.
    """

    names: tuple[str, ...]
    make: Callable[[Sequence[str], Any, Sizes], list[Task]] = field(repr=False)
    lacking: Callable[[Path | None], list[str]] = lambda data_dir: []  # tasks whose data the folder does not hold
    sized: bool = True  # whether samples have `Sizes.length` tokens at most; else a model may be given longer ones


def require_protocol(protocol: str) -> None:
    """Raise BadInput unless it is one of PROTOCOLS."""
    if protocol not in PROTOCOLS:
        raise BadInput(f"protocol={protocol!r}: choose {' or '.join(PROTOCOLS)}.")
