"""Print the rows of benchmarks: the machine and a table, or JSON."""

import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from headwise.commands.console import print_json, print_table
from headwise.files.terminal import say

Columns = Mapping[str, str | Callable[[dict[str, Any]], str]]  # headings, each with a field or a function of a row


def print_rows(rows: list[dict[str, Any]], title: str, columns: Columns, *, as_json: bool) -> None:
    """Print rows as a table, or as a list of JSON objects, each with the command line."""
    rows = [row | {"command": shlex.join(["headwise", *sys.argv[1:]])} for row in rows]
    if as_json:
        print_json(rows)
        return
    for hardware, versions in dict.fromkeys((row["hardware"], tuple(row["versions"].items())) for row in rows):
        say(f"{hardware}; " + ", ".join(f"{name} {version}" for name, version in versions))
    sources = columns.values()
    cells = [[f"{row[source]}" if isinstance(source, str) else source(row) for source in sources] for row in rows]
    print_table(title, list(columns), cells)
