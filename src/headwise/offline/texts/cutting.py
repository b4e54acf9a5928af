"""Cut a text at a sensible place, so that it has at most so many tokens, and return what follows the cut."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

Count = Callable[[str], int]  # the tokens of a text, without special ones

FOLLOWING = 192  # tokens of what follows a context, at most
FOLLOWING_SHARE = 5  # of a short text, what follows is a fifth
ENOUGH = 0.75  # of the room: a cut that leaves more of it empty is tried between smaller parts
MOST_CHARACTERS = 12  # per token, when a text is cut roughly before its tokens are counted

# The mark that ends a sentence; not that of Mrs. or an initial. In scripts without spaces nothing needs to follow it.
_TITLE = r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])"
_SPACED = r"""[.!?…؟।۔]["')\]”’»]*(?=\s+["'(\[“‘«`*_]*[^\Wa-z_]|\s*\Z)"""  # noqa: RUF001
_UNSPACED = r"""[。！？｡]["'」』”’）]*"""  # noqa: RUF001
SENTENCE_END = re.compile(f"{_TITLE}{_SPACED}|{_UNSPACED}")
_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
_LINE_END = re.compile(r"\n")
_WORD_END = re.compile(r"\s+")


def passage(text: str, count: Count, length: int, ends: Sequence[int] | None = None) -> tuple[str, str]:
    """Return the beginning of a text in at most `length` tokens, and what follows it.

    With `ends` the text is cut at one of these characters, if the first of them leaves it short enough. A text that is
    used up by `length` tokens ends earlier, so that something follows.
    """
    text = text[: (length + FOLLOWING) * MOST_CHARACTERS]
    total = count(text)
    room = min(length, total - min(FOLLOWING, total // FOLLOWING_SHARE))
    end = cut(text, count, room, ends)
    remainder = text[end:]
    return text[:end], remainder[: cut(remainder, count, FOLLOWING, [e - end for e in ends or () if e > end] or None)]


def cut(text: str, count: Count, room: int, ends: Sequence[int] | None = None) -> int:
    """Return the character at which to cut: one of `ends`, or after a paragraph, line, sentence, word or letter."""
    if len(text) <= room * MOST_CHARACTERS and count(text) <= room:
        return len(text)
    text = text[: room * MOST_CHARACTERS]
    best = _largest([end for end in ends or () if end <= len(text)], text, count, room)
    if best:
        return best
    for level in (_paragraphs, _lines, _sentences, _words, _letters):
        best = max(best, _largest(level(text), text, count, room))
        if best and count(text[:best]) >= ENOUGH * room:
            break
    return best


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return start and end of every sentence. A paragraph ends one too, and so does a line of a list."""
    spans: list[tuple[int, int]] = []
    for start, end in _between(text, _PARAGRAPH_END):
        paragraph = text[start:end]
        stops = [0, *(match.end() for match in SENTENCE_END.finditer(paragraph)), len(paragraph)]
        for begin, stop in pairwise(stops):
            inner = paragraph[begin:stop]
            if inner.strip():
                lead = len(inner) - len(inner.lstrip())
                spans.append((start + begin + lead, start + begin + len(inner.rstrip())))
    return spans


def paragraph_starts(text: str) -> list[int]:
    """Return where paragraphs start, the first one at 0."""
    return [start for start, _ in _between(text, _PARAGRAPH_END)]


def _between(text: str, separator: re.Pattern[str]) -> list[tuple[int, int]]:
    marks = [(match.start(), match.end()) for match in separator.finditer(text)]
    starts, ends = [0, *(end for _, end in marks)], [*(start for start, _ in marks), len(text)]
    return list(zip(starts, ends, strict=True))


def _largest(ends: Sequence[int], text: str, count: Count, room: int) -> int:
    """Return the last of the ends before which the text has at most `room` tokens, 0 if there is none."""
    ends = [end for end in ends if end > 0]
    index = bisect_left(ends, True, key=lambda end: count(text[:end]) > room)
    return ends[index - 1] if index else 0


def _paragraphs(text: str) -> list[int]:
    return [match.start() for match in _PARAGRAPH_END.finditer(text)]


def _lines(text: str) -> list[int]:
    return [match.start() for match in _LINE_END.finditer(text)]


def _sentences(text: str) -> list[int]:
    return [match.end() for match in SENTENCE_END.finditer(text)]


def _words(text: str) -> list[int]:
    return [match.start() for match in _WORD_END.finditer(text)]


def _letters(text: str) -> list[int]:
    return list(range(1, len(text) + 1))
