"""What entries cost in bytes, and how many of them some bytes hold."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.interfaces import Demand
from headwise.kernels.quantised import GROUP, SINK, Bits, group_of

Counts = Callable[[Demand], Int[Tensor, "layers batch kv_heads"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How the entries of a cache are stored: in the model's dtype, or but for those of the first tokens in fewer bits.

    Attributes
    ----------
    head_dim
        Numbers of a key, and of a value.
    itemsize
        Bytes of a number in the model's dtype.
    bits
        Of the numbers that are quantised; None where all are in the model's dtype.
    """

    head_dim: int
    itemsize: int
    bits: Bits | None = None

    @property
    def native(self) -> int:
        """Bytes of an entry in the model's dtype."""
        return 2 * self.head_dim * self.itemsize

    def nbytes(self, counts: Int[Tensor, "*heads"]) -> Int[Tensor, "*heads"]:
        """Bytes of heads that keep so many entries each, those of the first tokens among them (at most, if not)."""
        if self.bits is None:
            return counts * self.native
        first = counts.clamp(max=SINK)
        blocks = -(-(counts - first) // GROUP[self.bits.keys])
        return first * self.native + (counts - first) * self._codes(self.bits) + blocks * self._block

    def entries(self, nbytes: int, heads: int) -> int:
        """How many entries fit into so many bytes, however unevenly the heads share them."""
        if self.bits is None:
            return nbytes // self.native
        first, block = SINK * heads, GROUP[self.bits.keys]
        left = nbytes - first * self.native - heads * self._block  # of every head a block may be nearly empty
        if left < 0:
            return min(first, nbytes // self.native)
        return first + left * block // (self._codes(self.bits) * block + self._block)

    def _codes(self, bits: Bits) -> int:
        """Bytes of a quantised entry, the scales of its value included."""
        groups = self.head_dim // group_of(self.head_dim, bits.values)
        return self.head_dim * (bits.keys + bits.values) // 8 + 4 * groups

    @property
    def _block(self) -> int:
        """Bytes of the scales of a block of keys."""
        return 4 * self.head_dim


def fitted(demand: Demand, limits: tuple[int, ...], storage: Storage, counts: Counts) -> Demand:
    """The demand with the largest totals whose `counts` take no more bytes than each row's limit.

    What it is given must fit. Totals are found by bisection, all rows at once.
    """
    low = torch.tensor(demand.totals, dtype=torch.int64, device="cpu")
    high = torch.tensor([demand.shape.num_heads * n for n in demand.tokens], dtype=torch.int64, device="cpu") + 1
    most = torch.tensor(limits, dtype=torch.int64, device="cpu")
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        taken = counts(replace(demand, totals=tuple(middle.tolist()))).cpu()
        fits = storage.nbytes(taken).sum((0, 2)) <= most
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return replace(demand, totals=tuple(low.tolist()))
