"""Write cells and lines that the tables of several commands have."""

from headwise.files.terminal import say, size


def number(value: float | None) -> str:
    """Return a number with three digits after the point, or "-" if there is none."""
    return "-" if value is None else f"{value:.3f}"


def yes(value: bool | None) -> str:
    """Return "yes" or "no"; None is "no"."""
    return "yes" if value else "no"


def say_sliding(nbytes: int) -> None:
    """Print how many of the bytes in a table are of sliding-window layers, if any are."""
    if nbytes:
        say(f"Sliding-window layers are left whole, whatever the keep: {size(nbytes)} of the KV held.")
