"""The learned budget: LKV-H, from an embedding of every head."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.allocate.apportion import apportion, even_shares, require_feasible
from headwise.errors import BadInput
from headwise.gates import Gates, shipped_gates
from headwise.interfaces import AbstractAllocator, AbstractScorer, Demand, Provenance
from headwise.shapes import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class LKVH(AbstractAllocator):
    """Counts from budgets that were trained for this model: LKV (arXiv 2605.06676).

    One checkpoint serves every keep; totals are exact. Known before the first layer is read.
    """

    keeps_protected: ClassVar[bool] = False

    gates: Gates

    @property
    def sink(self) -> int:
        """First tokens that came first in training."""
        return self.gates.origin.sink

    @property
    def window(self) -> int:
        """Last tokens that came next in training."""
        return self.gates.origin.window

    def provenance(self) -> Provenance:
        """Name, and which gates."""
        return {"name": type(self).__name__, "gates": self.gates.provenance()}

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> "LKVH":
        """Itself; any scorer will do. Raises ArtifactMismatch for another model."""
        self.gates.require(shape, config_hash)
        return self

    def allocate(
        self,
        scores: Float[Tensor, "layers batch kv_heads tokens"],
        candidates: Bool[Tensor, "batch tokens"],
        layers: Sequence[int],
        demand: Demand,
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts from the budgets, whatever the scores. Raises ArtifactMismatch if they are for another ModelShape."""
        self.gates.require(demand.shape)
        require_feasible(demand)
        limits = zip(demand.tokens, demand.totals, demand.floors, strict=True)
        table = torch.stack([_counts(self.gates, *row) for row in limits], dim=1)
        table = table.unflatten(0, (len(demand.shape.layers), demand.shape.kv_heads))
        return table.transpose(1, 2)[list(layers)].to(scores.device)  # [L, H, B] -> [l, B, H]


@lru_cache(maxsize=64)  # it is asked once per layer
def _counts(gates: Gates, tokens: int, total: int, floor: int) -> Int[Tensor, " heads"]:
    heads = gates.origin.shape.num_heads
    return budget_counts(gates.fractions(total / (tokens * heads)), tokens, total, floor)


def budget_counts(fractions: Float[Tensor, " heads"], tokens: int, total: int, floor: int = 1) -> Int[Tensor, " heads"]:
    """Whole entries of every head at an exact total; evenly where the total is below the floors."""
    heads = len(fractions)
    if total < heads * floor:
        return even_shares(torch.tensor(total), heads)
    lower, upper = torch.full((1, heads), floor), torch.full((1, heads), tokens)
    return apportion((fractions.detach().cpu() * tokens)[None], torch.tensor([total]), lower, upper)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedLKVH(AbstractAllocator):
    """LKVH with the gates that come with headwise for the model at hand, if there are any."""

    keeps_protected: ClassVar[bool] = False

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> LKVH:
        """With the gates for this model. Raises BadInput if none are shipped."""
        return learned_budgets(shipped_gates(config_hash)).resolve(scorer, shape, config_hash)

    def allocate(
        self,
        scores: Float[Tensor, "layers batch kv_heads tokens"],
        candidates: Bool[Tensor, "batch tokens"],
        layers: Sequence[int],
        demand: Demand,
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """Never asked: `resolve` puts a LKVH in its place."""
        raise BadInput("shipped gates must be resolved for a model before they can allocate.")


def learned_budgets(gates: Gates) -> LKVH:
    """LKV-H of these gates. Raises BadInput if only scores were trained."""
    if gates.budgets is None:
        raise BadInput("these gates hold scores only: use them as lkv-t@FILE+allocator.")
    return LKVH(gates=gates)
