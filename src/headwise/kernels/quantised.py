"""Frozen storage in 8 or 4 bits: further entries of the segments of one layer, quantised once and never changed.

A number x of a group is stored as a code c: x is about `zero + scale * c`, where the group's smallest number has code 0
and its largest one 2^bits - 1 (asymmetric, round to nearest). `scale`, at least 0, and `zero` are float16.

Keys     a group is one channel of a block of consecutive entries of one head: 64 entries in 8 bits, 32 in 4 bits. A
         channel that is large in every entry, as biases of the key projection make them, then costs the others nothing.
Values   a group is some channels of one entry: 64 in 8 bits, 32 in 4 bits, or as many as divide the head.

The layout is that of KIVI (Liu et al., arXiv 2402.02750), but nothing stays in full precision because it is recent: see
docs/decisions.md for what was measured.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from headwise.errors import BadInput, NonFiniteValues, ShapeMismatch
from headwise.shapes import AUTO as AUTO
from headwise.shapes import KINDS
from headwise.shapes import NATIVE as NATIVE

if TYPE_CHECKING:
    from headwise.kernels.segments import ChunkTable

GROUP = {8: 64, 4: 32}  # entries of a block of keys, and channels of a group of values, at most
SINK = 4  # first tokens of a context, whose entries stay in the model's dtype
LARGEST = 65504.0  # number of float16
AT_ONCE = 2**20  # numbers that are quantised, or made numbers again, at a time

Rows = Callable[[Tensor], Tensor]  # gives keys or values [*rows, D] by the numbers of their rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Bits:
    """How many bits a number of a key and of a value takes, scales apart."""

    keys: int
    values: int


_BITS = (Bits(keys=8, values=8), Bits(keys=8, values=4), Bits(keys=4, values=4))
ENTRIES: Mapping[str, Bits] = MappingProxyType(dict(zip(KINDS, _BITS, strict=True)))


def parse_entries(name: str) -> Bits | None:
    """How entries are stored; None for "native". Raises BadInput."""
    if name == NATIVE:
        return None
    if not isinstance(name, str) or name not in ENTRIES:
        raise BadInput(f"entries={name!r} does not exist; choose {NATIVE}, {', '.join(ENTRIES)}.")
    return ENTRIES[name]


def require_entries(name: str) -> None:
    """Raise BadInput unless entries can be stored so: all of one kind, or those of every head as "auto" chooses."""
    if name != AUTO and (not isinstance(name, str) or name not in (NATIVE, *ENTRIES)):
        raise BadInput(f"entries={name!r} does not exist; choose {', '.join((NATIVE, *ENTRIES, AUTO))}.")


def group_of(head_dim: int, bits: int) -> int:
    """Channels of a value that share a scale."""
    return gcd(head_dim, GROUP[bits])


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The blocks of keys, in storage order: whose they are, their first row, and how many rows they have."""

    segment: Int[Tensor, " blocks"]
    start: Int[Tensor, " blocks"]
    count: Int[Tensor, " blocks"]


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """Quantised entries of one layer. Segment s holds rows `starts[s]` to its end, blocks `first_blocks[s]` to theirs.

    Codes of 4 bits lie in pairs: byte j of a row holds channel j in its low half, channel `j + head_dim / 2` in its
    high half. Raises ShapeMismatch where the parts do not fit together: kernels take that for granted.
    """

    keys: UInt8[Tensor, "rows key_bytes"]
    key_scales: Float[Tensor, "blocks 2 head_dim"]  # float16: scale, zero
    values: UInt8[Tensor, "rows value_bytes"]
    value_scales: Float[Tensor, "rows 2 groups"]  # float16: scale, zero
    positions: Int[Tensor, " rows"]
    lengths: tuple[int, ...]
    kv_heads: int

    def __post_init__(self) -> None:
        tensors = (self.keys, self.key_scales, self.values, self.value_scales)
        fits = [t.ndim for t in tensors] == [2, 3, 2, 3] and all(t.is_contiguous() for t in tensors)
        fits = fits and [t.dtype for t in tensors] == [torch.uint8, torch.float16] * 2 and bool(self.lengths)
        if fits:
            rows, dim, groups = sum(self.lengths), self.key_scales.shape[2], self.value_scales.shape[2]
            widths = {dim * bits // 8: bits for bits in GROUP} if dim and dim % 2 == 0 else {}
            fits = self.keys.shape[1] in widths and self.values.shape[1] in widths and min(self.lengths) >= 0
            fits = fits and len(self.lengths) % self.kv_heads == 0
            fits = fits and groups == dim // group_of(dim, widths[self.values.shape[1]])
            fits = fits and {len(self.keys), len(self.values), len(self.positions), len(self.value_scales)} == {rows}
            fits = fits and self.key_scales.shape[1] == self.value_scales.shape[1] == 2
            fits = fits and len(self.key_scales) == self.first_blocks[-1]
        if not fits:
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
            raise ShapeMismatch(
                f"quantised entries do not fit together: keys, key scales, values and value scales {shapes} of "
                f"{len(self.lengths)} segments with {sum(self.lengths)} entries."
            )

    @property
    def head_dim(self) -> int:
        """Numbers of a key."""
        return self.key_scales.shape[2]

    @property
    def bits(self) -> Bits:
        """Of a number of a key and of a value."""
        return Bits(keys=8 * self.keys.shape[1] // self.head_dim, values=8 * self.values.shape[1] // self.head_dim)

    @property
    def block(self) -> int:
        """Entries of a block of keys, at most."""
        return GROUP[8 * self.keys.shape[1] // self.key_scales.shape[2]]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of every segment."""
        return _offsets(self.lengths)[:-1]

    @cached_property
    def first_blocks(self) -> tuple[int, ...]:
        """First block of every segment; at the end, of blocks."""
        return _offsets([-(-length // self.block) for length in self.lengths])

    @cached_property
    def spans(self) -> Int[Tensor, "3 segments"]:
        """First row, number of rows and first block of every segment, int64, where the storage is."""
        spans = [self.starts, self.lengths, self.first_blocks[:-1]]
        return torch.tensor(spans, device=self.keys.device, dtype=torch.int64)

    @cached_property
    def blocks(self) -> Blocks:
        """The table of blocks, made on first use."""
        return blocks_of(self.lengths, self.block, self.keys.device)

    @cached_property
    def chunks(self) -> "ChunkTable":
        """The chunk table, made on first use: its numbers are those of blocks, not of rows."""
        from headwise.kernels.segments import chunk_table, split_into_chunks  # which imports this file

        rows = chunk_table(self.lengths, self.keys.device).size
        blocks = tuple(-(-length // self.block) for length in self.lengths)
        return split_into_chunks(blocks, rows // self.block, self.keys.device)

    def slice(self, segment: int) -> slice:
        """Rows of a segment."""
        return slice(self.starts[segment], self.starts[segment] + self.lengths[segment])

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of keys and values, their scales included."""
        return sum(t.untyped_storage().nbytes() for t in (self.keys, self.key_scales, self.values, self.value_scales))

    @property
    def index_nbytes(self) -> int:
        """Bytes of what describes the storage: positions and, once made, spans and the tables of blocks and chunks."""
        spans, blocks, chunks = (self.__dict__.get(name) for name in ("spans", "blocks", "chunks"))
        tensors = [self.positions] + ([] if spans is None else [spans])
        tensors += [] if blocks is None else [blocks.segment, blocks.start, blocks.count]
        tensors += [] if chunks is None else [chunks.segment, chunks.start, chunks.stop, chunks.first]
        return sum(t.nbytes for t in tensors)

    def numbers(
        self, some: Int[Tensor, " some"]
    ) -> tuple[Float[Tensor, "some block head_dim"], Float[Tensor, "some block head_dim"]]:
        """Keys and values of some blocks, float32. Blocks with fewer rows repeat rows that are not theirs."""
        table, dim = self.blocks, self.head_dim
        rows = table.start[some, None] + torch.arange(self.block, dtype=torch.int64, device=some.device)
        rows = rows.clamp(max=max(len(self.keys) - 1, 0))
        scale, zero = self.key_scales[some].float()[:, :, None].unbind(1)
        keys = torch.addcmul(zero, unpacked(self.keys[rows], dim), scale)
        scale, zero = self.value_scales[rows].float()[..., None].unbind(2)
        values = unpacked(self.values[rows], dim).unflatten(-1, (scale.shape[2], -1))
        return keys, torch.addcmul(zero, values, scale).flatten(-2)

    def pieces(self, first: int, last: int) -> Iterator[Int[Tensor, " some"]]:
        """Which blocks, from the first one to before the last, as many at a time as may become numbers at once."""
        for some in _pieces(last - first, self.head_dim * self.block, self.keys.device):
            yield some + first

    def segment(self, segment: int) -> tuple[Float[Tensor, "rows head_dim"], Float[Tensor, "rows head_dim"]]:
        """Keys and values of one segment, float32."""
        first, last = self.first_blocks[segment : segment + 2]
        some = torch.arange(first, last, dtype=torch.int64, device=self.keys.device)
        keys, values = self.numbers(some)
        count = self.lengths[segment]
        return keys.flatten(0, 1)[:count], values.flatten(0, 1)[:count]


def quantise(
    keys: Rows, values: Rows, positions: Int[Tensor, " rows"], lengths: tuple[int, ...], kv_heads: int, bits: Bits
) -> Quantised:
    """Store entries of segments in fewer bits; they are asked for some rows at a time.

    Raises BadInput for heads of an odd size, NonFiniteValues for numbers that float16 does not reach.
    """
    dim = keys(positions[:0].long()).shape[1]
    if dim % 2:
        raise BadInput(f"heads of {dim} numbers cannot be stored in fewer bits: their size must be even.")
    blocks = blocks_of(lengths, GROUP[bits.keys], positions.device)
    key_codes, key_scales = _of_keys(keys, len(positions), dim, blocks, bits.keys)
    value_codes, value_scales = _of_values(values, positions, dim, bits.values)
    return Quantised(
        keys=key_codes,
        key_scales=key_scales,
        values=value_codes,
        value_scales=value_scales,
        positions=positions,
        lengths=lengths,
        kv_heads=kv_heads,
    )


def join(parts: Sequence[Quantised]) -> Quantised:
    """Contexts of several storages of the same bits in one, in their order; copied."""
    return Quantised(
        keys=torch.cat([part.keys for part in parts]),
        key_scales=torch.cat([part.key_scales for part in parts]),
        values=torch.cat([part.values for part in parts]),
        value_scales=torch.cat([part.value_scales for part in parts]),
        positions=torch.cat([part.positions for part in parts]),
        lengths=tuple(length for part in parts for length in part.lengths),
        kv_heads=parts[0].kv_heads,
    )


def packed(codes: UInt8[Tensor, "*rows head_dim"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Codes of 4 bits in pairs; those of 8 as they are."""
    if bits == 8:
        return codes
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def unpacked(codes: UInt8[Tensor, "*rows bytes"], head_dim: int) -> Float[Tensor, "*rows head_dim"]:
    """The inverse of `packed`, as float32."""
    if codes.shape[-1] == head_dim:
        return codes.float()
    return torch.cat([codes & 15, codes >> 4], -1).float()


def blocks_of(lengths: Sequence[int], block: int, device: torch.device) -> Blocks:
    """Cut segments into blocks; the last one of a segment has what is left."""
    length = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    count = -(-length // block)
    segment = torch.repeat_interleave(torch.arange(len(length), dtype=torch.int64, device="cpu"), count)
    nth = torch.arange(len(segment), dtype=torch.int64, device="cpu") - (count.cumsum(0) - count)[segment]
    start = (length.cumsum(0) - length)[segment] + nth * block
    left = (length[segment] - nth * block).clamp(max=block)
    return Blocks(segment=segment.to(device), start=start.to(device), count=left.to(device))


def _of_keys(keys: Rows, count: int, dim: int, blocks: Blocks, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales, some blocks at a time."""
    block, device = GROUP[bits], blocks.start.device
    stored = torch.empty(count, dim * bits // 8, dtype=torch.uint8, device=device)
    scales = torch.empty(len(blocks.start), 2, dim, dtype=torch.float16, device=device)
    nth = torch.arange(block, dtype=torch.int64, device=device)
    for some in _pieces(len(scales), block * dim, device):
        # rows beyond a block's last repeat it: they change neither the smallest nor the largest
        rows = blocks.start[some, None] + torch.minimum(nth, blocks.count[some, None] - 1)
        codes, scales[some] = _codes(keys(rows).float(), 1, bits, "keys")
        inside = nth < blocks.count[some, None]
        stored[rows[inside]] = packed(codes[inside], bits)
    return stored, scales


def _of_values(values: Rows, positions: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales, some rows at a time."""
    count, groups, device = len(positions), dim // group_of(dim, bits), positions.device
    stored = torch.empty(count, dim * bits // 8, dtype=torch.uint8, device=device)
    scales = torch.empty(count, 2, groups, dtype=torch.float16, device=device)
    for rows in _pieces(count, dim, device):
        codes, scales[rows] = _codes(values(rows).float().unflatten(1, (groups, -1)), 2, bits, "values")
        stored[rows] = packed(codes.flatten(1), bits)
    return stored, scales


def _pieces(count: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """What is counted from 0, as many at a time as have AT_ONCE numbers, `size` each."""
    if count:
        yield from torch.arange(count, dtype=torch.int64, device=device).split(max(1, AT_ONCE // size))


def _codes(x: Tensor, axis: int, bits: int, name: str) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and scale and zero, float16, in axis 1, of groups that lie along an axis."""
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    if not float(torch.maximum(-low, high).max()) <= LARGEST:  # NaN too
        raise NonFiniteValues(
            f"some {name} are beyond {LARGEST:.0f} or not finite, and their scales are float16: use entries={NATIVE!r}."
        )
    # Rounded outwards, so that every number of the group has a code.
    zero = _rounded(low, up=False)
    scale = _rounded((high - zero.float()) / (2**bits - 1), up=True)
    codes = ((x - zero.float()) / scale.float().clamp(min=2.0**-24)).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), torch.stack([scale.squeeze(axis), zero.squeeze(axis)], 1)


def _rounded(x: Tensor, *, up: bool) -> Tensor:
    """To the next float16 that is not below (or not above) it."""
    nearest = x.half()
    wrong = nearest.float() < x if up else nearest.float() > x
    bits = nearest.view(torch.int16)
    outwards = torch.where((nearest < 0) == up, bits - 1, bits + 1)
    outwards = torch.where(nearest == 0, 1 if up else -32767, outwards)  # the smallest numbers beside zero
    return torch.where(wrong, outwards.to(torch.int16).view(torch.float16), nearest)


def _offsets(counts: Sequence[int]) -> tuple[int, ...]:
    """Where each begins; at the end, where the last one ends."""
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return tuple(offsets)
