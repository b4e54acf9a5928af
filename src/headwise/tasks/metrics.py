"""Judge answers from 0 (wrong) to 1 (right), in any script. Imports no torch."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from headwise.tasks.scripts import fold, may_begin, may_end, without_gaps, words

_ARTICLES = ("a", "an", "the")


def answers_found(text: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that occur in `text` as whole words, in any case and order.

    "cat" does not occur in "category", nor 12 in 123. At each end of an answer the two letters that meet decide:

    - Scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese and others) do not show where a
      word ends. If one of the two letters is of such a script, the answer occurs. But no number occurs in a longer one.
    - A Korean word goes on in particles: more Hangul may follow the answer, but none may precede it. Where Hangul meets
      another script, a word may begin and end.
    - Between all other letters and digits no word ends.

    `fold` says what counts as the same letter. An empty answer occurs in an empty text alone. RULER itself finds parts
    of words too; ruler/suite.py judges its tasks like that.
    """
    text = without_gaps(fold(text))
    return sum(_is_found(text, without_gaps(fold(answer))) for answer in answers) / len(answers)


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Return 1 if the text is one of the answers, but for case, punctuation, articles and spaces (SQuAD's exact match).

    Punctuation is that of all scripts, and the symbols of ASCII. `fold` says what counts as the same letter. Articles
    count if the answer is nothing else, such as A; and so does punctuation.
    """
    pairs = (_comparable_words(text, answer) for answer in answers)
    return max(float(predicted == expected) for predicted, expected in pairs)


def word_f1(text: str, answers: Sequence[str]) -> float:
    """Return F1 of the words of text and answer, as `exact_match` compares them (SQuAD's F1); the best of the answers.

    In scripts without spaces between words every letter counts as a word, as CMRC and DRCD count Chinese, and in
    Korean every syllable, as in KorQuAD.
    """
    return max(_f1(*_comparable_words(text, answer)) for answer in answers)


def _is_found(text: str, answer: str) -> bool:
    if not answer:
        return not text
    starts = (match.start() for match in re.finditer(f"(?={re.escape(answer)})", text))
    return any(
        may_begin(text[max(0, start - 1) : start], answer[0]) and may_end(answer, text[start + len(answer) :][:1])
        for start in starts
    )


def _f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def _comparable_words(text: str, answer: str) -> tuple[list[str], list[str]]:
    """Return the words to compare: without articles and punctuation, if that leaves something of the answer."""
    predicted, expected = fold(text), fold(answer)
    for parts in (_words_but_articles, _words):
        if parts(expected):
            return parts(predicted), parts(expected)
    return words(predicted), words(expected)


def _words_but_articles(folded: str) -> list[str]:
    return [word for word in _words(folded) if word not in _ARTICLES]


def _words(folded: str) -> list[str]:
    return words("".join(c for c in folded if c not in string.punctuation and unicodedata.category(c)[0] != "P"))


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = MappingProxyType(
    {"contains": answers_found, "exact": exact_match, "f1": word_f1}
)
