"""How an answer is judged: 0 (wrong) to 1 (right). Imports no torch."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType


def answers_found(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in `text` as whole words, in any case and order (RULER's string match)."""
    text = " ".join(text.lower().split())
    found = [re.search(rf"(?<!\w){re.escape(' '.join(a.lower().split()))}(?!\w)", text) is not None for a in answers]
    return sum(found) / len(found)


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Whether the text is one of the answers, but for case, punctuation, articles and spaces (SQuAD's exact match)."""
    return float(_words(text) in [_words(answer) for answer in answers])


def word_f1(text: str, answers: Sequence[str]) -> float:
    """F1 of the words of text and answer, normalised as for `exact_match` (SQuAD's F1); the best of the answers."""
    return max(_f1(_words(text), _words(answer)) for answer in answers)


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    text = "".join(" " if c in string.whitespace else c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = MappingProxyType(
    {"contains": answers_found, "exact": exact_match, "f1": word_f1}
)
