"""Allocators that need no artifact: equal shares, a pyramid over the layers, or a contest of raw scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import BadInput
from headwise.interfaces import AbstractAllocator, Demand, Scope, StaticAllocator
from headwise.methods.allocate.apportion import apportion, even_shares, require_feasible


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniform(StaticAllocator):
    """The same count for every head of every layer, to within one entry."""

    def counts(self, demand: Demand) -> Int[Tensor, "layers batch kv_heads"]:
        """Equal counts; nested: no head shrinks when the total grows. Raises BudgetInfeasible below the floors."""
        require_feasible(demand)
        return _equal_heads(_equal_layers(demand), demand)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pyramid(StaticAllocator):
    """More for the lower layers, less for the upper ones, in a straight line; equal heads within a layer.

    Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069.
    With a the average above the floors, the last layer gets a / beta and the first 2a - a / beta, or, where that
    exceeds the context, all of it, the last layer then taking what is left.

    Ours differs: the original rounds a / beta and the step between layers down, and so misses its total; ours is exact.
    The original turns to equal layers for contexts of less than twice the average; ours does not.
    `uniform_fallback` is the convention of kvpress: the line is laid over whole budgets, protected tokens included, and
    is given up for equal layers wherever the smallest would not hold the protected tokens (at 4k tokens and a window
    of 64: from 70% removed on).
    """

    beta: float = 20.0
    uniform_fallback: bool = False

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise BadInput(f"beta={self.beta!r} would turn the pyramid over; give 1 (flat) or more (paper: 20).")

    def counts(self, demand: Demand) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts that fall with depth. Raises BudgetInfeasible below the floors."""
        require_feasible(demand)
        heads, depth = demand.shape.kv_heads, len(demand.shape.layers)
        wishes = torch.tensor(
            [self._line(demand, row) for row in range(len(demand.totals))], dtype=torch.float64, device="cpu"
        )
        floors = torch.tensor(demand.floors, dtype=torch.int64, device="cpu")[:, None].expand(-1, depth)
        tokens = torch.tensor(demand.tokens, dtype=torch.int64, device="cpu")[:, None].expand(-1, depth)
        totals = apportion(
            wishes * heads, torch.tensor(demand.totals, dtype=torch.int64, device="cpu"), floors * heads, tokens * heads
        )
        return _equal_heads(totals, demand)

    def _line(self, demand: Demand, row: int) -> list[float]:
        """Entries per head wished for each layer."""
        depth, floor = len(demand.shape.layers), demand.floors[row]
        base = 0 if self.uniform_fallback else floor
        average = Fraction(demand.totals[row], demand.shape.num_heads) - base
        smallest = average / Fraction(str(self.beta))
        largest = min(2 * average - smallest, Fraction(demand.tokens[row] - floor))
        smallest = 2 * average - largest
        if self.uniform_fallback and not largest >= smallest >= floor:
            largest = smallest = average
        step = (largest - smallest) / max(depth - 1, 1)
        return [float(base + largest - layer * step) for layer in range(depth)]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaKV(AbstractAllocator):
    """Equal layers; within a layer the heads compete by raw score for what is left above a safe share.

    Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    arXiv 2407.11550, algorithm 1. `safeguard` times the even share is safe in every head (0.2 in the paper; its authors
    advise 0.05 at small budgets); the best entries of the layer's pool take the rest. Equal scores are shared equally.

    Ours differs: the authors' later code mixes, (1 - safeguard) * contest over all + safeguard * even share, and may
    weight the scores of a head by how concentrated they are; ours is their earlier form. Counts are exact.
    `pool_protected` is the convention of kvpress, where protected tokens use up the safe share; by default they stay
    outside of share and pool, as in the original.
    """

    safeguard: float = 0.2
    pool_protected: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.safeguard <= 1:
            raise BadInput(f"safeguard={self.safeguard!r} is not a share; give a number in [0, 1], such as 0.2.")

    def allocate(
        self,
        scores: Float[Tensor, "layers batch kv_heads tokens"],
        candidates: Bool[Tensor, "batch tokens"],
        layers: Sequence[int],
        demand: Demand,
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts by the layer's contest. Raises BudgetInfeasible below the floors."""
        require_feasible(demand)
        totals = _equal_layers(demand)
        counts = [
            self._contest(scores[at, row][:, candidates[row]], int(totals[row, layer]), demand, row)
            for at, layer in enumerate(layers)
            for row in range(len(demand.totals))
        ]
        return torch.stack(counts).view(len(layers), len(demand.totals), -1)

    def _contest(
        self, scores: Float[Tensor, "kv_heads candidates"], total: int, demand: Demand, row: int
    ) -> Int[Tensor, " kv_heads"]:
        heads, candidates = scores.shape
        protected = demand.tokens[row] - candidates
        pool = total - heads * protected
        share = Fraction(str(self.safeguard))
        safe = int(share * Fraction(total, heads)) - protected if self.pool_protected else int(share * pool / heads)
        return protected + _pooled(scores, safe=max(safe, demand.floors[row] - protected), total=pool)


@dataclass(frozen=True, kw_only=True, slots=True)
class Global(AbstractAllocator):
    """One contest of raw scores over all heads of all layers, above the protected tokens.

    The baseline that learned and solved budgets must beat; it needs scores that mean the same in every head. KVzip
    (Kim et al., arXiv 2505.23416) allocates this way. Every head keeps at least one entry; equal scores are shared
    equally.
    """

    scope: ClassVar[Scope] = "model"

    def allocate(
        self,
        scores: Float[Tensor, "layers batch kv_heads tokens"],
        candidates: Bool[Tensor, "batch tokens"],
        layers: Sequence[int],
        demand: Demand,
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts by the model's contest. Raises BudgetInfeasible below the floors."""
        require_feasible(demand)
        counts = [
            self._contest(scores[:, row].flatten(0, 1)[:, candidates[row]], demand, row)
            for row in range(len(demand.totals))
        ]
        return torch.stack(counts, dim=1).unflatten(0, (len(layers), -1)).transpose(1, 2)  # [L, B, H]

    def _contest(self, scores: Float[Tensor, "heads candidates"], demand: Demand, row: int) -> Int[Tensor, " heads"]:
        heads, candidates = scores.shape
        protected = demand.tokens[row] - candidates
        total = demand.totals[row] - heads * protected
        return protected + _pooled(scores, safe=demand.floors[row] - protected, total=total)


def _pooled(scores: Float[Tensor, "heads candidates"], *, safe: int, total: int) -> Int[Tensor, " heads"]:
    """How many of a pool's best `total` entries each head owns, when the best `safe` of every head come first."""
    heads = scores.shape[0]
    ranked = scores.sort(dim=-1, descending=True).values[:, safe:]
    # Rank first, then head: equal scores go round the heads instead of filling the first one.
    order = torch.argsort(ranked.T.flatten(), descending=True, stable=True)
    return safe + torch.bincount(order[: total - safe * heads] % heads, minlength=heads)


def _equal_layers(demand: Demand) -> Int[Tensor, "batch layers"]:
    """Every row's total, shared equally among the layers."""
    return even_shares(torch.tensor(demand.totals, dtype=torch.int64, device="cpu"), len(demand.shape.layers))


def _equal_heads(totals: Int[Tensor, "batch layers"], demand: Demand) -> Int[Tensor, "layers batch kv_heads"]:
    """Each layer's total, shared equally among its heads."""
    return even_shares(totals.T, demand.shape.kv_heads)
