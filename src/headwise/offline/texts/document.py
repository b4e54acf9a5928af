"""A document that is drafted unit by unit, as long as it is needed, and the example that is cut from it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from headwise.offline.texts.cutting import FOLLOWING, Count, passage
from headwise.offline.texts.example import Example

MOST_QUESTIONS = 12  # of a context
_WHOLE = 3  # of them are about all of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A record, a turn, a paragraph: what a document may be cut after. `questions` can be answered once it is there."""

    text: str  # with what separates it from the unit before
    questions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A document without an end: its units, and what can be asked of any beginning of it."""

    domain: str
    units: Iterable[Unit]
    whole: tuple[str, ...]


def finish(draft: Draft, count: Count, length: int, rng: Random) -> Example:
    """The beginning of a draft in at most `length` tokens, questions about what is in it, and what follows."""
    units, tokens = [], 0
    for unit in draft.units:
        units.append(unit)
        tokens += count(unit.text)
        if tokens > length + FOLLOWING * 2:
            break
    ends = list(accumulate(len(unit.text) for unit in units))
    context, following = passage("".join(unit.text for unit in units), count, length, ends)
    inside = [unit.questions for unit, end in zip(units, ends, strict=True) if end <= len(context)]
    questions = choose(rng, inside, draft.whole)
    return Example(context=context, questions=questions, domain=draft.domain, following=following)


def choose(rng: Random, of_units: Sequence[Sequence[str]], whole: Sequence[str]) -> tuple[str, ...]:
    """Questions from all over a context, in random order: on single units, in the order of the text, and on all of it.

    The text is divided into as many parts as there are questions, and each part gives one.
    """
    general = rng.sample(list(whole), min(_WHOLE, len(whole)))
    asked = [questions for questions in of_units if questions]
    wanted = MOST_QUESTIONS - len(general)
    places = sorted(rng.sample(range(len(asked)), min(wanted, len(asked))))
    if len(asked) > wanted:
        places = [rng.randrange(len(asked) * n // wanted, len(asked) * (n + 1) // wanted) for n in range(wanted)]
    found = [*(rng.choice(list(asked[place])) for place in places), *general]
    rng.shuffle(found)
    return tuple(dict.fromkeys(found))
