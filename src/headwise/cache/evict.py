"""Bounded reading (reading="evict"): after every piece a layer keeps what its budget allows, and a margin.

The budget is that of the whole context, whose length is known. The margin is for entries that a later piece shows to
matter, and for heads whose share grows. Later pieces attend to what is kept, so a context may be longer than memory has
room for. The last cut is the method's own: exact totals, its own protected tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headwise.cache.bounded import BoundedLayer
from headwise.cache.layer import FillingLayer, FrozenLayer
from headwise.cache.listener import Listener
from headwise.cache.masks import require_causal, tokens_of
from headwise.cache.prefill import Plan, Prefill, contest, last_queries
from headwise.errors import BadInput, ShapeMismatch, UnsupportedGeneration, UnsupportedModel
from headwise.interfaces import AbstractScorer, Demand, Observation
from headwise.methods.allocate.apportion import apportion
from headwise.methods.reading import EVICT, MARGIN, require_reading
from headwise.methods.registry import SCORERS
from headwise.methods.select import protected_mask, select
from headwise.models.interface import Call


class BoundedPrefill(Prefill):
    """Watches the layers of one cache fill, and evicts after every piece."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        if self.prompt_length is None:
            raise BadInput("reading='evict' needs the length of the context, which the budget is of: give it.")
        self.require(self.method.scorer)
        require_reading(EVICT, self.entries)
        if self.view.anatomy.special or any(layer.shared for layer in self.view.layers):
            raise UnsupportedModel(
                "reading='evict' knows no soft-capped attention, no attention sinks, and no keys that layers share, "
                "and this model has some of these: use reading='exact' or 'offload'."
            )
        self._queries: dict[int, Tensor] = {}  # the last ones, of each layer
        self._held_scores: dict[int, list[Tensor]] = {}  # of layers that wait for others, head by head
        self._summary: Tensor | None = None  # of the first layer so far
        self._fresh: list[Tensor] = []  # tokens of the newest piece in every row, padding excluded
        self._seen: list[int] = []  # tokens of every row so far, padding excluded

    @classmethod
    def require(cls, scorer: AbstractScorer) -> None:
        """Raise BadInput for a scorer that needs the whole context, naming those that do not."""
        if scorer.while_reading == "never":
            able = ", ".join(name for name, entry in SCORERS.items() if entry.make().while_reading != "never")
            raise BadInput(
                f"reading='evict': {type(scorer).__name__} scores a context that is all there, and here parts of it "
                f"are evicted while it is read. Choose a scorer that does without ({able}), or reading='offload'."
            )

    def add_listener(self, listener: Listener) -> NoReturn:
        """Refuse: no layer ever sees the whole context."""
        raise UnsupportedGeneration(
            "reading='evict' never has the whole context at hand, which a listener wants to hear of: read it with "
            "reading='exact' or 'offload'."
        )

    def _note_seen(self, layer: FillingLayer, call: Call, valid: Bool[Tensor, "batch tokens"]) -> None:
        """As ever, of the newest piece: that is what a mask covers."""
        require_causal(call.mask, valid[:, -self._piece :])

    def take_images(self, *, on_grid: bool) -> NoReturn:
        """Refuse: a context with images is one piece."""
        raise UnsupportedGeneration(
            "reading='evict' reads a context in pieces, and one with images is read in one: use reading='exact' or "
            "'offload'."
        )

    @property
    def _last(self) -> bool:
        """Whether the newest piece is the last one."""
        return self._valid.shape[1] >= (self.prompt_length or 0)

    @property
    def _protected(self) -> Bool[Tensor, "batch tokens"]:
        """Tokens seen that every head holds after this piece. Scorers look through the last queries, so they stay."""
        if self._last:
            return self.plan.protected
        window = max(self.method.window, self.method.scorer.query_window)
        return protected_mask(self._valid, self.method.sink, window)

    def _observe(self, layer: FillingLayer, call: Call) -> None:
        assert isinstance(layer, BoundedLayer)
        if layer.index == 0:
            self._extend(layer, call)
        self._require_finite(layer, self._valid[:, -self._piece :])
        earlier = self._queries.get(layer.index)
        queries = (call.query,) if earlier is None else (earlier, call.query)
        self._queries[layer.index] = last_queries(queries, self.method.scorer.query_window)
        if layer.index == 0:
            self._share_out(layer, call.scaling)
        self._held_scores[layer.index] = self._scores_of(layer, call.scaling)
        if self.method.allocator.scope == "layer":
            self._evict([layer])
        elif layer.index == len(self.view.shape.layers) - 1:
            self._evict([each for each in self.filling if isinstance(each, BoundedLayer)])

    def _tokens(self, layer: FillingLayer, call: Call) -> Bool[Tensor, "batch tokens"]:
        """Which of the tokens seen are no padding; a mask covers the newest piece only."""
        new = tokens_of(call.mask, call.query.shape[0], call.query.shape[2], call.query.device)
        return new if layer.seen == new.shape[1] else torch.cat([self._valid, new], dim=-1)

    def _extend(self, layer: FillingLayer, call: Call) -> None:
        """As ever; and plan for the whole context: what is still to come is no padding."""
        super()._extend(layer, call)
        self._fresh = [row.nonzero()[:, 0] for row in self._valid[:, -self._piece :]]
        self._seen = self._valid.sum(-1).tolist()
        if not self._last:
            ahead = torch.arange(
                1, (self.prompt_length or 0) - layer.seen + 1, device=self._valid.device, dtype=torch.int64
            )
            coming = torch.ones(len(self._valid), len(ahead), dtype=torch.bool, device=ahead.device)
            positions = torch.cat([self._positions, self._positions[:, -1:] + ahead], dim=-1)
            self.plan = self._planned(layer, torch.cat([self._valid, coming], dim=-1), positions)

    def _share_out(self, layer: BoundedLayer, scaling: float) -> None:
        """The first layer has seen a piece: say how many entries each row may hold, and each head if that is known."""
        keys, values = layer.states
        valid, positions = (states[:, -keys.shape[2] :] for states in (self._valid, self._positions))
        piece = self._observed(layer, keys, values, positions, self._queries[0], scaling, valid=valid)
        self._summarise(self.method.allocator.summarise(piece), valid)
        plan = self.plan if self._last else replace(self.plan, demand=self._roomy(self.plan), limits=None)
        plan = plan.with_summary(self.method, self._summary)
        if plan.table is not None:
            seen = torch.tensor(self._seen, dtype=torch.int64, device="cpu")[None, :, None]
            plan = replace(plan, table=_within(plan.table.minimum(seen), self._room(), plan.demand))
        self.plan = plan

    def _summarise(self, summary: Tensor | None, valid: Bool[Tensor, "batch tokens"]) -> None:
        """Fold in what the newest piece is like: a mean over its tokens."""
        if summary is None:
            return
        before = torch.zeros_like(summary) if self._summary is None else self._summary
        share = valid.sum(-1, keepdim=True) / self._valid.sum(-1, keepdim=True).clamp(min=1)
        self._summary = torch.where(share > 0, before + (summary - before) * share, before)

    def _roomy(self, plan: Plan) -> Demand:
        """The demand while the context is read: the method's and a margin, and whatever is protected then."""
        demand, heads = plan.demand, plan.demand.shape.num_heads
        budgets = demand.totals
        if plan.limits is not None:  # bytes of quantised entries: more of them may fit, but not more than so many
            budgets = tuple(
                min(heads * n, nbytes // plan.limits.storages[0].least)
                for n, nbytes in zip(demand.tokens, plan.limits.nbytes, strict=True)
            )
        floors = tuple(max(1, n) for n in self._protected.sum(-1).tolist())
        totals = tuple(
            min(heads * n, max(ceil(budget * (1 + MARGIN)), heads * floor))
            for n, budget, floor in zip(demand.tokens, budgets, floors, strict=True)
        )
        return replace(demand, totals=totals, floors=floors, protected=floors)

    def _room(self) -> Int[Tensor, "layers batch kv_heads"]:
        """How many entries every head could hold: what it does hold, and the newest piece."""
        new = torch.tensor([len(fresh) for fresh in self._fresh], dtype=torch.int64, device="cpu")[:, None]
        heads = self.view.shape.kv_heads
        layers = [layer for layer in self.filling if isinstance(layer, BoundedLayer)]
        held = [[len(head.tokens) for head in layer.heads] or [0] * (heads * len(new)) for layer in layers]
        return torch.tensor(held, dtype=torch.int64, device="cpu").view(len(layers), -1, heads) + new

    def _scores_of(self, layer: BoundedLayer, scaling: float) -> list[Float[Tensor, " candidates"]]:
        """Scores of what every head holds and of the newest piece, padding excluded."""
        heads = self.view.shape.kv_heads
        if self.method.scorer.while_reading == "anew":
            return [self._head_scores(layer, at, scaling) for at in range(len(self._fresh) * heads)]
        scores = [new for row in range(len(self._fresh)) for new in self._piece_scores(layer, row, scaling)]
        if not layer.heads:
            return scores
        return [torch.cat([head.scores, new]) for head, new in zip(layer.heads, scores, strict=True)]

    def _piece_scores(self, layer: BoundedLayer, row: int, scaling: float) -> list[Float[Tensor, " new"]]:
        """Scores of the newest piece alone, head by head."""
        fresh, piece = self._fresh[row], slice(-self._piece, None)
        if not len(fresh):
            return [*fresh.new_empty(self.view.shape.kv_heads, 0, dtype=torch.float32)]
        keys, values = (states[row : row + 1, :, fresh.to(states.device)] for states in layer.states)
        positions, queries = self._positions[row : row + 1, piece][:, fresh], self._queries[layer.index][row : row + 1]
        observation = self._observed(layer, keys, values, positions, queries, scaling, row=row)
        return list(_checked(self.method.scorer, observation)[0].to(fresh.device))

    def _head_scores(self, layer: BoundedLayer, at: int, scaling: float) -> Float[Tensor, " candidates"]:
        """Scores of what one head holds and of the newest piece."""
        shape, (row, head) = self.view.shape, divmod(at, self.view.shape.kv_heads)
        keys, values, places = layer.candidates(at, self._fresh[row])
        if not len(places):
            return places.new_empty(0, dtype=torch.float32)
        queries = self._queries[layer.index][row : row + 1, head * shape.group : (head + 1) * shape.group]
        queries = queries[:, :, max(0, queries.shape[2] - self._seen[row]) :]  # padding before the row has none
        positions = self._positions[row : row + 1, places]
        observation = self._observed(layer, keys[None, None], values[None, None], positions, queries, scaling, row=row)
        return _checked(self.method.scorer.of_heads(slice(head, head + 1)), observation)[0, 0].to(places.device)

    def _observed(
        self,
        layer: BoundedLayer,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        queries: Tensor,
        scaling: float,
        *,
        row: int | None = None,
        valid: Tensor | None = None,
    ) -> Observation:
        """What a scorer or an allocator is given of some entries: of all rows, or of one and without its padding."""
        rows = slice(None) if row is None else slice(row, row + 1)
        whole, first = self.plan.positions[rows], self.plan.valid[rows].int().argmax(-1, keepdim=True)
        positions = positions.to(keys.device)
        return Observation(
            shape=self.view.shape,
            layer=layer.index,
            keys=keys,
            values=values,
            queries=queries,
            valid=torch.ones_like(positions, dtype=torch.bool) if valid is None else valid,
            positions=positions,
            project=partial(self.view.output_weight, layer.index),
            scaling=scaling,
            rotary=self.view.rotary(layer.index),
            statistics={},
            totals=self.plan.demand.totals[rows],
            ends=torch.cat([whole.gather(-1, first), whole[:, -1:]], dim=-1).to(keys.device),
        )

    def _evict(self, layers: Sequence[BoundedLayer]) -> None:
        """Let these layers hold what they may, and nothing else; freeze them after the last piece."""
        last, scores = self._last, [self._held_scores.pop(layer.index) for layer in layers]
        places = [self._places(layer) for layer in layers]
        protected, order = self._protected, self.plan.order if last else None
        counts = self._counts([layer.index for layer in layers], scores, places, protected)
        for layer, own, own_places, own_counts in zip(layers, scores, places, counts, strict=True):
            layer.evict(self._selected(own, own_places, own_counts, protected, order), own, self._fresh)
            if last:
                quantised = self.plan.quantised(layer.index, self.plan.valid.device)
                self._put(layer.freeze(self.plan.positions, quantised))

    def _put(self, frozen: FrozenLayer) -> None:
        super()._put(frozen)
        self._queries.pop(frozen.index)
        if not self.filling:
            self._fresh, self._summary = [], None

    def _places(self, layer: BoundedLayer) -> list[Int[Tensor, " candidates"]]:
        """Places in the row of what every head holds and of the newest piece."""
        heads = self.view.shape.kv_heads
        return [layer.places(at, self._fresh[at // heads]) for at in range(len(self._fresh) * heads)]

    def _counts(
        self, indices: list[int], scores: list[list[Tensor]], places: list[list[Tensor]], protected: Tensor
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """How many candidates every head of these layers holds from now on."""
        if self.plan.table is not None:
            return self.plan.table[indices]
        heads, rows = self.view.shape.kv_heads, len(self._fresh)
        room = torch.tensor([list(map(len, layer)) for layer in scores], dtype=torch.int64, device="cpu")
        room = room.view(len(scores), rows, heads)
        others = [
            head_scores[~protected[at // heads, head_places]]
            for layer_scores, layer_places in zip(scores, places, strict=True)
            for at, (head_scores, head_places) in enumerate(zip(layer_scores, layer_places, strict=True))
        ]
        lowest = torch.finfo(torch.float32).min  # what fills a head up to the longest one
        ranked = pad_sequence(others, batch_first=True, padding_value=lowest).view(len(scores), rows, heads, -1)
        longest = torch.tensor(list(map(len, others)), dtype=torch.int64, device="cpu").view_as(room).amax((0, 2))
        candidates = torch.arange(ranked.shape[-1], dtype=torch.int64, device="cpu") < longest[:, None]
        demand = self._demand(room, longest + protected.sum(-1).cpu())
        plan = replace(self.plan, demand=demand)
        counts = contest(self.method, ranked, candidates.to(ranked.device), indices, plan)
        return _within(counts.cpu(), room, demand)

    def _demand(self, room: Int[Tensor, "layers batch kv_heads"], tokens: Int[Tensor, " batch"]) -> Demand:
        """Of a contest among candidates: `tokens` of them in the head that has most, the protected ones included."""
        demand, heads = self.plan.demand, self.view.shape.num_heads
        most = [heads * seen for seen in self._seen]
        if self.method.allocator.scope == "model":
            most = room.sum((0, 2)).tolist()
        return replace(
            demand,
            tokens=tuple(tokens.tolist()),
            totals=tuple(map(min, demand.totals, most)),
            floors=tuple(map(min, demand.floors, self._seen)),
        )

    def _selected(
        self, scores: list[Tensor], places: list[Tensor], counts: Tensor, protected: Tensor, order: Tensor | None
    ) -> list[Bool[Tensor, " candidates"]]:
        """Which candidates of every head of a layer stay. Every head is a row of its own: each has other candidates."""
        rows = [at // self.view.shape.kv_heads for at in range(len(places))]
        pad = partial(pad_sequence, batch_first=True)
        kept = select(
            pad(scores)[:, None],
            counts.reshape(-1, 1).to(protected.device),
            pad([torch.ones_like(own, dtype=torch.bool) for own in places]),
            pad([protected[row, own] for row, own in zip(rows, places, strict=True)]),
            None if order is None else pad([order[row, own] for row, own in zip(rows, places, strict=True)]),
        )
        return [head_kept[: len(own)] for head_kept, own in zip(kept[:, 0], places, strict=True)]


def _within(
    counts: Int[Tensor, "layers batch kv_heads"], room: Int[Tensor, "layers batch kv_heads"], demand: Demand
) -> Int[Tensor, "layers batch kv_heads"]:
    """The counts, but of no head more than there are; other heads of these layers get what it cannot hold."""
    if bool((counts <= room).all()):
        return counts
    wishes, most = (table.transpose(0, 1).flatten(1) for table in (counts, room))
    floors = torch.tensor(demand.floors, dtype=torch.int64, device="cpu")[:, None]
    spread = apportion(wishes.double(), wishes.sum(-1).minimum(most.sum(-1)), most.minimum(floors), most)
    return spread.view(room.shape[1], room.shape[0], -1).transpose(0, 1)


def _checked(scorer: AbstractScorer, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
    """Its scores in float32. Raises ShapeMismatch."""
    scores, expected = scorer.score(observation), tuple(observation.keys.shape[:3])
    if tuple(scores.shape) != expected:
        raise ShapeMismatch(
            f"{type(scorer).__name__} gave scores {tuple(scores.shape)}; expected [B, H, N] = {expected}."
        )
    return scores.float()
