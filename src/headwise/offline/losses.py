"""What a head loses when it keeps only its best entries by some scorer, as curves over how many it keeps.

Two losses, each a curve per head in the order in which a scorer keeps entries (protected tokens first):

    contribution  the summed importance of the entries that are evicted: LU-KV (arXiv 2602.08585)
    output        the squared change of what the head writes, ||(o_b - o) W_O||^2, when later queries see only the b
                  entries that are kept: ours. It knows that attention is shared out anew among what is left, so that
                  few entries can mislead a head more than none, and that many alike can stand in for each other. A
                  change that is the same at all steps is left out: it tells no answer from another

The change is measured at few counts, close together where little is kept, which is where budgets are decided.

Curves are handed on as marginal utilities: what each entry, or each equal share of them, takes off the loss.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.cache.cache import RaggedCache
from headwise.methods.select import protected_mask, protection_order
from headwise.offline.watch import Rows, Written

RANKS = 256  # resolution of a curve beyond the protected tokens
PER_OCTAVE = 4  # points per doubling of what is kept, at which a change of the output is measured


def keeping_order(scores: Float[Tensor, "*heads tokens"], sink: int, window: int) -> Int[Tensor, "*heads tokens"]:
    """Entries in the order in which `select` keeps them: first tokens, last tokens backwards, then by score."""
    valid = torch.ones(1, scores.shape[-1], dtype=torch.bool, device=scores.device)
    protected = protected_mask(valid, sink, window)[0]
    first = protection_order(valid, sink, window)[0].argsort()[: int(protected.sum())]
    limit = torch.finfo(torch.float32).max  # as in select: infinities tie with the greatest numbers
    ranked = scores.float().clamp(-limit, limit).masked_fill(protected, -torch.inf)
    rest = ranked.argsort(dim=-1, descending=True, stable=True)[..., : scores.shape[-1] - len(first)]
    return torch.cat([first.expand(*scores.shape[:-1], -1), rest], dim=-1)


def marginal_utility(
    importance: Float[Tensor, "*heads tokens"], order: Int[Tensor, "*heads tokens"], protected: int, ranks: int = RANKS
) -> Float[Tensor, "*heads steps"]:
    """Importance in the order of keeping: one by one for the protected tokens, then in equal shares. float64."""
    gained = importance.double().gather(-1, order).cumsum(-1)
    gained = torch.nn.functional.pad(gained, (1, 0))  # nothing kept, nothing gained
    return _by_rank(gained, torch.arange(gained.shape[-1], device=gained.device, dtype=torch.int64), protected, ranks)


class OutputLoss:
    """Reader: how the output of every head changes with how much it keeps, summed over later queries.

    `order` [layers, kv_heads, tokens] is of `keeping_order`; a curve tells its first `protected` entries one by one.
    Outputs are made at `kept` entries only, closer together where there are few, and the curve is drawn straight
    between them. Memory: so many outputs for every query head, and in one layer for every query told of at once.
    """

    def __init__(
        self,
        whole: RaggedCache,
        order: Int[Tensor, "layers kv_heads tokens"],
        protected: int,
        *,
        written: Written | None = None,
        per_octave: int = PER_OCTAVE,
    ):
        self.order, self.protected, self.written = order, protected, written or Written(whole)
        self.points = spread_points(order.shape[-1], protected, per_octave)
        self.kept = torch.tensor(self.points, dtype=torch.int64, device=order.device)
        self._squares = torch.zeros(*order.shape[:-1], len(self.points), dtype=torch.float64, device=order.device)
        self._sums: dict[int, Tensor] = {}  # layer -> [H, G, points, D]
        self._queries = 0

    def __call__(self, rows: Rows) -> None:
        """Take note of some queries."""
        seen = self._outputs(rows)
        change = seen - seen[:, :, -1:]  # [H, G, points, rows, D]
        self._squares[rows.layer] += change.square().sum((1, 3, 4)).double()
        self._sums[rows.layer] = self._sums.get(rows.layer, 0) + change.sum(3)
        self._queries += len(rows.question) if rows.layer == 0 else 0

    def loss(self) -> Float[Tensor, "layers kv_heads points"]:
        """Summed squares at `kept` entries, less what a constant change accounts for (a single query has no other)."""
        if self._queries < 2:
            return self._squares
        common = [total.square().sum((1, 3)).double() for _, total in sorted(self._sums.items())]
        return (self._squares - torch.stack(common) / self._queries).clamp(min=0)

    def marginal(self) -> Float[Tensor, "layers kv_heads steps"]:
        """What keeping more takes off the loss, by rank. May be negative where more is worse than less."""
        loss = self.loss()
        return _by_rank(loss[..., :1] - loss, self.kept, self.protected, RANKS)

    def _outputs(self, rows: Rows) -> Float[Tensor, "kv_heads group points rows head_dim"]:
        """What a head writes when its later queries see the first entries in order, at every point.

        Point after point, the output so far and that of the next entries are mixed by their log-sum-exps: stable in
        float32, whatever the logits.
        """
        order, whole = self.order[rows.layer][:, None], self.written.values(rows.layer)
        logits = rows.context.gather(-1, order[:, :, None].expand_as(rows.context))
        values = whole.gather(2, order[..., None].expand_as(whole))
        output, total = self.written.of(rows.tail_output, rows.layer), rows.tail
        seen = [output]
        for start, stop in pairwise(self.points):
            new = logits[..., start:stop]
            summed = new.logsumexp(-1)
            found = (new - summed[..., None]).exp_() @ values[:, :, start:stop]
            total = torch.logaddexp(total, summed)
            output = output + (found - output) * (summed - total).exp_()[..., None]
            seen.append(output)
        return torch.stack(seen, dim=2)


def spread_points(tokens: int, protected: int, per_octave: int = PER_OCTAVE) -> list[int]:
    """Counts from 0 to `tokens`: one by one while few, then so many per doubling; `protected` is among them."""
    points, at = {0, min(protected, tokens), tokens}, 1.0
    while round(at) < tokens:
        points.add(round(at))
        at = max(at + 1, at * 2 ** (1 / per_octave))
    return sorted(points)


def _by_rank(
    gained: Float[Tensor, "*heads points"], kept: Int[Tensor, " points"], protected: int, ranks: int
) -> Float[Tensor, "*heads steps"]:
    """Steps of a curve known at `kept` entries: singly up to `protected`, then `ranks` equal ones, interpolated."""
    first = torch.arange(protected, dtype=torch.float64, device=gained.device)
    rest = torch.linspace(protected, float(kept[-1]), ranks + 1, dtype=torch.float64, device=gained.device)
    at = torch.cat([first, rest])
    above = torch.searchsorted(kept.double(), at, right=True).clamp(max=len(kept) - 1)
    share = (at - kept[above - 1]) / (kept[above] - kept[above - 1])
    return torch.lerp(gained[..., above - 1], gained[..., above], share.to(gained)).diff(dim=-1)
