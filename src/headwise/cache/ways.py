"""The ways to read a context, by name: who watches the layers fill, and what a layer is until then."""

from collections.abc import Mapping
from types import MappingProxyType

from headwise.cache.bounded import BoundedLayer
from headwise.cache.evict import BoundedPrefill
from headwise.cache.layer import FillingLayer
from headwise.cache.prefill import Prefill
from headwise.errors import BadInput

EXACT = "exact"
PIECE = 2048  # tokens of a piece where nobody says how many, if it is pieces that a way of reading is for

WAYS: Mapping[str, tuple[type[Prefill], type[FillingLayer]]] = MappingProxyType(
    {
        EXACT: (Prefill, FillingLayer),
        "evict": (BoundedPrefill, BoundedLayer),
    }
)


def how(reading: str) -> tuple[type[Prefill], type[FillingLayer]]:
    """What a cache is made of until its context has been read. Raises BadInput."""
    if reading not in WAYS:
        raise BadInput(f"reading={reading!r} does not exist; choose {', '.join(WAYS)}.")
    return WAYS[reading]


def piece_size(reading: str, asked: int | None, tokens: int) -> int:
    """Tokens of a piece of a context. Raises BadInput."""
    how(reading)
    if asked is not None and asked < 1:
        raise BadInput(f"prefill_chunk_size={asked} must be at least 1 token, or None.")
    return asked or (tokens if reading == EXACT else PIECE)
