"""What happens while a context is read: every layer is observed, scored, given counts, and cut.

A scope "layer" allocator has each layer cut as soon as it is done, so that peak KV memory is the compressed cache plus
one full layer. A scope "model" allocator, and a scorer that replays the context, wait until all layers are done.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn
from weakref import ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.cache.layer import RaggedLayer
from headwise.cache.masks import require_causal, require_left_padding, tokens_of
from headwise.errors import BadInput, NonFiniteValues, ShapeMismatch, UnsupportedGeneration, UnsupportedModel
from headwise.interfaces import Chunk, Demand, Observation, Statistics
from headwise.methods.allocate.apportion import require_feasible
from headwise.methods.keep import Keep
from headwise.methods.method import Method
from headwise.methods.select import protected_mask, protection_order, select
from headwise.models.attention import is_enabled
from headwise.models.families import ModelView
from headwise.shapes import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is known about a context before any layer is scored."""

    valid: Bool[Tensor, "batch tokens"]
    positions: Int[Tensor, "batch tokens"]
    protected: Bool[Tensor, "batch tokens"]
    order: Int[Tensor, "batch tokens"] | None  # of the protected tokens, where a head may keep fewer of them
    demand: Demand
    spared: bool  # whether a row is kept whole, because it has no more tokens than every head must keep

    def summarised(self, method: Method, first: Observation) -> "Plan":
        """With what the method's allocator wants to know of the first layer."""
        return replace(self, demand=replace(self.demand, summary=method.allocator.summarise(first)))


@dataclass(kw_only=True)
class _Trace:
    """What is remembered of one layer until it is cut."""

    statistics: Statistics = field(default_factory=dict)
    queries: Tensor | None = None
    scaling: float = 1.0
    scores: Tensor | None = None


class Prefill:
    """Watches the layers of one cache fill, and cuts them. Does nothing once they are cut."""

    def __init__(self, *, view: ModelView, method: Method, keep: Keep, prompt_length: int | None):
        self.view = view
        self.method = method
        self.keep = keep
        self.prompt_length = prompt_length
        self.tokens: tuple[int, ...] | None = None  # of every context, once it has been cut
        self._layers: Sequence[ref[RaggedLayer]] = ()
        self.traces = [_Trace() for _ in view.shape.layers]
        self.deferred = defers(method)
        self.plan: Plan | None = None
        self._valid: Tensor | None = None
        self._positions: Tensor | None = None
        self._piece = 0  # tokens of the latest piece of prefill
        self._failure: str | None = None

    def watch(self, layers: Sequence[RaggedLayer]) -> None:
        """These are the layers. They hold this object, so it holds them weakly: a cycle would outlive its cache."""
        self._layers = [ref(layer) for layer in layers]

    @property
    def layers(self) -> list[RaggedLayer]:
        """The layers that are watched."""
        found = [layer() for layer in self._layers]
        return [layer for layer in found if layer is not None]

    def refuse_failed(self) -> NoReturn:
        """Raise UnsupportedGeneration: what was read is not whole, and cannot be read again."""
        reason = self._failure or "a forward pass did not finish"
        raise UnsupportedGeneration(f"this cache failed while reading its context ({reason}): make a new one.")

    def expect(self, layer: RaggedLayer, num_tokens: int) -> None:
        """New tokens are about to enter the first layer: raise if they cannot be served, warn of a likely mistake."""
        if self._failure is not None:
            self.refuse_failed()
        if not is_enabled(self.view.model):  # it would ignore the frozen part
            raise UnsupportedModel(
                "the model's attention implementation was changed while a RaggedCache is in use; call "
                "headwise.enable(model) again before using the cache."
            )
        if layer.untouched and self.prompt_length is None and num_tokens > 1:
            self._warn_of_pieces(layer.seen, num_tokens)
        if not layer.frozen and num_tokens == 1 and self._piece > 1 and layer.seen + 1 < (self.prompt_length or 0):
            raise UnsupportedGeneration(
                f"prompt_length={self.prompt_length}, but {layer.seen} tokens came before single ones, so the context "
                "is not complete and nothing has been cut. Give the prompt's length, or None if it comes in one piece."
            )

    def observe(
        self, layer: RaggedLayer, query: Tensor, mask: Tensor | None, scaling: float, position_ids: Tensor | None
    ) -> None:
        """Take in one piece of prefill of one layer; cut the layer if it was the last piece."""
        try:
            self._observe(layer, query, mask, scaling, position_ids)
        except BaseException as error:  # an interrupt too leaves layers half-filled
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def start_replay(self, start: int, stop: int, num_prefix: int) -> None:
        """The next forward pass repeats tokens start:stop after `num_prefix` tokens of instruction."""
        marks = {"replay_start": start, "replay_end": stop, "num_prefix": num_prefix}
        for layer, trace in zip(self.layers, self.traces, strict=True):
            layer.replaying = True
            trace.statistics = {
                **trace.statistics,
                **{k: torch.tensor(v, dtype=torch.int64, device="cpu") for k, v in marks.items()},
            }

    def finish_replay(self) -> None:
        """The context has been repeated: score and cut."""
        for layer in self.layers:
            layer.replaying = False
            self.traces[layer.index].scores = self._score(layer)
        self._cut(self.layers)

    def _observe(
        self, layer: RaggedLayer, query: Tensor, mask: Tensor | None, scaling: float, position_ids: Tensor | None
    ) -> None:
        if layer.index == 0 and not layer.replaying:
            self._extend(layer, query, mask, position_ids)
        chunk = self._chunk(layer, query, mask, scaling, position_ids)
        trace = self.traces[layer.index]
        trace.scaling = scaling
        trace.statistics = self.method.scorer.accumulate(trace.statistics, chunk)
        if layer.replaying:
            return
        window = self.method.scorer.query_window
        trace.queries = _last(trace.queries, query, window)
        if layer.seen >= (self.prompt_length or 0):
            self._finish(layer)

    def _warn_of_pieces(self, seen: int, num_tokens: int) -> None:
        warnings.warn(
            f"this cache took the first {seen} tokens for its whole context and compressed them; now {num_tokens} more "
            f"came at once. If they are the next piece of the prompt (prefill_chunk_size), give RaggedCache the "
            f"prompt's length as prompt_length; if they are a later question, give prompt_length={seen}, or use "
            "headwise.compress().",
            UserWarning,
            stacklevel=2,
        )

    def _extend(self, layer: RaggedLayer, query: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Note which tokens are padding, and every token's position; refuse what cannot work, before any cut."""
        batch, length, self._piece = query.shape[0], layer.seen, query.shape[2]
        valid = tokens_of(mask, batch, length, query.device)
        require_causal(mask, valid)
        fresh = _positions(position_ids, valid, query.shape[2])
        self._valid = valid
        self._positions = fresh if self._positions is None else torch.cat([self._positions, fresh], dim=-1)
        needed = int(fresh.max()) + 1
        self.view.require_positions(needed, f"reaches position {needed}")
        self.view.warn_of_positions(needed)
        if layer.seen >= (self.prompt_length or 0):
            assert layer.keys is not None
            entry_bytes = self.view.shape.entry_bytes(layer.keys.itemsize)
            self.plan = make_plan(
                self.method,
                self.keep,
                shape=self.view.shape,
                entry_bytes=entry_bytes,
                valid=valid,
                positions=self._positions,
            )
            if self.plan.spared:
                self._warn_of_short_context(self.plan)

    def _warn_of_short_context(self, plan: Plan) -> None:
        shortest = min(plan.demand.tokens)
        why = f"sink {self.method.sink} and window {self.method.window} cover it" if max(plan.demand.floors) > 1 else ""
        warnings.warn(
            f"a context of {shortest} {'tokens' if shortest > 1 else 'token'} is kept whole, whatever the keep: "
            f"{why or 'every head keeps one at least'}.",
            UserWarning,
            stacklevel=2,
        )

    def _chunk(
        self, layer: RaggedLayer, query: Tensor, mask: Tensor | None, scaling: float, position_ids: Tensor | None
    ) -> Chunk:
        assert layer.keys is not None and self._valid is not None and self._positions is not None
        keys, valid, positions = layer.keys, self._valid, self._positions
        if layer.replaying:
            assert layer.replayed_keys is not None
            keys = layer.replayed_keys
            valid = tokens_of(mask, query.shape[0], keys.shape[2], query.device)
            positions = torch.cat([positions, _positions(position_ids, valid, query.shape[2])], dim=-1)
        return Chunk(
            queries=query,
            keys=keys,
            valid=valid,
            positions=positions,
            offset=keys.shape[2] - query.shape[2],
            scaling=scaling,
            rotary=self.view.rotary(layer.index),
        )

    def _finish(self, layer: RaggedLayer) -> None:
        """The whole context has passed through a layer."""
        self._require_finite(layer)
        if self.method.scorer.replay is not None:
            return  # scored when the context has been repeated
        self.traces[layer.index].scores = self._score(layer)
        if not self.deferred:
            self._cut([layer])
        elif layer.index == len(self.layers) - 1:
            self._cut(self.layers)

    def _score(self, layer: RaggedLayer) -> Float[Tensor, "batch kv_heads tokens"]:
        assert self.plan is not None and layer.keys is not None and layer.values is not None
        trace = self.traces[layer.index]
        assert trace.queries is not None
        observation = Observation(
            shape=self.view.shape,
            layer=layer.index,
            keys=layer.keys,
            values=layer.values,
            queries=trace.queries,
            valid=self.plan.valid,
            positions=self.plan.positions,
            project=partial(self.view.output_weight, layer.index),
            scaling=trace.scaling,
            rotary=self.view.rotary(layer.index),
            statistics=trace.statistics,
            totals=self.plan.demand.totals,
        )
        self.traces[layer.index] = replace(trace, statistics={}, queries=None)
        if layer.index == 0:
            self.plan = self.plan.summarised(self.method, observation)
        return self.method.scorer.score(observation)

    def _cut(self, layers: Sequence[RaggedLayer]) -> None:
        """Allocate counts to these layers and freeze them."""
        assert self.plan is not None
        indices = [layer.index for layer in layers]
        scores = [self.traces[i].scores for i in indices]
        kept = keep_entries(self.method, torch.stack([s for s in scores if s is not None]), indices, self.plan)
        for layer, layer_kept in zip(layers, kept, strict=True):
            layer.freeze(layer_kept, self.plan.positions)
            self.traces[layer.index] = _Trace()
        if all(layer.frozen for layer in self.layers):
            self.tokens = self.plan.demand.tokens
            self.plan = self._valid = self._positions = None

    def _require_finite(self, layer: RaggedLayer) -> None:
        """Padding may hold anything; a real token's key or value may not be NaN or infinite."""
        assert self.plan is not None and layer.keys is not None and layer.values is not None
        sums = torch.stack([states.sum(-1, dtype=torch.float32) for states in (layer.keys, layer.values)])
        bad = ~torch.isfinite(sums) & self.plan.valid[:, None]  # float32: finite float16 numbers may add up to more
        for name, count in zip(("keys", "values"), bad.flatten(1).sum(-1).tolist(), strict=True):  # one wait for a GPU
            if count:
                raise NonFiniteValues(
                    f"the {name} of model layer {self.view.shape.layers[layer.index]} are not finite at "
                    f"{count} entries. Check the weights and the dtype (float16 overflows; try bfloat16)."
                )


def defers(method: Method) -> bool:
    """Whether every layer stays whole until the last has been read."""
    return method.allocator.scope == "model" or method.scorer.replay is not None


def make_plan(
    method: Method,
    keep: Keep,
    *,
    shape: ModelShape,
    entry_bytes: int,
    valid: Bool[Tensor, "batch tokens"],
    positions: Int[Tensor, "batch tokens"],
) -> Plan:
    """Turn `keep` into what the allocator must deliver for this context. Raises BadInput, BudgetInfeasible.

    A row that has no more tokens than every head must keep is kept whole, whatever the keep.
    """
    require_left_padding(valid)
    tokens = valid.sum(-1).tolist()
    if min(tokens) == 0:
        raise BadInput("a context is empty: every row needs at least one token that is not padding.")
    protected = protected_mask(valid, method.sink, method.window)
    floors = [max(1, n * method.keeps_protected) for n in protected.sum(-1).tolist()]
    asked = keep.entries(shape=shape, tokens=tokens, entry_bytes=entry_bytes)
    # No keep but everything would suit a context (a short turn of a chat) that has nothing to evict.
    totals = [shape.num_heads * n if n <= floor else a for n, floor, a in zip(tokens, floors, asked, strict=True)]
    demand = Demand(shape=shape, tokens=tuple(tokens), totals=tuple(totals), floors=tuple(floors))
    require_feasible(demand, keep)
    order = None if method.keeps_protected else protection_order(valid, method.sink, method.window)
    spared = totals != asked
    return Plan(valid=valid, positions=positions, protected=protected, order=order, demand=demand, spared=spared)


def keep_entries(
    method: Method, scores: Float[Tensor, "layers batch kv_heads tokens"], layers: Sequence[int], plan: Plan
) -> list[Bool[Tensor, "batch kv_heads tokens"]]:
    """Which entries of these layers stay: allocate counts, then select.

    Raises ShapeMismatch on scores of a wrong shape.
    """
    demand = plan.demand
    expected = (len(layers), len(plan.valid), demand.shape.kv_heads, plan.valid.shape[1])
    if tuple(scores.shape) != expected:
        name = type(method.scorer).__name__
        raise ShapeMismatch(f"{name} gave scores {tuple(scores.shape)}; expected [L, B, H, N] = {expected}.")
    counts = method.allocator.allocate(scores, plan.valid & ~plan.protected, layers, demand)
    return [select(s, c, plan.valid, plan.protected, plan.order) for s, c in zip(scores, counts, strict=True)]


def _last(past: Tensor | None, query: Tensor, window: int) -> Tensor:
    """The last `window` queries seen so far (a copy, so that the rest can be freed)."""
    joined = query if past is None else torch.cat([past, query], dim=2)
    return joined[:, :, max(0, joined.shape[2] - window) :].clone()


def _positions(position_ids: Tensor | None, valid: Tensor, count: int) -> Int[Tensor, "batch queries"]:
    """Positions of the newest `count` tokens: as given to the model, else counted from the first real token."""
    if position_ids is None:
        return (valid.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
    return position_ids.expand(valid.shape[0], -1)
