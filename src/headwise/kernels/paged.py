"""Attention over a paged pool, for serving: pure PyTorch.

A pool is `[pages, block, 2 D]`: a page holds the keys (first D) and values (last D) of `block` entries of ONE head of
one request. A sequence, a request's KV head, is a list of pages, in any order of the pool; its entries are in the order
of the list, and heads of a request may have different numbers of them. `triton_paged` has the same signature, for GPUs.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from headwise.errors import ShapeMismatch
from headwise.kernels.partial import OwnedPart, attend_part, merge
from headwise.kernels.segments import bias_of

PART = 128  # entries of a sequence that one part of a decoding attention reads, at least
MAX_PARTS = 4096  # at a time: what they read is copied
MAX_QUERIES = 512  # of a prompt at a time: their mask would be quadratic in memory


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sequences:
    """What the queries of a batch see. Queries of request r are rows `query_starts[r] : query_starts[r + 1]`.

    The last query of a request sees the first `lengths[r, h]` entries of the sequence of head h, the one before it one
    less, and so on. No query may see nothing.
    """

    tables: Int[Tensor, "requests kv_heads blocks"]  # pages; what comes after those that are needed is not looked at
    lengths: Int[Tensor, "requests kv_heads"]  # on the CPU
    query_starts: tuple[int, ...]


def attend(
    query: Float[Tensor, "queries query_heads head_dim"],
    pool: Float[Tensor, "pages block width"],
    sequences: Sequences,
    scaling: float,
) -> Float[Tensor, "queries query_heads head_dim"]:
    """Attention of every query over what it sees of its request's sequences.

    All requests with one query are one batched attention over parts of all their sequences; prompts come one by one.
    """
    require_fit(query, pool, sequences)
    out = torch.empty_like(query)
    starts = sequences.query_starts
    counts = [stop - start for start, stop in pairwise(starts)]
    single = [r for r, count in enumerate(counts) if count == 1]
    if single:
        rows = torch.tensor([starts[r] for r in single], device=query.device, dtype=torch.int64)
        out[rows] = _decode(query[rows], pool, sequences.tables[single], sequences.lengths[single], scaling)
    for request, count in enumerate(counts):
        if count > 1:
            rows = slice(starts[request], starts[request + 1])
            out[rows] = _prefill(
                query[rows], pool, sequences.tables[request], sequences.lengths[request].tolist(), scaling
            )
    return out


def require_fit(query: Tensor, pool: Tensor, sequences: Sequences) -> None:
    """Raise ShapeMismatch where sequences name queries or table entries that are not there.

    Page numbers are not looked at: they may be on a GPU, for which nobody waits. On a CPU a wrong one is an IndexError.
    """
    tables, lengths, starts = sequences.tables, sequences.lengths, sequences.query_starts
    if query.ndim == pool.ndim == tables.ndim == 3:
        room = tables.shape[2] * pool.shape[1]
        if (
            pool.shape[2] == 2 * query.shape[2]
            and tables.shape[:2] == lengths.shape
            and tables.shape[1]
            and query.shape[1] % tables.shape[1] == 0
            and len(starts) == len(tables) + 1
            and starts[0] >= 0
            and all(start <= stop for start, stop in pairwise(starts))
            and starts[-1] <= len(query)
            and (not lengths.numel() or 0 <= int(lengths.min()) <= int(lengths.max()) <= room)
        ):
            return
    raise ShapeMismatch(
        f"{len(starts) - 1} requests, with lengths {tuple(lengths.shape)} and tables {tuple(tables.shape)}, do not fit "
        f"queries {tuple(query.shape)} and a pool {tuple(pool.shape)}: every request needs its queries, and a table as "
        "long as its sequences."
    )


def _decode(query: Tensor, pool: Tensor, tables: Tensor, lengths: Tensor, scaling: float) -> Tensor:
    """One query per request: [R, Hq, D]."""
    heads, block, dim = tables.shape[1], pool.shape[1], query.shape[-1]
    folded = query.view(len(query) * heads, -1, dim)  # [S, G, D]
    pages = -(-PART // block)  # of a part
    length = lengths.flatten()
    count = -(-length // (pages * block))  # parts of a sequence
    owner = torch.repeat_interleave(torch.arange(len(length), dtype=torch.int64, device="cpu"), count)
    first = (
        torch.arange(len(owner), dtype=torch.int64, device="cpu") - (count.cumsum(0) - count)[owner]
    ) * pages  # page of the sequence
    left = (length[owner] - first * block).clamp(max=pages * block)  # entries of a part
    parts: list[OwnedPart] = []
    for some in torch.arange(len(owner), dtype=torch.int64, device="cpu").split(MAX_PARTS):
        parts.append(_parts(folded, pool, tables.flatten(0, 1), owner[some], first[some], left[some], pages, scaling))
    return merge(parts, len(folded)).to(query.dtype).view_as(query)


def _parts(
    query: Tensor, pool: Tensor, tables: Tensor, owner: Tensor, first: Tensor, left: Tensor, pages: int, scaling: float
) -> OwnedPart:
    block, dim = pool.shape[1], query.shape[-1]
    nth = torch.arange(pages, dtype=torch.int64, device="cpu")
    wanted = torch.minimum(nth, (left[:, None] - 1) // block)  # no page beyond a sequence's last is looked up
    owner, index = owner.to(query.device), (first[:, None] + wanted).to(query.device)
    rows = pool.index_select(0, tables[owner[:, None], index].flatten()).flatten(0, 1)  # a copy
    seen = torch.arange(pages * block, dtype=torch.int64, device="cpu") < left[:, None]
    rows.index_fill_(0, (~seen).flatten().nonzero()[:, 0].to(query.device), 0)  # a page may hold anything beyond
    entries = rows.view(len(owner), 1, pages * block, -1)
    bias = bias_of(seen, query.dtype).to(query.device)[:, None, None]
    out, lse = attend_part(query[owner, None], entries[..., :dim], entries[..., dim:], bias, scaling)
    return out[:, 0], lse[:, 0], owner


def _prefill(query: Tensor, pool: Tensor, table: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """Many queries of one request: [T, Hq, D]. Heads that see equally many entries are done together."""
    heads = len(lengths)
    grouped = query.view(len(query), heads, -1, query.shape[-1]).permute(1, 2, 0, 3)  # [H, G, T, D]
    out = torch.empty_like(grouped)
    for length in sorted(set(lengths)):
        alike = torch.tensor([h for h in range(heads) if lengths[h] == length], device=query.device, dtype=torch.int64)
        entries = read(pool, table[alike], length)
        out[alike] = _causal(grouped[alike], entries, scaling)
    return out.permute(2, 0, 1, 3).reshape(query.shape)


def _causal(query: Tensor, entries: Tensor, scaling: float) -> Tensor:
    """[H, G, T, D] over entries [H, n, 2 D]; the last query sees all of them."""
    num_queries, dim, length = query.shape[2], query.shape[3], entries.shape[1]
    hidden = length - num_queries  # entries that every query sees
    keys, values = entries[:, None, :, :dim], entries[:, None, :, dim:]
    outs = []
    for some in torch.arange(num_queries, device=query.device, dtype=torch.int64).split(MAX_QUERIES):
        stop = hidden + int(some[-1]) + 1
        visible = torch.arange(stop, device=query.device, dtype=torch.int64) <= hidden + some[:, None]
        outs.append(
            functional.scaled_dot_product_attention(
                query[:, :, some],
                keys[:, :, :stop],
                values[:, :, :stop],
                attn_mask=visible,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outs, dim=2)


def read(
    pool: Float[Tensor, "pages block width"], tables: Int[Tensor, "kv_heads blocks"], length: int
) -> Float[Tensor, "kv_heads length width"]:
    """The first `length` entries of every head of a request (a copy)."""
    needed = -(-length // pool.shape[1])
    pages = pool.index_select(0, tables[:, :needed].flatten())
    return pages.view(len(tables), -1, pool.shape[2])[:, :length]
