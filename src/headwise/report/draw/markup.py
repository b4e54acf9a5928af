"""A table of a report, as Markdown and as HTML."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

CLOSE = "≈"  # its interval overlaps the best's
NONE = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One cell of a table."""

    text: str = NONE
    margin: str = ""  # the interval, or that it is unknown
    best: bool = False
    close: bool = False
    share: float | None = None  # length of a bar


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table whose rows have names, which are mostly methods."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]
    first: str = "method"  # what the rows' names are

    def markdown(self) -> str:
        """Return the table as Markdown, with its title as a heading."""
        head = f"| {plain(self.first)} | {' | '.join(map(plain, self.columns))} |\n|---|{'---:|' * len(self.columns)}"
        rows = [f"| {plain(name)} | {' | '.join(map(_markdown, entries))} |" for name, entries in self.rows]
        return "\n".join([f"### {plain(self.title)}", "", head, *rows, ""])

    def html(self, numbers: Mapping[str, int] | None = None) -> str:
        """Return the table as HTML, in a box that scrolls. `numbers` are those of the charts' lines, by row name."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        rows = "".join(
            f'<tr{_data(name, numbers or {})}><th scope="row" title="{escape(name)}">{escape(name)}</th>'
            f"{''.join(map(_html, entries))}</tr>"
            for name, entries in self.rows
        )
        return (
            f'<div class="scroll" tabindex="0"><table><caption>{escape(self.title)}</caption><thead><tr>'
            f'<th scope="col">{escape(self.first)}</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )


def plain(text: str) -> str:
    """Return a text escaped for Markdown: a bar would end the column, and a bracket starts a link."""
    return re.sub(r"[\\`\[|]", r"\\\g<0>", escape(" ".join(text.split()), quote=False))


def _markdown(entry: Entry) -> str:
    text = plain(f"{entry.text} ({entry.margin})" if entry.margin else entry.text)
    return f"**{text}**" if entry.best else f"{text} {CLOSE}" if entry.close else text


def _html(entry: Entry) -> str:
    text = f"<b>{escape(entry.text)}</b>" if entry.best else escape(entry.text)
    margin = f" <small>({escape(entry.margin)})</small>" if entry.margin else ""
    mark = f"<i>{CLOSE if entry.close else ''}</i>" if entry.margin else ""
    bar = "" if entry.share is None else f' class="bar" style="--share:{entry.share:.1%}"'
    return f"<td{bar}>{text}{margin}{mark}</td>"


def _data(name: str, numbers: Mapping[str, int]) -> str:
    return f' data-m="{numbers[name]}"' if name in numbers else ""
