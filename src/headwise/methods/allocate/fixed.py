"""The allocator that follows a Budget file: how much a head keeps was decided once per model, before any request."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.artifacts.budget import Budget
from headwise.artifacts.tensors import fingerprint
from headwise.interfaces import AbstractScorer, Demand, Provenance, StaticAllocator
from headwise.methods.allocate.apportion import apportion, require_feasible
from headwise.shapes import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed(StaticAllocator):
    """Kept fractions per head from a Budget: LU-KV (arXiv 2602.08585), LKV-H, DuoAttention (arXiv 2410.10819).

    The budget's rows become counts for the context at hand, held between floor and context length; then the two
    neighbouring rows whose sums enclose the demanded total are interpolated, so that floors are paid for along the
    budget's own curve: a head that is kept whole stays whole.

    Ours differs from LU-KV's online step, which takes the nearest of 99 rows and rounds within a layer: ours meets any
    total exactly.
    """

    budget: Budget

    @property
    def sink(self) -> int:
        """First tokens that the budget's origin protects."""
        return self.budget.origin.sink

    @property
    def window(self) -> int:
        """Last tokens that the budget's origin protects."""
        return self.budget.origin.window

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> "Fixed":
        """Itself; any scorer will do. Raises ArtifactMismatch for another model or shape."""
        self.budget.require(shape, config_hash)
        return self

    @property
    def made_for(self) -> str:
        """Of the budget."""
        return self.budget.origin.model

    def provenance(self) -> Provenance:
        """Name, and which budget: its origin and a fingerprint of its table, not the table itself."""
        table = fingerprint(self.budget.ratios, self.budget.fractions)
        return {"name": type(self).__name__, "budget": self.budget.provenance(table)}

    def counts(self, demand: Demand) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts from the budget. Raises ArtifactMismatch if it is for another ModelShape, BudgetInfeasible."""
        self.budget.require(demand.shape)
        require_feasible(demand)
        rows = self.budget.closed()[1].flatten(1).double()  # [R, L * H]
        limits = list(zip(demand.tokens, demand.totals, demand.floors, strict=True))
        wishes = torch.stack([_wishes(rows, tokens, total, floor) for tokens, total, floor in limits])
        lower = torch.tensor(demand.floors, dtype=torch.int64, device="cpu")[:, None].expand(wishes.shape)
        upper = torch.tensor(demand.tokens, dtype=torch.int64, device="cpu")[:, None].expand(wishes.shape)
        counts = apportion(wishes, torch.tensor(demand.totals, dtype=torch.int64, device="cpu"), lower, upper)
        return counts.unflatten(1, (len(demand.shape.layers), demand.shape.kv_heads)).transpose(0, 1)


def _wishes(rows: Float[Tensor, "rows heads"], tokens: int, total: int, floor: int) -> Float[Tensor, " heads"]:
    """Real-valued counts that sum to `total`, between two neighbouring rows of a budget."""

    def clamped(row: int) -> Float[Tensor, " heads"]:
        return (rows[row] * tokens).clamp(floor, tokens)

    # The first row keeps nothing and the last everything, so some neighbours enclose the total, monotone table or not.
    low, high = 0, len(rows) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if clamped(middle).sum() <= total else (low, middle)
    below, above = clamped(low), clamped(high)
    span = above.sum() - below.sum()
    return below + (above - below) * ((total - below.sum()) / span if span > 0 else 0.0)
