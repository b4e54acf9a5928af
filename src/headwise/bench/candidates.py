"""Measure whole models: reading a context and decoding after it, every candidate in a process of its own.

`headwise bench generate` and `headwise bench memory` use this, with different default models and contexts. The full
cache is transformers' own: DynamicCache and SDPA.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headwise.bench.measuring import LOGITS, MOST, WrongResult, in_worker, relative_error, require_kvpress
from headwise.bench.models import require_budgets, shape_for
from headwise.errors import BadInput
from headwise.evals.answers import known_methods
from headwise.kernels.quantised import NATIVE, parse_entries

FULL = "full"
KVPRESS = "kvpress:"
PEAKS = Path("/proc/self/clear_refs")  # a process on Linux resets its peak of memory by this file
PRESSES = ("adakv", "snapkv", "keydiff", "expected")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One model and context, and the methods to compare on it."""

    model: str
    layers: int | None
    methods: tuple[str, ...]
    keep: float
    tokens: int
    new_tokens: int
    batch: int
    dtype: str
    device: str
    threads: int | None
    kvpress: Path | None  # the Python of an environment with kvpress
    entries: str = NATIVE  # how methods of ours store what they keep

    def __post_init__(self) -> None:
        if self.dtype not in LOGITS:
            raise BadInput(f"dtype={self.dtype!r} is not measured; choose {', '.join(LOGITS)}.")
        if not 0 < self.keep <= 1:
            raise BadInput(f"keep={self.keep} is a share in (0, 1].")
        if min(self.tokens, self.new_tokens, self.batch) < 1:
            raise BadInput("tokens, new tokens and batch must be at least 1.")
        parse_entries(self.entries)
        known_methods([FULL, *(method for method in self.methods if not method.startswith(KVPRESS))])
        pressed = [method.removeprefix(KVPRESS) for method in self.methods if method.startswith(KVPRESS)]
        if unknown := [press for press in pressed if press not in PRESSES]:
            raise BadInput(f"kvpress:{unknown[0]} is not measured; choose {', '.join(KVPRESS + p for p in PRESSES)}.")
        if pressed and self.kvpress is None:
            raise BadInput("name the Python of an environment in which kvpress is installed: --kvpress env/bin/python.")

    def require_budgets(self) -> None:
        """Raise an error if a method of ours could not keep `keep` of the context. Loads no weights."""
        require_budgets(
            self.model,
            self.layers,
            [method for method in self.methods if _is_ours(method)],
            keep=self.keep,
            tokens=self.tokens,
            batch=self.batch,
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The results of one candidate. Peaks are bytes of the process (of the GPU's allocator) above the loaded model."""

    benchmark: str
    candidate: str
    entries: str
    model: str
    dtype: str
    batch: int
    tokens: int
    new_tokens: int
    keep: float
    threads: int
    prefill_s: float
    ms_per_token: float
    speedup_vs_full: float
    attention_ms: float  # of a step: attention and storing new keys and values, all layers
    attention_share: float
    kv_bytes: int  # keys and values after the prefill
    claimed_bytes: int  # the most keys and values held at once, as the cache says
    peak_prefill_bytes: int
    peak_decode_bytes: int
    peak_bytes: int
    saved_bytes: int | None  # of the full cache's peak, measured
    claimed_saved_bytes: int | None
    logits_error: float  # after the prefill, relative to the full cache's, which does the same there
    rel_error: float | None  # attention's while decoding, from float64, the worst layer's; None where it is not ours
    plain_error: float | None
    hardware: str
    versions: dict[str, str]


def run(benchmark: str, settings: Settings, *, progress: Progress | None = None) -> list[Row]:
    """Measure all candidates, the full cache first, and return a row of each.

    Raises BadInput if something cannot be measured here, WrongResult if a result is wrong, HeadwiseError if a process
    fails.
    """
    if settings.device == "cpu" and not PEAKS.exists():
        raise BadInput(
            "the peak of a process's memory can be measured on Linux only; on a GPU (--device cuda) anywhere."
        )
    shape = shape_for(settings.model, settings.layers)
    if settings.kvpress is not None:
        require_kvpress(settings.kvpress)
    methods = [FULL, *(method for method in settings.methods if method != FULL)]
    results: dict[str, dict[str, Any]] = {}
    for done, method in enumerate(methods):
        if progress is not None:
            progress(done, len(methods), method)
        results[method] = _measure(settings, shape, method)
        _require_correct(settings, method, results[method], results[FULL])
    return [_row(benchmark, settings, method, result, results[FULL]) for method, result in results.items()]


def _row(benchmark: str, settings: Settings, method: str, result: dict[str, Any], full: dict[str, Any]) -> Row:
    errors = result["kernel_errors"]
    worst = max(errors, key=lambda pair: pair[0] / pair[1]) if errors else (None, None)
    is_full = method == FULL
    peak, full_peak = (max(x["peak_prefill_bytes"], x["peak_decode_bytes"]) for x in (result, full))
    return Row(
        benchmark=benchmark,
        candidate=method,
        entries=settings.entries if _is_ours(method) else NATIVE,
        model=settings.model if settings.layers is None else f"{settings.model}, {settings.layers} layers",
        dtype=settings.dtype,
        batch=settings.batch,
        tokens=settings.tokens,
        new_tokens=settings.new_tokens,
        keep=1.0 if is_full else settings.keep,
        threads=result["threads"],
        prefill_s=result["prefill_s"],
        ms_per_token=result["ms_per_token"],
        speedup_vs_full=full["ms_per_token"] / result["ms_per_token"],
        attention_ms=result["attention_ms"],
        attention_share=result["attention_share"],
        kv_bytes=result["kv_bytes"],
        claimed_bytes=result["claimed_bytes"],
        peak_prefill_bytes=result["peak_prefill_bytes"],
        peak_decode_bytes=result["peak_decode_bytes"],
        peak_bytes=peak,
        saved_bytes=None if is_full else full_peak - peak,
        claimed_saved_bytes=None if is_full else full["claimed_bytes"] - result["claimed_bytes"],
        logits_error=_logits_error(result, full),
        rel_error=worst[0],
        plain_error=worst[1],
        hardware=result["hardware"],
        versions=result["versions"],
    )


def _logits_error(result: dict[str, Any], full: dict[str, Any]) -> float:
    return relative_error(
        torch.tensor(result["logits"], dtype=torch.float32, device="cpu"),
        torch.tensor(full["logits"], dtype=torch.float32, device="cpu"),
    )


def _require_correct(settings: Settings, method: str, result: dict[str, Any], full: dict[str, Any]) -> None:
    error = _logits_error(result, full)
    if not error <= LOGITS[settings.dtype]:
        raise WrongResult(
            f"{method}: logits after the prefill are {error:.1e} from the full cache's: nothing is shown."
        )
    if result["kernel_errors"] == []:
        raise WrongResult(f"{method}: no attention of its cache was seen, so none was checked: nothing is shown.")
    for own, plain in result["kernel_errors"] or []:
        if not own <= MOST * plain:
            raise WrongResult(
                f"{method}: attention is {own:.1e} from float64, PyTorch's {plain:.1e}: nothing is shown."
            )


def _measure(settings: Settings, shape: dict[str, Any] | None, method: str) -> dict[str, Any]:
    job = {
        "kind": "model",
        "model": settings.model,
        "shape": shape,
        "method": method,
        "keep": settings.keep,
        "entries": settings.entries,
        "tokens": settings.tokens,
        "new_tokens": settings.new_tokens,
        "batch": settings.batch,
        "dtype": settings.dtype,
        "device": settings.device,
        "threads": settings.threads,
    }
    return in_worker(method, job, settings.kvpress if method.startswith(KVPRESS) else None)


def _is_ours(method: str) -> bool:
    return method != FULL and not method.startswith(KVPRESS)


def default_methods(methods: Sequence[str], kvpress: Path | None) -> tuple[str, ...]:
    """Return the methods, and kvpress' AdaKV if kvpress is there and none of its presses was named."""
    pressed = any(method.startswith(KVPRESS) for method in methods)
    return (*methods, *([] if kvpress is None or pressed else [KVPRESS + "adakv"]))
