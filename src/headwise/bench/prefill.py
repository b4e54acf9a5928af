"""What a method adds to the reading of a context: runs with and without it, in turns, on one model.

Methods differ from the full cache in what they do between a layer's attention and its MLP, so a model of one layer
tells what a deep one would. `ours_seconds` is that time itself, from a run of its own; the difference of two prefills
of many seconds is noise where a method costs next to nothing.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from headwise.bench.candidates import FULL, Progress
from headwise.bench.measuring import LOGITS, WrongResult, relative_error, threads
from headwise.bench.models import method_for, require_budgets, shape_for
from headwise.bench.worker import make_model, random_context
from headwise.cache.cache import RaggedCache
from headwise.cache.layer import FillingLayer
from headwise.errors import BadInput
from headwise.evals.answers import known_methods
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.method import Method
from headwise.models.families import given, view
from headwise.models.interface import Call


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One model and context, and the methods."""

    model: str
    layers: int | None
    methods: tuple[str, ...]
    keep: float
    tokens: int
    batch: int
    dtype: str
    device: str
    threads: int | None
    rounds: int

    def __post_init__(self) -> None:
        if self.dtype not in LOGITS:
            raise BadInput(f"dtype={self.dtype!r} is not measured; choose {', '.join(LOGITS)}.")
        if min(self.tokens, self.batch, self.rounds) < 1:
            raise BadInput("tokens, batch and rounds must be at least 1.")
        parse_keep(self.keep)
        known_methods(self.methods)

    def require_budgets(self) -> None:
        """Raise what a method would raise for its budget, before anything is measured."""
        require_budgets(
            self.model,
            self.layers,
            [method for method in self.methods if method != FULL],
            keep=self.keep,
            tokens=self.tokens,
            batch=self.batch,
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One candidate: median seconds of a prefill, and the share by which it is longer than the full cache's."""

    benchmark: str
    candidate: str
    model: str
    dtype: str
    batch: int
    tokens: int
    keep: float
    threads: int
    seconds: float
    overhead: float
    ours_seconds: float | None  # spent by the method
    ours_share: float | None  # of the full cache's prefill
    kv_bytes: int
    logits_error: float  # relative to the full cache's, which does the same in prefill
    hardware: str
    versions: dict[str, str]


@torch.no_grad()
def run(settings: Settings, *, progress: Progress = lambda done, total, text: None) -> list[Row]:
    """Measure. Raises BadInput, WrongResult."""
    job = {
        "shape": shape_for(settings.model, settings.layers),
        "model": settings.model,
        "dtype": settings.dtype,
        "device": settings.device,
    }
    with threads(settings.threads):
        return _rows(settings, make_model(job), progress)


def _rows(settings: Settings, model: Any, progress: Progress) -> list[Row]:
    from headwise.evals.run import hardware, versions

    ids, model_view = random_context(model, settings.batch, settings.tokens), view(model)
    methods = {
        name: None if name == FULL else method_for(name, model_view.shape, model_view.config_hash)
        for name in dict.fromkeys((FULL, *settings.methods))
    }
    errors, held = _checked(settings, model, ids, methods, progress)
    ours = {}
    for name, method in methods.items():
        if method is not None:
            progress(0, settings.rounds, f"what {name} adds")
            ours[name] = _own_seconds(model, ids, method, settings.keep)
    times = _times(settings, model, ids, methods, progress)
    full = median(times[FULL])
    return [
        Row(
            benchmark="prefill",
            candidate=name,
            model=settings.model if settings.layers is None else f"{settings.model}, layers {settings.layers}",
            dtype=settings.dtype,
            batch=settings.batch,
            tokens=settings.tokens,
            keep=1.0 if name == FULL else settings.keep,
            threads=torch.get_num_threads(),
            seconds=median(seconds),
            overhead=median(own / whole for own, whole in zip(seconds, times[FULL], strict=True)) - 1,
            ours_seconds=ours.get(name),
            ours_share=ours[name] / full if name in ours else None,
            kv_bytes=held[name],
            logits_error=errors[name],
            hardware=hardware(model.device),
            versions=versions(),
        )
        for name, seconds in times.items()
    ]


_Methods = Mapping[str, Method | None]


def _checked(
    settings: Settings, model: Any, ids: Tensor, methods: _Methods, progress: Progress
) -> tuple[dict[str, float], dict[str, int]]:
    """Each candidate's error against the full cache's logits, and the bytes it holds; this also warms up."""
    logits, held = {}, {}
    for name, method in methods.items():
        progress(0, settings.rounds, f"checking {name}")
        cache = _cache(model, method, parse_keep(settings.keep))
        logits[name] = _read(model, ids, cache)
        held[name] = _kv_bytes(cache)
    errors = {name: relative_error(own, logits[FULL]) for name, own in logits.items()}
    if wrong := [name for name, error in errors.items() if not error <= LOGITS[settings.dtype]]:
        raise WrongResult(f"{wrong[0]}: logits are {errors[wrong[0]]:.1e} from the full cache's: nothing is shown.")
    return errors, held


def _times(
    settings: Settings, model: Any, ids: Tensor, methods: _Methods, progress: Progress
) -> dict[str, list[float]]:
    """Seconds of every round; candidates take turns."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for done in range(settings.rounds):
        for name, method in methods.items():
            progress(done, settings.rounds, name)
            cache = _cache(model, method, parse_keep(settings.keep))
            _wait(model.device)
            start = time.perf_counter()
            _read(model, ids, cache)
            _wait(model.device)
            times[name].append(time.perf_counter() - start)
    return times


def _cache(model: Any, method: Method | None, keep: Keep) -> Any:
    return DynamicCache(config=model.config) if method is None else RaggedCache(model, method, keep=keep)


def _read(model: Any, ids: Tensor, cache: Any) -> Tensor:
    return model(ids, **given(model, cache), use_cache=True, logits_to_keep=1).logits


def _kv_bytes(cache: Any) -> int:
    if isinstance(cache, RaggedCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _own_seconds(model: Any, ids: Tensor, method: Method, keep: float) -> float:
    """Seconds that the method itself takes while the context is read."""
    cache = RaggedCache(model, method, keep=keep)
    timed = [_Timed(layer) for layer in cache.ragged_layers if isinstance(layer, FillingLayer)]
    _read(model, ids, cache)
    return sum(layer.seconds for layer in timed)


class _Timed:
    """In the place of a layer's observer: `seconds` of all its calls. A GPU is waited for."""

    def __init__(self, layer: FillingLayer):
        self.seconds = 0.0
        self._observer = layer.observer
        layer.observer = self

    def observe(self, layer: FillingLayer, call: Call) -> None:
        """What the observer does, timed."""
        _wait(call.query.device)
        start = time.perf_counter()
        self._observer.observe(layer, call)
        _wait(call.query.device)
        self.seconds += time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
