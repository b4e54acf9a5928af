"""Attention over a paged pool on a GPU, written in Triton: one launch for all prompts and all decoding of a batch.

Queries are folded: a row is one query token and one of the query heads that read a KV head. A tile is some rows of one
request. A program attends for one tile to one KV head, or to a part of its entries where too few programs would run;
then the parts are combined by their log-sum-exp. Nothing waits for the GPU. See `paged` for pool and sequences.

Only imported where Triton is installed. With TRITON_INTERPRET=1 it runs, slowly, on the CPU.
"""

# ruff: noqa: N803 - capitals are constants at compile time

from functools import lru_cache
from itertools import pairwise
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from headwise.errors import BadInput
from headwise.kernels import paged
from headwise.kernels.paged import Sequences
from headwise.kernels.triton_decode import DTYPES, MAX_HEAD_DIM, Tiles, interpreted

PROGRAMS = 512  # at work at the same time, about: where there are fewer, entries are split
MAX_FLOAT32_ROWS = 32  # of a tile; with more, the compiler runs out of registers
MIN_PART = 256  # entries of a sequence that one program reads, at least
MAX_PART_ROWS = 1 << 17  # float32 outputs of all parts, 64 MiB for heads of 128


def attend(
    query: Float[Tensor, "queries query_heads head_dim"],
    pool: Float[Tensor, "pages block width"],
    sequences: Sequences,
    scaling: float,
) -> Float[Tensor, "queries query_heads head_dim"]:
    """Attention of every query over what it sees of its request's sequences; see `paged.attend`.

    The pool may have any strides between pages and between entries. What the kernel is not made for (float64, wider
    heads) goes to `paged`. Raises BadInput for tensors that are not on a GPU.
    """
    if query.device.type != "cuda" and not interpreted():
        raise BadInput(
            f"the Triton kernel needs tensors on a GPU; these are on {query.device}. Move the model to a GPU, or use "
            "paged.attend (or set TRITON_INTERPRET=1 before Python starts, to test it slowly)."
        )
    fits = query.shape[2] <= MAX_HEAD_DIM and query.dtype in DTYPES and query.dtype == pool.dtype
    if not fits or not len(query):
        return paged.attend(query, pool, sequences, scaling)
    paged.require_fit(query, pool, sequences)
    return _launch(query, pool, sequences, scaling)


def _launch(query: Tensor, pool: Tensor, sequences: Sequences, scaling: float) -> Tensor:
    (num_queries, query_heads, dim), heads = query.shape, sequences.tables.shape[1]
    query, tables = _packed(query), _packed(sequences.tables)
    assert pool.stride(2) == 1
    starts, group = sequences.query_starts, query_heads // heads
    most = max(stop - start for start, stop in pairwise(starts))
    shape = _shape(most * group, dim, query.dtype)
    tiles = _tiles(starts, group, shape.queries)
    part, splits = _split(sequences.lengths, tiles, num_queries * query_heads, shape.tokens)
    # The interpreter rounds to bfloat16 by cutting bits off.
    dtype = torch.float32 if splits > 1 or interpreted() else query.dtype
    out = torch.empty(splits, num_queries, query_heads, dim, dtype=dtype, device=query.device)
    lse = torch.empty(splits, num_queries, query_heads, dtype=torch.float32, device=query.device)
    _attend_tiles[(len(tiles), heads, splits)](
        query, pool, tables, _on_device(tiles, sequences.lengths, query.device), out, lse,
        scaling * 1.4426950408889634, part, num_queries, group,
        *query.stride()[:2], *pool.stride()[:2], *tables.stride()[:2],
        D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_M=shape.queries, BLOCK_N=shape.tokens,
        PAGE=pool.shape[1], SPLIT=splits > 1, UPCAST=interpreted(),
        num_warps=shape.num_warps, num_stages=shape.num_stages,  # pyright: ignore[reportCallIssue] - of the launch
    )  # fmt: skip
    return (out[0] if splits == 1 else _combined(out, lse)).to(query.dtype)


def _packed(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@lru_cache(maxsize=8)
def _shape(num_rows: int, dim: int, dtype: torch.dtype) -> Tiles:
    return Tiles.of(min(num_rows, MAX_FLOAT32_ROWS) if dtype == torch.float32 else num_rows, dim, dtype.itemsize)


@lru_cache(maxsize=8)  # all layers of a step have the same, and all steps of decoding
def _tiles(query_starts: tuple[int, ...], group: int, size: int) -> Int32[Tensor, "tiles 4"]:
    """Request, its first query, its number of queries, and the first of its rows that the tile holds."""
    starts = torch.tensor(query_starts, dtype=torch.int64, device="cpu")
    counts = starts.diff()
    num_tiles = -(-counts * group // size)
    request = torch.repeat_interleave(num_tiles)
    nth = torch.arange(len(request), dtype=torch.int64, device="cpu") - (num_tiles.cumsum(0) - num_tiles)[request]
    return torch.stack([request, starts[request], counts[request], nth * size], dim=1).int()


def _split(lengths: Tensor, tiles: Tensor, num_rows: int, block: int) -> tuple[int, int]:
    """How many entries of a sequence a program reads, and into how many parts that splits the longest.

    Work is shared out evenly, so shorter sequences have fewer parts; the outputs of all parts fit in memory.
    """
    longest = int(lengths.max())
    work = int(lengths.index_select(0, tiles[:, 0]).sum())
    max_parts = max(1, MAX_PART_ROWS // num_rows)
    part = max(MIN_PART, work // PROGRAMS, -(-longest // max_parts))
    part = -(-part // block) * block  # triton.cdiv takes longer than a small tensor operation
    return part, -(-longest // part)


def _on_device(tiles: Tensor, lengths: Tensor, device: torch.device) -> Tensor:
    """The tiles and, behind them, the lengths. The GPU is not waited for: what it copies from is pinned."""
    plan = torch.cat([tiles.flatten(), lengths.flatten().int()])
    return plan.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else plan


def _combined(out: Tensor, lse: Tensor) -> Tensor:
    """The mean of the parts' outputs, weighted by exp2 of their log-sum-exp."""
    weight = torch.exp2(lse - lse.amax(0))
    return (out * (weight / weight.sum(0))[..., None]).sum(0)


@triton.jit(do_not_specialize=["part", "num_queries", "group", "table_request", "table_head"])
@no_type_check
def _attend_tiles(
    query, pool, tables, plan, out, lse,
    scale, part, num_queries, group,
    query_token, query_head, pool_page, pool_entry, table_request, table_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one request, over a part of the entries of one head: mean of the values, log-sum-exp in base 2.

    `plan` is what `_on_device` puts there. A row that sees nothing of the part gets zeros, and minus infinity.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    request = tl.load(plan + tile * 4)
    first_query = tl.load(plan + tile * 4 + 1)
    count = tl.load(plan + tile * 4 + 2)
    first_row = tl.load(plan + tile * 4 + 3)
    length = tl.load(plan + tl.num_programs(0) * 4 + request * heads + head)
    row = first_row + tl.arange(0, BLOCK_M)
    token, dim = row // group, tl.arange(0, BLOCK_D)
    query_at_head = head * group + row % group
    query_nth = (first_query + token).to(tl.int64)
    wanted = (token < count)[:, None] & (dim < D)[None, :]
    at = query + query_nth * query_token + query_at_head * query_head
    queries = tl.load(at[:, None] + dim[None, :], mask=wanted, other=0.0)
    if UPCAST:  # the interpreter's products are wrong in bfloat16
        queries = queries.to(tl.float32)
    seen = length - count + 1 + token
    last_token = tl.minimum((first_row + BLOCK_M - 1) // group, count - 1)
    start = split * part
    stop = tl.minimum(start + part, length - count + 1 + last_token)
    pages = tables + request.to(tl.int64) * table_request + head * table_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_N):
        entry = first + tl.arange(0, BLOCK_N)
        inside = entry < stop
        page = tl.load(pages + entry // PAGE, mask=inside, other=0).to(tl.int64)
        entry_at = pool + page * pool_page + entry % PAGE * pool_entry
        there = inside[:, None] & (dim < D)[None, :]
        key = tl.load(entry_at[:, None] + dim[None, :], mask=there, other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
        logits = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        visible = inside[None, :] & (entry[None, :] < seen[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no inf - inf
        weight = tl.exp2(logits - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weight, 1)
        value = tl.load(entry_at[:, None] + D + dim[None, :], mask=there, other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        mean = mean * decay[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = new_top
    divisor = tl.where(total > 0, total, 1.0)
    mean = mean / divisor[:, None]
    place = (split.to(tl.int64) * num_queries + query_nth) * (heads * group) + query_at_head
    tl.store(out + place[:, None] * D + dim[None, :], mean.to(out.dtype.element_ty), mask=wanted)
    if SPLIT:
        tl.store(lse + place, tl.where(total > 0, top + tl.log2(divisor), float("-inf")), mask=token < count)
