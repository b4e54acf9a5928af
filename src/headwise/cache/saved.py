"""What a saved cache must hold, before anything is computed with it: kernels trust the numbers of rows that it says.

kept.py writes and loads the files; a map of kept tokens reads one without the model (report/inspect/kept.py).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.artifacts.contents import ADVICE
from headwise.artifacts.tensors import Opened
from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.schema import INTEGERS, Numbers, Schema
from headwise.kernels.quantised import AUTO, ENTRIES, GROUP, NATIVE, Bits, require_entries

COMPRESS = "Compress the context again."


def _entries(value: Any) -> str:
    """One of the ways to store entries. Raises BadInput."""
    require_entries(value)
    return value


FIELDS: Mapping[str, strict_json.Check] = {
    "model": strict_json.or_none(strict_json.text),
    "model_fingerprint": strict_json.text,
    "tokens_fingerprint": strict_json.or_none(strict_json.text),
    "method": strict_json.mapping,
    "keep": strict_json.text,
    "entries": _entries,
    "reading": strict_json.text,
    "seen": strict_json.size,
    "context_tokens": strict_json.or_none(strict_json.list_of(strict_json.positive)),
    "peak_nbytes": strict_json.count,
    "ahead": strict_json.or_none(strict_json.list_of(strict_json.whole)),
}
IDS = "ids"  # of all tokens seen, where they are known
QUANTISED = ("keys", "key_scales", "values", "value_scales", "positions", "lengths")
_NAME = re.compile(r"(0|[1-9]\d{0,3})\.(k[48]v[48]_)?[a-z_]+")
_FROZEN = ("keys", "values", "positions", "lengths", "rows")
_TAIL = ("tail_keys", "tail_values")
_STATES = ("batch", "kv_heads")
_STATE = re.compile(r"(conv|recurrent)_[a-z]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What is known of the model that the cache is for."""

    layers: tuple[int, ...]  # those that are compressed
    windows: Mapping[int, tuple[int, int, int]]  # tokens, KV heads and their size of layers with a sliding window
    states: frozenset[int]  # layers with a state
    kv_heads: int
    head_dim: int
    max_positions: int
    largest: float  # number of its dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What a file holds, on the CPU. `context_tokens` and `ids` are None where they were not known.

    `ahead` is of models that place images on a grid: by how much positions after a context are ahead of its tokens.
    """

    layers: dict[int, dict[str, Tensor]]
    ids: Int[Tensor, "batch seen"] | None
    context_tokens: tuple[int, ...] | None
    ahead: tuple[int, ...] | None
    metadata: dict[str, Any]


def read(file: Opened, expected: Expected | None = None) -> Saved:
    """Tensors and metadata, all checked. Raises BadInput.

    Without a model layers and sizes are those that the file says.
    """
    earlier = {
        "context_tokens": None,
        "ahead": None,
        "entries": NATIVE,
        "reading": "exact",
    }  # what files of earlier versions leave out
    written = {**earlier, **file.metadata}
    metadata = {**written, **strict_json.checked(written, FIELDS, f"{file.path}: the metadata", ADVICE)}
    present = _layers(file)
    frozen = present if expected is None else set(expected.layers)
    if expected is None:
        frozen = {layer for layer in present if f"{layer}.positions" in file.headers}
    every = present if expected is None else {*expected.layers, *expected.windows, *expected.states}
    schema = _schema(file, every, frozen, metadata["seen"], expected)
    tensors = file.read(schema)
    layers = {
        layer: {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{layer}.")}
        for layer in sorted(every)
    }
    tail = max((states["tail_keys"].shape[2] for states in layers.values() if "tail_keys" in states), default=0)
    context = metadata["seen"] - tail
    limit = context if expected is None else expected.max_positions
    entries = metadata["entries"]
    for layer in sorted(frozen):
        place = f"{file.path} is damaged: layer {layer}"
        if entries != AUTO and bits_in(layers[layer]) != [bits for name, bits in ENTRIES.items() if name == entries]:
            raise BadInput(f"{place} does not hold the {entries} entries that it says. {COMPRESS}")
        _require_segments(layers[layer], context, limit, place)
    counts = metadata["context_tokens"]
    contexts = len(layers[min(frozen)]["lengths"])
    if counts is not None and (len(counts) != contexts or max(counts) > context):
        raise BadInput(f"{file.path} is damaged: {counts!r:.60} are no tokens of its {contexts} contexts. {COMPRESS}")
    known = None if counts is None else tuple(counts)
    ahead = _ahead(metadata["ahead"], known, limit, f"{file.path} is damaged")
    return Saved(layers=layers, ids=tensors.get(IDS), context_tokens=known, ahead=ahead, metadata=metadata)


def prefix_of(bits: Bits) -> str:
    """What the names of the tensors of a layer's quantised entries begin with."""
    return f"k{bits.keys}v{bits.values}_"


def bits_in(names: Iterable[str]) -> list[Bits]:
    """Of the quantised entries of a layer that has tensors of these names."""
    found = set(names)
    return [bits for bits in ENTRIES.values() if any(prefix_of(bits) + name in found for name in QUANTISED)]


def _ahead(
    written: Sequence[int] | None, counts: tuple[int, ...] | None, limit: int, place: str
) -> tuple[int, ...] | None:
    """How far positions after each context are ahead. Raises BadInput where no positions come of it."""
    if written is None:
        return None
    ends = [count + ahead for count, ahead in zip(counts or (), written, strict=False)]
    if counts is None or len(counts) != len(written) or not all(0 < end <= limit for end in ends):
        raise BadInput(f"{place}: its contexts cannot be {written!r:.60} positions ahead of their tokens. {COMPRESS}")
    return tuple(written)


def _layers(file: Opened) -> set[int]:
    """Those that the file has tensors of."""
    names = {name: _NAME.fullmatch(name) for name in file.headers if name != IDS}
    strange = sorted(name for name, match in names.items() if match is None)
    if strange:
        raise BadInput(f"{file.path} is damaged: it holds an unknown tensor {strange[0][:40]!r}. {COMPRESS}")
    return {int(match[1]) for match in names.values() if match is not None}


def _schema(file: Opened, every: set[int], frozen: set[int], seen: int, expected: Expected | None) -> Schema:
    high = torch.finfo(torch.float64).max if expected is None else expected.largest
    has_tail = any(f"{layer}.{name}" in file.headers for layer in frozen for name in _TAIL)
    table: dict[str, Numbers] = {}
    sizes: dict[str, int] = {}
    if expected is not None:
        sizes = {"kv_heads": expected.kv_heads, "head_dim": expected.head_dim}
        for layer, (tokens, heads, dim) in expected.windows.items():
            found = (min(seen, tokens - 1), heads, dim)
            sizes |= dict(zip(_window_axes(layer), found, strict=True))
    for layer in sorted(every):
        if _is_state(file, layer, expected):
            table |= {name: _state(file, name, high) for name in file.headers if name.startswith(f"{layer}.")}
            continue
        for name in ("keys", "values") if layer not in frozen else _FROZEN + _TAIL * has_tail:
            if f"{layer}.{name}" not in file.headers:
                raise BadInput(f"{file.path} is damaged: layer {layer} has no {name!r}. {COMPRESS}")
            table[f"{layer}.{name}"] = _numbers(name, layer, layer in frozen, high, seen)
    for layer in sorted(frozen):
        own = [name.partition(".")[2] for name in file.headers if name.startswith(f"{layer}.")]
        for bits in bits_in(own):
            for name in QUANTISED:
                table[f"{layer}.{prefix_of(bits)}{name}"] = _codes(name, layer, bits, expected, seen)
    if IDS in file.headers:
        table[IDS] = Numbers(shape=("batch", "seen"), dtypes=("I32",), low=0.0, high=float(strict_json.MOST))
        sizes["seen"] = seen
    return Schema(table=table, sizes=sizes, advice=COMPRESS)


def _numbers(name: str, layer: int, frozen: bool, high: float, seen: int) -> Numbers:
    rows = f"rows of layer {layer}"
    match name:
        case "rows":
            return Numbers(shape=("batch",), dtypes=("I64",), low=0.0, high=float(strict_json.MOST))
        case "lengths":
            return Numbers(shape=("contexts", "kv_heads"), dtypes=INTEGERS, low=0.0, high=float(seen))
        case "positions":
            return Numbers(shape=(rows,), dtypes=("I32",), low=0.0, high=float(strict_json.MOST))
        case "tail_keys" | "tail_values":
            return Numbers(shape=(*_STATES, "tail", "head_dim"), low=-high, high=high)
    tokens, heads, dim = _window_axes(layer)
    shape = (rows, "head_dim") if frozen else ("batch", heads, tokens, dim)
    return Numbers(shape=shape, low=-high, high=high)


def _window_axes(layer: int) -> tuple[str, str, str]:
    return f"window of layer {layer}", f"heads of layer {layer}", f"head size of layer {layer}"


def _is_state(file: Opened, layer: int, expected: Expected | None) -> bool:
    if expected is not None:
        return layer in expected.states
    return not any(f"{layer}.{name}" in file.headers for name in (*_FROZEN, *_TAIL))


def _state(file: Opened, name: str, high: float) -> Numbers:
    """What a tensor of a state must be: one row for every row of the batch. Raises BadInput for another name."""
    kind, axes = name.partition(".")[2], file.headers[name].shape
    if not _STATE.fullmatch(kind) or not axes:
        raise BadInput(f"{file.path} is damaged: {name!r} is no tensor of a state. {COMPRESS}")
    return Numbers(shape=("batch", *(f"{name} {i}" for i in range(1, len(axes)))), low=-high, high=high)


def _codes(name: str, layer: int, bits: Bits, expected: Expected | None, seen: int) -> Numbers:
    """What a tensor of quantised entries must be."""
    rows, kind = f"{prefix_of(bits)}rows of layer {layer}", prefix_of(bits)
    match name:
        case "positions":
            return Numbers(shape=(rows,), dtypes=("I32",), low=0.0, high=float(strict_json.MOST))
        case "lengths":
            return Numbers(shape=("contexts", "kv_heads"), dtypes=INTEGERS, low=0.0, high=float(seen))
        case "key_scales":
            return Numbers(shape=(f"{kind}blocks of layer {layer}", 2, "head_dim"), dtypes=("F16",))
        case "value_scales":
            return Numbers(shape=(rows, 2, f"{kind}groups"), dtypes=("F16",))
    width = None if expected is None else expected.head_dim * (bits.keys if name == "keys" else bits.values) // 8
    return Numbers(shape=(rows, width or f"{kind}{name} bytes"), dtypes=("U8",), low=0.0, high=255.0)


def _require_segments(layer: Mapping[str, Tensor], context: int, limit: int, place: str) -> None:
    """Raise BadInput unless lengths, rows and positions fit the keys and each other."""
    contexts, rows = len(layer["lengths"]), layer["rows"]
    if not contexts or not len(rows) or int(rows.max()) >= contexts:
        raise BadInput(f"{place} has {len(rows)} rows, which must each name one of its {contexts} contexts. {COMPRESS}")
    kept = torch.zeros(layer["lengths"].numel(), dtype=torch.int64, device="cpu")
    places: list[Tensor] = []  # a number for every position of every segment
    for bits in (None, *bits_in(layer)):
        prefix = "" if bits is None else prefix_of(bits)
        lengths, positions = layer[f"{prefix}lengths"].long().flatten(), layer[f"{prefix}positions"].long()
        entries = len(positions)
        if int(lengths.sum()) != entries:
            raise BadInput(f"{place} has lengths that sum to {int(lengths.sum())}, but {entries} keys. {COMPRESS}")
        if entries and int(positions.max()) >= limit:
            raise BadInput(f"{place} keeps position {int(positions.max())} of {limit}. {COMPRESS}")
        if not _ascending(positions, lengths):
            raise BadInput(f"{place} has a head whose positions do not ascend. {COMPRESS}")
        if bits is not None and int((-(-lengths // GROUP[bits.keys])).sum()) != len(layer[f"{prefix}key_scales"]):
            raise BadInput(f"{place} has {entries} keys, but not the scales of as many blocks. {COMPRESS}")
        scales = [] if bits is None else [layer[f"{prefix}{name}_scales"][:, 0] for name in ("key", "value")]
        if any(bool((scale < 0).any()) for scale in scales):  # kernels count on it
            raise BadInput(f"{place} has scales below 0. {COMPRESS}")
        places.append(
            torch.arange(len(lengths), dtype=torch.int64, device="cpu").repeat_interleave(lengths) * limit + positions
        )
        kept += lengths
    if len(torch.cat(places).unique()) < sum(map(len, places)):
        raise BadInput(f"{place} keeps a position twice in one head. {COMPRESS}")
    if int(kept.max()) > context:
        raise BadInput(
            f"{place} keeps {int(kept.max())} entries in a head, of a context of {context} tokens. {COMPRESS}"
        )


def _ascending(positions: Int[Tensor, " rows"], lengths: Int[Tensor, " segments"]) -> bool:
    """Within every segment."""
    step = positions.diff()
    borders = lengths.cumsum(0)[:-1]
    borders = borders[(borders > 0) & (borders < len(positions))]
    step[borders - 1] = 1
    return bool((step > 0).all())
