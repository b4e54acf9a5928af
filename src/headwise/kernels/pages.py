"""The default kernel: pure PyTorch, on any device.

With few queries per head (decoding) the storage is read as pages: ONE batched attention over all pages of all heads, in
place. With many (a question, or many questions on one context) heads are done one by one over their own slice. The tail
is one more part, and one merge by log-sum-exp puts the parts together. Quantised entries become numbers again a few
blocks at a time: with few queries every block is a part, with many the blocks of a head are.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headwise.kernels.arguments import require_fit
from headwise.kernels.partial import OwnedPart, attend_part, merge
from headwise.kernels.quantised import Quantised
from headwise.kernels.segments import Segments, bias_of, listed_rows

MAX_PAGED_QUERIES = 32  # per segment
MAX_QUERIES = 512  # at a time, per row


def attend(
    query: Tensor,
    segments: Segments,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over frozen segments and tail; see `Kernel`."""
    require_fit(query, segments, rows, tail_keys, tail_values, mask)
    if query.shape[3] > MAX_QUERIES:
        own = partial(attend, softcap=softcap, sinks=sinks)
        return _attend_in_blocks(own, query, segments, rows, tail_keys, tail_values, mask, scaling)
    queries = query.flatten(2, 3)  # [B, H, G * T, D]
    folding = Folding.of(rows, segments.batch)
    folded = folding.fold(queries)  # [S, slots * G * T, D]
    few = folded.shape[1] <= MAX_PAGED_QUERIES
    parts = (_attend_pages if few else _attend_slices)(folded, segments, scaling, softcap)
    for quantised in segments.quantised:
        parts += (_attend_blocks if few else _attend_runs)(folded, quantised, scaling, softcap)
    out, lse = attend_part(queries, tail_keys, tail_values, _tail_bias(mask, query), scaling, softcap)
    everyone = torch.arange(len(folded), device=query.device, dtype=torch.int64)
    parts.append((folding.fold(out), folding.fold(lse), everyone))
    if sinks is not None:  # one more key, whose value is nothing
        by_query = sinks.to(lse.dtype).view(1, query.shape[1], -1, 1).expand(len(query), -1, -1, query.shape[3])
        parts.append((torch.zeros_like(parts[-1][0]), folding.fold(by_query.flatten(2)), everyone))
    merged = folding.unfold(merge(parts, len(folded)), queries.shape[1])
    return merged.to(query.dtype).view_as(query)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folding:
    """All queries that read the same segment, side by side. Row b of the batch is in `slot[b]` of context `rows[b]`."""

    rows: Tensor
    slot: list[int]
    contexts: int
    num_slots: int
    in_order: bool  # every context has as many rows, one after the other: no copy is needed

    @classmethod
    def of(cls, rows: Tensor, contexts: int) -> "Folding":
        """Give every row the next free slot of its context."""
        taken: Counter[int] = Counter()
        slot, listed = [], listed_rows(rows, contexts)
        for context in listed:
            slot.append(taken[context])
            taken[context] += 1
        num_slots = max(slot) + 1
        in_order = listed == [i // num_slots for i in range(contexts * num_slots)]
        return cls(rows=rows, slot=slot, contexts=contexts, num_slots=num_slots, in_order=in_order)

    def fold(self, states: Tensor) -> Tensor:
        """[B, H, Q, ...] -> [S, slots * Q, ...]; zeros in slots that no row has taken."""
        shape = (self.contexts, self.num_slots, *states.shape[1:])
        if self.in_order:
            folded = states.reshape(shape)
        else:
            folded = states.new_zeros(shape)
            folded[self.rows, self.slot] = states
        return folded.transpose(1, 2).reshape(-1, self.num_slots * states.shape[2], *states.shape[3:])

    def unfold(self, folded: Tensor, heads: int) -> Tensor:
        """Inverse of `fold`."""
        by_slot = folded.view(self.contexts, heads, self.num_slots, -1, *folded.shape[2:]).transpose(1, 2)
        return by_slot.flatten(0, 1) if self.in_order else by_slot[self.rows, self.slot]


def _attend_in_blocks(
    own: Callable[..., Tensor],
    query: Tensor,
    segments: Segments,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """A long question or turn, some queries at a time: its mask would be quadratic in memory."""
    blocks = torch.arange(query.shape[3], device=query.device, dtype=torch.int64).split(MAX_QUERIES)
    masks = [None if mask is None else mask[:, block] for block in blocks]
    return torch.cat(
        [
            own(query[:, :, :, block], segments, rows, tail_keys, tail_values, part, scaling)
            for block, part in zip(blocks, masks, strict=True)
        ],
        dim=3,
    )


def _tail_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """[B, T, n] -> [B, 1, G * T, n], the same for all heads."""
    if mask is None:
        return None
    return bias_of(mask, query.dtype)[:, None].repeat(1, 1, query.shape[2], 1)


def _attend_slices(query: Tensor, segments: Segments, scaling: float, softcap: float | None) -> list[OwnedPart]:
    parts = []
    for segment, length in enumerate(segments.lengths):
        if length > 0:
            part = segments.slice(segment)
            keys, values = segments.keys[None, None, part], segments.values[None, None, part]
            out, lse = attend_part(query[None, segment, None], keys, values, None, scaling, softcap)
            parts.append((out[0], lse[0], torch.tensor([segment], device=query.device, dtype=torch.int64)))
    return parts


def _attend_pages(query: Tensor, segments: Segments, scaling: float, softcap: float | None) -> list[OwnedPart]:
    table = segments.pages
    whole = len(table.owner) * table.size
    parts = []
    if whole:
        keys = segments.keys[:whole].view(-1, 1, table.size, query.shape[-1])
        values = segments.values[:whole].view_as(keys)
        parts.append(_owned(query, keys, values, table.bias, table.owner, scaling, softcap))
    if len(table.extra_owner):
        keys, values = segments.keys[table.extra_index][:, None], segments.values[table.extra_index][:, None]
        parts.append(_owned(query, keys, values, table.extra_bias, table.extra_owner, scaling, softcap))
    return parts


def _attend_blocks(query: Tensor, quantised: Quantised, scaling: float, softcap: float | None) -> Iterator[OwnedPart]:
    precise, table = torch.promote_types(query.dtype, torch.float32), quantised.blocks
    row = torch.arange(quantised.block, device=query.device, dtype=torch.int64)
    for some in quantised.pieces(0, len(table.segment)):
        keys, values = (states[:, None].to(precise) for states in quantised.numbers(some))
        bias = bias_of(row < table.count[some, None], precise)
        yield _owned(query.to(precise), keys, values, bias, table.segment[some], scaling, softcap)


def _attend_runs(query: Tensor, quantised: Quantised, scaling: float, softcap: float | None) -> Iterator[OwnedPart]:
    precise = torch.promote_types(query.dtype, torch.float32)
    for segment, length in enumerate(quantised.lengths):
        done = 0
        for some in quantised.pieces(*quantised.first_blocks[segment : segment + 2]):
            keys, values = (states.flatten(0, 1)[: length - done].to(precise) for states in quantised.numbers(some))
            done += len(keys)
            own = query[None, segment, None].to(precise)
            out, lse = attend_part(own, keys[None, None], values[None, None], None, scaling, softcap)
            yield out[0], lse[0], torch.tensor([segment], device=query.device, dtype=torch.int64)


def _owned(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    owner: Tensor,
    scaling: float,
    softcap: float | None,
) -> OwnedPart:
    out, lse = attend_part(query[owner, None], keys, values, bias[:, None, None], scaling, softcap)
    return out[:, 0], lse[:, 0], owner
