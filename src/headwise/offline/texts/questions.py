"""Make questions for any text, which together need all of it: quote, go on, look up, list, summarise.

They quote the text and ask in English. In scripts without spaces a sentence is named by its first letters instead of
its first words. Code has questions of its own.
"""

import re
from collections import Counter
from random import Random

from headwise.offline.texts.cutting import sentence_spans
from headwise.offline.texts.document import choose

OPENING = "{opening} ..."  # how a question names a sentence; it stands at the question's end
_ANY = (
    "Quote the sentence that begins with: " + OPENING,
    "Write down, word for word, the sentence that starts like this: " + OPENING,
    "Say in your own words what this sentence means: " + OPENING,
    "What is the point of the sentence that begins with: " + OPENING,
)
_NOT_FIRST = ("Which sentence stands right before the one that begins with: " + OPENING,)
_NOT_LAST = (
    "What comes right after the sentence that begins with: " + OPENING,
    "Quote this sentence and the next one: " + OPENING,
)
_ABOUT = (
    'Quote every sentence with the word "{term}".',
    'In what connection does the text use the word "{term}"?',
    'How often does the word "{term}" come up, and in which sentences?',
)
_WHOLE = (
    "Summarise the text in three sentences.",
    "Go on with the text from where it ends.",
    "List the main points of the text, one on each line.",
    "What is the text about, and for whom is it written?",
    "Repeat the text from its beginning.",
    "Which topics does the text treat, in which order?",
)
_CODE_LINE = (
    "Copy the line that comes after this one: {line}",
    "Copy the line that stands before this one: {line}",
    "Copy the ten lines that start with this one: {line}",
    "What is this line for? {line}",
)
_CODE_NAME = (
    "What does `{name}` do?",
    "Copy the code of `{name}`.",
    "Where is `{name}` used, and with which arguments?",
    "Which names does `{name}` use that are defined elsewhere?",
)
_CODE_WHOLE = (
    "List the functions and classes that this code defines, one on each line.",
    "Explain in a few sentences what this code does.",
    "Go on with the code from where it ends.",
    "Repeat the code from its beginning.",
    "Which errors can this code raise, and when?",
)
_WORD = re.compile(r"\S+")
_TERM = re.compile(r"[^\W\d_]{6,20}")
_DEFINED = re.compile(
    r"(?:(?:async|export|pub|public|static)\s+)*(?:def|class|function|func|fn|struct|interface|trait|enum)\s+(\w+)"
)
_CODE = re.compile(
    r"[;{}\[(:,]\s*$|^\s*(?:[#@}]|//|import |from \S+ import |return\b|def |class )|^\s*[\w.\[\]]+(?: = |\(.*\)$)"
)
_CODE_SHARE = 0.5  # of the lines
_FEWEST_WORDS, _MOST_WORDS = 4, 9
_FEWEST_LETTERS, _MOST_LETTERS = 12, 80
_UNSPACED = 14  # letters of a word on average; in a script without spaces they are more


def about_text(text: str, rng: Random) -> tuple[str, ...]:
    """Return questions about prose in any script; none about a text that says the same everywhere."""
    spans = sentence_spans(text)
    of_places: list[tuple[str, ...]] = []
    for number, (start, end) in enumerate(spans):
        opening = _opening(text, start, end)
        if opening:
            before, after = _NOT_FIRST * (number > 0), _NOT_LAST * (number + 1 < len(spans))
            of_places.append(tuple(template.format(opening=opening) for template in _ANY + before + after * 2))
    terms = [(rng.choice(_ABOUT).format(term=term),) for term in _terms(text, rng)]
    return choose(rng, of_places, [*_WHOLE[:3], *(question for (question,) in terms), *_WHOLE[3:]])


def about_code(text: str, rng: Random) -> tuple[str, ...]:
    """Return questions about source code."""
    lines = [line.strip() for line in text.split("\n")]
    once = Counter(lines)
    of_places: list[tuple[str, ...]] = []
    for number, line in enumerate(lines):
        definition = _DEFINED.match(line)
        if definition:
            of_places.append(tuple(template.format(name=definition[1]) for template in _CODE_NAME))
        elif len(line) >= _FEWEST_LETTERS and once[line] == 1 and 0 < number < len(lines) - 1:
            of_places.append(tuple(template.format(line=line) for template in _CODE_LINE))
    return choose(rng, of_places, _CODE_WHOLE)


def looks_like_code(text: str) -> bool:
    """Return whether most lines of a text end or begin as lines of code do."""
    lines = [line for line in text.split("\n") if line.strip()]
    return sum(bool(_CODE.search(line)) for line in lines) > len(lines) * _CODE_SHARE


def _opening(text: str, start: int, end: int) -> str:
    """Return the first words of a sentence, as many as name no other place of the text; empty if there are none."""
    line_end = text.find("\n", start, end)
    first_line = text[start : end if line_end < 0 else line_end]
    words = [match.end() for match in _WORD.finditer(first_line)]
    spaced = len(first_line) < _UNSPACED * len(words)
    stops = words[_FEWEST_WORDS - 1 : _MOST_WORDS] if spaced else range(_FEWEST_LETTERS // 2, _MOST_LETTERS, 2)
    for stop in stops:
        if (
            stop * (2 - spaced) >= _FEWEST_LETTERS
            and stop <= min(_MOST_LETTERS, end - start - 1)
            and text.count(first_line[:stop]) == 1
        ):
            return first_line[:stop] if stop <= len(first_line) else ""
    return ""


def _terms(text: str, rng: Random) -> list[str]:
    """Return words that the text uses a few times."""
    counts = Counter(match[0] for match in _TERM.finditer(text))
    often = sorted(word for word, number in counts.items() if 2 <= number <= 6)
    return rng.sample(often, min(3, len(often)))
