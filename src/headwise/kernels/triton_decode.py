"""The kernel for decoding on a GPU: split-KV attention, written in Triton.

A segment is split into chunks (`segments.ChunkTable`), the tail of every row and head into chunks of its own. One
launch attends to all chunks, each for all queries that read it; a last one combines the chunks of every query by their
log-sum-exp. Nothing waits for the GPU once the tables exist, and a fixed set of tensors can be captured in a CUDA
graph: give a tail of full capacity, and a mask of what is in it.

Every storage of quantised entries has a launch of its own in between. Codes become numbers in registers, float16 for
queries of 16 bits: a code is exact in float16, as its scale is, and bfloat16 would be less precise.

Only imported where Triton is installed. With TRITON_INTERPRET=1 it runs, slowly, on the CPU.
"""

# ruff: noqa: N803 - capitals are constants at compile time

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from types import MappingProxyType
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from headwise.errors import BadInput
from headwise.kernels import pages
from headwise.kernels.arguments import require_fit
from headwise.kernels.quantised import GROUP, Bits, Quantised, group_of
from headwise.kernels.segments import Readers, Segments

MAX_QUERIES = 512  # that read one segment; for more, matrix products are the better way
MAX_HEAD_DIM = 256
TAIL_CHUNK = 256  # tokens
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """What one program holds at a time: `queries` x `tokens`; and how it is run."""

    queries: int
    tokens: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def of(cls, num_queries: int, head_dim: int, itemsize: int) -> "Tiles":
        """16 KiB of keys at a time; tiles of queries are no smaller than a matrix product takes."""
        return cls(
            queries=min(64, max(16, triton.next_power_of_2(num_queries))),
            tokens=max(16, 16384 // itemsize // triton.next_power_of_2(head_dim)),
            num_warps=4 if itemsize == 2 else 8,  # float32 is multiplied without tensor cores, in registers
        )

    @classmethod
    def of_codes(cls, num_queries: int, head_dim: int, itemsize: int) -> "Tiles":
        """For quantised entries, which become numbers in registers: as much as there are registers for."""
        block_dim = triton.next_power_of_2(head_dim)
        if itemsize == 4:
            return cls(queries=16, tokens=min(128, max(16, 2048 // block_dim)), num_warps=8)
        queries = min(64, max(16, triton.next_power_of_2(num_queries)))
        return cls(queries=queries, tokens=min(128, 8192 // block_dim), num_warps=8 if queries == 64 else 4)


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
    """Attention over frozen segments and tail; see `Kernel`.

    `rows` must not be changed in place between calls. What it is not made for (many queries, float64, quantised heads
    whose size is no multiple of 8) goes to `pages`. Raises BadInput for tensors that are not on a GPU.
    """
    _require_gpu(query)
    require_fit(query, segments, rows, tail_keys, tail_values, mask)
    num_folded = segments.readers_of(rows).slots * query.shape[2] * query.shape[3]
    fits = num_folded <= MAX_QUERIES and query.shape[4] <= MAX_HEAD_DIM
    fits = fits and not (segments.quantised and query.shape[4] % 8)
    if not fits or query.dtype not in DTYPES or query.dtype != segments.keys.dtype:
        options = {"softcap": softcap, "sinks": sinks}
        given = {name: value for name, value in options.items() if value is not None}
        return pages.attend(query, segments, rows, tail_keys, tail_values, mask, scaling, **given)
    tiles = Tiles.of(num_folded, query.shape[4], query.itemsize)
    return attend_split(query, segments, rows, tail_keys, tail_values, mask, scaling, tiles, softcap, sinks)


def attend_split(
    query: Tensor,
    segments: Segments,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
    tiles: Tiles,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The launches: native entries and tail, every storage of quantised entries, and what combines them."""
    batch, heads, group, num_new, dim = query.shape
    chunks, readers = segments.chunks, segments.readers_of(rows)
    query, tail_keys, tail_values = _packed(query, 1), _packed(tail_keys, 2), _packed(tail_values, 2)
    tail, tail_chunks = tail_keys.shape[2], triton.cdiv(tail_keys.shape[2], TAIL_CHUNK)
    own, folded, num_frozen = group * num_new, readers.slots * group * num_new, len(chunks.segment)
    num_native = num_frozen + batch * heads * tail_chunks
    num_parts = num_native + sum(len(part.chunks.segment) for part in segments.quantised)
    part_out = torch.empty(num_parts, folded, dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(num_parts, folded, dtype=torch.float32, device=query.device)
    seen = part_lse if mask is None else mask.view(torch.uint8)  # never read without a mask
    block_dim = triton.next_power_of_2(dim)
    _attend_chunks[(num_native, triton.cdiv(folded, tiles.queries))](
        query, segments.keys, segments.values, tail_keys, tail_values, seen,
        chunks.segment, chunks.start, chunks.stop, readers.row, part_out, part_lse,
        scaling * LOG2_E, _cap(softcap), num_frozen, tail, tail_chunks, heads, readers.slots, own, num_new,
        *query.stride()[:4], *tail_keys.stride()[:2], *tail_values.stride()[:2],
        *((0, 0, 0) if mask is None else mask.stride()),
        D=dim, BLOCK_D=block_dim, BLOCK_M=tiles.queries, BLOCK_N=tiles.tokens, TAIL_CHUNK=TAIL_CHUNK,
        MASKED=mask is not None, CAPPED=softcap is not None, UPCAST=interpreted(),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,  # pyright: ignore[reportCallIssue] - of the launch
    )  # fmt: skip
    _launch_quantised(query, segments.quantised, readers, part_out, part_lse, num_native, scaling, softcap)
    # The interpreter rounds to bfloat16 by cutting bits off.
    out = torch.empty(query.shape, dtype=torch.float32 if interpreted() else query.dtype, device=query.device)
    _combine_chunks[(batch * heads, own)](
        part_out, part_lse, rows, readers.slot, chunks.first, tuple(part.chunks.first for part in segments.quantised),
        out, part_lse if sinks is None else sinks, num_frozen, tail_chunks, len(segments.lengths), heads, folded, own,
        num_new, D=dim, BLOCK_D=block_dim, BLOCK_C=32, SINKS=sinks is not None,
    )  # fmt: skip
    return out.to(query.dtype)


def _launch_quantised(
    query: Tensor,
    storages: tuple[Quantised, ...],
    readers: Readers,
    part_out: Tensor,
    part_lse: Tensor,
    first_part: int,
    scaling: float,
    softcap: float | None,
) -> None:
    """Write the parts of all chunks of quantised entries, one storage after the other, from `first_part`."""
    _, heads, group, num_new, dim = query.shape
    folded = part_lse.shape[1]
    for storage in storages:
        chunks, constants = storage.chunks, quantised_constants(dim, storage.bits, folded, query.dtype)
        _attend_quantised[(len(chunks.segment), triton.cdiv(folded, constants["BLOCK_M"]))](
            query, storage.keys, storage.key_scales, storage.values, storage.value_scales,
            chunks.segment, chunks.start, chunks.stop, storage.spans, readers.row, part_out, part_lse,
            scaling * LOG2_E, _cap(softcap), first_part, len(storage.lengths), heads, readers.slots, group * num_new,
            num_new, *query.stride()[:4], CAPPED=softcap is not None, **constants,
        )  # fmt: skip
        first_part += len(chunks.segment)


@lru_cache(maxsize=64)
def quantised_constants(head_dim: int, bits: Bits, num_queries: int, dtype: torch.dtype) -> Mapping[str, Any]:
    """What `_attend_quantised` is compiled for, with queries of a dtype, and how it is run."""
    tiles, group = Tiles.of_codes(num_queries, head_dim, dtype.itemsize), group_of(head_dim, bits.values)
    constants = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.tokens,
        "KEY_BITS": bits.keys,
        "KEY_BLOCK": GROUP[bits.keys],
        "VALUE_BITS": bits.values,
        "VALUE_GROUP": group,
        "UNIT": gcd(group, head_dim * bits.values // 8),
        "NUMBER": tl.float32 if dtype == torch.float32 else tl.float16,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    return MappingProxyType(constants)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(knobs.runtime.interpret)


def _cap(softcap: float | None) -> float:
    """Of logits in base 2."""
    return LOG2_E * (softcap or 0.0)


def _require_gpu(query: Tensor) -> None:
    if query.device.type != "cuda" and not interpreted():
        raise BadInput(
            f"kernel='triton' needs tensors on a GPU; these are on {query.device}. Move the model to a GPU, or use "
            "kernel='auto' (or set TRITON_INTERPRET=1 before Python starts, to test it slowly)."
        )


def _packed(states: Tensor, axes: int) -> Tensor:
    """Contiguous in its last `axes` axes; the others may have any stride."""
    packed = states.stride(-1) == 1 and (axes == 1 or states.stride(-2) == states.shape[-1])
    return states if packed else states.contiguous()


@triton.jit(do_not_specialize=["num_frozen", "tail", "tail_chunks", "heads", "slots", "own", "num_new"])
@no_type_check
def _attend_chunks(
    query, keys, values, tail_keys, tail_values, seen,
    chunk_segment, chunk_start, chunk_stop, reader_row, part_out, part_lse,
    scale, cap, num_frozen, tail, tail_chunks, heads, slots, own, num_new,
    query_row, query_head, query_group, query_new, tail_key_row, tail_key_head, tail_value_row, tail_value_head,
    seen_row, seen_new, seen_token,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One chunk, for BLOCK_M of the queries that read it: mean of the values, and log-sum-exp in base 2.

    `own` = G * T queries are those of one row and head; a frozen chunk is read by those of `slots` rows.
    """
    part = tl.program_id(0)
    fold = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, dim = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    folded = slots * own
    frozen = part < num_frozen
    if frozen:
        segment = tl.load(chunk_segment + part)
        head = segment % heads
        row = tl.load(reader_row + segment // heads * slots + fold // own, mask=fold < folded, other=-1)
        real = row >= 0
        start = tl.load(chunk_start + part)
        length = (tl.load(chunk_stop + part) - start).to(tl.int32)
        key_at, value_at, seen_at = keys + start * D, values + start * D, seen
        masked = fold < 0  # none: later tokens see all that is frozen
    else:
        owner = (part - num_frozen) // tail_chunks
        head = owner % heads
        row = tl.zeros([BLOCK_M], tl.int32) + owner // heads
        real = fold < own
        begin = (part - num_frozen) % tail_chunks * TAIL_CHUNK
        length = tl.minimum(tail - begin, TAIL_CHUNK)
        length = tl.where(tl.program_id(1) * BLOCK_M < own, length, 0)
        owner_row = (owner // heads).to(tl.int64)
        key_at = tail_keys + owner_row * tail_key_row + head * tail_key_head + begin * D
        value_at = tail_values + owner_row * tail_value_row + head * tail_value_head + begin * D
        seen_at = seen + owner_row * seen_row + begin * seen_token
        masked = real
    group, new = fold % own // num_new, fold % num_new
    query_at = query + row * query_row + head * query_head + group * query_group + new * query_new
    wanted = real[:, None] & (dim < D)[None, :]
    queries = tl.load(query_at[:, None] + dim[None, :], mask=wanted, other=0.0)
    if UPCAST:  # the interpreter's products are wrong in bfloat16
        queries = queries.to(tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_N):
        inside = first + token < length
        offset = (first + token)[:, None] * D + dim[None, :]
        there = inside[:, None] & (dim < D)[None, :]
        key = tl.load(key_at + offset, mask=there, other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
        logits = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:
            logits = _capped(logits, cap)
        visible = inside[None, :]
        if MASKED:
            seen_offset = new[:, None] * seen_new + (first + token)[None, :] * seen_token
            visible = visible & (tl.load(seen_at + seen_offset, mask=visible & masked[:, None], other=1) != 0)
        logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no inf - inf
        weight = tl.exp2(logits - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weight, 1)
        value = tl.load(value_at + offset, mask=there, other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        out = out * decay[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = new_top
    divisor = tl.where(total > 0, total, 1.0)
    place = part.to(tl.int64) * folded + fold
    tl.store(part_out + place[:, None] * D + dim[None, :], out / divisor[:, None], mask=wanted)
    tl.store(part_lse + place, tl.where(total > 0, top + tl.log2(divisor), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["first_part", "num_segments", "heads", "slots", "own", "num_new"])
@no_type_check
def _attend_quantised(
    query, keys, key_scales, values, value_scales, chunk_segment, chunk_start, chunk_stop, spans, reader_row,
    part_out, part_lse, scale, cap, first_part, num_segments, heads, slots, own, num_new,
    query_row, query_head, query_group, query_new,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEY_BITS: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_GROUP: tl.constexpr,
    UNIT: tl.constexpr, NUMBER: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One chunk of quantised entries, as `_attend_chunks`. Their codes become a NUMBER in registers.

    Channels are in the order in which `_numbers` takes them out. UNIT neighbours of a value have the same scale.
    """
    chunk = tl.program_id(0)
    fold = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.arange(0, BLOCK_N)
    key_dim, value_dim = _channels(D, BLOCK_D, KEY_BITS), _channels(D, BLOCK_D, VALUE_BITS)
    segment = tl.load(chunk_segment + chunk)
    row = tl.load(reader_row + segment // heads * slots + fold // own, mask=fold < slots * own, other=-1)
    real = row >= 0
    query_at = query + row * query_row + segment % heads * query_head
    query_at += fold % own // num_new * query_group + fold % num_new * query_new
    queries = tl.load(query_at[:, None] + key_dim[None, :], mask=real[:, None] & (key_dim < D)[None, :], other=0.0)
    queries = queries.to(NUMBER)
    block = tl.load(chunk_start + chunk)
    skipped = (block - tl.load(spans + 2 * num_segments + segment)) * KEY_BLOCK
    start = tl.load(spans + segment) + skipped
    length = tl.load(spans + num_segments + segment) - skipped
    length = tl.minimum(length, (tl.load(chunk_stop + chunk) - block) * KEY_BLOCK).to(tl.int32)
    key_at = keys.to(tl.pointer_type(tl.uint32), bitcast=True) + start * (D * KEY_BITS // 32)
    value_at = values.to(tl.pointer_type(tl.uint32), bitcast=True) + start * (D * VALUE_BITS // 32)
    key_scale_at, value_scale_at = key_scales + block * (2 * D), value_scales + start * (2 * D // VALUE_GROUP)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_N):
        entry = first + token
        key = _numbers(key_at, entry, length, D, BLOCK_D, BLOCK_N, KEY_BITS, NUMBER)
        key = _scaled_keys(key, key_scale_at, first, length, key_dim, D, BLOCK_D, BLOCK_N, KEY_BLOCK, NUMBER)
        logits = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:
            logits = _capped(logits, cap)
        logits = tl.where((entry < length)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weight = tl.exp2(logits - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weight, 1)
        value = _numbers(value_at, entry, length, D, BLOCK_D, BLOCK_N, VALUE_BITS, NUMBER)
        value = _scaled_values(
            value, value_scale_at, entry, length, D, BLOCK_D, BLOCK_N, VALUE_BITS, VALUE_GROUP, UNIT, NUMBER
        )
        out = tl.dot(weight.to(NUMBER), value, out * decay[:, None], input_precision="ieee")
        top = new_top
    place = (first_part + chunk).to(tl.int64) * (slots * own) + fold
    wanted = real[:, None] & (value_dim < D)[None, :]
    tl.store(part_out + place[:, None] * D + value_dim[None, :], out / total[:, None], mask=wanted)
    tl.store(part_lse + place, top + tl.log2(total), mask=real)


@triton.jit
@no_type_check
def _capped(logits, cap):
    """cap * tanh(logits / cap). Small numbers go through the series of tanh: 1 - exp would lose their digits."""
    size = tl.abs(logits / cap)
    square = size * size
    power = tl.exp2(size * -2.8853900817779268)
    small = ((square * -5.3968254e-2 + 1.3333333e-1) * square - 3.3333333e-1) * square * size + size
    found = tl.where(size < 0.2, small, (1.0 - power) / (1.0 + power)) * cap
    return tl.where(logits < 0, -found, found)


@triton.jit
@no_type_check
def _channels(D: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr):
    """Which channel is in a column of `_numbers`; D for columns that are none."""
    BYTES: tl.constexpr = D * BITS // 8
    column = tl.arange(0, BLOCK_D)
    byte, half = column % (BLOCK_D * BITS // 8), column // (BLOCK_D * BITS // 8)
    channel = half * BYTES + byte // 4 * 4 + byte % 2 * 2 + byte // 2 % 2
    return tl.where(byte < BYTES, channel, D)


@triton.jit
@no_type_check
def _numbers(
    at, entry, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """The codes of some entries, as numbers, in columns that `_channels` names.

    Codes that are 16 bits apart in a word of 32 are taken out of it together, and stay beside each other. Low halves of
    bytes come before high ones.
    """
    word = tl.arange(0, BLOCK_D * BITS // 32)
    there = (entry < length)[:, None] & (word < D * BITS // 32)[None, :]
    words = tl.load(at + entry[:, None] * (D * BITS // 32) + word[None, :], mask=there, other=0)
    codes = tl.join(_pair(words, BITS, NUMBER), _pair(words >> 8, BITS, NUMBER))  # [entries, words, codes, pairs]
    if BITS == 8:
        codes = tl.permute(codes, [0, 1, 3, 2])
    else:
        high = tl.join(_pair(words >> 4, BITS, NUMBER), _pair(words >> 12, BITS, NUMBER))
        codes = tl.permute(tl.join(codes, high), [0, 4, 1, 3, 2])
    return codes.reshape([BLOCK_N, BLOCK_D])


@triton.jit
@no_type_check
def _pair(words, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """The codes that begin at bits 0 and 16 of words."""
    if NUMBER == tl.float16:  # noqa: SIM300 - 1024 + code, put together from its bits
        both = (words & ((1 << BITS) - 1) * 0x10001) | 0x64006400
        low = both.to(tl.uint16).to(tl.float16, bitcast=True)
        high = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        return tl.join(low, high) - 1024
    return tl.join(words & (1 << BITS) - 1, words >> 16 & (1 << BITS) - 1).to(NUMBER)


@triton.jit
@no_type_check
def _scaled_keys(
    code, scale_at, first, length, dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys, of one block or of several whole ones."""
    BLOCKS: tl.constexpr = max(1, BLOCK_N // KEY_BLOCK)
    block = first // KEY_BLOCK + tl.arange(0, BLOCKS)
    there = (block * KEY_BLOCK < length)[:, None] & (dim < D)[None, :]
    at = scale_at + block[:, None] * (2 * D) + dim[None, :]
    scale = tl.load(at, mask=there, other=0.0).to(NUMBER)
    zero = tl.load(at + D, mask=there, other=0.0).to(NUMBER)
    code = code.reshape([BLOCKS, BLOCK_N // BLOCKS, BLOCK_D])
    return (code * scale[:, None, :] + zero[:, None, :]).reshape([BLOCK_N, BLOCK_D])


@triton.jit
@no_type_check
def _scaled_values(
    code, scale_at, entry, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """BLOCK_N values. A unit is UNIT channels of the head, or of a half where `_numbers` takes out halves."""
    BYTES: tl.constexpr = D * BITS // 8
    unit = tl.arange(0, BLOCK_D // UNIT) * UNIT
    byte, half = unit % (BLOCK_D * BITS // 8), unit // (BLOCK_D * BITS // 8)
    channel = half * BYTES + byte
    there = (entry < length)[:, None] & (byte < BYTES)[None, :]
    at = scale_at + entry[:, None] * (2 * D // GROUP) + channel[None, :] // GROUP
    scale = tl.load(at, mask=there, other=0.0).to(NUMBER)
    zero = tl.load(at + D // GROUP, mask=there, other=0.0).to(NUMBER)
    code = code.reshape([BLOCK_N, BLOCK_D // UNIT, UNIT])
    return (code * scale[:, :, None] + zero[:, :, None]).reshape([BLOCK_N, BLOCK_D])


@triton.jit(do_not_specialize=["num_frozen", "tail_chunks", "num_segments", "heads", "folded", "own", "num_new"])
@no_type_check
def _combine_chunks(
    part_out, part_lse, rows, reader_slot, chunk_first, quantised_first,
    out, sinks, num_frozen, tail_chunks, num_segments, heads, folded, own, num_new,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One query of one row and head: the mean of its chunks' outputs, weighted by exp2 of their log-sum-exp.

    `quantised_first` has a table like `chunk_first` for every storage of quantised entries.
    """
    owner, query = tl.program_id(0), tl.program_id(1)
    row, head = owner // heads, owner % heads
    segment = tl.load(rows + row) * heads + head
    first = tl.load(chunk_first + segment)
    num_own = tl.load(chunk_first + segment + 1) - first
    fold = tl.load(reader_slot + row) * own + query
    chunk, dim = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if SINKS:  # a key whose value is nothing
        sink = tl.load(sinks + head * (own // num_new) + query // num_new).to(tl.float32)
        top = tl.where(sink > float("-inf"), sink * 1.4426950408889634, top)
        total = tl.where(sink > float("-inf"), total + 1.0, total)
    mean = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, num_own + tail_chunks, BLOCK_C):
        nth = begin + chunk
        there, frozen = nth < num_own + tail_chunks, nth < num_own
        part = tl.where(frozen, first + nth, num_frozen + owner * tail_chunks + nth - num_own)
        at = part.to(tl.int64) * folded + tl.where(frozen, fold, query)
        top, total, mean = _with_parts(top, total, mean, part_out, part_lse, at, there, D, BLOCK_D)
    first_part = num_frozen + tl.num_programs(0) * tail_chunks
    for storage in tl.static_range(len(quantised_first)):
        first = tl.load(quantised_first[storage] + segment)
        stop = tl.load(quantised_first[storage] + segment + 1)
        for begin in range(first, stop, BLOCK_C):
            nth = begin + chunk
            at = (first_part + nth).to(tl.int64) * folded + fold
            top, total, mean = _with_parts(top, total, mean, part_out, part_lse, at, nth < stop, D, BLOCK_D)
        first_part += tl.load(quantised_first[storage] + num_segments)
    mean = mean / tl.where(total > 0, total, 1.0)
    tl.store(out + (owner.to(tl.int64) * own + query) * D + dim, mean.to(out.dtype.element_ty), mask=dim < D)


@triton.jit
@no_type_check
def _with_parts(top, total, mean, part_out, part_lse, at, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Largest log-sum-exp, sum of weights and weighted sum of outputs, with some more parts."""
    dim = tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse + at, mask=there, other=float("-inf"))
    new_top = tl.maximum(top, tl.max(lse, 0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(lse - base)
    decay = tl.exp2(top - base)
    part_mean = tl.load(part_out + at[:, None] * D + dim[None, :], mask=there[:, None] & (dim < D)[None, :], other=0.0)
    mean = mean * decay + tl.sum(part_mean * weight[:, None], 0)
    total = total * decay + tl.sum(weight, 0)
    return new_top, total, mean
