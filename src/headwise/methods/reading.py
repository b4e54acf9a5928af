"""The ways to read a context, by name, and what is known of them without a model. Imports no torch."""

from fractions import Fraction

from headwise.errors import BadInput

EXACT, EVICT, OFFLOAD = READINGS = ("exact", "evict", "offload")
PIECE = 2048  # tokens of a piece where nobody says how many, if it is pieces that a way of reading is for
MARGIN = Fraction(1, 2)  # entries that "evict" holds beyond the budget between pieces, as a share of the budget


def require_reading(name: str) -> str:
    """Return the name. Raises BadInput if it is unknown."""
    if name not in READINGS:
        raise BadInput(f"reading={name!r} does not exist; choose {', '.join(READINGS)}.")
    return name


def piece_size(reading: str, asked: int | None, tokens: int) -> int:
    """Tokens of a piece of a context. Raises BadInput."""
    require_reading(reading)
    if asked is not None and asked < 1:
        raise BadInput(f"prefill_chunk_size={asked} must be at least 1 token, or None.")
    return asked or (tokens if reading == EXACT else PIECE)
