"""Take prose from the reference manual and long docstrings, and code from the modules of the standard library.

A passage starts at a paragraph of a document and goes on, where the document ends, in the next one.
"""

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random

from headwise.errors import BadInput
from headwise.offline.texts import sources
from headwise.offline.texts.cutting import FOLLOWING, Count, paragraph_starts, passage
from headwise.offline.texts.example import Example
from headwise.offline.texts.questions import about_code, about_text

_CHARACTERS, _MOST_CHARACTERS = 5, 8  # of a token, about
_FILLER = 80, 500  # characters of a paragraph to strew facts in
_DOCSTRING = 200  # characters; shorter ones say little
_BROKEN = 50  # characters that a line has which was broken to a width, at least
_PLAIN_LINE = re.compile(r"[\w(\"'*`]")

Documents = Sequence[Callable[[], Sequence[str]]]  # each read when it is needed; parts that are apart


def prose(number: int, count: Count, length: int, seed: int, split: str) -> Example:
    """Return a passage of the manual, or of docstrings."""
    documents = _manual(split) if number % 2 else _docstrings(split)
    text = _stretch(documents, number // 2, length, f"{split} prose {number % 2} {seed}")
    context, following = passage(text, count, length)
    questions = about_text(context, Random(f"{split} prose questions {number} {seed}"))
    return Example(context=context, questions=questions, domain="prose", following=following)


def code(number: int, count: Count, length: int, seed: int, split: str) -> Example:
    """Return a passage of a module."""
    text = _stretch(_modules(split), number, length, f"{split} code {seed}")
    context, following = passage(text, count, length)
    questions = about_code(context, Random(f"{split} code questions {number} {seed}"))
    return Example(context=context, questions=questions, domain="code", following=following)


def paragraphs(number: int, length: int, seed: int, split: str) -> list[str]:
    """Return paragraphs of the manual that are prose and not long, to strew facts in."""
    text = _stretch(_manual(split), number, 3 * length, f"{split} filler {seed}")
    starts = paragraph_starts(text)
    stripped = (text[a:b].strip("\n") for a, b in zip(starts, [*starts[1:], len(text)], strict=True))
    shortest, longest = _FILLER
    return [part for part in stripped if shortest <= len(part) <= longest and _PLAIN_LINE.match(part)]


def _stretch(documents: Documents, number: int, length: int, seed: str) -> str:
    """Return enough text for a context and what follows it. Number n starts in the nth part, later in other places."""
    needed = (length + FOLLOWING) * _MOST_CHARACTERS
    order = list(range(len(documents)))
    Random(seed).shuffle(order)
    parts: list[str] = []
    for index in order:
        parts += documents[index]()
        if sum(map(len, parts[number + 1 :])) >= needed:
            break
    if not parts:
        raise BadInput("this Python comes without the sources of its library: give texts of your own with --data.")
    turn, place = divmod(number, len(parts))
    beginning = _from_inside(parts[place], turn, length, f"{seed} {place}")
    return "\n\n".join([beginning, *parts[place + 1 :], *parts[:place]])[:needed]


def _from_inside(text: str, turn: int, length: int, seed: str) -> str:
    """Return the text from a paragraph on that leaves enough after it, another one in every turn."""
    step = (length + FOLLOWING) * _CHARACTERS
    free = max(1, len(text) - step)
    target = (Random(seed).randrange(free) + turn * step) % free
    return text[max(start for start in paragraph_starts(text) if start <= target) :]


@cache
def _manual(split: str) -> Documents:
    def reader(text: str) -> Callable[[], Sequence[str]]:
        return cache(lambda: [*sources.own_parts(_unwrapped(text), split)])

    return [reader(text) for text in sources.manual(split).values()]


@cache
def _docstrings(split: str) -> Documents:
    def reader(path: Path) -> Callable[[], Sequence[str]]:
        return cache(lambda: [*sources.own_parts(_documentation(path), split)])

    return [reader(path) for path in (*sources.standard_files(split), *sources.package_files(split))]


@cache
def _modules(split: str) -> Documents:
    def reader(path: Path) -> Callable[[], Sequence[str]]:
        return cache(lambda: [*sources.own_parts(sources.read(path), split)])

    return [reader(path) for path in sources.standard_files(split)]


def _documentation(path: Path) -> str:
    """Return the long docstrings of a module in the order of the file, each under a heading; empty if they are few."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(sources.read(path))) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    parts: list[str] = []
    for node in nodes:
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if len(text) >= _DOCSTRING:
            parts += [f"## {getattr(node, 'name', path.stem)}", _unwrapped(text)]
    joined = "\n\n".join(parts)
    return joined if len(joined) >= sources.SHORTEST else ""


def _unwrapped(text: str) -> str:
    """Join the lines of paragraphs that were broken to a width. Lists, code and tables stay as they are."""
    return "\n\n".join(map(_one_line, re.split(r"\n[^\S\n]*\n\s*?(?=[^\S\n]*\S)", text)))


def _one_line(paragraph: str) -> str:
    lines = paragraph.split("\n")
    indents = {len(line) - len(line.lstrip()) for line in lines}
    plain = len(indents) == 1 and all(_PLAIN_LINE.match(line.lstrip()) for line in lines[:1])
    broken = all(len(line) >= _BROKEN for line in lines[:-1])
    return " ".join(line.strip() for line in lines) if plain and broken else paragraph
