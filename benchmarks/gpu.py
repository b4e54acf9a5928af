"""Claim: on one GPU, decode attention over kept entries runs at 75% of the copy bandwidth or more, and a model gains.

Parts. `decode`: one layer of Llama-3.1-8B (8 KV heads, 4 query heads each, D = 128), our kernels against PyTorch's over
the whole cache. `tune`: tiles and chunk sizes of the Triton kernel. `generate`: a random model of Llama-3.1-8B's shape,
from prompt to tokens, and the largest batch that fits. Kernels are checked before they are timed: a wrong one ends the
run. Caches are defeated by going round several copies of the storage; times are medians of CUDA graph replays where a
candidate can be captured, else of eager runs between events.

    python benchmarks/gpu.py decode --json decode.json
    python benchmarks/gpu.py generate --json generate.json
"""

import argparse
import gc
import json
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import transformers
import triton
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import headwise
from headwise.cache.cache import RaggedCache
from headwise.files.writing import write_bytes
from headwise.kernels import pages, reference, triton_decode
from headwise.kernels import segments as layout
from headwise.kernels.segments import Segments

PROFILE = (1.00, 0.20, 0.12, 0.10, 0.08, 0.05, 0.03, 0.02)  # kept fraction of each KV head: 20% on average
HEADS, GROUP, TAIL = len(PROFILE), 4, 64
OURS = "headwise triton"
FULL = ("sdpa flash gqa", "sdpa default gqa", "sdpa group folded", "transformers", "transformers, padded batch")
METHODS = ("keydiff", "snapkv+adakv", "streaming")
KEEP = 0.15
NEW_TOKENS, WARM_UP, PROFILED = 64, 4, 4
GIB = 2**30


class Attention(nn.Module):
    """What transformers' attention function wants to know of the layer it serves."""

    num_key_value_groups = GROUP
    is_causal = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One configuration to measure."""

    tokens: int
    batch: int
    keep: float = 0.2
    dtype: str = "bfloat16"
    profile: str = "skewed"
    dim: int = 128

    @property
    def fractions(self) -> list[float]:
        """Kept fraction of each head: the profile, scaled to the mean `keep`, no head above 1."""
        if self.profile == "uniform":
            return [self.keep] * HEADS
        low, high = 0.0, 1 / min(PROFILE)
        for _ in range(60):
            scale = (low + high) / 2
            above = sum(min(1.0, scale * p) for p in PROFILE) / HEADS > self.keep
            low, high = (low, scale) if above else (scale, high)
        return [min(1.0, low * p) for p in PROFILE]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where it runs. Tiny: on the CPU, in Triton's interpreter, to see that nothing breaks."""

    tiny: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def memory(self) -> int:
        """Bytes of memory that are free, what PyTorch has cached included."""
        if self.tiny:
            return 2**30
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Let go of what nobody holds, and count peaks from here."""
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return 0 if self.tiny else torch.cuda.max_memory_allocated()

    def seconds(self, run: Callable[[], Any]) -> float:
        self.synchronize()
        begin = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - begin

    def describe(self) -> dict[str, Any]:
        name = platform.processor() if self.tiny else torch.cuda.get_device_name()
        return {
            "device": name,
            "memory_gib": round(self.memory / GIB, 1),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
            "headwise": headwise.__version__,
        }


class Record:
    """Everything measured so far, printed as it comes and written whenever there is more."""

    def __init__(self, path: str | None, machine: Machine, part: str):
        self.path = path
        self.begin = time.monotonic()
        self.content: dict[str, Any] = {"part": part, "machine": machine.describe(), "results": []}
        say(", ".join(f"{k} {v}" for k, v in self.content["machine"].items()))

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def add(self, **result: Any) -> None:
        self.content["results"].append(result)
        self.content["seconds"] = self.elapsed
        self.write()

    def write(self) -> None:
        if self.path:
            write_bytes(self.path, json.dumps(self.content, indent=1).encode())

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What does not fit or fails is noted, and the rest goes on."""
        try:
            yield
        except torch.OutOfMemoryError:
            say(f"{name}: does not fit the memory")
            self.add(name=name, failed="out of memory")
        except Exception as error:
            say(f"{name}: FAILED\n{traceback.format_exc()}")
            self.add(name=name, failed=repr(error)[:500])


def main() -> None:
    arguments = parse()
    if arguments.tiny and not triton_decode.interpreted():
        sys.exit("--tiny needs TRITON_INTERPRET=1 in the environment.")
    torch.manual_seed(0)
    machine = Machine(tiny=arguments.tiny)
    parts = {"decode": decode, "tune": tune, "generate": generate}
    record = Record(arguments.json, machine, arguments.part)
    try:
        with torch.no_grad():
            parts[arguments.part](machine, record)
    finally:
        record.write()
    say(f"done in {record.elapsed:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["decode", "tune", "generate"])
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def say(text: str) -> None:
    print(text, flush=True)


# ---- decode attention of one layer


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Random keys, values and queries of one layer; one new token per row, the last of a tail of 64."""

    query: Tensor  # [B, Hq, 1, D]
    full: tuple[Tensor, Tensor] | None  # [B, H, N + tail, D]
    segments: Segments
    tail: tuple[Tensor, Tensor]
    scaling: float

    @property
    def grouped(self) -> Tensor:
        batch, _, _, dim = self.query.shape
        return self.query.view(batch, HEADS, GROUP, 1, dim)

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.query), device=self.query.device)

    @property
    def kept_bytes(self) -> int:
        return self.segments.nbytes + sum(t.nbytes for t in self.tail)


def decode_points(tiny: bool) -> list[Point]:
    if tiny:
        return [Point(tokens=512, batch=2, dim=64, dtype="float32"), Point(tokens=512, batch=1, keep=0.05, dim=64)]
    skewed = [Point(tokens=tokens, batch=batch) for tokens in (32768, 131072) for batch in (1, 4, 8, 16)]
    main_point = Point(tokens=32768, batch=8)
    variants = [
        replace(main_point, profile="uniform"),
        replace(main_point, keep=0.05),
        replace(main_point, keep=0.5),
        replace(main_point, dtype="float32"),
    ]
    return [main_point, *(p for p in skewed if p != main_point), *variants]


def decode(machine: Machine, record: Record) -> None:
    copy = copy_bandwidth(machine)
    record.content["copy_gb_per_s"] = copy / 1e9
    say(f"copy bandwidth {copy / 1e9:.0f} GB/s (read + written)")
    for point in decode_points(machine.tiny):
        machine.clear()
        with record.attempt(str(point)):
            decode_point(point, machine, record, copy)


def decode_point(point: Point, machine: Machine, record: Record, copy: float) -> None:
    say(f"\n{point}")
    size = getattr(torch, point.dtype).itemsize
    needed = 3.2 * 2 * point.batch * HEADS * point.tokens * point.dim * size
    if needed > machine.memory:
        say(f"skipped: needs about {needed / GIB:.0f} GiB, {machine.memory / GIB:.0f} are free")
        record.add(point=asdict(point), skipped="memory")
        return
    layer = make_layer(point, machine.device)
    errors = check(layer)
    times: dict[str, dict[str, Any]] = {}
    for name, runs, capture in candidates(layer, machine):
        try:
            times[name] = {"us": timed(runs, machine, capture) * 1e6, "copies": len(runs)}
        except Exception as error:
            times[name] = {"failed": repr(error)[:300]}
        machine.clear()
    report(point, layer, times, errors, copy, record)


def make_layer(point: Point, device: torch.device) -> Layer:
    dtype = getattr(torch, point.dtype)
    shape = (point.batch, HEADS, point.tokens + TAIL, point.dim)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    counts = torch.tensor([round(f * point.tokens) for f in point.fractions], device=device)
    kept = torch.stack(
        [
            torch.rand(HEADS, point.tokens, device=device).argsort(-1).argsort(-1) < counts[:, None]
            for _ in range(point.batch)
        ]
    )
    positions = torch.arange(point.tokens, device=device).expand(point.batch, -1)
    tail = (keys[:, :, point.tokens :].clone(), values[:, :, point.tokens :].clone())
    segments = layout.gather(keys[:, :, : point.tokens], values[:, :, : point.tokens], kept, positions)
    return Layer(
        query=2 * torch.randn(point.batch, HEADS * GROUP, 1, point.dim, dtype=dtype, device=device),
        full=(keys, values),
        segments=segments,
        tail=tail,
        scaling=point.dim**-0.5,
    )


def check(layer: Layer) -> dict[str, float]:
    """Relative errors against float64 over the kept entries. A wrong kernel ends the run."""
    exact_segments = replace(layer.segments, keys=layer.segments.keys.double(), values=layer.segments.values.double())
    tail = layer.tail[0].double(), layer.tail[1].double()
    exact = reference.attend(layer.grouped.double(), exact_segments, layer.rows, *tail, None, layer.scaling)
    del exact_segments
    plain = relative_error(plain_attention(layer), exact)
    found = {
        OURS: relative_error(by_kernel(triton_decode.attend, layer, layer.segments), exact),
        "headwise pages": relative_error(by_kernel(pages.attend, layer, layer.segments), exact),
    }
    wrong = [f"{name}: error {e:.1e}, plain PyTorch {plain:.1e}" for name, e in found.items() if not e <= 2 * plain]
    if wrong:
        sys.exit("WRONG RESULT\n" + "\n".join(wrong))
    return {**found, "plain": plain}


def plain_attention(layer: Layer) -> Tensor:
    """PyTorch's attention in the same precision, one head at a time."""
    out = torch.empty_like(layer.grouped)
    for row in range(len(out)):
        for head in range(HEADS):
            part = layer.segments.slice(row * HEADS + head)
            keys = torch.cat([layer.segments.keys[part], layer.tail[0][row, head]])
            values = torch.cat([layer.segments.values[part], layer.tail[1][row, head]])
            query = layer.grouped[row, head].transpose(0, 1)[None]  # [1, 1, G, D]
            found = functional.scaled_dot_product_attention(
                query, keys[None, None], values[None, None], scale=layer.scaling
            )
            out[row, head] = found[0].transpose(0, 1)
    return out


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def by_kernel(kernel: Callable[..., Tensor], layer: Layer, segments: Segments, rows: Tensor | None = None) -> Tensor:
    return kernel(layer.grouped, segments, layer.rows if rows is None else rows, *layer.tail, None, layer.scaling)


Runs = list[Callable[[], Tensor]]


def candidates(layer: Layer, machine: Machine) -> Iterator[tuple[str, Runs, bool]]:
    """Name, a run per copy of the storage, and whether it can be captured in a graph."""
    rows = layer.rows
    ragged = [
        replace(layer.segments, keys=k, values=v)
        for k, v in copies((layer.segments.keys, layer.segments.values), machine)
    ]
    yield OURS, [lambda s=s: by_kernel(triton_decode.attend, layer, s, rows) for s in ragged], True
    yield "headwise pages", [lambda s=s: by_kernel(pages.attend, layer, s, rows) for s in ragged], False
    del ragged
    assert layer.full is not None
    full = copies(layer.full, machine)
    query, scale = layer.query, layer.scaling
    folded = layer.grouped.squeeze(3)
    mask = torch.ones(len(query), 1, 1, full[0][0].shape[2], dtype=torch.bool, device=query.device)

    def flash(keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(keys, values)

    def sdpa(keys: Tensor, values: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)

    def fold(keys: Tensor, values: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(folded, keys, values, scale=scale)

    def stock(keys: Tensor, values: Tensor) -> Tensor:
        return sdpa_attention_forward(Attention(), query, keys, values, None, scaling=scale)[0]

    def padded(keys: Tensor, values: Tensor) -> Tensor:
        return sdpa_attention_forward(Attention(), query, keys, values, mask, scaling=scale)[0]

    for name, run in zip(FULL, (flash, sdpa, fold, stock, padded), strict=True):
        yield name, [lambda k=k, v=v, run=run: run(k, v) for k, v in full], True


def copies(pair: tuple[Tensor, Tensor], machine: Machine) -> list[tuple[Tensor, Tensor]]:
    """The pair, and clones, until together they are far larger than any cache."""
    wanted = 2**20 if machine.tiny else 2**29
    count = min(16, max(2, math.ceil(wanted / sum(t.nbytes for t in pair))))
    return [pair, *((pair[0].clone(), pair[1].clone()) for _ in range(count - 1))]


def timed(runs: Runs, machine: Machine, capture: bool) -> float:
    """Median seconds of one run."""
    for run in runs:
        run()
    machine.synchronize()
    turns = max(1, 8 // len(runs))
    if machine.tiny:
        return machine.seconds(runs[0])

    def all_turns() -> None:
        for run in runs * turns:
            run()

    replay = all_turns
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_turns()
        replay = graph.replay
    replay()
    return median(event_seconds(replay) for _ in range(15)) / (turns * len(runs))


def event_seconds(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(machine: Machine) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    size = 2**20 if machine.tiny else 2**31
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    measure = machine.seconds if machine.tiny else event_seconds
    return 2 * size / median(measure(lambda: target.copy_(source)) for _ in range(12))


def report(
    point: Point, layer: Layer, times: dict[str, dict[str, Any]], errors: dict[str, float], copy: float, record: Record
) -> None:
    ours = times[OURS].get("us")
    bandwidth = layer.kept_bytes / ours * 1e6 if ours else 0.0
    for name, entry in times.items():
        us = entry.get("us")
        factor = f"{us / ours:7.2f}x our time" if us and ours else ""
        say(f"  {name:28}" + (f"{us:10.1f} us {factor}" if us else f"failed: {entry['failed'][:110]}"))
    say(
        f"  errors {', '.join(f'{k} {v:.1e}' for k, v in errors.items())}; chunks of {layer.segments.chunks.size}: "
        f"{len(layer.segments.chunks.segment)}\n  ours reads {layer.kept_bytes / 1e6:.0f} MB at "
        f"{bandwidth / 1e9:.0f} GB/s = {bandwidth / copy:.1%} of the copy bandwidth"
    )
    record.add(
        point=asdict(point),
        times=times,
        errors=errors,
        kept_bytes=layer.kept_bytes,
        gb_per_s=bandwidth / 1e9,
        share_of_copy=bandwidth / copy,
        chunk=layer.segments.chunks.size,
    )


# ---- tiles and chunks


def tune(machine: Machine, record: Record) -> None:
    copy = copy_bandwidth(machine)
    say(f"copy bandwidth {copy / 1e9:.0f} GB/s")
    record.content["copy_gb_per_s"] = copy / 1e9
    points = (
        [Point(tokens=512, batch=1, dim=64)]
        if machine.tiny
        else [Point(tokens=32768, batch=8), Point(tokens=32768, batch=1), Point(tokens=131072, batch=8)]
    )
    points += [replace(points[0], dtype="float32")]
    for point in points:
        machine.clear()
        with record.attempt(str(point)):
            tune_point(point, machine, record, copy)


def tune_point(point: Point, machine: Machine, record: Record, copy: float) -> None:
    layer = replace(make_layer(point, machine.device), full=None)
    expected, rows = by_kernel(triton_decode.attend, layer, layer.segments), layer.rows
    check(layer)
    pairs = copies((layer.segments.keys, layer.segments.values), machine)
    default = layer.segments.chunks.size
    chunks = [default] if machine.tiny else sorted({max(128, default // 2), default, min(2048, default * 2)})
    found = []
    for size in chunks:
        ragged = [with_chunks(replace(layer.segments, keys=k, values=v), size) for k, v in pairs]
        for tiles in tilings(point, machine.tiny):

            def run(segments: Segments, tiles: triton_decode.Tiles = tiles) -> Tensor:
                return triton_decode.attend_split(
                    layer.grouped, segments, rows, *layer.tail, None, layer.scaling, tiles
                )

            try:
                assert relative_error(run(ragged[0]), expected.double()) < 1e-2
                us = timed([lambda s=s, run=run: run(s) for s in ragged], machine, True) * 1e6
            except Exception as error:
                say(f"  {tiles} failed: {repr(error)[:100]}")
                continue
            found.append((us, size, tiles))
            record.add(point=asdict(point), chunk=size, tiles=asdict(tiles), us=us)
    say(f"\n{point}: best of {len(found)}; the default chunk is {default}")
    usual = triton_decode.Tiles.of(GROUP, point.dim, expected.itemsize)
    for us, size, tiles in sorted(found, key=lambda f: f[0])[:8] + [f for f in found if f[1:] == (default, usual)]:
        share = layer.kept_bytes / us * 1e6 / copy
        mark = " (default)" if (size, tiles) == (default, usual) else ""
        say(
            f"  {us:8.1f} us {share:6.1%} of copy  chunk {size:5} tokens {tiles.tokens:4} warps {tiles.num_warps} "
            f"stages {tiles.num_stages}{mark}"
        )


def tilings(point: Point, tiny: bool) -> list[triton_decode.Tiles]:
    usual = triton_decode.Tiles.of(GROUP, point.dim, getattr(torch, point.dtype).itemsize)
    if tiny:
        return [usual]
    return [usual] + [
        option
        for tokens in (usual.tokens // 2, usual.tokens, usual.tokens * 2)
        for num_warps in ((2, 4, 8) if point.dtype != "float32" else (4, 8))
        for num_stages in (2, 3, 4, 5)
        if (option := replace(usual, tokens=tokens, num_warps=num_warps, num_stages=num_stages)) != usual
    ]


def with_chunks(segments: Segments, size: int) -> Segments:
    """The same storage, to be read in chunks of another size."""
    segments.__dict__["chunks"] = layout.split_into_chunks(segments.lengths, size, segments.keys.device)
    return segments


# ---- a whole model


def generate(machine: Machine, record: Record) -> None:
    model = make_model(machine)
    say(f"model: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {record.elapsed:.0f} s")
    contexts = [256] if machine.tiny else [32768, 131072 - NEW_TOKENS - WARM_UP - PROFILED]
    vocabulary = model.config.vocab_size
    warm = torch.randint(0, vocabulary, (1, 256), device=machine.device)
    with record.attempt("warm-up"):
        for method in (None, *METHODS):
            read_and_decode(model, warm, method, machine)
    for tokens in contexts:
        ids = torch.randint(0, vocabulary, (1, tokens), device=machine.device)
        for method in (None, *METHODS):
            if record.elapsed > 300:
                say(f"{tokens} tokens, {method}: skipped, out of time")
                continue
            with record.attempt(f"{method or 'full cache'}, {tokens} tokens"):
                result = read_and_decode(model, ids, method, machine)
                describe(f"{method or 'full cache'}, {tokens} tokens", result)
                record.add(method=method or "full cache", tokens=tokens, **result)
        if tokens == contexts[0]:
            largest_batches(model, ids, machine, record)


def make_model(machine: Machine) -> PreTrainedModel:
    """Random weights of Llama-3.1-8B's shape, made on the device in bfloat16."""
    size: dict[str, Any] = (
        {
            "hidden_size": 256,
            "intermediate_size": 256,
            "vocab_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        if machine.tiny
        else {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        }
    )
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        **size,
        num_key_value_heads=size["num_attention_heads"] // GROUP,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with machine.device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def read_and_decode(model: PreTrainedModel, ids: Tensor, method: str | None, machine: Machine) -> dict[str, Any]:
    """Read a prompt and decode; `method` None is transformers' cache and attention."""
    machine.clear()
    cache: Any = None

    def read() -> None:
        nonlocal cache
        cache = read_full(model, ids) if method is None else headwise.compress(model, ids, method, keep=KEEP)

    prefill = machine.seconds(read)
    prefill_peak = machine.peak()
    machine.clear()
    result = {"prefill_s": prefill, "prefill_peak_bytes": prefill_peak, "kv_bytes": kv_bytes(cache)}
    return result | decode_tokens(model, cache, len(ids), machine)


def read_full(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def decode_tokens(model: PreTrainedModel, cache: Any, batch: int, machine: Machine) -> dict[str, Any]:
    """Greedy decoding of 64 tokens after a warm-up of 4, and how long the GPU is busy per step."""
    token = torch.ones(batch, 1, dtype=torch.long, device=machine.device)

    def steps(count: int) -> None:
        nonlocal token
        for _ in range(count):
            token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    steps(WARM_UP)
    seconds = machine.seconds(lambda: steps(NEW_TOKENS))
    peak = machine.peak()
    return {
        "batch": batch,
        "step_ms": seconds / NEW_TOKENS * 1e3,
        "tokens_per_s": batch * NEW_TOKENS / seconds,
        "decode_peak_bytes": peak,
        "gpu_busy_ms": busy_ms(lambda: steps(PROFILED), machine) / PROFILED,
    }


def busy_ms(run: Callable[[], Any], machine: Machine) -> float:
    """Time that kernels take on the GPU, without the gaps between them; NaN where no profiler works."""
    if machine.tiny:
        run()
        return math.nan
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        return sum(event.self_device_time_total for event in profile.key_averages()) / 1e3
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        say(f"  no profiler: {repr(error)[:100]}")
        return math.nan


def kv_bytes(cache: Any) -> int:
    if isinstance(cache, RaggedCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def describe(name: str, result: dict[str, Any]) -> None:
    prefill = ""
    if "prefill_s" in result:
        prefill = f"prefill {result['prefill_s']:.2f} s, peak {result['prefill_peak_bytes'] / GIB:.1f} GiB; "
    say(
        f"{name}, batch {result['batch']}: {prefill}KV {result['kv_bytes'] / GIB:.2f} GiB; "
        f"decode {result['tokens_per_s']:.1f} tokens/s, {result['step_ms']:.1f} ms a step, "
        f"GPU busy {result['gpu_busy_ms']:.1f} ms, peak {result['decode_peak_bytes'] / GIB:.1f} GiB"
    )


def largest_batches(model: PreTrainedModel, ids: Tensor, machine: Machine, record: Record) -> None:
    """How many contexts fit for decoding, and how fast a batch is. Contexts are read one at a time, then put together:
    one is read, and stored as often; of the whole cache, of which nothing but its size matters, random entries are."""
    for method in (None, "snapkv+adakv"):
        machine.clear()
        cache = None if method is None else headwise.compress(model, ids, method, keep=KEEP)
        machine.clear()
        name, largest = method or "full cache", estimate(model, ids.shape[1], cache, machine)
        say(f"largest batch, {name}: {machine.memory / GIB:.1f} GiB free, estimate {largest}")
        fits = [batch for batch in (4, 8) if batch < largest and not machine.tiny]
        batches = iter([*fits, largest, largest + max(1, largest // 25)])
        fitted = 0
        while record.elapsed < 330 and (batch := next(batches, None)) is not None:
            result = try_batch(model, ids.shape[1], cache, batch, machine)
            if result is None:
                say(f"  batch {batch} does not fit")
                record.add(method=name, tokens=ids.shape[1], batch=batch, failed="out of memory")
                smaller = batch - max(1, batch // 25)
                batches = iter([smaller] if smaller > fitted else [])
                continue
            fitted = batch
            describe(f"  {name}", result)
            record.add(method=name, tokens=ids.shape[1], **result)
        del cache


def estimate(model: PreTrainedModel, tokens: int, cache: RaggedCache | None, machine: Machine) -> int:
    """Contexts that should fit beside 1.5 GiB of other things."""
    if machine.tiny:
        return 2
    config: LlamaConfig = model.config  # pyright: ignore[reportAssignmentType]
    assert config.num_hidden_layers and config.num_key_value_heads
    full = 4 * config.num_hidden_layers * config.num_key_value_heads * tokens * 128
    free = machine.memory - 1.5 * GIB
    if cache is None:
        return int(free / (full * (1 + 1 / config.num_hidden_layers)))  # a layer is copied when it grows
    positions = sum(layer.index_nbytes for layer in cache.ragged_layers)
    return int(free / (cache.nbytes + positions + full * 128 / tokens))  # and a tail of 128


def try_batch(
    model: PreTrainedModel, tokens: int, cache: RaggedCache | None, batch: int, machine: Machine
) -> dict[str, Any] | None:
    """Decode with `batch` contexts, or None if they do not fit."""
    machine.clear()
    many: Any = None
    try:
        many = random_cache(model, tokens, batch) if cache is None else stacked(model, cache, batch)
        held = kv_bytes(many)
        return {"kv_bytes": held, **decode_tokens(model, many, batch, machine)}
    except torch.OutOfMemoryError:
        return None
    finally:
        del many
        machine.clear()


def random_cache(model: PreTrainedModel, tokens: int, batch: int) -> DynamicCache:
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    shape = (batch, model.config.num_key_value_heads, tokens, model.config.head_dim)
    for layer in range(model.config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
        del keys, values
    return cache


def stacked(model: PreTrainedModel, cache: RaggedCache, copies: int) -> RaggedCache:
    """A cache of `copies` contexts, each with storage of its own."""
    headwise.enable(model)
    twin = cache.fork()
    for layer in twin.frozen_layers:
        one = layer.segments
        layer.segments = Segments(
            keys=one.keys.repeat(copies, 1),
            values=one.values.repeat(copies, 1),
            positions=one.positions.repeat(copies),
            lengths=one.lengths * copies,
            kv_heads=one.kv_heads,
        )
        layer.put((torch.arange(copies, device=one.keys.device), *(t.repeat(copies, 1, 1, 1) for t in layer.tail)))
    return twin


if __name__ == "__main__":
    main()
