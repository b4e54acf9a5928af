"""What commands have in common: lists in options, a bar on stderr, tables and JSON on stdout.

Documents, answers and names of files and models are somebody else's text. Whatever of it is shown goes through `shown`.
"""

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwise.errors import BadInput

# What moves a cursor, sets colours or a title, types for the user, starts a line, or turns the direction of writing:
# C0 and C1, marks, overrides and isolates of direction, line separators. And halves of characters, which are none.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


FIRST_LINE, NEXT_LINE = 5.0, 30.0  # seconds between lines of progress where there is no terminal


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


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[..., None]]:
    """Progress on stderr, fed with (done, total), and a text behind it if there is one.

    A bar on a terminal; elsewhere a line after five seconds, then every thirty. What was done before the first call
    tells nothing about the time that is left.
    """
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", file=sys.stderr, leave=False, disable=None) as bar:
        log = _Log(unit) if bar.disable else None

        def report(done: float | int, total: int, text: str = "") -> None:
            if log is not None:
                log.report(done, total, text)
                return
            if bar.total is None:
                bar.initial = bar.n = done
            bar.total = total
            bar.set_postfix_str(shown(text), refresh=False)
            bar.n = round(done, 2)
            if not bar.update(0) and text:  # drawn if it is time; what a step is shall be seen: it may take minutes
                bar.refresh()

        yield report


class _Log:
    """Progress where no bar can be drawn: a line now and then."""

    def __init__(self, unit: str):
        self.unit = unit
        self._total, self._first, self._began = -1, 0.0, time.monotonic()
        self._next = self._began + FIRST_LINE

    def report(self, done: float | int, total: int, text: str) -> None:
        """Print a line if it is time."""
        now = time.monotonic()
        if total != self._total:  # other work, which has a pace of its own
            self._total, self._first, self._began = total, done, now
        if now < self._next:
            return
        self._next = now + NEXT_LINE
        told = [f"{done:.4g} of {total} {self.unit}", f"{_clock(now - self._began)} elapsed"]
        if done > self._first:
            told.append(f"about {_clock((now - self._began) * (total - done) / (done - self._first))} left")
        print(f"headwise: {', '.join(told)}{f': {shown(text)}' if text else ''}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    from tqdm import tqdm

    return tqdm.format_interval(seconds)


def print_json(value: Any) -> None:
    """On stdout."""
    print(json.dumps(value, indent=2))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On stdout, as wide as the terminal, or for 140 characters where there is none."""
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = 140
    table = _table(header, rows)
    if console.measure(table).maximum > console.width:
        table = _table(header, rows, padding=(0, 1, 0, 0), pad_edge=False)
    console.print(Text(shown(title), style="bold"), soft_wrap=True)
    console.print(table, markup=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], **layout: Any) -> Table:
    """What is too long for its column goes on in the next line, and is never cut."""
    table = Table(box=box.SIMPLE_HEAD, **layout)
    for name in header:
        table.add_column(shown(name), overflow="fold")
    for row in rows:
        table.add_row(*(shown(cell, lines=True) for cell in row))
    return table


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
