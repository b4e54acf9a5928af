"""The axes used everywhere, the sizes of a model's KV cache, and the names of how its entries are stored.

Legend, in code comments and in jaxtyping annotations:

    B  batch      L  layers (only those that can be compressed)     H  kv_heads     G  group: query heads per KV head
    N  tokens of the context    T  queries: tokens of the current forward    W  window: last queries of the context
    D  head_dim   K  kept       S  segments = B * H
"""

from dataclasses import dataclass
from reprlib import repr as shown

from headwise.errors import BadInput

NATIVE = "native"  # entries in the model's dtype
AUTO = "auto"  # every head has entries of one kind, which the allocator chooses
KINDS = ("int8", "k8v4", "int4")  # of entries in fewer bits, see kernels/quantised.py
MOST_LAYERS, MOST_HEADS, MOST_HEAD_DIM = 2**12, 2**12, 2**16


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a model's KV cache.

    `layers` are the indices, among the model's `num_layers`, of the layers that attend to the whole context and can
    therefore be compressed. Sliding-window layers are not among them: they are left whole. Raises BadInput for sizes
    that no model has: a file says them, and memory is taken by them.
    """

    num_layers: int
    layers: tuple[int, ...]
    kv_heads: int
    query_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        limits = {
            "num_layers": MOST_LAYERS,
            "kv_heads": MOST_HEADS,
            "query_heads": MOST_HEADS,
            "head_dim": MOST_HEAD_DIM,
        }
        for name, most in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise BadInput(f"{name}={shown(value)} must be a whole number from 1 to {most}.")
        whole = all(type(layer) is int and 0 <= layer < self.num_layers for layer in self.layers)
        if not (self.layers and whole and list(self.layers) == sorted(set(self.layers))):
            raise BadInput(
                f"layers={shown(self.layers)} must be indices of layers that ascend, at least one, each below "
                f"num_layers={self.num_layers}."
            )
        if self.query_heads % self.kv_heads:
            raise BadInput(f"query_heads={self.query_heads} must be a multiple of kv_heads={self.kv_heads}.")

    def told_beside(self, other: "ModelShape") -> str:
        """In words: layers and KV heads, and whatever else is not the same in `other`."""
        which = self.layers != other.layers and len(self.layers) == len(other.layers)
        said = f"{len(self.layers)} layers{f' {shown(self.layers)}' if which else ''} of {self.kv_heads} KV heads"
        partial = len(self.layers) < self.num_layers or len(other.layers) < other.num_layers
        if self.num_layers != other.num_layers and partial:
            said += f", {self.num_layers} layers in all"
        if self.query_heads != other.query_heads:
            said += f", {self.query_heads} query heads"
        if self.head_dim != other.head_dim:
            said += f", heads of size {self.head_dim}"
        return said

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
