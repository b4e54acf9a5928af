"""Write text to a terminal, and read lists in options.

Documents, answers and names of files and models are somebody else's text. All of it goes through `shown` before it is
printed.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from headwise.errors import BadInput

# These move a cursor, set colours or a title, type for the user, start a line, or turn the direction of writing: C0 and
# C1, marks, overrides and isolates of direction, line separators. Halves of characters are in it, too.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str, *, lines: bool = False) -> str:
    r"""Return the text as a terminal may get it: control characters are written out, such as \x1b.

    With `lines`, newlines and tabs stay as they are.
    """
    kept = "\n\t" if lines else ""
    return _CONTROL.sub(lambda match: match[0] if match[0] in kept else repr(match[0])[1:-1], text)


def say(text: str) -> None:
    """Print a result on stdout."""
    print(shown(text, lines=True))


def complain(error: object) -> None:
    """Print an error or a warning on stderr, in one line."""
    print(f"headwise: {shown(str(error))}", file=sys.stderr)


def open_streams() -> None:
    """Make stdout and stderr take any text: a character that their encoding lacks is written out, such as \\u2192.

    If there is no such stream (pythonw, or closed by the shell), nothing is printed, and commands that write files
    work. The missing stream is replaced: otherwise the next file that is opened would get its number, and what is
    printed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def split(text: str) -> list[str]:
    """Return the parts of a comma-separated list. Raises BadInput if there are none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise BadInput(f"{text!r} is an empty list; separate values with commas.")
    return names


def count(items: Sequence[Any], name: str) -> str:
    """Return how many items there are, such as "3 questions"."""
    return f"{len(items)} {name}{'' if len(items) == 1 else 's'}"


def size(nbytes: int) -> str:
    """Return bytes as a text, in a unit that fits."""
    number = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Return the numbers of a comma-separated list. Raises BadInput if one is no number, or there are none."""
    try:
        return [kind(part) for part in split(text)]
    except ValueError as error:
        raise BadInput(f"{text[:60]!r} is no list of numbers: {error}.") from error
