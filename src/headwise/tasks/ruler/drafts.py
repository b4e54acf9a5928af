"""Make RULER prompts of a given length: a draft can be written in any size, and the largest that fits is taken."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from headwise.errors import BadInput

LARGEST_GAP = 0.02  # of the length; a draft that leaves more of it goes on in another way
NUM_GAPS_IGNORED = 500  # a gap of this part of the length is not worth another tokenization
NUM_GUESSES = 8
MOST_UNITS_PER_TOKEN = 2
TOKENS_PER_UNIT = 256  # before any size was tried: the first try must not be much too long

CountTokens = Callable[[str], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """An official input text in two parts, what the answer begins with, and the answers."""

    context: str  # up to the end of the haystack
    question: str  # the rest of the template
    answer_prefix: str
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """Everything that the model reads before it generates."""
        return self.context + self.question + self.answer_prefix

    def after(self, example: str) -> "Prompt":
        """Return the prompt with an example in front."""
        return replace(self, context=example + self.context)


Write = Callable[[np.random.Generator, int], Prompt]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A prompt whose size is open: `write(rng, size)` draws everything anew.

    So a sample depends on its size and seed only, never on the sizes that were tried. If the largest one leaves a gap,
    `then(size)` is the draft to go on with. `fewest` and `most` are sizes.
    """

    write: Write
    fewest: int
    most: int | None = None
    then: "Callable[[int], Draft] | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What the samples of a task have in common."""

    count_tokens: CountTokens
    length: int
    data_dir: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A family with its sources read: the draft of sample `index`, and how many samples there are at most."""

    draft: Callable[[int], Draft]
    most_samples: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Family(ABC):
    """A kind of task with its official parameters."""

    tokens_to_generate: int
    any_answer_counts: ClassVar[bool] = False  # else the share of the answers

    @abstractmethod
    def prepare(self, setting: Setting) -> Prepared:
        """Read the sources. Raises BadInput if one is missing or damaged."""


def fill(draft: Draft, new_rng: Callable[[], np.random.Generator], setting: Setting, reserved: int) -> Prompt:
    """Write the longest prompt that leaves `reserved` of the length's tokens free. Raises BadInput if none does."""
    room = setting.length - reserved
    slack = setting.length // NUM_GAPS_IGNORED

    def count(size: int) -> int:
        return setting.count_tokens(draft.write(new_rng(), size).text)

    size, num_tokens = largest(count, room=room, slack=slack, fewest=draft.fewest, most=draft.most)
    if num_tokens > room:
        raise BadInput(f"length {setting.length} is too short; it takes at least {num_tokens + reserved} tokens.")
    if draft.then is not None and room - num_tokens > LARGEST_GAP * setting.length:
        return fill(draft.then(size), new_rng, setting, reserved)
    return draft.write(new_rng(), size)


def largest(
    count: Callable[[int], int], *, room: int, slack: int, fewest: int, most: int | None = None
) -> tuple[int, int]:
    """Find the largest size of at most `room` tokens, and its tokens. Even `fewest` may be larger than `room`.

    It ends early at a size that leaves at most `slack` tokens. Tokens grow nearly in proportion to the size, so a few
    guesses are enough; otherwise it goes on by halving.
    """
    size, num_tokens = fewest, count(fewest)
    too_large = fewest + room * MOST_UNITS_PER_TOKEN if most is None else most + 1
    tokens_per_unit = float(TOKENS_PER_UNIT)
    num_tries = 0
    while too_large - size > 1 and room - num_tokens > slack:
        guess = (
            size + int((room - num_tokens) / tokens_per_unit) if num_tries < NUM_GUESSES else (size + too_large) // 2
        )
        guess = min(max(guess, size + 1), too_large - 1)
        guess_tokens = count(guess)
        tokens_per_unit = max(1, guess_tokens - num_tokens) / (guess - size)
        num_tries += 1
        if guess_tokens <= room:
            size, num_tokens = guess, guess_tokens
        else:
            too_large = guess
    return size, num_tokens
