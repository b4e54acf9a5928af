"""The axes used everywhere, and the sizes of a model's KV cache.

Legend, in code comments and in jaxtyping annotations:

    B  batch      L  layers (only those that can be compressed)     H  kv_heads     G  group: query heads per KV head
    N  tokens of the context    T  queries: tokens of the current forward    W  window: last queries of the context
    D  head_dim   K  kept       S  segments = B * H
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a model's KV cache.

    `layers` are the indices, among the model's `num_layers`, of the layers that attend to the whole context and can
    therefore be compressed. Sliding-window layers are not among them: they are left whole.
    """

    num_layers: int
    layers: tuple[int, ...]
    kv_heads: int
    query_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def num_heads(self) -> int:
        """KV heads over all compressible layers, `L * H`."""
        return len(self.layers) * self.kv_heads

    def entry_bytes(self, itemsize: int) -> int:
        """Bytes of one KV entry (key and value) of one head, for numbers of `itemsize` bytes."""
        return 2 * self.head_dim * itemsize
