"""What entries cost in bytes, how many of them some bytes hold, and who says in which bits heads store theirs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.errors import BadInput
from headwise.interfaces import Demand
from headwise.kernels.quantised import AUTO, GROUP, SINK, Bits, group_of
from headwise.methods.keep import Keep

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
    def least(self) -> int:
        """Bytes that an entry takes at least."""
        return self.native if self.bits is None else self._codes(self.bits)

    @property
    def native(self) -> int:
        """Bytes of an entry in the model's dtype."""
        return 2 * self.head_dim * self.itemsize

    def nbytes(self, counts: Int[Tensor, "*heads"]) -> Int[Tensor, "*heads"]:
        """Bytes of heads that keep so many entries each, those of the first tokens among them."""
        return self._with_first(counts, SINK)

    def most(self, counts: Int[Tensor, "*heads"]) -> Int[Tensor, "*heads"]:
        """The most bytes of heads that keep so many entries each, whichever they are.

        A few quantised entries can take more than native ones: a block of keys has scales for every channel.
        """
        return torch.stack([self._with_first(counts, first) for first in range(SINK + 1)]).amax(0)

    def entries(self, nbytes: int, heads: int) -> int:
        """How many entries fit into so many bytes, whichever they are, and however unevenly the heads share them."""
        if self.bits is None:
            return nbytes // self.native
        codes, block = self._codes(self.bits), GROUP[self.bits.keys]
        # Of every head the first tokens may be native, and a block nearly empty. Or every entry is alone in a block.
        left = nbytes - heads * (SINK * (self.native - codes) + self._block)
        return max(left * block // (codes * block + self._block), nbytes // max(self.native, codes + self._block))

    def _with_first(self, counts: Tensor, first: int) -> Tensor:
        """Bytes of heads with so many entries of first tokens among theirs, or nothing else if they have fewer."""
        if self.bits is None:
            return counts * self.native
        native = counts.clamp(max=first)
        blocks = -(-(counts - native) // GROUP[self.bits.keys])
        return native * self.native + (counts - native) * self._codes(self.bits) + blocks * self._block

    def _codes(self, bits: Bits) -> int:
        """Bytes of a quantised entry, the scales of its value included."""
        groups = self.head_dim // group_of(self.head_dim, bits.values)
        return self.head_dim * (bits.keys + bits.values) // 8 + 4 * groups

    @property
    def _block(self) -> int:
        """Bytes of the scales of a block of keys."""
        return 4 * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bytes that each row of a batch may take, and how they are counted."""

    nbytes: tuple[int, ...]
    storages: tuple[Storage, ...]  # one for every kind of entries that a head may have
    first_kept: bool  # whether every head keeps the first tokens before others

    def price(self, counts: Int[Tensor, "*heads"], kind: int = 0) -> Int[Tensor, "*heads"]:
        """Bytes of heads that keep so many entries: exactly where it is known which are native, else the most."""
        storage = self.storages[kind]
        return storage.nbytes(counts) if self.first_kept else storage.most(counts)


@runtime_checkable
class ChoosesKinds(Protocol):
    """An allocator that knows what entries in fewer bits are worth to every head: what `entries="auto"` needs."""

    @property
    def kinds(self) -> tuple[Bits | None, ...]:
        """The kinds that it can choose among, native entries (None) first; nothing else if it knows no others."""
        ...

    def stored(
        self, demand: Demand, limits: Limits
    ) -> tuple[Int[Tensor, "layers batch kv_heads"], Int[Tensor, "layers batch kv_heads"]]:
        """Counts of every head, and which of `kinds` its entries are, for the bytes of each row. On the CPU."""
        ...


def require_bytes(keep: Keep) -> None:
    """Raise BadInput unless entries="auto" can be asked for: their number and their bits follow from bytes."""
    if not keep.counts_bytes:
        raise BadInput(
            f"entries={AUTO!r} chooses entries AND bits by bytes: give keep as bytes, such as '15%bytes' or '64MiB', "
            f"not as {keep}."
        )


def fitted(demand: Demand, limits: Limits, counts: Counts, *, share: int = 0) -> Demand:
    """The demand with the largest totals whose `counts` take no more bytes than each row's limit.

    What it is given must fit. Totals are found by bisection, all rows at once; with `share` they may stay below the
    largest ones by one of so many entries.
    """
    low = torch.tensor(demand.totals, dtype=torch.int64, device="cpu")
    high = torch.tensor([demand.shape.num_heads * n for n in demand.tokens], dtype=torch.int64, device="cpu") + 1
    most = torch.tensor(limits.nbytes, dtype=torch.int64, device="cpu")
    high = torch.maximum(low + 1, high.minimum(most // limits.storages[0].least + 1))
    near = torch.tensor(1, dtype=torch.int64, device="cpu") if share == 0 else (low // share).clamp(min=1)
    while bool((high - low > near).any()):
        middle = (low + high) // 2
        taken = counts(replace(demand, totals=tuple(middle.tolist()))).cpu()
        fits = limits.price(taken).sum((0, 2)) <= most
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return replace(demand, totals=tuple(low.tolist()))
