"""Print progress on stderr, and tables and JSON on stdout."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwise.files.terminal import shown

FIRST_LINE, NEXT_LINE = 5.0, 30.0  # seconds between lines of progress if there is no terminal


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[..., None]]:
    """Show progress on stderr. Yields a function that takes (done, total), and perhaps a text to show behind it.

    It is a bar on a terminal; elsewhere a line after five seconds, then every thirty. Work that was done before the
    first call does not count for the time that is left.
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
            if not bar.update(0) and text:  # drawn if it is time; a step may take minutes, so its text is shown now
                bar.refresh()

        yield report


class _Log:
    """Prints a line of progress now and then, where no bar can be drawn."""

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
        number = f"{done:.2f}".rstrip("0").rstrip(".")
        parts = [f"{number} of {total} {self.unit}", f"{_clock(now - self._began)} elapsed"]
        if done > self._first:
            parts.append(f"about {_clock((now - self._began) * (total - done) / (done - self._first))} left")
        print(f"headwise: {', '.join(parts)}{f': {shown(text)}' if text else ''}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    from tqdm import tqdm

    return tqdm.format_interval(seconds)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print(json.dumps(value, indent=2))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, as wide as the terminal, or 140 characters wide if there is none."""
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = 140
    table = _table(header, rows)
    if console.measure(table).maximum > console.width:
        table = _table(header, rows, padding=(0, 1, 0, 0), pad_edge=False)
    console.print(Text(shown(title), style="bold"), soft_wrap=True)
    console.print(table, markup=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], **layout: Any) -> Table:
    """Return a table. A text that is too long for its column goes on in the next line, and is never cut."""
    table = Table(box=box.SIMPLE_HEAD, **layout)
    for name in header:
        table.add_column(shown(name), overflow="fold")
    for row in rows:
        table.add_row(*(shown(cell, lines=True) for cell in row))
    return table
