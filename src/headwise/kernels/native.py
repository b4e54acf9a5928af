"""The kernel for decoding on a CPU: C++, one call per layer, compiled for the machine it runs on.

The compiler of the system ($CXX, or c++, g++, clang++) makes it at first use, in some ten seconds; the library is kept
in $HEADWISE_CACHE, or headwise/ in the user's cache folder, under a name that changes with source, compiler and CPU,
and with what is in it (compiled.py).
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from headwise.errors import BadInput, KernelUnavailable, ShapeMismatch
from headwise.kernels import compiled, pages
from headwise.kernels.arguments import require_shapes
from headwise.kernels.quantised import GROUP, Quantised, group_of
from headwise.kernels.segments import Segments

SOURCE = Path(__file__).with_name("ragged.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
MAX_QUERIES = 128  # that read one segment; for more, matrix products are the better way,
SHORT = 512  # except where segments are as short on average
MAX_HEAD_DIM = 256
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Native:
    """The compiled library."""

    path: Path
    features: str  # of the CPU that it makes use of
    dtypes: frozenset[torch.dtype]
    function: Any
    reader: Any
    built: bool  # just now, not found in the cache
    lanes: int  # floats that it computes with at a time

    def reads_codes(self, parts: Sequence[Quantised]) -> bool:
        """Whether it can read these entries: their scales are float16, and codes of 4 bits lie in two halves."""
        halves = all(part.head_dim % (2 * self.lanes) == 0 for part in parts if 4 in (part.bits.keys, part.bits.values))
        return halves and torch.float16 in self.dtypes


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

    What it is not made for (many queries, float64, odd head sizes, float16 where the CPU has none) goes to `pages`.
    Raises KernelUnavailable where it cannot be compiled.
    """
    if not serves(query, segments):
        options = {"softcap": softcap, "sinks": sinks}
        given = {name: value for name, value in options.items() if value is not None}
        return pages.attend(query, segments, rows, tail_keys, tail_values, mask, scaling, **given)
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    spans = segments.spans
    stored = [t for x in segments.quantised for t in (x.keys, x.key_scales, x.values, x.value_scales, x.spans)]
    return torch.ops.headwise.attend_ragged.default(
        query,
        segments.keys,
        segments.values,
        spans,
        rows,
        tail_keys,
        tail_values,
        mask,
        scaling,
        stored,
        softcap,
        sinks,
    )


def serves(query: Tensor, segments: Segments) -> bool:
    """Whether these tensors are what the kernel is made for."""
    batch, _, group, num_new, dim = query.shape
    per_segment = -(-batch // segments.batch) * group * num_new
    return (
        query.device.type == "cpu"
        and query.dtype == segments.keys.dtype
        and dim % 16 == 0
        and dim <= MAX_HEAD_DIM
        and (per_segment <= MAX_QUERIES or sum(segments.kept) <= SHORT * len(segments.lengths))
        and query.dtype in load().dtypes
        and (not segments.quantised or load().reads_codes(segments.quantised))
    )


@cache
def load() -> Native:
    """The library, compiled if it was not yet. Raises KernelUnavailable."""
    path, library, built = compiled.library(SOURCE, FLAGS, _bind)
    dtypes = frozenset(DTYPES) - (set() if library.headwise_has_float16() else {torch.float16})
    return Native(
        path=path,
        features=library.headwise_features().decode(),
        dtypes=dtypes,
        function=library.headwise_attend,
        reader=library.headwise_read,
        built=built,
        lanes=library.headwise_lanes(),
    )


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions. Raises AttributeError if it lacks one of them."""
    library.headwise_attend.argtypes = (ctypes.c_char_p, ctypes.c_double, ctypes.c_double, ctypes.c_int)
    library.headwise_features.restype = ctypes.c_char_p
    library.headwise_lanes.restype = ctypes.c_int
    library.headwise_has_float16.restype = ctypes.c_int
    reader = library.headwise_read
    reader.argtypes, reader.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int), ctypes.c_int64
    return library


def read(states: Tensor) -> None:
    """Read a contiguous tensor from memory, for the floor of `headwise bench`. Raises KernelUnavailable, BadInput."""
    if not (states.is_cpu and states.is_contiguous()):
        raise BadInput("only a contiguous tensor on the CPU can be read from memory.")
    load().reader(states.data_ptr(), states.nbytes // 8, torch.get_num_threads())


_CALL = struct.Struct("33q")
_STORED = struct.Struct("13q")
_library = torch.library.Library("headwise", "DEF")
_library.define(
    "attend_ragged(Tensor query, Tensor keys, Tensor values, Tensor spans, Tensor rows, Tensor tail_keys, "
    "Tensor tail_values, Tensor? mask, float scaling, Tensor[]? stored=None, float? softcap=None, "
    "Tensor? sinks=None) -> Tensor"
)


def _attend_ragged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: Tensor,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
    stored: Sequence[Tensor] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The op. `spans` [2, segments]: first row and number of rows of every segment; all other shapes as elsewhere.

    `stored`: keys, key scales, values, value scales and spans [3, segments] of quantised entries, five tensors for
    every kind. Anybody can call it: raises ShapeMismatch for whatever would be read out of bounds. `sinks` are float32.
    """
    _require_fit(query, keys, values, spans, rows, tail_keys, tail_values, mask)
    stored = stored or ()
    kinds = [_kind(stored[i : i + 5], keys.shape[1], spans.shape[1]) for i in range(0, len(stored), 5)]
    codes = ctypes.create_string_buffer(b"".join(kinds))
    batch, heads, group, num_new, dim = query.shape
    _require_sinks(sinks, heads * group)
    num_keys, segments, tail = keys.shape[0], spans.shape[1], tail_keys.shape[2]
    query, query_strides = _dense(query, 1)
    (tail_keys, key_strides), (tail_values, value_strides) = _dense(tail_keys, 2), _dense(tail_values, 2)
    out, starts = torch.empty((batch, heads, group, num_new, dim), dtype=query.dtype, device="cpu"), spans.data_ptr()
    call = _CALL.pack(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), starts, starts + 8 * segments, rows.data_ptr(),
        tail_keys.data_ptr(), tail_values.data_ptr(), 0 if mask is None else mask.data_ptr(), out.data_ptr(),
        batch, heads, group, num_new, dim, segments // heads, tail, num_keys,
        *query_strides[:4], *key_strides[:2], *value_strides[:2],
        *((0, 0, 0) if mask is None else mask.stride()),
        torch.get_num_threads(), ctypes.addressof(codes), len(kinds), 0 if sinks is None else sinks.data_ptr(),
    )  # fmt: skip
    error = load().function(call, scaling, softcap or 0.0, DTYPES[query.dtype])
    if error:
        _refuse(error, query.dtype, num_keys)
    return out


def _require_sinks(sinks: Tensor | None, query_heads: int) -> None:
    """Raise ShapeMismatch unless there is a float for every query head."""
    if sinks is not None and not (
        sinks.shape == (query_heads,) and sinks.dtype == torch.float32 and sinks.is_contiguous() and sinks.is_cpu
    ):
        raise ShapeMismatch(
            f"sinks are {query_heads} contiguous float32 on the CPU; found {tuple(sinks.shape)} {sinks.dtype}."
        )


def _kind(stored: Sequence[Tensor], dim: int, segments: int) -> bytes:
    """What the library is told of quantised entries of one kind. Raises ShapeMismatch where their parts do not fit."""
    shapes, dtypes = [tuple(t.shape) for t in stored], [t.dtype for t in stored]
    width, value_width = (shapes[i][-1] if len(stored) == 5 and shapes[i] else 0 for i in (0, 2))
    if {width, value_width} <= {dim, dim // 2} and all(t.is_contiguous() for t in stored):
        rows, blocks, groups = len(stored[0]), len(stored[1]), dim // group_of(dim, 8 * value_width // dim)
        expected = [(rows, width), (blocks, 2, dim), (rows, value_width), (rows, 2, groups), (3, segments)]
        if shapes == expected and dtypes == [torch.uint8, torch.float16, torch.uint8, torch.float16, torch.int64]:
            if min(width, value_width) < dim and dim % (2 * load().lanes):
                raise ShapeMismatch(f"codes of 4 bits take heads of a multiple of {2 * load().lanes}; found {dim}.")
            first, block = stored[4].data_ptr(), GROUP[8 * width // dim]
            addresses = [t.data_ptr() for t in stored[:4]]
            spans = first, first + 8 * segments, first + 16 * segments
            return _STORED.pack(*addresses, *spans, width, value_width, groups, block, rows, blocks)
    raise ShapeMismatch(
        f"quantised entries of heads of {dim} in {segments} segments are contiguous keys, key scales, values, value "
        f"scales and spans; found {shapes} of {dtypes}."
    )


def _refuse(error: int, dtype: torch.dtype, num_keys: int) -> NoReturn:
    """What the library's number for an error means; see the end of ragged.cpp."""
    if error == 1:
        raise MemoryError("there is no memory for the parts of ragged attention.")
    if error == 2:
        raise KernelUnavailable(f"the C++ kernel was built for a CPU without {dtype}: use kernel='pages'.")
    raise ShapeMismatch(
        f"rows name a context, or spans one of the {num_keys} keys, that is not there: every row must be the index of "
        "a context, and every span a first key and a number of keys."
    )


def _require_fit(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: Tensor,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
) -> None:
    """Raise ShapeMismatch unless addresses, sizes and strides of these tensors are what the library takes them for.

    All are on the CPU: PyTorch calls the op of another device where any is not.
    """
    dtype = query.dtype
    if not (
        dtype == keys.dtype == values.dtype == tail_keys.dtype == tail_values.dtype
        and dtype in DTYPES
        and spans.dtype == rows.dtype == torch.int64
        and (mask is None or mask.dtype == torch.bool)
        and keys.is_contiguous() and values.is_contiguous() and spans.is_contiguous() and rows.is_contiguous()
    ):  # fmt: skip
        raise ShapeMismatch(
            "ragged attention takes contiguous keys, values, spans and rows: query, keys, values and tail of one dtype "
            f"of {', '.join(map(str, DTYPES))}, spans and rows of int64, a mask of bool."
        )
    given = spans.shape
    if len(given) != 2 or given[0] != 2:
        raise ShapeMismatch(f"spans {tuple(given)} must be [2, segments]: first keys, and numbers of keys.")
    dim = require_shapes(query, keys, values, given[1], rows, tail_keys, tail_values, mask)
    if dim % 16 or dim > MAX_HEAD_DIM:
        raise ShapeMismatch(f"the C++ kernel takes heads of a multiple of 16 up to {MAX_HEAD_DIM}; found {dim}.")


def _dense(states: Tensor, axes: int) -> tuple[Tensor, tuple[int, ...]]:
    """Contiguous in its last `axes` axes; the others may have any stride. With its strides."""
    strides = states.stride()
    if strides[-1] == 1 and (axes == 1 or strides[-2] == states.shape[-1]):
        return states, strides
    dense = states.contiguous()
    return dense, dense.stride()


_library.impl("attend_ragged", _attend_ragged, "CPU")


@torch.library.register_fake("headwise::attend_ragged")
def _fake(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)
