"""Text for a terminal: what is shown of names and texts, streams that take any text, lists in options.

Documents, answers and names of files and models are somebody else's text. Whatever of it is shown goes through `shown`.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from headwise.errors import BadInput

# What moves a cursor, sets colours or a title, types for the user, starts a line, or turns the direction of writing:
# C0 and C1, marks, overrides and isolates of direction, line separators. And halves of characters, which are none.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str, *, lines: bool = False) -> str:
    r"""The text as a terminal may get it: control characters are written out, such as \x1b.

    With `lines`, newlines and tabs stay as they are.
    """
    kept = "\n\t" if lines else ""
    return _CONTROL.sub(lambda found: found[0] if found[0] in kept else repr(found[0])[1:-1], text)


def say(text: str) -> None:
    """A result on stdout."""
    print(shown(text, lines=True))


def complain(error: object) -> None:
    """An error, or what is left out, on stderr, in one line."""
    print(f"headwise: {shown(str(error))}", file=sys.stderr)


def open_streams() -> None:
    """Make stdout and stderr take any text: a character that their encoding lacks is written out, such as \\u2192.

    Where there is no such stream (pythonw, or closed by the shell) nothing is printed, and commands that write files
    work. The place is filled, or else the next file that is opened would get its number, and what is printed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def split(text: str) -> list[str]:
    """The parts of a comma-separated list. Raises BadInput if there are none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise BadInput(f"{text!r} is an empty list; separate values with commas.")
    return names


def count(things: Sequence[Any], name: str) -> str:
    """So many of what is called `name`."""
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def size(nbytes: int) -> str:
    """Bytes in a unit that fits."""
    number = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of a comma-separated list. Raises BadInput."""
    try:
        return [kind(part) for part in split(text)]
    except ValueError as error:
        raise BadInput(f"{text[:60]!r} is no list of numbers: {error}.") from error
