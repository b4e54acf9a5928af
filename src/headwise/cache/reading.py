"""One prefill, many methods: read a context once, then cut it by any scorer that watched, any allocator, any keep.

What comes out is what `compress` would have made, for one forward pass instead of one per method. The whole
cache stays in memory meanwhile, so this is for comparing methods, not for saving memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.cache.compress import Progress, compress
from headwise.cache.meter import Meter
from headwise.cache.prefill import defers, keep_entries, make_plan
from headwise.errors import BadInput
from headwise.interfaces import AbstractScorer, Chunk, Observation, Replay, Statistics
from headwise.kernels.segments import Segments
from headwise.methods.allocate import Uniform
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.method import Method
from headwise.models.families import ModelView, view


@dataclass(frozen=True, kw_only=True, slots=True)
class _Watchers(AbstractScorer):
    """Scorers that watch one prefill side by side; what they see of each layer is gathered, and everything is kept."""

    scorers: tuple[AbstractScorer, ...]
    seen: dict[AbstractScorer, list[Observation]] = field(default_factory=dict, compare=False)  # of all layers
    scores: dict[AbstractScorer, list[Tensor]] = field(default_factory=dict, compare=False)
    first: list[Observation] = field(default_factory=list, compare=False)  # of the first layer

    @property
    def replay(self) -> Replay | None:
        """Of a scorer that reads the context twice, which watches alone."""
        return self.scorers[0].replay if self.scorers else None

    @property
    def query_window(self) -> int:
        """The longest of the windows."""
        return max((scorer.query_window for scorer in self.scorers), default=0)

    def accumulate(self, statistics: Statistics, chunk: Chunk) -> Statistics:
        """Each gathers under its own prefix; one that watches alone also needs the marks of its second reading."""
        if self.replay is not None:
            return self.scorers[0].accumulate(statistics, chunk)
        gathered: Statistics = {}
        for number, scorer in enumerate(self.scorers):
            found = scorer.accumulate(_own(statistics, number), chunk)
            gathered |= {f"{number}.{name}": tensor for name, tensor in found.items()}
        return gathered

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Note every scorer's scores; of one whose scores depend on the budget, what it will make them from."""
        for number, scorer in enumerate(self.scorers):
            seen = self._seen_by(number, scorer, observation)
            if scorer.needs_budget:
                self.seen.setdefault(scorer, []).append(seen)
            else:
                self.scores.setdefault(scorer, []).append(scorer.score(seen))
        if observation.layer == 0:
            self.first.append(observation)
        return torch.zeros(observation.keys.shape[:3], device=observation.keys.device, dtype=torch.float32)

    def _seen_by(self, number: int, scorer: AbstractScorer, observation: Observation) -> Observation:
        last = observation.queries.shape[2] - scorer.query_window
        return replace(
            observation,
            queries=observation.queries[:, :, max(0, last) :],
            statistics=observation.statistics if self.replay is not None else _own(observation.statistics, number),
        )


def _own(statistics: Statistics, number: int) -> Statistics:
    prefix = f"{number}."
    return {name.removeprefix(prefix): t for name, t in statistics.items() if name.startswith(prefix)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A context in memory, whole, with the scores of every scorer that watched. Made by `read`.

    Scores that depend on the budget are made by `cut`, from what their scorer has `seen`, layer by layer.
    """

    whole: RaggedCache
    first: Observation  # of the first layer
    scores: dict[AbstractScorer, Float[Tensor, "layers batch kv_heads tokens"]]
    seen: dict[AbstractScorer, list[Observation]]
    before: int = 0  # tokens that were read before the last piece

    def cut(self, method: str | Method, keep: float | str | Keep) -> RaggedCache:
        """The cache that `compress` makes of this context. Raises BadInput if the scorer did not watch."""
        seen, keep = self.whole.view, parse_keep(keep)
        method = Method.parse(method).for_model(seen.shape, seen.config_hash)
        if method.scorer not in self.scores and method.scorer not in self.seen:
            watched = ", ".join(type(scorer).__name__ for scorer in (*self.scores, *self.seen))
            raise BadInput(f"{type(method.scorer).__name__} did not watch this reading; {watched} did.")
        shape, layers = seen.shape, self.whole.frozen_layers
        plan = make_plan(
            method,
            keep,
            shape=shape,
            entry_bytes=shape.entry_bytes(layers[0].dtype.itemsize),
            valid=self.first.valid,
            positions=self.first.positions,
        ).summarised(method, self.first)
        scores = self._scores(method.scorer, plan.demand.totals)
        kept = keep_entries(method, scores, range(len(layers)), plan)
        segments = [
            _subset(layer.segments, layer_kept, self.first.valid)
            for layer, layer_kept in zip(layers, kept, strict=True)
        ]
        provenance = {"method": method.provenance(), "keep": str(keep)}
        value = self.whole.kept.with_segments(segments, provenance=provenance)
        cache = RaggedCache.of(seen, value, kernel=layers[0].kernel)
        cache.meter = self._as_if_compressed(cache.layers, whole_first=defers(method))
        return cache

    def _scores(self, scorer: AbstractScorer, totals: tuple[int, ...]) -> Float[Tensor, "layers batch kv_heads tokens"]:
        if scorer in self.scores:
            return self.scores[scorer]
        return torch.stack([scorer.score(replace(seen, totals=totals)) for seen in self.seen[scorer]])

    def _as_if_compressed(self, cut: Sequence[Any], whole_first: bool) -> Meter:
        """What `compress` would have held: each layer whole, then with what is copied out of it, then that alone."""
        meter, compressible = self.whole.meter.fork(), {layer.model_index for layer in self.whole.ragged_layers}
        meter.held, meter.peak = {}, meter.uncut_peak
        full = 2 * self.first.keys.numel() * self.whole.ragged_layers[0].dtype.itemsize  # padding included
        early = full * self.before // self.first.keys.shape[2]
        for layer in cut if early else ():  # in pieces, all layers are whole up to the last one
            meter.report(layer.model_index, early if layer.model_index in compressible else min(early, layer.nbytes))
        for index in compressible if whole_first else ():
            meter.report(index, full + early // 2)  # the last piece is put to the keys, then to the values
            meter.report(index, full)
        for layer in cut:
            held = full if layer.model_index in compressible else 0
            for nbytes in (held, held + layer.nbytes, layer.nbytes):
                meter.report(layer.model_index, nbytes)
        return meter


def can_share(scorer: AbstractScorer) -> bool:
    """Whether a scorer can watch a reading together with others: it needs no second pass."""
    return scorer.replay is None


def can_watch(scorer: AbstractScorer) -> bool:
    """Whether a scorer's scores depend on nothing but one prefill: neither on a second one nor on the budget."""
    return can_share(scorer) and not scorer.needs_budget


def read(
    model: PreTrainedModel | ModelView,
    input_ids: Int[Tensor, "batch tokens"],
    scorers: Sequence[AbstractScorer],
    *,
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
    prefill_chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Reading:
    """Read a context once while `scorers` watch; twice for one that needs it, which watches alone.

    Raises BadInput for such a one among others, and what `compress` raises.
    """
    for scorer in scorers:
        if len(scorers) > 1 and not can_share(scorer):
            raise BadInput(
                f"{type(scorer).__name__} reads the context twice and cannot watch with others: read it alone."
            )
    seen = view(model)
    scorers = [scorer.resolve(seen.shape, seen.config_hash) for scorer in scorers]
    watchers = _Watchers(scorers=tuple(dict.fromkeys(scorers)))
    whole = compress(
        seen,
        input_ids,
        Method(scorer=watchers, allocator=Uniform()),
        keep=1.0,
        attention_mask=attention_mask,
        prefill_chunk_size=prefill_chunk_size,
        progress=progress,
    )
    scores = {scorer: torch.stack(layers) for scorer, layers in watchers.scores.items()}
    length = input_ids.shape[1]
    before = (length - 1) // (prefill_chunk_size or length) * (prefill_chunk_size or length)
    return Reading(whole=whole, first=watchers.first[0], scores=scores, seen=watchers.seen, before=before)


def _subset(whole: Segments, kept: Tensor, valid: Tensor) -> Segments:
    """The kept entries of segments that hold every valid token."""
    rows = kept[valid[:, None].expand_as(kept)].nonzero()[:, 0]
    return Segments(
        keys=whole.keys[rows],
        values=whole.values[rows],
        positions=whole.positions[rows],
        lengths=tuple(kept.sum(-1).flatten().tolist()),
        kv_heads=whole.kv_heads,
    )
