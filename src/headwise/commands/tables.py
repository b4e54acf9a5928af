"""Write cells and lines that the tables of several commands have."""

from collections.abc import Iterable, Sequence

from headwise.files.terminal import say, size


def number(value: float | None) -> str:
    """Return a number with three digits after the point, or "-" if there is none."""
    return "-" if value is None else f"{value:.3f}"


def yes(value: bool | None) -> str:
    """Return "yes" or "no"; None is "no"."""
    return "yes" if value else "no"


def all_native(entries: Iterable[str]) -> bool:
    """Return whether no entries are stored in fewer bits, so that a table need not name them."""
    return set(entries) <= {"native"}


def without(
    hidden: Iterable[str], header: Sequence[str], table: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return a table's header and rows without the columns of these names."""
    left_out = set(hidden)
    places = [i for i, name in enumerate(header) if name not in left_out]
    return [header[i] for i in places], [[row[i] for i in places] for row in table]


def say_sliding(nbytes: int) -> None:
    """Print how many of the bytes in a table are of sliding-window layers, if any are."""
    if nbytes:
        say(f"Sliding-window layers are left whole, whatever the keep: {size(nbytes)} of the KV held.")
