"""What happens while a context is read: every layer is observed, scored, given counts, and cut.

A scope "layer" allocator has each layer cut as soon as it is done, so that peak KV memory is the compressed cache plus
one full layer. A scope "model" allocator, and a scorer that replays the context, wait until all layers are done.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn, Protocol, runtime_checkable
from weakref import ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.cache.layer import FillingLayer, FrozenLayer, RaggedLayer
from headwise.cache.listener import Listener
from headwise.cache.masks import require_causal, require_left_padding, tokens_of
from headwise.errors import BadInput, NonFiniteValues, ShapeMismatch, UnsupportedGeneration, UnsupportedModel
from headwise.interfaces import AbstractScorer, Chunk, Demand, Observation, Replay, StaticAllocator, Statistics
from headwise.kernels.quantised import AUTO, ENTRIES, NATIVE, SINK, Bits, parse_entries
from headwise.methods.allocate.apportion import require_feasible
from headwise.methods.keep import MOST, Keep
from headwise.methods.method import Method
from headwise.methods.select import protected_mask, protection_order, select
from headwise.methods.storage import ChoosesKinds, Limits, Storage, fitted, require_bytes
from headwise.models.families import ModelView
from headwise.models.interface import Call
from headwise.shapes import ModelShape

NEAR = 1000  # where counts need all scores, a budget in bytes may stay below what fits by one in so many entries


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is known about a context before any layer is scored. Its tensors are where the first layer is."""

    valid: Bool[Tensor, "batch tokens"]
    positions: Int[Tensor, "batch tokens"]
    protected: Bool[Tensor, "batch tokens"]
    order: Int[Tensor, "batch tokens"] | None  # of the protected tokens, where a head may keep fewer of them
    demand: Demand
    spared: bool  # whether a row is kept whole, because it has no more tokens than every head must keep
    kinds: tuple[Bits | None, ...]  # of entries, one of which every head has; None is the model's dtype
    limits: Limits | None = None  # bytes of each row, where the budget counts quantised entries in bytes
    table: Int[Tensor, "layers batch kv_heads"] | None = None  # all counts, where no scores are needed for them
    chosen: Int[Tensor, "layers batch kv_heads"] | None = None  # which of `kinds` a head has, where there are several

    def summarised(self, method: Method, first: Observation) -> "Plan":
        """With what the method's allocator wants to know of the first layer, and its counts if it needs no more."""
        return self.with_summary(method, method.allocator.summarise(first))

    def with_summary(self, method: Method, summary: Float[Tensor, "batch width"] | None) -> "Plan":
        """With what is known of the first layer."""
        allocator = method.allocator
        demand, table, chosen = replace(self.demand, summary=summary), None, None
        if len(self.kinds) > 1 and self.limits is not None and isinstance(allocator, ChoosesKinds):
            table, chosen = allocator.stored(demand, self.limits)
            demand = replace(demand, totals=tuple(table.sum((0, 2)).tolist()))
        elif isinstance(allocator, StaticAllocator):
            if self.limits is not None:
                demand = fitted(demand, self.limits, allocator.counts)
            table = allocator.counts(demand)
        return replace(self, demand=demand, table=table, chosen=chosen)

    def quantised(self, layer: int, device: torch.device) -> list[tuple[Bits, Bool[Tensor, "batch kv_heads tokens"]]]:
        """Every kind of bits in a layer, and the entries that are stored so where they are kept; on its `device`."""
        tokens = (self.valid & ~protected_mask(self.valid, SINK, 0))[:, None].to(device)
        found: list[tuple[Bits, Tensor]] = []
        for number, bits in enumerate(self.kinds):
            if bits is not None and self.chosen is None:
                found.append((bits, tokens.expand(-1, self.demand.shape.kv_heads, -1)))
            elif bits is not None and self.chosen is not None:
                heads = (self.chosen[layer] == number).to(tokens.device)
                found += [(bits, tokens & heads[..., None])] if bool(heads.any()) else []
        return found


@dataclass(kw_only=True)
class _Trace:
    """What a scorer gathers of one layer while the context is read."""

    scorer: AbstractScorer
    statistics: Statistics = field(default_factory=dict)
    queries: tuple[Tensor, ...] = ()  # the last ones, in one tensor
    scaling: float = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None

    def add(self, chunk: Chunk) -> None:
        """Take in a chunk. A second reading is for those who asked for it, and its queries are not the context's."""
        if chunk.repeats is None or self.scorer.replay is not None:
            self.statistics = self.scorer.accumulate(self.statistics, chunk)
        if chunk.repeats is None:
            self.queries = (last_queries((*self.queries, chunk.queries), self.scorer.query_window),)
            self.scaling, self.softcap, self.sinks = chunk.scaling, chunk.softcap, chunk.sinks


@runtime_checkable
class Filled(Protocol):
    """The cache that is being filled."""

    ragged_layers: list[RaggedLayer]
    context_tokens: tuple[int, ...] | None

    def put(self, frozen: FrozenLayer) -> None:
        """In the place of the layer that was cut."""


class Prefill:
    """Watches the layers of one cache fill, and cuts them. Does nothing once they are cut."""

    plan: Plan  # from the last piece on, until all layers are cut
    _valid: Bool[Tensor, "batch tokens"]  # from the first piece on, until then
    _positions: Int[Tensor, "batch tokens"]

    def __init__(
        self, *, view: ModelView, method: Method, keep: Keep, prompt_length: int | None, entries: str = NATIVE
    ):
        kinds_of(method, keep, entries)  # refused before anything is read
        self.view = view
        self.method = method
        self.keep = keep
        self.entries = entries
        self.prompt_length = prompt_length
        self._filled: Callable[[], Filled | None] = lambda: None
        self.listeners: list[Listener] = []
        self.scores: dict[int, Tensor] = {}  # of layers that have not been cut
        self.repeats: tuple[int, int] | None = None  # tokens of the context that a second reading is at
        self._traces: dict[int, list[_Trace]] = {}  # of each layer, by scorer
        self._piece = 0  # tokens of the latest piece of prefill
        self.has_images = False  # whether the context has some
        self._until: Tensor | None = None  # the last token that each one sees, where that is not always itself
        self._failure = ""

    @classmethod
    def require(cls, scorer: AbstractScorer) -> None:
        """Raise BadInput unless contexts can be read so with this scorer. Any will do where they stay whole."""

    def watch(self, filled: "Filled") -> None:
        """This is the cache. Its layers hold this object, so it holds the cache weakly: a cycle would outlive it."""
        self._filled = ref(filled)

    @property
    def filling(self) -> list[FillingLayer]:
        """The layers that have not been cut."""
        filled = self._filled()
        layers = [] if filled is None else filled.ragged_layers
        return [layer for layer in layers if isinstance(layer, FillingLayer)]

    @property
    def scorers(self) -> list[AbstractScorer]:
        """The method's, which decides, then those that only watch, for listeners; each once."""
        scorers = [self.method.scorer]
        for listener in self.listeners:
            scorers += [scorer for scorer in listener.scorers if scorer not in scorers]
        return scorers

    @property
    def replay(self) -> Replay | None:
        """How the context must be read again, if any scorer asks for it; all that do ask for the same."""
        return next((scorer.replay for scorer in self.scorers if scorer.replay is not None), None)

    def add_listener(self, listener: Listener) -> None:
        """Let it hear the reading. Raises BadInput where its scorers come too late, or want another second reading."""
        if self._piece and listener.scorers:
            raise BadInput("a listener with scorers must be there before the context is read, for they need all of it.")
        for scorer in listener.scorers:
            if scorer.replay is not None and self.replay not in (None, scorer.replay):
                raise BadInput(
                    f"{type(scorer).__name__} wants the context repeated in another way than {self.replay}: listen to "
                    "one of them at a time."
                )
        self.listeners.append(listener)

    def take_images(self, *, on_grid: bool) -> None:
        """The context has images. Raises UnsupportedGeneration for scorers that have the model repeat it.

        Raises UnsupportedModel for methods that cannot be used where images are placed on a grid.
        """
        if on_grid:
            self.refuse_turning()
        for scorer in self.scorers:
            if scorer.replay is not None:
                raise UnsupportedGeneration(
                    f"{type(scorer).__name__} has the model repeat the context, which has images here: these come with "
                    "the context once. Choose a method that reads it once, such as snapkv or keydiff."
                )
        self.has_images = True

    def refuse_turning(self) -> None:
        """Tokens are on a grid. Raises UnsupportedModel for what turns keys or queries by one position a token."""
        for part in (*self.scorers, self.method.allocator):
            if part.needs & {"rotation", "queries"}:
                raise UnsupportedModel(
                    f"{type(part).__name__} cannot be used: tokens of images have three positions each in this model, "
                    "and it turns keys by one. Choose a method that needs keys and values only, such as keydiff."
                )

    def refuse_failed(self) -> NoReturn:
        """Raise UnsupportedGeneration: what was read is not whole, and cannot be read again."""
        reason = self._failure or "a forward pass did not finish"
        raise UnsupportedGeneration(f"this cache failed while reading its context ({reason}): make a new one.")

    def expect(self, seen: int, num_tokens: int) -> None:
        """So many new tokens are about to enter the first layer: raise if they cannot be served."""
        if self._failure:
            self.refuse_failed()
        if num_tokens == 1 and self._piece > 1 and seen + 1 < (self.prompt_length or 0):
            raise UnsupportedGeneration(
                f"prompt_length={self.prompt_length}, but {seen} tokens came before single ones, so the context "
                "is not complete and nothing has been cut. Give the prompt's length, or None if it comes in one piece."
            )

    def observe(self, layer: FillingLayer, call: Call) -> None:
        """Take in one piece of prefill of one layer; cut the layer if it was the last piece."""
        try:
            self._observe(layer, call)
        except BaseException as error:  # an interrupt too leaves layers half-filled
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def start_replay(self, start: int, stop: int) -> None:
        """The next forward pass repeats tokens start:stop of the context."""
        self.repeats = start, stop
        for layer in self.filling:
            layer.replaying = True

    def finish_replay(self) -> None:
        """The context has been repeated: score and cut."""
        filling = self.filling
        for layer in filling:
            layer.replaying = False
            self.scores[layer.index] = self._score(layer)
            layer.rest()
        self._cut(filling)

    def _observe(self, layer: FillingLayer, call: Call) -> None:
        if layer.index == 0 and not layer.replaying:
            self._extend(layer, call)
        chunk = self._chunk(layer, call)
        if layer.index not in self._traces:
            self._traces[layer.index] = [_Trace(scorer=scorer) for scorer in self.scorers]
        for trace in self._traces[layer.index]:
            trace.add(chunk)
        if not layer.replaying and layer.seen >= (self.prompt_length or 0):
            self._finish(layer)

    def _extend(self, layer: FillingLayer, call: Call) -> None:
        """Note which tokens are padding, and every token's position; refuse what cannot work, before any cut."""
        first, self._piece = not self._piece, call.query.shape[2]
        valid = self._tokens(layer, call)
        self._note_seen(layer, call, valid)
        fresh = _positions(call.position_ids, valid, self._piece)
        self._valid = valid
        self._positions = fresh if first else torch.cat([self._positions, fresh], dim=-1)
        needed = int(fresh.max()) + 1
        self.view.require_positions(needed, f"reaches position {needed}")
        self.view.warn_of_positions(needed)
        if layer.seen >= (self.prompt_length or 0):
            self.plan = self._planned(layer, valid, self._positions)
            if self.plan.spared:
                self._warn_of_short_context(self.plan)

    def _tokens(self, layer: FillingLayer, call: Call) -> Bool[Tensor, "batch tokens"]:
        """Which of the tokens seen are no padding."""
        return tokens_of(call.mask, call.query.shape[0], layer.seen, call.query.device)

    def _note_seen(self, layer: FillingLayer, call: Call, valid: Bool[Tensor, "batch tokens"]) -> None:
        """Note how far tokens see. Raises BadInput for a mask that is not causal, but for images."""
        until, before = require_causal(call.mask, valid, images=self.has_images), layer.seen - call.query.shape[2]
        if until is not None or self._until is not None:
            number = torch.arange(layer.seen, dtype=torch.int64, device=valid.device).expand_as(valid)
            past = number[:, :before] if self._until is None else self._until
            self._until = torch.cat([past, number[:, before:] if until is None else until], dim=-1)

    def _planned(self, layer: FillingLayer, valid: Tensor, positions: Tensor) -> Plan:
        return make_plan(
            self.method,
            self.keep,
            shape=self.view.shape,
            itemsize=layer.dtype.itemsize,
            entries=self.entries,
            valid=valid,
            positions=positions,
        )

    def _warn_of_short_context(self, plan: Plan) -> None:
        shortest = min(plan.demand.tokens)
        why = f"sink {self.method.sink} and window {self.method.window} cover it" if max(plan.demand.floors) > 1 else ""
        warnings.warn(
            f"a context of {shortest} {'tokens' if shortest > 1 else 'token'} is kept whole, whatever the keep: "
            f"{why or 'every head keeps one at least'}.",
            UserWarning,
            stacklevel=2,
        )

    def _chunk(self, layer: FillingLayer, call: Call) -> Chunk:
        (batch, _, new, _), tokens = call.query.shape, call.key.shape[2]
        device = call.query.device
        valid, positions = self._valid.to(device), self._positions.to(device)
        if layer.replaying:
            valid = tokens_of(call.mask, batch, tokens, device)
            positions = torch.cat([positions, _positions(call.position_ids, valid, new)], dim=-1)
        return Chunk(
            queries=call.query,
            keys=call.key,
            valid=valid,
            positions=positions,
            offset=tokens - new,
            scaling=call.scaling,
            rotary=self.view.rotary(layer.index),
            softcap=call.softcap,
            sinks=call.sinks,
            repeats=self.repeats,
            until=None if self._until is None else self._until[:, tokens - new :],
        )

    def _finish(self, layer: FillingLayer) -> None:
        """The whole context has passed through a layer."""
        self._require_finite(layer, self.plan.valid)
        if self.replay is not None:
            return  # scored when the context has been repeated
        self.scores[layer.index] = self._score(layer)
        if self.method.allocator.scope == "layer":
            self._cut([layer])
        elif layer.index == len(self.view.shape.layers) - 1:
            self._cut(self.filling)

    def _score(self, layer: FillingLayer) -> Float[Tensor, "batch kv_heads tokens"]:
        """Scores of the method's scorer, where the plan is; listeners are given what every scorer is given."""
        traces = self._traces.pop(layer.index)
        observations = [self._observation(layer, trace) for trace in traces]
        if layer.index == 0:
            self.plan = self.plan.summarised(self.method, observations[0])
        for trace, observation in zip(traces, observations, strict=True):
            for listener in self.listeners:
                if trace.scorer is traces[0].scorer or trace.scorer in listener.scorers:
                    listener.observed(trace.scorer, observation)
        return self.method.scorer.score(observations[0]).to(self.plan.valid.device)

    def _observation(self, layer: FillingLayer, trace: _Trace) -> Observation:
        (keys, values), (queries,) = layer.states, trace.queries
        return Observation(
            shape=self.view.shape,
            layer=layer.index,
            keys=keys,
            values=values,
            queries=queries,
            valid=self.plan.valid.to(keys.device),
            positions=self.plan.positions.to(keys.device),
            project=partial(self.view.output_weight, layer.index),
            scaling=trace.scaling,
            rotary=self.view.rotary(layer.index),
            statistics=trace.statistics,
            totals=self.plan.demand.totals,
            softcap=trace.softcap,
            sinks=trace.sinks,
            until=None if self._until is None else self._until[:, keys.shape[2] - queries.shape[2] :],
        )

    def _cut(self, layers: Sequence[FillingLayer]) -> None:
        """Allocate counts to these layers and freeze them."""
        indices = [layer.index for layer in layers]
        kept = keep_entries(self.method, torch.stack([self.scores.pop(i) for i in indices]), indices, self.plan)
        for layer, layer_kept in zip(layers, kept, strict=True):
            quantised = self.plan.quantised(layer.index, layer.device)
            self._put(layer.cut(layer_kept.to(layer.device), self.plan.positions.to(layer.device), quantised))

    def _put(self, frozen: FrozenLayer) -> None:
        """Give the cache a layer that was cut; after the last one nothing is left to be known of the context."""
        filled = self._filled()
        if filled is not None:
            filled.put(frozen)
        if not self.filling:
            if filled is not None:
                filled.context_tokens = self.plan.demand.tokens
            self._until = None
            del self.plan, self._valid, self._positions

    def _require_finite(self, layer: FillingLayer, valid: Bool[Tensor, "batch tokens"]) -> None:
        """Padding may hold anything; a real token's key or value may not be NaN or infinite."""
        sums = torch.stack([states.sum(-1, dtype=torch.float32) for states in layer.states])
        valid = valid.to(sums.device)
        bad = ~torch.isfinite(sums) & valid[:, None]  # float32: finite float16 numbers may add up to more
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
    itemsize: int,
    entries: str = NATIVE,
    valid: Bool[Tensor, "batch tokens"],
    positions: Int[Tensor, "batch tokens"],
) -> Plan:
    """Turn `keep` into what the allocator must deliver for this context. Raises BadInput, BudgetInfeasible.

    A row that has no more tokens than every head must keep is kept whole, whatever the keep.
    """
    kinds = kinds_of(method, keep, entries)
    require_left_padding(valid)
    tokens = valid.sum(-1).tolist()
    if min(tokens) == 0:
        raise BadInput("a context is empty: every row needs at least one token that is not padding.")
    protected = protected_mask(valid, method.sink, method.window)
    num_protected = tuple(protected.sum(-1).tolist())
    floors = [max(1, n * method.keeps_protected) for n in num_protected]
    storages = tuple(Storage(head_dim=shape.head_dim, itemsize=itemsize, bits=bits) for bits in kinds)
    asked, limits = _asked(method, keep, storages, shape, tokens)
    # No keep but everything would suit a context (a short turn of a chat) that has nothing to evict.
    totals = [shape.num_heads * n if n <= floor else a for n, floor, a in zip(tokens, floors, asked, strict=True)]
    if limits is not None:  # a row that is kept whole may take what it takes
        nbytes = [n if total == a else MOST - 1 for n, total, a in zip(limits.nbytes, totals, asked, strict=True)]
        limits = replace(limits, nbytes=tuple(nbytes))
    demand = Demand(
        shape=shape, tokens=tuple(tokens), totals=tuple(totals), floors=tuple(floors), protected=num_protected
    )
    require_feasible(demand, keep)
    order = None if method.keeps_protected else protection_order(valid, method.sink, method.window)
    return Plan(
        valid=valid,
        positions=positions,
        protected=protected,
        order=order,
        demand=demand,
        spared=totals != asked,
        kinds=kinds,
        limits=limits,
    )


def kinds_of(method: Method, keep: Keep, entries: str) -> tuple[Bits | None, ...]:
    """The kinds of entries that heads may have; several with "auto". Raises BadInput where that cannot be chosen."""
    if entries != AUTO:
        return (parse_entries(entries),)
    require_bytes(keep)
    kinds = method.allocator.kinds if isinstance(method.allocator, ChoosesKinds) else ()
    if len(kinds) < 2:
        raise BadInput(
            f"entries={AUTO!r} needs a budget that knows what fewer bits cost each head, and this method has "
            f"{_lacking(method)}. Make one with 'headwise profile --entries {NATIVE},{','.join(ENTRIES)}' and "
            "'headwise solve', then write scorer+lukv@FILE."
        )
    return kinds


def _lacking(method: Method) -> str:
    """What it has instead, as an error says it."""
    allocator = method.allocator
    return "one without" if isinstance(allocator, ChoosesKinds) else f"the allocator {type(allocator).__name__}"


def _asked(
    method: Method, keep: Keep, storages: tuple[Storage, ...], shape: ModelShape, tokens: Sequence[int]
) -> tuple[list[int], Limits | None]:
    """Entries of each row; and its bytes, where quantised entries are counted in bytes: more may fit then."""
    native = storages[0].native
    if not keep.counts_bytes or all(storage.bits is None for storage in storages):
        return keep.entries(shape=shape, tokens=tokens, entry_bytes=native), None
    nbytes = keep.limits(shape=shape, tokens=tokens, entry_bytes=native)
    fitting = [max(storage.entries(limit, shape.num_heads) for storage in storages) for limit in nbytes]
    asked = [min(shape.num_heads * n, entries) for n, entries in zip(tokens, fitting, strict=True)]
    limits = Limits(nbytes=tuple(nbytes), storages=storages, first_kept=method.sink >= SINK)
    return asked, limits


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
    if plan.table is None:
        counts = contest(method, scores, plan.valid & ~plan.protected, layers, plan)
    else:
        counts = plan.table[list(layers)].to(scores.device)
    return [select(s, c, plan.valid, plan.protected, plan.order) for s, c in zip(scores, counts, strict=True)]


def contest(
    method: Method,
    scores: Float[Tensor, "layers batch kv_heads tokens"],
    candidates: Bool[Tensor, "batch tokens"],
    layers: Sequence[int],
    plan: Plan,
) -> Int[Tensor, "layers batch kv_heads"]:
    """Counts of these layers where they depend on scores."""
    allocate, demand = method.allocator.allocate, plan.demand
    if plan.limits is not None and method.allocator.scope == "model":
        demand = fitted(demand, plan.limits, partial(allocate, scores, candidates, layers), share=NEAR)
    return allocate(scores, candidates, layers, demand)


def last_queries(pieces: Sequence[Tensor], window: int) -> Tensor:
    """The last `window` queries seen so far (a copy, so that the rest can be freed)."""
    joined = torch.cat([*pieces], dim=2) if len(pieces) > 1 else pieces[0]
    return joined[:, :, max(0, joined.shape[2] - window) :].clone()


def _positions(position_ids: Tensor | None, valid: Tensor, count: int) -> Int[Tensor, "batch queries"]:
    """Positions of the newest `count` tokens: as given to the model, else counted from the first real token."""
    if position_ids is None:
        return (valid.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
    return position_ids.expand(valid.shape[0], -1)
