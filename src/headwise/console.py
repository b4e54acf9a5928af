"""What commands have in common: lists in options, a bar on stderr, tables and JSON on stdout."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwise.errors import BadInput


def split(text: str) -> list[str]:
    """The parts of a comma-separated list. Raises BadInput if there are none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise BadInput(f"{text!r} is an empty list; separate values with commas.")
    return names


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr, fed with (done, total), and a text behind it if there is one."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", file=sys.stderr, leave=False, disable=None) as bar:

        def report(done: int, total: int, text: str = "") -> None:
            bar.total = total
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)

        yield report


def print_json(value: Any) -> None:
    """On stdout."""
    print(json.dumps(value, indent=2))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On stdout, as wide as the terminal, or for 140 characters where there is none."""
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = 140
    table = Table(*header, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table, markup=False)


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
