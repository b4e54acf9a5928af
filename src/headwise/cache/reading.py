"""One prefill, many methods: read a context once, then cut it by any scorer that watched, any allocator, any keep.

What comes out is what `compress` would have made, for one forward pass instead of one per method. The whole
cache stays in memory meanwhile, so this is for comparing methods, not for saving memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.cache.compress import Progress, compress
from headwise.cache.kept import provenance_of
from headwise.cache.listener import Listener
from headwise.cache.meter import Meter
from headwise.cache.prefill import defers, keep_entries, make_plan
from headwise.errors import BadInput
from headwise.interfaces import AbstractScorer, Observation
from headwise.kernels.quantised import NATIVE, Bits, require_entries
from headwise.kernels.segments import Segments, quantise
from headwise.methods.allocate import Uniform
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.method import Method
from headwise.methods.reading import EXACT
from headwise.methods.scores import Streaming
from headwise.models.families import ModelView, view


class _Watching(Listener):
    """Scorers that watch one prefill side by side; what they see of each layer is gathered."""

    def __init__(self, scorers: Sequence[AbstractScorer]):
        self._scorers = tuple(dict.fromkeys(scorers))
        self.scores: dict[AbstractScorer, list[Tensor]] = {scorer: [] for scorer in self._scorers}
        self.observations: dict[AbstractScorer, list[Observation]] = {}  # of all layers, for scores that need a budget
        self.first: list[Observation] = []  # of the first layer

    @property
    def scorers(self) -> Sequence[AbstractScorer]:
        """All of them."""
        return self._scorers

    def observed(self, scorer: AbstractScorer, observation: Observation) -> None:
        """Note the scorer's scores; of one whose scores depend on the budget, what it will make them from."""
        if observation.layer == 0 and not self.first:
            self.first.append(observation)
        if scorer not in self.scores:
            return
        if scorer.needs_budget:
            self.observations.setdefault(scorer, []).append(observation)
        else:
            self.scores[scorer].append(scorer.score(observation))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A context in memory, whole, with the scores of every scorer that watched. Made by `read`.

    Scores that depend on the budget are made by `cut`, from their scorer's `observations`, layer by layer.
    """

    whole: RaggedCache
    first: Observation  # of the first layer
    scores: dict[AbstractScorer, Float[Tensor, "layers batch kv_heads tokens"]]
    observations: dict[AbstractScorer, list[Observation]]
    before: int = 0  # tokens that were read before the last piece

    def cut(self, method: str | Method, keep: float | str | Keep, *, entries: str = NATIVE) -> RaggedCache:
        """The cache that `compress` makes of this context. Raises BadInput if the scorer did not watch."""
        require_entries(entries)
        model_view, keep = self.whole.view, parse_keep(keep)
        method = Method.parse(method).for_model(model_view.shape, model_view.config_hash)
        if method.scorer not in self.scores and method.scorer not in self.observations:
            watched = ", ".join(type(scorer).__name__ for scorer in (*self.scores, *self.observations))
            raise BadInput(f"{type(method.scorer).__name__} did not watch this reading; {watched} did.")
        shape, layers = model_view.shape, self.whole.frozen_layers
        plan = make_plan(
            method,
            keep,
            shape=shape,
            itemsize=layers[0].dtype.itemsize,
            entries=entries,
            valid=self.first.valid,
            positions=self.first.positions,
        ).summarised(method, self.first)
        scores = self._scores(method.scorer, plan.demand.totals)
        kept = keep_entries(method, scores, range(len(layers)), plan)
        segments = [
            _subset(layer.segments, layer_kept, self.first.valid, plan.quantised(layer.index, layer.device))
            for layer, layer_kept in zip(layers, kept, strict=True)
        ]
        provenance = provenance_of(method, keep, entries, EXACT)
        value = self.whole.kept.with_segments(segments, provenance=provenance)
        cache = RaggedCache.of(model_view, value, kernel=layers[0].kernel)
        cache.meter = self._as_if_compressed(cache.layers, whole_first=defers(method))
        return cache

    def _scores(self, scorer: AbstractScorer, totals: tuple[int, ...]) -> Float[Tensor, "layers batch kv_heads tokens"]:
        if scorer in self.scores:
            return self.scores[scorer]
        return _stacked([scorer.score(replace(layer, totals=totals)) for layer in self.observations[scorer]])

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


def can_watch(scorer: AbstractScorer) -> bool:
    """Whether a scorer's scores depend on nothing but one prefill: neither on a second one nor on the budget."""
    return scorer.replay is None and not scorer.needs_budget


def read(
    model: PreTrainedModel | ModelView,
    input_ids: Int[Tensor, "batch tokens"],
    scorers: Sequence[AbstractScorer],
    *,
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
    prefill_chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Reading:
    """Read a context once while `scorers` watch; twice if they need it, and all in the same way (`replay`).

    Raises BadInput if they do not, and what `compress` raises.
    """
    for scorer in scorers:
        if scorer.replay != scorers[0].replay:
            raise BadInput(
                f"{type(scorer).__name__} and {type(scorers[0]).__name__} do not read the context in the same way: "
                "read it for each of them."
            )
    model_view = view(model)
    watching = _Watching([scorer.resolve(model_view.shape, model_view.config_hash) for scorer in scorers])
    whole = compress(
        model_view,
        input_ids,
        Method(scorer=Streaming(), allocator=Uniform()),  # any will do: everything is kept
        keep=1.0,
        attention_mask=attention_mask,
        prefill_chunk_size=prefill_chunk_size,
        progress=progress,
        listeners=[watching],
    )
    scores = {scorer: _stacked(layers) for scorer, layers in watching.scores.items() if layers}
    length = input_ids.shape[1]
    before = (length - 1) // (prefill_chunk_size or length) * (prefill_chunk_size or length)
    return Reading(
        whole=whole, first=watching.first[0], scores=scores, observations=watching.observations, before=before
    )


def _stacked(layers: Sequence[Float[Tensor, "batch kv_heads tokens"]]) -> Float[Tensor, "layers batch kv_heads tokens"]:
    """Scores of all layers, where the first layer is."""
    return torch.stack([scores.to(layers[0].device) for scores in layers])


def _subset(whole: Segments, kept: Tensor, valid: Tensor, quantised: Sequence[tuple[Bits, Tensor]]) -> Segments:
    """The kept entries of segments that hold every valid token, some of them in fewer bits."""
    kept, valid = kept.to(whole.keys.device), valid.to(whole.keys.device)
    rows = kept[valid[:, None].expand_as(kept)].nonzero()[:, 0]
    segments = Segments(
        keys=whole.keys[rows],
        values=whole.values[rows],
        positions=whole.positions[rows],
        lengths=tuple(kept.sum(-1).flatten().tolist()),
        kv_heads=whole.kv_heads,
    )
    native = torch.ones_like(rows, dtype=torch.bool)
    for bits, entries in quantised:
        chosen = entries[kept]
        segments = quantise(segments, chosen[native], bits)
        native &= ~chosen
    return segments
