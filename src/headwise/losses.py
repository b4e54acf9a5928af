"""What a head loses when it keeps only its best entries by some scorer, as curves over how many it keeps.

Two losses, each a curve per head in the order in which a scorer keeps entries (protected tokens first):

    contribution  the summed importance of the entries that are evicted: LU-KV (arXiv 2602.08585)
    output        the squared change of what the head writes, ||(o_b - o) W_O||^2, when later queries see only the b
                  entries that are kept: ours. It knows that attention is shared out anew among what is left, so that
                  few entries can mislead a head more than none, and that many alike can stand in for each other. A
                  change that is the same at all steps is left out: it tells no answer from another

Curves are handed on as marginal utilities: what each entry, or each equal share of them, takes off the loss.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.oracle import Step, output_gram, states_of
from headwise.ragged.cache import RaggedCache
from headwise.select import protected_mask, protection_order

RANKS = 256  # resolution of a curve beyond the protected tokens
_UNDERFLOW = -600.0  # exp of it is still a float64


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
    """Listener: how the output of every head changes with how much it keeps, summed over decoding steps.

    `order` [layers, kv_heads, tokens] is of `keeping_order`; its first `protected` entries are told one by one.
    Memory: about `ranks` outputs for every query head, and as many for each question of a batch in one layer.
    """

    def __init__(
        self, whole: RaggedCache, order: Int[Tensor, "layers kv_heads tokens"], protected: int, ranks: int = RANKS
    ):
        candidates = order.shape[-1] - protected
        self.whole, self.order, self.protected, self.ranks = whole, order, protected, ranks
        self.block = -(-candidates // ranks)  # entries per recorded point
        ends = torch.arange(self.block, candidates + self.block, self.block, dtype=torch.int64, device="cpu").clamp(
            max=candidates
        )
        self.kept = torch.cat([torch.arange(protected + 1, dtype=torch.int64, device="cpu"), protected + ends]).to(
            order.device
        )
        self.gram = [output_gram(whole, layer) for layer in range(len(order))]
        self._squares = torch.zeros(*order.shape[:-1], len(self.kept), dtype=torch.float64, device=order.device)
        self._sums: dict[int, Tensor] = {}  # layer -> [H, G, points, D]
        self._steps = 0

    def __call__(self, step: Step) -> None:
        """Take note of a step."""
        outputs, sums = self._parts(step)  # of the tail, of every protected entry, of every block of others
        weight = (sums - sums.amax(-1, keepdim=True)).double().clamp(min=_UNDERFLOW).exp()
        seen = (outputs * weight[..., None]).cumsum(-2) / weight.cumsum(-1)[..., None]
        change = (seen - seen[..., -1:, :]).float() * step.answering[:, None, None, None, None]
        self._squares[step.layer] += self._norms(change, step.layer).sum((0, 2)).double()
        self._sums[step.layer] = self._sums.get(step.layer, 0) + change.sum(0)
        self._steps += int(step.answering.sum()) if step.layer == 0 else 0

    def loss(self) -> Float[Tensor, "layers kv_heads points"]:
        """Summed squares at `kept` entries, less what a constant change accounts for (a single step has no other)."""
        if self._steps < 2:
            return self._squares
        common = [self._norms(total, layer).sum(1).double() for layer, total in sorted(self._sums.items())]
        return (self._squares - torch.stack(common) / self._steps).clamp(min=0)

    def marginal(self) -> Float[Tensor, "layers kv_heads steps"]:
        """What keeping more takes off the loss, by rank. May be negative where more is worse than less."""
        loss = self.loss()
        return _by_rank(loss[..., :1] - loss, self.kept, self.protected, self.ranks)

    def _norms(self, change: Float[Tensor, "*batch kv_heads group points head_dim"], layer: int) -> Tensor:
        """Squared norm of what the change writes."""
        return ((change @ self.gram[layer]) * change).sum(-1).clamp(min=0)

    def _parts(self, step: Step) -> tuple[Tensor, Tensor]:
        """Attention output [B, H, G, parts, D] and log-sum-exp [B, H, G, parts] of parts of the cache."""
        values, order = states_of(self.whole, step.layer)[1].float(), self.order[step.layer]
        logits = step.context.gather(-1, order[None, :, None].expand_as(step.context))
        values = values.gather(1, order[..., None].expand_as(values))
        first, rest = logits[..., : self.protected], logits[..., self.protected :]
        pad = -rest.shape[-1] % self.block
        rest = torch.nn.functional.pad(rest, (0, pad), value=-torch.inf).unflatten(-1, (-1, self.block))
        blocks = torch.nn.functional.pad(values[:, self.protected :], (0, 0, 0, pad)).unflatten(1, (-1, self.block))
        outputs = [
            (step.tail.softmax(-1) @ step.tail_values)[:, :, :, None],
            values[None, :, None, : self.protected].expand(*first.shape, -1),
            torch.einsum("bhgpn,hpnd->bhgpd", rest.softmax(-1), blocks),
        ]
        sums = [step.tail.logsumexp(-1, keepdim=True), first, rest.logsumexp(-1)]
        return torch.cat(outputs, dim=-2), torch.cat(sums, dim=-1)


def _by_rank(
    gained: Float[Tensor, "*heads points"], kept: Int[Tensor, " points"], protected: int, ranks: int
) -> Float[Tensor, "*heads steps"]:
    """Steps of a curve known at `kept` entries: singly up to `protected`, then `ranks` equal ones, interpolated."""
    at = torch.linspace(protected, float(kept[-1]), ranks + 1, dtype=torch.float64, device=gained.device)
    above = torch.searchsorted(kept.double(), at, right=True).clamp(max=len(kept) - 1)
    share = (at - kept[above - 1]) / (kept[above] - kept[above - 1])
    rest = torch.lerp(gained[..., above - 1], gained[..., above], share.to(gained))
    return torch.cat([gained[..., :protected], rest], dim=-1).diff(dim=-1)
