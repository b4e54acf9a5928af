"""A document that is drafted unit by unit, as long as it is needed, and the example that is cut from it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from headwise.offline.texts.cutting import FOLLOWING, Count, passage
from headwise.offline.texts.example import Example

MOST_QUESTIONS = 12  # of a context
_GENERAL = 3  # of them are about all of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A record, a turn, a paragraph: a document may be cut after it. `questions` can be answered from it."""

    text: str  # with what separates it from the unit before
    questions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A document without an end: its units, and `general` questions that can be asked of any beginning of it."""

    domain: str
    units: Iterable[Unit]
    general: tuple[str, ...]


def finish(draft: Draft, count: Count, length: int, rng: Random) -> Example:
    """Return the beginning of a draft in at most `length` tokens, questions about it, and what follows it."""
    units, tokens = [], 0
    for unit in draft.units:
        units.append(unit)
        tokens += count(unit.text)
        if tokens > length + FOLLOWING * 2:
            break
    ends = list(accumulate(len(unit.text) for unit in units))
    context, following = passage("".join(unit.text for unit in units), count, length, ends)
    inside = [unit.questions for unit, end in zip(units, ends, strict=True) if end <= len(context)]
    questions = choose(rng, inside, draft.general)
    return Example(context=context, questions=questions, domain=draft.domain, following=following)


def choose(rng: Random, of_units: Sequence[Sequence[str]], general: Sequence[str]) -> tuple[str, ...]:
    """Choose questions from all over a context, in random order: some on single units, some `general` ones.

    The text is divided into as many parts as there are questions on units, and each part gives one.
    """
    chosen_general = rng.sample(list(general), min(_GENERAL, len(general)))
    askable = [questions for questions in of_units if questions]
    parts = MOST_QUESTIONS - len(chosen_general)
    places = sorted(rng.sample(range(len(askable)), min(parts, len(askable))))
    if len(askable) > parts:
        places = [rng.randrange(len(askable) * n // parts, len(askable) * (n + 1) // parts) for n in range(parts)]
    chosen = [*(rng.choice(list(askable[place])) for place in places), *chosen_general]
    rng.shuffle(chosen)
    return tuple(dict.fromkeys(chosen))
