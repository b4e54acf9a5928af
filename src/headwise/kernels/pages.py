"""The default kernel: pure PyTorch, on any device.

With few queries per head (decoding) the storage is read as pages: ONE batched attention over all pages of all heads, in
place, and a merge by log-sum-exp. With many (a question, or many questions on one context) heads are done one by one
over their own slice, which needs no merge. The tail is one more part.
"""

import torch
from torch import Tensor

from headwise.kernels.partial import MASKED, Part, attend_part, merge_by_owner, merge_pair
from headwise.layout import Segments

MAX_PAGED_QUERIES = 32


def attend(
    query: Tensor,
    segments: Segments,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention over frozen segments and tail; see `reference.attend` for the shapes."""
    batch, heads, group, num_queries, dim = query.shape
    tail = attend_part(
        query.flatten(0, 1).flatten(1, 2),
        tail_keys.flatten(0, 1),
        tail_values.flatten(0, 1),
        _tail_mask(mask, heads, group),
        scaling,
    )
    folded, slot = _fold(query, rows, segments.batch)
    paged = folded.shape[1] <= MAX_PAGED_QUERIES
    out, lse = (_attend_pages if paged else _attend_slices)(folded, segments, scaling)
    frozen = _unfold(out, rows, slot, heads, group * num_queries), _unfold(lse, rows, slot, heads, group * num_queries)
    merged = merge_pair(frozen, tail)
    return merged.to(query.dtype).view(batch, heads, group, num_queries, dim)


def _tail_mask(mask: Tensor | None, heads: int, group: int) -> Tensor | None:
    """[B, T, n] -> [B * H, G * T, n]."""
    if mask is None:
        return None
    batch, num_queries, tail = mask.shape
    return mask[:, None, None].expand(batch, heads, group, num_queries, tail).reshape(batch * heads, -1, tail)


def _fold(query: Tensor, rows: Tensor, contexts: int) -> tuple[Tensor, Tensor]:
    """Put all queries that read the same segment side by side: [S, slots * G * T, D], and the slot of every row."""
    batch, heads, group, num_queries, dim = query.shape
    same = rows[:, None] == rows[None, :]
    slot = same.tril(-1).sum(-1)  # how many earlier rows share the context
    slots = int(slot.max()) + 1
    if batch == contexts * slots and bool((rows == torch.arange(batch, device=rows.device) // slots).all()):
        folded = query.reshape(contexts, slots, heads, group * num_queries, dim)
    else:
        folded = query.new_zeros(contexts, slots, heads, group * num_queries, dim)
        folded[rows, slot] = query.flatten(2, 3)
    return folded.transpose(1, 2).reshape(contexts * heads, slots * group * num_queries, dim), slot


def _unfold(folded: Tensor, rows: Tensor, slot: Tensor, heads: int, per_row: int) -> Tensor:
    """Inverse of `_fold`: [S, slots * G * T, ...] -> [B * H, G * T, ...]."""
    rest = folded.shape[2:]
    by_slot = folded.view(folded.shape[0] // heads, heads, -1, per_row, *rest)
    return by_slot[rows, :, slot].flatten(0, 1)


def _attend_slices(query: Tensor, segments: Segments, scaling: float) -> Part:
    outs, sums = [], []
    for segment, length in enumerate(segments.lengths):
        part = segments.slice(segment)
        if length == 0:
            outs.append(torch.zeros_like(query[segment]))
            sums.append(query.new_full(query.shape[1:2], MASKED, dtype=torch.promote_types(query.dtype, torch.float32)))
            continue
        out, lse = attend_part(
            query[segment, None], segments.keys[None, part], segments.values[None, part], None, scaling
        )
        outs.append(out[0])
        sums.append(lse[0])
    return torch.stack(outs), torch.stack(sums)


def _attend_pages(query: Tensor, segments: Segments, scaling: float) -> Part:
    table = segments.pages
    whole = len(table.owner) * table.size
    parts, owners = [], []
    if whole:
        keys = segments.keys[:whole].view(-1, table.size, query.shape[-1])
        values = segments.values[:whole].view_as(keys)
        parts.append(attend_part(query[table.owner], keys, values, table.mask[:, None], scaling))
        owners.append(table.owner)
    if len(table.extra_owner):
        keys, values = segments.keys[table.extra_index], segments.values[table.extra_index]
        parts.append(attend_part(query[table.extra_owner], keys, values, table.extra_mask[:, None], scaling))
        owners.append(table.extra_owner)
    merged = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return merge_by_owner(merged, torch.cat(owners), query.shape[0])
