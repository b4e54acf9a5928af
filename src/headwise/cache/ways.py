"""The ways to read a context: who watches the layers fill, and what a layer is until then."""

from collections.abc import Mapping
from types import MappingProxyType

from headwise.cache.bounded import BoundedLayer
from headwise.cache.evict import BoundedPrefill
from headwise.cache.layer import FillingLayer
from headwise.cache.offload import OffloadedLayer, OffloadingPrefill
from headwise.cache.prefill import Prefill
from headwise.methods.reading import EVICT, EXACT, OFFLOAD, require_reading

WAYS: Mapping[str, tuple[type[Prefill], type[FillingLayer]]] = MappingProxyType(
    {
        EXACT: (Prefill, FillingLayer),
        EVICT: (BoundedPrefill, BoundedLayer),
        OFFLOAD: (OffloadingPrefill, OffloadedLayer),
    }
)


def how(reading: str) -> tuple[type[Prefill], type[FillingLayer]]:
    """What a cache is made of until its context has been read. Raises BadInput."""
    return WAYS[require_reading(reading)]
