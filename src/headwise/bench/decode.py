"""Measure one decoding step of one layer on a CPU: every kernel, the full cache, and the floor that memory sets.

A layer's cache is random, and a share of its entries is kept, more in some heads than in others. Every candidate is
compared with float64 first: a wrong one ends the run. Runs go round copies of the storage, so that the processor's
caches do not help. They are interleaved, so that all see the same noise; times are medians of wall time. Only kvpress,
which needs an environment of its own, is measured right after the others.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headwise.bench.measuring import (
    MOST,
    WrongResult,
    exact_and_plain,
    in_worker,
    relative_error,
    require_kvpress,
    threads,
)
from headwise.errors import BadInput
from headwise.kernels import KERNELS, Kernel, get_kernel, native, usable
from headwise.kernels import segments as layout
from headwise.kernels.quantised import NATIVE, SINK, parse_entries
from headwise.kernels.segments import Segments

SKEW = (1.00, 0.20, 0.12, 0.10, 0.08, 0.05, 0.03, 0.02)  # kept by each KV head, in proportion
FULL, GROUPED, KVPRESS = "full", "full, grouped", "kvpress, head-wise"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

READ = "read", ""  # what only reads, for the floor

Runs = Sequence[Callable[[], Tensor]]
Key = tuple[str, str]  # of a candidate: its name, and how entries are stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The layer (by default Llama-3.1-8B's), its context, and how it is measured."""

    tokens: int = 32768
    keep: float = 0.2
    batch: int = 1
    dtype: str = "bfloat16"
    threads: int = 1
    kv_heads: int = 8
    group: int = 4  # query heads of each
    head_dim: int = 128
    tail: int = 64  # tokens since the context was cut
    entries: tuple[str, ...] = (NATIVE,)  # how what is kept is stored
    skewed: bool = True
    rounds: int = 15
    gigabytes: float = 1.0  # storage that each candidate goes round
    kvpress: Path | None = None  # the Python of an environment with it

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype={self.dtype!r} is not measured; choose {', '.join(DTYPES)}.")
        if not 0 < self.keep <= 1 or self.tokens * self.keep < 1:
            raise BadInput(f"keep={self.keep} of {self.tokens} tokens: it is a share in (0, 1] of at least one token.")
        if not self.entries:
            raise BadInput("entries must name how what is kept is stored, at least once.")
        for name in self.entries:
            parse_entries(name)
        if self.kvpress is not None and NATIVE not in self.entries:
            raise BadInput(f"kvpress is compared with native entries: name {NATIVE} among the entries.")
        sizes = (self.batch, self.threads, self.kv_heads, self.group, self.head_dim, self.tail, self.rounds)
        if min(sizes) < 1 or self.gigabytes <= 0:
            raise BadInput("sizes, threads, rounds and gigabytes must be above 0.")

    @property
    def scaling(self) -> float:
        """The factor of logits."""
        return self.head_dim**-0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The results of one candidate. `rel_error` is its relative error against float64, `plain_error` PyTorch's."""

    benchmark: str = "decode"
    candidate: str
    entries: str
    dtype: str
    batch: int
    ms: float
    speedup_vs_full: float
    times_floor: float
    rel_error: float
    plain_error: float
    floor_ms: float  # of reading what the candidate has to read
    kv_bytes: int  # of what it has to read
    tokens: int
    keep: float
    threads: int
    skewed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """The layer of all candidates: random states, and what every head keeps, the tail included."""

    query: Tensor
    keys: Tensor
    values: Tensor
    kept: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    name: str
    entries: str = NATIVE
    runs: Runs
    exact: Tensor
    plain_error: float
    nbytes: int

    @property
    def key(self) -> Key:
        return self.name, self.entries

    @property
    def error(self) -> float:
        return relative_error(self.runs[0](), self.exact)


class _Attention(nn.Module):
    """The attributes of a layer that transformers' attention function needs."""

    is_causal = True

    def __init__(self, group: int):
        super().__init__()
        self.num_key_value_groups = group


@torch.no_grad()
def run(settings: Settings) -> list[Row]:
    """Measure all candidates, and return a row of each.

    Raises BadInput if kvpress is asked for and missing, WrongResult if a result is wrong.
    """
    if settings.kvpress is not None:
        require_kvpress(settings.kvpress)
    with threads(settings.threads):
        torch.manual_seed(0)
        layer = _make_layer(settings)
        candidates, reads, read_bytes = _candidates(settings, layer)
        errors = {c.key: c.error for c in candidates}
        _require_correct(candidates, errors)
        times = _median_seconds({c.key: c.runs for c in candidates} | {READ: reads}, settings.rounds)
    seconds_per_byte = times[READ] / read_bytes
    if settings.kvpress is not None:
        exact, plain_error = next((c.exact, c.plain_error) for c in candidates[2:] if c.entries == NATIVE)
        output, seconds = _by_kvpress(settings, settings.kvpress, layer)
        pressed = _Candidate(
            name=KVPRESS, runs=[lambda: output], exact=exact, plain_error=plain_error, nbytes=_nbytes(layer)
        )
        candidates.append(pressed)
        times[pressed.key], errors[pressed.key] = seconds, pressed.error
        _require_correct(candidates, errors)
    return [
        Row(
            candidate=c.name,
            entries=c.entries,
            dtype=settings.dtype,
            batch=settings.batch,
            ms=1e3 * times[c.key],
            speedup_vs_full=times[FULL, NATIVE] / times[c.key],
            times_floor=times[c.key] / (seconds_per_byte * c.nbytes),
            rel_error=errors[c.key],
            plain_error=c.plain_error,
            floor_ms=1e3 * seconds_per_byte * c.nbytes,
            kv_bytes=c.nbytes,
            tokens=settings.tokens,
            keep=settings.keep,
            threads=settings.threads,
            skewed=settings.skewed,
        )
        for c in candidates
    ]


def kept_fractions(settings: Settings) -> Float[Tensor, " kv_heads"]:
    """Return the fraction that each head keeps; their mean is `keep`."""
    if not settings.skewed:
        return torch.full((settings.kv_heads,), settings.keep, dtype=torch.float32, device="cpu")
    shape = torch.tensor(
        [SKEW[head % len(SKEW)] for head in range(settings.kv_heads)], dtype=torch.float64, device="cpu"
    )
    low, high = 0.0, 1 / float(shape.min())
    for _ in range(60):  # a head cannot keep more than everything
        middle = (low + high) / 2
        low, high = (middle, high) if float((shape * middle).clamp(max=1).mean()) < settings.keep else (low, middle)
    return (shape * high).clamp(max=1).float()


def _require_correct(candidates: Sequence[_Candidate], errors: dict[Key, float]) -> None:
    wrong = [c for c in candidates if not errors[c.key] <= MOST * c.plain_error]
    if wrong:
        told = [c.name + ("" if c.entries == NATIVE else f" of {c.entries}") for c in wrong]
        pairs = zip(told, wrong, strict=True)
        listed = "; ".join(f"{name}: {errors[c.key]:.1e} (PyTorch {c.plain_error:.1e})" for name, c in pairs)
        raise WrongResult(f"nothing is shown, for results are wrong, by their relative error: {listed}.")


def _make_layer(settings: Settings) -> _Layer:
    batch, heads, tokens, dim = settings.batch, settings.kv_heads, settings.tokens + settings.tail, settings.head_dim
    dtype = DTYPES[settings.dtype]
    query = 2 * torch.randn(batch, heads * settings.group, 1, dim, dtype=torch.float32, device="cpu").to(dtype)
    keys, values = (
        torch.randn(batch, heads, tokens, dim, dtype=torch.float32, device="cpu").to(dtype) for _ in range(2)
    )
    kept = functional.pad(_kept(settings), (0, settings.tail), value=True)
    return _Layer(query=query, keys=keys, values=values, kept=kept)


def _nbytes(layer: _Layer) -> int:
    return layer.keys.nbytes + layer.values.nbytes


def _candidates(settings: Settings, layer: _Layer) -> tuple[list[_Candidate], Sequence[Callable[[], None]], int]:
    """Return all candidates, which decode the last token of the tail, and what only reads, with the bytes it reads."""
    query, keys, values, kept = layer.query, layer.keys, layer.values, layer.kept
    batch, heads, tokens, dim = settings.batch, settings.kv_heads, settings.tokens, settings.head_dim
    group, scaling = settings.group, settings.scaling
    everything = torch.ones_like(kept)
    exact = _exact_attention(query, keys, values, everything, scaling)
    plain = _plain_error(layer, everything, exact)
    attention, dense = _Attention(group), _copies((keys, values), settings.gigabytes)
    grouped = query.view(batch, heads, group, 1, dim)

    def by_transformers(k: Tensor, v: Tensor) -> Tensor:
        return sdpa_attention_forward(attention, query, k, v, None, scaling=scaling)[0].transpose(1, 2)

    def folded(k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(grouped[:, :, :, 0], k, v, scale=scaling).view_as(query)

    candidates = [
        _Candidate(name=name, runs=[lambda k=k, v=v, use=use: use(k, v) for k, v in dense], exact=exact,
                   plain_error=plain, nbytes=_nbytes(layer))
        for name, use in ((FULL, by_transformers), (GROUPED, folded))
    ]  # fmt: skip
    segments = _gather(keys[:, :, :tokens], values[:, :, :tokens], kept[:, :, :tokens])
    tail = keys[:, :, tokens:].clone(), values[:, :, tokens:].clone()
    for name in settings.entries:
        candidates += _ragged(settings, layer, segments, tail, name)
    read = _read if "native" in usable("cpu") else _read_by_torch
    whole = _copies((segments.keys, segments.values), settings.gigabytes)
    reads = [lambda k=k, v=v: read(k, v, *tail) for k, v in whole]
    return candidates, reads, segments.nbytes + tail[0].nbytes + tail[1].nbytes


def _ragged(
    settings: Settings, layer: _Layer, segments: Segments, tail: tuple[Tensor, Tensor], entries: str
) -> list[_Candidate]:
    """Return every kernel over what is kept, stored in one way; exact is attention over the numbers that codes are."""
    query, kept, scaling = layer.query, layer.kept, settings.scaling
    rows = torch.arange(settings.batch, dtype=torch.int64, device="cpu")
    grouped = query.view(settings.batch, settings.kv_heads, settings.group, 1, -1)
    bits = parse_entries(entries)
    if bits is None:
        exact = _exact_attention(query, layer.keys, layer.values, kept, scaling)
        plain_error = _plain_error(layer, kept, exact)
    else:
        segments = layout.quantise(segments, segments.positions >= SINK, bits)
        exact, plain = exact_and_plain(grouped, segments, rows, *tail, None, scaling)
        exact, plain_error = exact.view_as(query), relative_error(plain, exact)
    count = max(2, round(settings.gigabytes * 1e9 / max(1, segments.nbytes)))
    ring = [segments, *(_copied(segments) for _ in range(count - 1))]
    able = [name for name in usable("cpu") if bits is None or KERNELS[name].quantised]
    kernels = {name: get_kernel(name) for name in able if name != "reference"}

    def by_kernel(kernel: Kernel, storage: Segments) -> Tensor:
        return kernel(grouped, storage, rows, *tail, None, scaling).view_as(query)

    return [
        _Candidate(
            name=name,
            entries=entries,
            runs=[lambda s=s, use=use: by_kernel(use, s) for s in ring],
            exact=exact,
            plain_error=plain_error,
            nbytes=segments.nbytes + tail[0].nbytes + tail[1].nbytes,
        )
        for name, use in kernels.items()
    ]


def _gather(
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens head_dim"],
    kept: Bool[Tensor, "batch kv_heads tokens"],
) -> Segments:
    batch, _, tokens = kept.shape
    return layout.gather(
        keys, values, kept, torch.arange(tokens, dtype=torch.int64, device="cpu").expand(batch, tokens)
    )


def _kept(settings: Settings) -> Bool[Tensor, "batch kv_heads tokens"]:
    """Return random entries to keep, by each head's fraction. Every row has another order of heads."""
    fractions = kept_fractions(settings)
    counts = torch.stack([fractions.roll(row) for row in range(settings.batch)]).mul(settings.tokens).round()
    order = (
        torch.rand(settings.batch, settings.kv_heads, settings.tokens, dtype=torch.float32, device="cpu")
        .argsort(-1)
        .argsort(-1)
    )
    return order < counts.clamp(min=1)[..., None]


def _copies(tensors: tuple[Tensor, Tensor], gigabytes: float) -> list[tuple[Tensor, Tensor]]:
    count = max(2, round(gigabytes * 1e9 / sum(t.nbytes for t in tensors)))
    return [tensors, *((tensors[0].clone(), tensors[1].clone()) for _ in range(count - 1))]


def _copied(segments: Segments) -> Segments:
    """Return the same entries in storage of their own."""
    codes = ("keys", "key_scales", "values", "value_scales")
    return replace(
        segments,
        keys=segments.keys.clone(),
        values=segments.values.clone(),
        quantised=tuple(replace(x, **{name: getattr(x, name).clone() for name in codes}) for x in segments.quantised),
    )


def _exact_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Return attention in float64, computed one head at a time."""
    batch, heads = mask.shape[:2]
    grouped = query.view(batch, heads, -1, query.shape[-1]).double()
    outs = [
        (grouped[b, h] @ keys[b, h, mask[b, h]].double().T * scaling).softmax(-1) @ values[b, h, mask[b, h]].double()
        for b, h in itertools.product(range(batch), range(heads))
    ]
    return torch.cat(outs).view(query.shape)


def _plain_error(layer: _Layer, mask: Tensor, exact: Tensor) -> float:
    """Return PyTorch's relative error: the larger one of two ways to compute attention."""
    query, keys, values, group = layer.query, layer.keys, layer.values, layer.query.shape[1] // layer.keys.shape[1]
    by_head = mask.repeat_interleave(group, 1)[:, :, None]
    attend = functional.scaled_dot_product_attention
    grouped = attend(query, keys, values, attn_mask=by_head, enable_gqa=True)
    folded = attend(query.unflatten(1, (-1, group))[:, :, :, 0], keys, values, attn_mask=mask[:, :, None])
    return max(relative_error(grouped, exact), relative_error(folded.view_as(query), exact))


def _by_kvpress(settings: Settings, python: Path, layer: _Layer) -> tuple[Tensor, float]:
    """Return kvpress' output for the layer, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        layer_file, out = Path(folder) / "layer.pt", Path(folder) / "out.pt"
        torch.save({"query": layer.query, "keys": layer.keys, "values": layer.values, "kept": layer.kept}, layer_file)
        job = {
            "kind": "layer",
            "layer": str(layer_file),
            "out": str(out),
            "threads": settings.threads,
            "rounds": settings.rounds,
            "copies": round(settings.gigabytes * 1e9 / _nbytes(layer)),
            "scaling": settings.scaling,
        }
        seconds = in_worker(KVPRESS, job, python)["seconds"]
        return torch.load(out), seconds


def _read(*tensors: Tensor) -> None:
    for tensor in tensors:
        native.read(tensor)


def _read_by_torch(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.view(torch.int32).sum()


def _median_seconds(candidates: dict[Key, Sequence[Callable[[], Any]]], rounds: int) -> dict[Key, float]:
    """Return the median seconds of each candidate. All copies are touched before."""
    for call in itertools.chain.from_iterable(candidates.values()):
        call()
    rings = {name: itertools.cycle(runs) for name, runs in candidates.items()}
    times: dict[Key, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, ring in rings.items():
            call = next(ring)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in times.items()}
