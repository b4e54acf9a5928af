"""What compression buys on given hardware, from the model's configuration alone: no weights are loaded."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from headwise.errors import BadInput
from headwise.kernels.quantised import AUTO, NATIVE, parse_entries
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.reading import EVICT, EXACT, MARGIN, OFFLOAD, piece_size, require_reading
from headwise.methods.storage import Storage, require_bytes
from headwise.models.layout import heads_of, layers_of, max_positions, shape_of, text_config
from headwise.models.loading import auto_class

ACTIVATIONS_NOTE = "activations, logits and the framework's own memory are not counted: leave 10-20% free"
STATES_NOTE = "the states of layers with linear attention or convolutions are not counted: they do not grow"
NO_DTYPE_NOTE = "the configuration names no dtype, so float32 is assumed: name another one if the weights have it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """KV memory of a batch before and after, in bytes; what fits is None without a memory size."""

    context: int
    keep: float | str
    entries: str
    batch: int
    dtype: str
    weight_bytes: int
    full_kv_bytes: int
    kv_bytes: int
    peak_kv_bytes: int  # while the context is read, scope "layer": the compressed cache and one full layer
    peak_kv_bytes_model_scope: int  # at most, scope "model": everything, and what is kept of the first layer to be cut
    reading: str  # what both peaks are of, see headwise.compress
    prefill_chunk_size: int  # tokens of a piece
    sliding_kv_bytes: int  # part of both: sliding-window layers, left whole
    memory_bytes: int | None
    full_fits: bool | None
    fits: bool | None
    max_batch_full: int | None
    max_batch: int | None
    max_context_full: int | None
    max_context: int | None
    max_positions: int  # the longest context the model was made for
    beyond_positions: bool  # whether `context` is longer than that
    note: str = ACTIVATIONS_NOTE


def plan(
    config: PretrainedConfig,
    *,
    context: int,
    keep: float | str | Keep,
    entries: str = NATIVE,
    batch: int = 1,
    memory: int | None = None,
    dtype: torch.dtype | None = None,
    reading: str = EXACT,
    prefill_chunk_size: int | None = None,
) -> Plan:
    """KV bytes of `batch` contexts of `context` tokens, with everything kept and with `keep`; what fits in `memory`.

    `dtype` is that of keys, values and weights; None is the checkpoint's own, as its configuration names it. Weights of
    a quantised checkpoint are counted as it stores them; its keys and values have its dtype. What is kept is stored as
    `entries` says. It is counted for heads that all keep the same, the first tokens among it, which stay native; with
    "auto" it takes the bytes that `keep` must then say, however heads share them.
    `reading` and `prefill_chunk_size` are those of headwise.compress; with "evict" a peak is what is kept, the margin
    and one piece, with "offload" two layers, or what is kept and one. Bytes outside of memory are not counted.
    `max_batch` and `max_context` are what the memory has room for, for an allocator of scope "layer"; `max_context` may
    exceed `max_positions`. Raises BadInput, UnsupportedModel.
    """
    if batch < 1 or context < 1:
        raise BadInput(f"context={context} and batch={batch} must be at least 1.")
    dtype, of_dtype = (dtype, []) if dtype else _own_dtype(config)
    size, keep = piece_size(reading, prefill_chunk_size, context), _parse_keep(keep, reading, entries)
    pieces = None if size == context and reading == EXACT else size  # None: all at once, however long
    sizes = _Sizes(config, dtype, entries, reading, pieces)
    weights, of_weights = _weight_bytes(config, dtype)
    fit = _fit(sizes, context, batch, keep, None if memory is None else max(0, memory - weights))
    return Plan(
        context=context,
        keep=keep.value,
        entries=entries,
        batch=batch,
        dtype=_name(dtype),
        weight_bytes=weights,
        full_kv_bytes=sizes.held(context, batch, None),
        kv_bytes=sizes.held(context, batch, keep),
        peak_kv_bytes=sizes.peak(context, batch, keep),
        peak_kv_bytes_model_scope=sizes.peak(context, batch, keep, whole_first=True),
        reading=reading,
        prefill_chunk_size=min(size, context),
        sliding_kv_bytes=sizes.sliding(context, batch),
        memory_bytes=memory,
        **asdict(fit),
        max_positions=max_positions(config),
        beyond_positions=context > max_positions(config),
        note="; ".join([ACTIVATIONS_NOTE, *of_dtype, *of_weights, *_of_states(config)]),
    )


def _parse_keep(keep: float | str | Keep, reading: str, entries: str) -> Keep:
    """Raises BadInput where it, the reading and the entries do not go together."""
    parsed = parse_keep(keep)
    require_reading(reading, entries)
    if entries == AUTO:
        require_bytes(parsed)
    return parsed


def _of_states(config: PretrainedConfig) -> list[str]:
    return [STATES_NOTE] if any(layer.kind == "state" for layer in layers_of(config)) else []


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """What a memory has room for; None where no memory is given."""

    full_fits: bool | None = None
    fits: bool | None = None
    max_batch_full: int | None = None
    max_batch: int | None = None
    max_context_full: int | None = None
    max_context: int | None = None


def _fit(sizes: "_Sizes", context: int, batch: int, keep: Keep, room: int | None) -> _Fit:
    if room is None:
        return _Fit()
    return _Fit(
        full_fits=sizes.held(context, batch, None) <= room,
        fits=sizes.peak(context, batch, keep) <= room,
        max_batch_full=_largest(lambda b: sizes.held(context, b, None) <= room),
        max_batch=_largest(lambda b: sizes.peak(context, b, keep) <= room),
        max_context_full=_largest(lambda n: sizes.held(n, batch, None) <= room),
        max_context=_largest(lambda n: sizes.peak(n, batch, keep) <= room),
    )


def _own_dtype(config: PretrainedConfig) -> tuple[torch.dtype, list[str]]:
    """The checkpoint's, and what a reader must know of it."""
    named = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    return (named, []) if named else (torch.float32, [NO_DTYPE_NOTE])


class _Sizes:
    """KV bytes of one model in one precision, what is kept in perhaps fewer bits."""

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        entries: str,
        reading: str = EXACT,
        piece: int | None = None,
    ):
        self.reading, self.piece = reading, piece
        self.auto = entries == AUTO
        bits = None if self.auto else parse_entries(entries)
        self.shape = shape_of(config)
        self.storage = Storage(head_dim=self.shape.head_dim, itemsize=dtype.itemsize, bits=bits)
        self.entry = self.storage.native
        layers = enumerate(layers_of(config))
        # Of every layer with a window: tokens that it holds, and numbers of a token in all of its heads.
        self.windows = [(layer.window - 1, 2 * prod(heads_of(config, i))) for i, layer in layers if layer.window]
        self.itemsize = dtype.itemsize

    def sliding(self, context: int, batch: int) -> int:
        return batch * self.itemsize * sum(min(context, tokens) * numbers for tokens, numbers in self.windows)

    def layer(self, context: int, batch: int) -> int:
        return batch * self.shape.kv_heads * context * self.entry

    def held(self, context: int, batch: int, keep: Keep | None) -> int:
        everything = self.layer(context, batch) * len(self.shape.layers)
        if keep is None:
            return everything + self.sliding(context, batch)
        keep = _of_one(keep, batch)
        if self.auto:
            (limit,) = keep.limits(shape=self.shape, tokens=[context], entry_bytes=self.entry)
            return batch * min(limit, self.layer(context, 1) * len(self.shape.layers)) + self.sliding(context, batch)
        (entries,) = keep.entries(shape=self.shape, tokens=[context], entry_bytes=self.entry)
        if keep.counts_bytes and self.storage.bits is not None:
            (limit,) = keep.limits(shape=self.shape, tokens=[context], entry_bytes=self.entry)
            everything = self.shape.num_heads * context
            entries = min(everything, _largest(lambda n: n <= everything and self.stored(n) <= limit))
        return batch * self.stored(entries) + self.sliding(context, batch)

    def stored(self, entries: int) -> int:
        """Bytes of so many entries, shared evenly by all heads."""
        each, more = divmod(entries, self.shape.num_heads)
        fewer, most = self.storage.nbytes(torch.tensor([each, each + 1], dtype=torch.int64, device="cpu")).tolist()
        return (self.shape.num_heads - more) * fewer + more * most

    def peak(self, context: int, batch: int, keep: Keep, *, whole_first: bool = False) -> int:
        """While a context is read; `whole_first`: no layer is cut before all have seen it, or a piece of it."""
        kept, sliding, layer = self.held(context, batch, keep), self.sliding(context, batch), self.layer(context, batch)
        layers = len(self.shape.layers)
        if self.reading == EVICT:
            piece = self.layer(min(context, self.piece or context), batch) * (layers if whole_first else 1)
            return min(layers * layer, self._with_margin(context, batch, keep)) + piece + sliding
        if self.reading == OFFLOAD:
            return max(kept + layer, 2 * layer + sliding)
        if whole_first:
            return layers * layer + sliding + min(layer, kept - sliding)
        if self.piece is not None and self.piece < context:  # all layers are whole but for the last piece
            before = (context - 1) // self.piece * self.piece
            return max(kept + layer, layers * self.layer(before, batch) + layer + sliding)
        return kept + layer

    def _with_margin(self, context: int, batch: int, keep: Keep) -> int:
        """Bytes of what is held between pieces: entries are native until the last cut."""
        keep = _of_one(keep, batch)
        if keep.counts_bytes and self.storage.bits is not None:
            each = keep.limits(shape=self.shape, tokens=[context], entry_bytes=self.entry)[0] // self.storage.least
        else:
            (each,) = keep.entries(shape=self.shape, tokens=[context], entry_bytes=self.entry)
        return batch * ceil(each * (1 + MARGIN)) * self.entry


def _of_one(keep: Keep, batch: int) -> Keep:
    """The keep of one of several rows that are alike."""
    return replace(keep, amount=keep.amount / batch) if keep.kind == "bytes" else keep


def _largest(fits: Callable[[int], bool]) -> int:
    """Largest n >= 0 for which `fits(n)`; it must be monotone."""
    if not fits(1):
        return 0
    high = 1
    while fits(2 * high) and high < 2**40:
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _weight_bytes(config: PretrainedConfig, dtype: torch.dtype) -> tuple[int, list[str]]:
    """Bytes of all weights, and what a reader must know of a quantised checkpoint."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    nbytes = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    quantisation = getattr(config, "quantization_config", None)
    if not quantisation:
        return nbytes, []
    settings = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    bits, method = _bits(settings), settings.get("quant_method", "unknown")
    if not bits:
        return nbytes, [f"how {method} quantises is not known here, so weights are counted as {_name(dtype)}"]
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    note = f"weights of linear layers are counted with {bits} bits ({method}), without their scales"
    return nbytes - linear * dtype.itemsize + linear * bits // 8, [note]


def _bits(settings: dict[str, Any]) -> int:
    """Bits of a quantised weight, by what transformers' quantisers write into a configuration; 0 if it is not said."""
    if settings.get("bits"):  # gptq, awq, hqq and others
        return int(settings["bits"])
    for bits in (4, 8):  # bitsandbytes
        if settings.get(f"load_in_{bits}bit"):
            return bits
    groups = settings.get("config_groups") or {}  # compressed-tensors: the first group, which is mostly the only one
    for group in groups.values():
        return int((group.get("weights") or {}).get("num_bits") or 0)
    return {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4}.get(str(settings.get("quant_method")), 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
