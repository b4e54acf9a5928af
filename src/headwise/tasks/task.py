"""The parts of a task: a context, questions right after it, and how an answer is judged. Imports no torch.

A suite makes `Task`s; the evaluation (run.py) knows nothing else of them. To add one, write a function that judges, a
function that makes sample `index`, and a line in suites.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

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


def require_protocol(protocol: str) -> None:
    """Raise BadInput unless it is one of PROTOCOLS."""
    if protocol not in PROTOCOLS:
        raise BadInput(f"protocol={protocol!r}: choose {' or '.join(PROTOCOLS)}.")
