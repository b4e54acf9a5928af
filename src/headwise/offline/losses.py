"""Measure what a head loses when it keeps only its best entries by a scorer, as curves over how many it keeps.

Two losses, each a curve per head in the order in which a scorer keeps entries (protected tokens first):

    contribution  the summed importance of the entries that are evicted: LU-KV (arXiv 2602.08585)
    output        the squared change of what the head writes, ||(o_b - o) W_O||^2, when later queries see only the b
                  entries that are kept: ours. It knows that attention is shared out anew among what is left, so that
                  few entries can mislead a head more than none, and that many alike can stand in for each other. A
                  change that is the same at all steps is left out: it tells no answer from another

The change is measured at few counts, close together where little is kept, which is where budgets are decided. It can
be measured of entries that are stored in fewer bits, too, against the output of all of them in the model's dtype.

Curves are handed on as marginal utilities: what each entry, or each equal share of them, takes off the loss.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.cache.cache import RaggedCache
from headwise.cache.whole import by_head
from headwise.kernels.partial import capped
from headwise.kernels.quantised import NATIVE, SINK, Bits
from headwise.kernels.segments import quantise
from headwise.methods.select import protected_mask, protection_order
from headwise.offline.watch import Rows, Written

RANKS = 256  # resolution of a curve beyond the protected tokens
PER_OCTAVE = 4  # points per doubling of what is kept, at which a change of the output is measured


def keeping_order(scores: Float[Tensor, "*heads tokens"], sink: int, window: int) -> Int[Tensor, "*heads tokens"]:
    """Return entries in the order in which `select` keeps them: first tokens, last tokens backwards, then by score."""
    valid = torch.ones(1, scores.shape[-1], dtype=torch.bool, device=scores.device)
    protected = protected_mask(valid, sink, window)[0]
    protected_order = protection_order(valid, sink, window)[0].argsort()[: int(protected.sum())]
    limit = torch.finfo(torch.float32).max  # as in select: infinities tie with the greatest numbers
    ranked = scores.float().clamp(-limit, limit).masked_fill(protected, -torch.inf)
    scored_order = ranked.argsort(dim=-1, descending=True, stable=True)[..., : scores.shape[-1] - len(protected_order)]
    return torch.cat([protected_order.expand(*scores.shape[:-1], -1), scored_order], dim=-1)


def marginal_utility(
    importance: Float[Tensor, "*heads tokens"], order: Int[Tensor, "*heads tokens"], protected: int, ranks: int = RANKS
) -> Float[Tensor, "*heads steps"]:
    """Return the importance that each step of keeping gains, in float64.

    The first `protected` steps are one entry each; the others are `ranks` equal shares of the context.
    """
    gained = importance.double().gather(-1, order).cumsum(-1)
    gained = torch.nn.functional.pad(gained, (1, 0))  # nothing kept, nothing gained
    return _by_rank(gained, torch.arange(gained.shape[-1], device=gained.device, dtype=torch.int64), protected, ranks)


class Stored:
    """A wholly kept context in fewer bits, but for its first tokens: what later queries see of it.

    Blocks of keys are of consecutive entries of the context. Those of a cache are of consecutive entries that a head
    has kept, so their scales may be wider: a change that is measured here is a little too small where little is kept.
    """

    def __init__(self, whole: RaggedCache, bits: Bits, written: Written):
        segments = [layer.segments for layer in whole.frozen_layers]
        later = torch.arange(segments[0].lengths[0], dtype=torch.int64, device=segments[0].keys.device) >= SINK
        self._segments = [quantise(part, later.repeat(part.kv_heads), bits) for part in segments]
        self._written = written
        self._last: tuple[Rows, tuple[Tensor, Tensor]] | None = None  # readers ask for the same rows one after another

    def seen_by(
        self, rows: Rows
    ) -> tuple[Float[Tensor, "kv_heads group rows tokens"], Float[Tensor, "kv_heads group tokens head_dim"]]:
        """Logits of some queries at the entries, and what these write."""
        if self._last is None or self._last[0] is not rows:
            segments = self._segments[rows.layer]
            native = (by_head(states, segments.kv_heads).float() for states in (segments.keys, segments.values))
            (few,) = segments.quantised
            later = zip(*(few.segment(head) for head in range(segments.kv_heads)), strict=True)
            keys, values = (torch.cat([a, torch.stack(b)], 1)[:, None] for a, b in zip(native, later, strict=True))
            self._last = rows, (capped(rows.queries @ keys.mT, rows.softcap), self._written.of(values, rows.layer))
        return self._last[1]


class OutputLoss:
    """Measures how the output of every head changes with how much it keeps, summed over later queries. A reader.

    `order` [layers, kv_heads, tokens] is of `keeping_order`; a curve has a step for each of its first `protected`
    entries. Outputs are made at `kept` entries only, closer together where there are few, and the curve is straight
    between them. Memory: so many outputs for every query head, and in one layer for every query of a call.

    `stored` are the same entries in fewer bits, by the kind of bits: each has a curve of its own, of the change from
    the native output.
    """

    def __init__(
        self,
        whole: RaggedCache,
        order: Int[Tensor, "layers kv_heads tokens"],
        protected: int,
        *,
        written: Written | None = None,
        stored: Mapping[str, Stored] | None = None,
        per_octave: int = PER_OCTAVE,
    ):
        self.order, self.protected, self.written = order, protected, written or Written(whole)
        self.points = spread_points(order.shape[-1], protected, per_octave)
        self.kept = torch.tensor(self.points, dtype=torch.int64, device=order.device)
        self._stored = stored or {}
        shape, device = (*order.shape[:-1], len(self.points)), order.device
        self._squares = {k: torch.zeros(shape, dtype=torch.float64, device=device) for k in (NATIVE, *self._stored)}
        self._sums: dict[tuple[str, int], Tensor] = {}  # kind, layer -> [H, G, points, D]
        self._queries = 0

    def __call__(self, rows: Rows) -> None:
        """Add some queries."""
        outputs = self._outputs(rows, rows.context, self.written.values(rows.layer))
        whole = outputs[:, :, -1:].clone()
        self._add(NATIVE, rows.layer, outputs.sub_(whole))
        for kind, stored in self._stored.items():
            self._add(kind, rows.layer, self._outputs(rows, *stored.seen_by(rows)).sub_(whole))
        self._queries += len(rows.question) if rows.layer == 0 else 0

    def _add(self, kind: str, layer: int, change: Float[Tensor, "kv_heads group points rows head_dim"]) -> None:
        self._squares[kind][layer] += change.square().sum((1, 3, 4)).double()
        self._sums[kind, layer] = self._sums.get((kind, layer), 0) + change.sum(3)

    def loss(self, kind: str = NATIVE) -> Float[Tensor, "layers kv_heads points"]:
        """Return the summed squares at `kept` entries, without the part of a change that is the same at all steps.

        A single query has no other change, so nothing is taken off for it.
        """
        squares = self._squares[kind]
        if self._queries < 2:
            return squares
        common = [self._sums[kind, layer].square().sum((1, 3)).double() for layer in range(len(squares))]
        return (squares - torch.stack(common) / self._queries).clamp(min=0)

    def marginal(self, kind: str = NATIVE) -> Float[Tensor, "layers kv_heads steps"]:
        """Return what each step of keeping takes off the loss. Negative where keeping more is worse."""
        loss = self.loss(kind)
        return _by_rank(loss[..., :1] - loss, self.kept, self.protected, RANKS)

    def _outputs(
        self,
        rows: Rows,
        logits: Float[Tensor, "kv_heads group rows tokens"],
        values: Float[Tensor, "kv_heads group tokens head_dim"],
    ) -> Float[Tensor, "kv_heads group points rows head_dim"]:
        """Return the outputs of heads whose later queries see the first entries in order only, at every point.

        The output so far and that of the next entries are mixed by their log-sum-exps, which is stable in float32.
        """
        order = self.order[rows.layer][:, None]
        logits = logits.gather(-1, order[:, :, None].expand_as(logits))
        values = values.gather(2, order[..., None].expand_as(values))
        output, total = self.written.of(rows.tail_output, rows.layer), rows.tail
        outputs = [output]
        for start, stop in pairwise(self.points):
            new_logits = logits[..., start:stop]
            new_total = new_logits.logsumexp(-1)
            new_output = (new_logits - new_total[..., None]).exp_() @ values[:, :, start:stop]
            total = torch.logaddexp(total, new_total)
            output = output + (new_output - output) * (new_total - total).exp_()[..., None]
            outputs.append(output)
        return torch.stack(outputs, dim=2)


def spread_points(tokens: int, protected: int, per_octave: int = PER_OCTAVE) -> list[int]:
    """Return counts from 0 to `tokens`: one by one while few, then so many per doubling, and `protected`."""
    points, count = {0, min(protected, tokens), tokens}, 1.0
    while round(count) < tokens:
        points.add(round(count))
        count = max(count + 1, count * 2 ** (1 / per_octave))
    return sorted(points)


def _by_rank(
    gained: Float[Tensor, "*heads points"], kept: Int[Tensor, " points"], protected: int, ranks: int
) -> Float[Tensor, "*heads steps"]:
    """Return the steps of a curve that is known at `kept` entries: `protected` single ones, then `ranks` equal ones."""
    protected_steps = torch.arange(protected, dtype=torch.float64, device=gained.device)
    equal_steps = torch.linspace(protected, float(kept[-1]), ranks + 1, dtype=torch.float64, device=gained.device)
    steps = torch.cat([protected_steps, equal_steps])
    above = torch.searchsorted(kept.double(), steps, right=True).clamp(max=len(kept) - 1)
    share = (steps - kept[above - 1]) / (kept[above] - kept[above - 1])
    return torch.lerp(gained[..., above - 1], gained[..., above], share.to(gained)).diff(dim=-1)
