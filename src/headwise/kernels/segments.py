"""Frozen storage of one layer: the kept entries of every head, head after head, in two flat tensors.

Nothing is padded: a head with 3 entries takes 3 rows. Attention reads the storage in pages of equal size; `PageTable`
says which head owns which rows of which page. A GPU reads it in chunks, none of which crosses a head (`ChunkTable`).
Further entries may be stored in fewer bits beside them (quantised.py).
Storage is never changed once made, so any number of caches can share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from headwise.errors import ShapeMismatch
from headwise.kernels import quantised as small
from headwise.kernels.quantised import ENTRIES, Bits, Quantised

MIN_PAGE, MAX_PAGE = 16, 256
MIN_CHUNK, MAX_CHUNK = 128, 2048
CHUNKS_PER_PROCESSOR = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PageTable:
    """How a flat storage is read in pages of `size` rows.

    Every full page is read in place, for the head that owns most of it (`owner`). What other heads have in a page, and
    the last, incomplete page, are `extra` pieces of at most `size` rows, gathered when read.
    """

    size: int
    owner: Int[Tensor, " pages"]
    bias: Float[Tensor, "pages size"]  # for the logits: 0 at rows of a page that belong to its owner, else very low
    extra_owner: Int[Tensor, " extras"]
    extra_index: Int[Tensor, "extras size"]  # rows of the storage
    extra_bias: Float[Tensor, "extras size"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTable:
    """How segments are split into chunks of nearly equal length, at most `size` rows, in storage order."""

    size: int
    segment: Int[Tensor, " chunks"]
    start: Int[Tensor, " chunks"]  # first row in the storage, int64
    stop: Int[Tensor, " chunks"]
    first: Int[Tensor, " offsets"]  # number of the first chunk of every segment; at the end, of chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class Readers:
    """Which rows of a batch read which context: row b is number `slot[b]` of those that read its context."""

    slots: int
    row: Int[Tensor, "contexts slots"]  # -1 where a context has fewer readers
    slot: Int[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Kept keys and values of one layer. Segment s = row * kv_heads + head holds rows `starts[s]` to its end.

    Entries of a segment are in position order; `positions` are the rotary positions they had in the context.
    `quantised` are further entries of the same segments, in fewer bits, one storage for each kind of bits. Raises
    ShapeMismatch where the parts do not fit together: kernels take that for granted.
    """

    keys: Float[Tensor, "rows head_dim"]
    values: Float[Tensor, "rows head_dim"]
    positions: Int[Tensor, " rows"]
    lengths: tuple[int, ...]  # without the quantised entries
    kv_heads: int
    quantised: tuple[Quantised, ...] = ()

    def __post_init__(self) -> None:
        lengths, keys = self.lengths, self.keys
        fits = keys.ndim == 2 and keys.shape == self.values.shape and self.positions.shape == keys.shape[:1]
        fits = fits and keys.dtype == self.values.dtype and keys.is_contiguous() and self.values.is_contiguous()
        if not (fits and self.kv_heads >= 1 and lengths):
            raise ShapeMismatch(
                f"keys {tuple(keys.shape)}, values {tuple(self.values.shape)} and positions "
                f"{tuple(self.positions.shape)} of {len(lengths)} segments must be contiguous rows of equally "
                "many numbers, of one dtype, and one position each."
            )
        if len(lengths) % self.kv_heads or min(lengths) < 0 or sum(lengths) != len(keys):
            raise ShapeMismatch(
                f"{len(lengths)} segments of {self.kv_heads} KV heads with {sum(lengths)} entries do not fit "
                f"{len(keys)} keys: there must be a segment for every head of every context, and a key for every entry."
            )
        for part in self.quantised:
            if (len(part.lengths), part.kv_heads, part.head_dim) != (len(lengths), self.kv_heads, keys.shape[1]):
                raise ShapeMismatch(
                    f"{len(part.lengths)} segments of quantised entries of {part.head_dim} numbers do not fit "
                    f"{len(lengths)} segments of {keys.shape[1]}."
                )

    @property
    def kept(self) -> tuple[int, ...]:
        """Entries of every segment, the quantised ones included."""
        return tuple(map(sum, zip(self.lengths, *(part.lengths for part in self.quantised), strict=True)))

    def positions_of(self, segment: int) -> Int[Tensor, " kept"]:
        """Positions of all entries of a segment, ascending."""
        parts = [part.positions[part.slice(segment)] for part in (self, *self.quantised)]
        return torch.cat(parts).sort().values if self.quantised else parts[0]

    @property
    def batch(self) -> int:
        """Contexts stored here."""
        return len(self.lengths) // self.kv_heads

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of every segment."""
        starts, total = [], 0
        for length in self.lengths:
            starts.append(total)
            total += length
        return tuple(starts)

    @cached_property
    def spans(self) -> Int[Tensor, "2 segments"]:
        """First row and number of rows of every segment, int64, where the storage is."""
        return torch.tensor([self.starts, self.lengths], device=self.keys.device, dtype=torch.int64)

    @cached_property
    def pages(self) -> PageTable:
        """The page table, made on first use."""
        return page_table(self.lengths, self.keys.device, self.keys.dtype)

    @cached_property
    def chunks(self) -> ChunkTable:
        """The chunk table, made on first use."""
        return chunk_table(self.lengths, self.keys.device)

    @cached_property
    def _readers(self) -> WeakTensorKeyDictionary:
        return WeakTensorKeyDictionary()

    def readers_of(self, rows: Int[Tensor, " batch"]) -> Readers:
        """Who reads what when row b of a batch continues context `rows[b]`; remembered for as long as `rows` lives.

        To ask a GPU for the rows means to wait for it, which a decode step should not.
        """
        found = self._readers.get(rows)
        if found is None:
            found = self._readers[rows] = readers(rows, self.batch)
        return found

    def slice(self, segment: int) -> slice:
        """Rows of a segment."""
        return slice(self.starts[segment], self.starts[segment] + self.lengths[segment])

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of keys and values, scales included."""
        native = self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()
        return native + sum(part.nbytes for part in self.quantised)

    @property
    def index_nbytes(self) -> int:
        """Bytes of what describes the storage: positions and, once made, spans and the tables of pages and chunks."""
        table, chunks, spans = (self.__dict__.get(name) for name in ("pages", "chunks", "spans"))
        tensors = [self.positions]
        if spans is not None:
            tensors.append(spans)
        if table is not None:
            tensors += [table.owner, table.bias, table.extra_owner, table.extra_index, table.extra_bias]
        if chunks is not None:
            tensors += [chunks.segment, chunks.start, chunks.stop, chunks.first]
        return sum(t.nbytes for t in tensors) + sum(part.index_nbytes for part in self.quantised)


def gather(
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens head_dim"],
    kept: Bool[Tensor, "batch kv_heads tokens"],
    positions: Int[Tensor, "batch tokens"],
    quantised: Sequence[tuple[Bits, Bool[Tensor, "batch kv_heads tokens"]]] = (),
) -> Segments:
    """Copy the kept entries of every head into flat storage of their own, some of them in fewer bits.

    No copy of those is made in between. `quantised` names every kind of bits and its entries, which no other kind has.
    Raises BadInput, NonFiniteValues.
    """
    parts: list[Quantised] = []
    for bits, entries in quantised:
        parts.append(_gather_quantised(keys, values, kept & entries, positions, bits))
        kept = kept & ~entries
    row, head, token = kept.nonzero(as_tuple=True)
    return Segments(
        keys=keys[row, head, token],
        values=values[row, head, token],
        positions=positions[row, token].to(torch.int32),
        lengths=tuple(kept.sum(-1).flatten().tolist()),
        kv_heads=kept.shape[1],
        quantised=tuple(parts),
    )


def _gather_quantised(keys: Tensor, values: Tensor, kept: Tensor, positions: Tensor, bits: Bits) -> Quantised:
    row, head, token = kept.nonzero(as_tuple=True)
    return small.quantise(
        lambda rows: keys[row[rows], head[rows], token[rows]],
        lambda rows: values[row[rows], head[rows], token[rows]],
        positions[row, token].to(torch.int32),
        tuple(kept.sum(-1).flatten().tolist()),
        kept.shape[1],
        bits,
    )


def quantise(segments: Segments, chosen: Bool[Tensor, " rows"], bits: Bits) -> Segments:
    """The same entries, the chosen ones in fewer bits; copied. Raises BadInput, NonFiniteValues."""
    lengths = torch.tensor(segments.lengths, dtype=torch.int64, device=chosen.device)
    counts = torch.segment_reduce(chosen.double(), "sum", lengths=lengths)
    taken, (index,) = tuple(int(count) for count in counts.tolist()), chosen.nonzero(as_tuple=True)
    part = small.quantise(
        lambda rows: segments.keys[index[rows]],
        lambda rows: segments.values[index[rows]],
        segments.positions[chosen],
        taken,
        segments.kv_heads,
        bits,
    )
    return Segments(
        keys=segments.keys[~chosen],
        values=segments.values[~chosen],
        positions=segments.positions[~chosen],
        lengths=tuple(whole - count for whole, count in zip(segments.lengths, taken, strict=True)),
        kv_heads=segments.kv_heads,
        quantised=(*segments.quantised, part),
    )


def join(parts: Sequence[Segments]) -> Segments:
    """Contexts of several storages in one, in their order; copied. Each may have entries in other bits."""
    storages = [{part.bits: part for part in segments.quantised} for segments in parts]
    kinds = [bits for bits in ENTRIES.values() if any(bits in own for own in storages)]
    return Segments(
        keys=torch.cat([part.keys for part in parts]),
        values=torch.cat([part.values for part in parts]),
        positions=torch.cat([part.positions for part in parts]),
        lengths=tuple(length for part in parts for length in part.lengths),
        kv_heads=parts[0].kv_heads,
        quantised=tuple(
            small.join([own.get(bits) or _none(bits, part) for own, part in zip(storages, parts, strict=True)])
            for bits in kinds
        ),
    )


def _none(bits: Bits, segments: Segments) -> Quantised:
    """No entry of a kind in any of the segments."""
    nothing, lengths = segments.keys[:0], (0,) * len(segments.lengths)
    states = lambda rows: nothing[rows]  # noqa: E731
    return small.quantise(states, states, segments.positions[:0], lengths, segments.kv_heads, bits)


def masked_value(dtype: torch.dtype) -> float:
    """What a logit is lowered by where nothing is seen: finite, so that a query which sees nothing gets no NaN."""
    return max(-1e30, torch.finfo(dtype).min / 2)


def bias_of(mask: Bool[Tensor, "*axes"], dtype: torch.dtype) -> Float[Tensor, "*axes"]:
    """What to add to the logits so that nothing is seen where `mask` is False."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, masked_value(dtype))


def page_table(lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> PageTable:
    """Cut a flat storage of segments into pages. The page size follows the mean segment length, 16 to 256 rows."""
    total = sum(lengths)
    mean = max(1, total // len(lengths))
    size = min(MAX_PAGE, max(MIN_PAGE, 1 << (mean.bit_length() - 1)))
    segment, page, first, stop = _pieces(torch.tensor(lengths, dtype=torch.int64, device="cpu"), size)
    num_pages = total // size
    main = _largest_of_page(page, stop - first, num_pages)
    row = torch.arange(size, dtype=torch.int64, device="cpu")
    offset = page * size
    inside = (row >= (first - offset)[:, None]) & (row < (stop - offset)[:, None])  # [pieces, size]
    index = (first[:, None] + row).clamp(max=max(total - 1, 0))
    return PageTable(
        size=size,
        owner=segment[main].to(device),
        bias=bias_of(inside[main], dtype).to(device),
        extra_owner=segment[~main].to(device),
        extra_index=index[~main].to(device),
        extra_bias=bias_of((row < (stop - first)[:, None])[~main], dtype).to(device),
    )


def chunk_table(lengths: tuple[int, ...], device: torch.device) -> ChunkTable:
    """Split segments into enough chunks for every processor of the device, as long as chunks have 128 to 2048 rows."""
    wanted = max(1, sum(lengths) // (CHUNKS_PER_PROCESSOR * _num_processors(device)))
    size = min(MAX_CHUNK, max(MIN_CHUNK, 1 << (wanted.bit_length() - 1)))
    return split_into_chunks(lengths, size, device)


def split_into_chunks(lengths: tuple[int, ...], size: int, device: torch.device) -> ChunkTable:
    """Split segments into as few chunks of at most `size` rows as there can be."""
    length = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    count = (length + size - 1) // size
    segment = torch.repeat_interleave(torch.arange(len(length), dtype=torch.int64, device="cpu"), count)
    nth = torch.arange(len(segment), dtype=torch.int64, device="cpu") - (count.cumsum(0) - count)[segment]
    begin = (length.cumsum(0) - length)[segment]
    first = functional.pad(count.cumsum(0), (1, 0))
    return ChunkTable(
        size=size,
        segment=segment.to(device, torch.int32),
        start=(begin + length[segment] * nth // count[segment]).to(device),
        stop=(begin + length[segment] * (nth + 1) // count[segment]).to(device),
        first=first.to(device, torch.int32),
    )


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def readers(rows: Int[Tensor, " batch"], contexts: int) -> Readers:
    """Number the rows that read each context."""
    slot, members = [], [[] for _ in range(contexts)]
    for row, context in enumerate(listed_rows(rows, contexts)):
        slot.append(len(members[context]))
        members[context].append(row)
    slots = max(len(listed) for listed in members)
    padded = [listed + [-1] * (slots - len(listed)) for listed in members]
    return Readers(
        slots=slots,
        row=torch.tensor(padded, dtype=torch.int32, device=rows.device),
        slot=torch.tensor(slot, dtype=torch.int32, device=rows.device),
    )


def listed_rows(rows: Int[Tensor, " batch"], contexts: int) -> list[int]:
    """The context of every row. Raises ShapeMismatch where there is none: what lies there instead would be read."""
    listed = rows.tolist()
    if listed and not 0 <= min(listed) <= max(listed) < contexts:
        raise ShapeMismatch(f"rows from {min(listed)} to {max(listed)} were asked for; there are {contexts} contexts.")
    return listed


def _pieces(lengths: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut segments at page borders: segment, page, first row and end row of every piece, in storage order."""
    end = lengths.cumsum(0)
    start = end - lengths
    count = torch.where(lengths > 0, (end - 1) // size - start // size + 1, 0)
    segment = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int64, device="cpu"), count)
    nth = torch.arange(len(segment), dtype=torch.int64, device="cpu") - torch.repeat_interleave(
        count.cumsum(0) - count, count
    )
    page = start[segment] // size + nth
    return segment, page, torch.maximum(start[segment], page * size), torch.minimum(end[segment], (page + 1) * size)


def _largest_of_page(page: Tensor, rows: Tensor, num_pages: int) -> Tensor:
    """Marks, for each full page, its largest piece (the first of equals)."""
    main = torch.zeros(len(page), dtype=torch.bool, device="cpu")
    order = torch.argsort(-rows, stable=True)
    order = order[torch.argsort(page[order], stable=True)]  # by page, then largest first
    leading = torch.ones(len(page), dtype=torch.bool, device="cpu")
    leading[1:] = page[order][1:] != page[order][:-1]
    main[order[leading & (page[order] < num_pages)]] = True
    return main
