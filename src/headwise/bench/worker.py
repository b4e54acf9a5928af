"""One candidate, measured in a process of its own. Writes what it found as JSON.

A whole model reads a context, then decodes: in a process of its own because only of a process can the most memory that
it held be measured. Or one layer decodes a token the way kvpress does. Run as a file, by headwise's Python or by that
of an environment with kvpress, so nothing of headwise is imported before it is needed.
"""

import ctypes
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SAMPLED = 512  # logits that are compared with those of other candidates
TIMED = 6  # decoding steps of which attention is timed: apart from the others, which that would slow down

Job = dict[str, Any]


def make_model(job: Job) -> Any:
    """A checkpoint, or a Llama with random weights that depend on its shape only (not on transformers' version)."""
    dtype = getattr(torch, job["dtype"])
    if job["shape"] is None:
        model = AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
        return model.to(job["device"]).eval().requires_grad_(False)
    with torch.device(job["device"]):
        model: Any = AutoModelForCausalLM.from_config(
            LlamaConfig(**job["shape"]), dtype=dtype, attn_implementation="sdpa"
        )
    generator = torch.Generator(job["device"]).manual_seed(0)
    for name, weight in sorted(model.named_parameters()):
        if not name.endswith("norm.weight"):
            weight.data.normal_(std=0.02, generator=generator)
    return model.eval().requires_grad_(False)


class Memory:
    """Bytes held and their peak: of the GPU's allocator, or of the whole process, as the kernel counts them."""

    def __init__(self, device: str):
        self.device = device
        self.start = 0
        self.start = self._now()

    def _now(self) -> int:
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated(self.device)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # glibc's
            trim(0)
        return _status("VmRSS")

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self._now()
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def peak(self) -> int:
        """Since `reset_peak`, above what was held at the start."""
        gpu = self.device.startswith("cuda")
        return (torch.cuda.max_memory_allocated(self.device) if gpu else _status("VmHWM")) - self.start


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Candidate:
    """Transformers as it is (`full`), a method of headwise, or one of kvpress's presses (`kvpress:adakv`)."""

    def __init__(self, job: Job, model: Any):
        self.job, self.model = job, model
        self.method: str = job["method"]
        self.ours = self.method != "full" and not self.method.startswith("kvpress:")

    def make_cache(self, keep: float) -> Any:
        if not self.ours:
            return DynamicCache(config=self.model.config)
        from headwise import RaggedCache
        from headwise.bench.models import method_for
        from headwise.models.families import view

        seen = view(self.model)
        method = method_for(self.method, seen.shape, seen.config_hash)
        return RaggedCache(self.model, method, keep=keep, entries=self.job["entries"])

    def reading(self) -> Any:
        """Around the prefill."""
        if not self.method.startswith("kvpress:"):
            return nullcontext()
        import kvpress  # pyright: ignore[reportMissingImports]

        removed = 1 - self.job["keep"]
        presses: dict[str, Callable[[], Any]] = {
            "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=removed)),
            "snapkv": lambda: kvpress.SnapKVPress(compression_ratio=removed),
            "keydiff": lambda: kvpress.KeyDiffPress(compression_ratio=removed),
            "expected": lambda: kvpress.ExpectedAttentionPress(compression_ratio=removed),
        }
        return presses[self.method.removeprefix("kvpress:")]()(self.model)

    def kv_bytes(self, cache: Any) -> int:
        """Bytes of keys and values in storage."""
        if self.ours:
            return cache.nbytes
        return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))

    def claimed_bytes(self, cache: Any) -> int:
        """The most bytes of keys and values that the cache says it has held at once."""
        return cache.peak_nbytes if self.ours else self.kv_bytes(cache)


def step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """One forward pass: logits of the last token."""
    given = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return model(ids, **{given: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def measure_layer(job: Job) -> dict[str, Any]:
    """Attention of one new token as kvpress computes it where heads keep different entries: over the whole cache, with
    keys of what is evicted that no query looks at. Tensors come and go by files.
    """
    import kvpress  # noqa: F401  # pyright: ignore[reportMissingImports]  # changes the attention functions

    torch.set_num_threads(job["threads"])
    given = torch.load(job["layer"])
    query, keys, values = given["query"], given["keys"], given["values"]
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = query.shape[1] // keys.shape[1], True
    module.masked_key_indices = (~given["kept"]).nonzero(as_tuple=True)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ring = [(keys.clone(), values.clone()) for _ in range(max(2, job["copies"]))]
    times = []
    for run in range(len(ring) + job["rounds"]):
        pair = ring[run % len(ring)]
        start = time.perf_counter()
        out = attention(module, query, *pair, None, 0.0, scaling=job["scaling"])[0]
        times.append(time.perf_counter() - start)
    torch.save(out.transpose(1, 2), job["out"])  # pyright: ignore[reportPossiblyUnboundVariable]
    return {"seconds": median(times[len(ring) :])}


@torch.no_grad()
def measure_model(job: Job) -> dict[str, Any]:
    """Everything about one candidate."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    model = make_model(job)
    device, candidate = model.device, Candidate(job, model)
    vocabulary = model.config.get_text_config().vocab_size
    ids = random_context(model, job["batch"], job["tokens"])
    _warm_up(model, candidate, ids)
    memory = Memory(job["device"])
    memory.reset_peak()
    cache = candidate.make_cache(job["keep"])
    with candidate.reading():
        prefill, logits = _timed(lambda: step(model, ids, cache), job["device"])
    found = {
        "prefill_s": prefill,
        "peak_prefill_bytes": memory.peak,
        "kv_bytes": candidate.kv_bytes(cache),
        "claimed_bytes": candidate.claimed_bytes(cache),
        "logits": logits[:, :: max(1, vocabulary // SAMPLED)].float().cpu().tolist(),
    }
    memory.reset_peak()
    times, token = [], logits.argmax(-1, keepdim=True)
    for _ in range(job["new_tokens"]):
        seconds, logits = _timed(lambda: step(model, token, cache), job["device"])  # noqa: B023
        token = logits.argmax(-1, keepdim=True)
        times.append(seconds)
    found |= {"ms_per_token": 1e3 * median(times), "peak_decode_bytes": memory.peak}
    found["claimed_bytes"] = max(found["claimed_bytes"], candidate.claimed_bytes(cache))
    attention, whole = _attention(model, token, cache, job["device"])
    errors = _kernel_errors(model, token, cache) if candidate.ours else None
    return found | {
        "attention_ms": 1e3 * attention,
        "attention_share": attention / whole,
        "kernel_errors": errors,
        "threads": torch.get_num_threads(),
        "hardware": _hardware(device),
        "versions": _versions(candidate),
    }


def random_context(model: Any, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
    """Token ids that are the same in every run."""
    generator, vocabulary = torch.Generator().manual_seed(1), model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator, dtype=torch.int64, device="cpu")
    return ids.to(model.device)


def _warm_up(model: Any, candidate: Candidate, ids: Tensor) -> None:
    """Compile kernels, start threads, load libraries: none of it is the candidate's time or memory."""
    caches = [DynamicCache(config=model.config)]
    if candidate.ours:
        caches.append(candidate.make_cache(keep=1.0))  # which every method can
    for cache in caches:
        for piece in (ids[:, :256], ids[:, :1]):
            step(model, piece, cache)


def _timed(run: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _attention(model: Any, token: Tensor, cache: Any, device: str) -> tuple[float, float]:
    """Seconds of a step's attention, storing new keys and values included, and of the step."""
    spent = 0.0

    def timing(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            seconds, result = _timed(lambda: function(*args, **kwargs), device)
            spent += seconds
            return result

        return timed

    steps = []
    with _replaced(model, timing), _updating(cache, timing):
        for _ in range(TIMED):
            before = spent
            whole, _ = _timed(lambda: step(model, token, cache), device)
            steps.append((spent - before, whole))
    return median(attention for attention, _ in steps), median(whole for _, whole in steps)


@contextmanager
def _replaced(model: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    name = model.config.get_text_config()._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS[name] = wrap(function)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = function


@contextmanager
def _updating(cache: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    cache.update = wrap(cache.update)
    try:
        yield
    finally:
        del cache.update


def _kernel_errors(model: Any, token: Tensor, cache: Any) -> list[tuple[float, float]]:
    """Of every layer of one more step: how far its attention is from float64's, and how far PyTorch's own is."""
    from headwise.bench.measuring import checked

    errors: list[tuple[float, float]] = []
    for layer in cache.ragged_layers:
        layer.kernel = checked(layer.kernel, errors)
    step(model, token, cache)
    return errors


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _versions(candidate: Candidate) -> dict[str, str]:
    from importlib.metadata import version

    names = ["torch", "transformers"] + ["headwise"] * candidate.ours
    return {name: version(name) for name in names + ["kvpress"] * candidate.method.startswith("kvpress:")}


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    out = Path(sys.argv[2])
    asked = json.loads(sys.argv[1])
    result = measure_layer(asked) if asked["kind"] == "layer" else measure_model(asked)
    out.with_suffix(".tmp").write_text(json.dumps(result))
    os.replace(out.with_suffix(".tmp"), out)
