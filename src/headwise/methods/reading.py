"""The ways to read a context, by name, and what is known of them without a model. Imports no torch."""

from fractions import Fraction

from headwise.errors import BadInput
from headwise.shapes import AUTO

EXACT, EVICT, OFFLOAD = READINGS = ("exact", "evict", "offload")
PIECE = 2048  # tokens of a piece where nobody says how many, if it is pieces that a way of reading is for
MARGIN = Fraction(1, 2)  # entries that "evict" holds beyond the budget between pieces, as a share of the budget


def require_reading(name: str, *entries: str) -> str:
    """Return the name. Raises BadInput if it is unknown, or what is kept cannot be stored as one of `entries`."""
    if name not in READINGS:
        raise BadInput(f"reading={name!r} does not exist; choose {', '.join(READINGS)}.")
    if name == EVICT and AUTO in entries:  # bits are chosen when the whole context has been read
        raise BadInput(
            f"reading={EVICT!r} cannot be used with entries={AUTO!r}: name the bits, or use {EXACT!r} or {OFFLOAD!r}."
        )
    return name


def piece_size(reading: str, asked: int | None, tokens: int) -> int:
    """Tokens of a piece of a context. Raises BadInput."""
    require_reading(reading)
    if asked is not None and asked < 1:
        raise BadInput(f"prefill_chunk_size={asked} must be at least 1 token, or None.")
    return asked or (tokens if reading == EXACT else PIECE)
