"""What benchmarks print: where they ran, and a table, or all of it as JSON."""

import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from headwise.commands.console import print_json, print_table
from headwise.files.terminal import say

Columns = Mapping[str, str | Callable[[dict[str, Any]], str]]  # of a table: a field of the rows, or what is made of one


def print_rows(rows: list[dict[str, Any]], title: str, columns: Columns, *, as_json: bool) -> None:
    """Of a benchmark: a list of objects as JSON, each with the command line, or a table."""
    rows = [row | {"command": shlex.join(["headwise", *sys.argv[1:]])} for row in rows]
    if as_json:
        print_json(rows)
        return
    for hardware, versions in dict.fromkeys((row["hardware"], tuple(row["versions"].items())) for row in rows):
        say(f"{hardware}; " + ", ".join(f"{name} {version}" for name, version in versions))
    cells = [[f"{row[how]}" if isinstance(how, str) else how(row) for how in columns.values()] for row in rows]
    print_table(title, list(columns), cells)
