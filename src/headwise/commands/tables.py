"""Cells and lines that the tables of several commands have."""

from headwise.files.terminal import say, size


def number(value: float | None) -> str:
    """To three digits after the point, or "-" where there is none."""
    return "-" if value is None else f"{value:.3f}"


def yes(value: bool | None) -> str:
    """Whether it is so; what is not known counts as no."""
    return "yes" if value else "no"


def say_sliding(nbytes: int) -> None:
    """Below a table of bytes: how many of them are left whole, if any are."""
    if nbytes:
        say(f"Sliding-window layers are left whole, whatever the keep: {size(nbytes)} of the KV held.")
