"""The learned budget: LKV-H, from an embedding of every head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.artifacts.gates import Gates, context_summary, shipped_gates
from headwise.errors import BadInput
from headwise.interfaces import AbstractAllocator, AbstractScorer, Demand, Observation, Provenance, StaticAllocator
from headwise.methods.allocate.apportion import apportion, even_shares, require_feasible
from headwise.methods.allocate.heuristic import Global
from headwise.methods.allocate.unresolved import Shipped
from headwise.shapes import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class LKVH(StaticAllocator):
    """Counts from budgets that were trained for this model: LKV (arXiv 2605.06676).

    One checkpoint serves every keep; totals are exact. Known as soon as the first layer has been read.
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

    @property
    def needs(self) -> frozenset[str]:
        """Traits of a context are read off its keys before rotation."""
        return frozenset({"rotation"})

    @property
    def made_for(self) -> str:
        """Of the gates."""
        return self.gates.origin.model

    def provenance(self) -> Provenance:
        """Name, and which gates."""
        return {"name": type(self).__name__, "gates": self.gates.provenance()}

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> "LKVH":
        """Itself; any scorer will do. Raises ArtifactMismatch for another model."""
        self.gates.require(shape, config_hash)
        return self

    def summarise(self, first: Observation) -> Float[Tensor, "batch width"]:
        """What the context is like."""
        return context_summary(first.keys, first.values, first.positions, first.valid, first.rotary)

    def counts(self, demand: Demand) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts from the budgets. Raises ArtifactMismatch if they are for another ModelShape."""
        self.gates.require(demand.shape)
        require_feasible(demand)
        heads, rows = demand.shape.num_heads, []
        for row, (tokens, total, floor) in enumerate(zip(demand.tokens, demand.totals, demand.floors, strict=True)):
            summary = None if demand.summary is None else demand.summary[row]
            rows.append(budget_counts(self.gates.fractions(total / (tokens * heads), summary), tokens, total, floor))
        return torch.stack(rows).unflatten(1, (len(demand.shape.layers), demand.shape.kv_heads)).transpose(0, 1)


def budget_counts(fractions: Float[Tensor, " heads"], tokens: int, total: int, floor: int = 1) -> Int[Tensor, " heads"]:
    """Whole entries of every head at an exact total; evenly where the total is below the floors."""
    heads = len(fractions)
    if total < heads * floor:
        return even_shares(torch.tensor(total, dtype=torch.int64, device="cpu"), heads)
    lower, upper = (
        torch.full((1, heads), floor, dtype=torch.int64, device="cpu"),
        torch.full((1, heads), tokens, dtype=torch.int64, device="cpu"),
    )
    return apportion(
        (fractions.detach().cpu() * tokens)[None], torch.tensor([total], dtype=torch.int64, device="cpu"), lower, upper
    )[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedLKVH(Shipped):
    """LKVH with the gates that come with headwise for the model at hand, if there are any."""

    keeps_protected: ClassVar[bool] = False

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> AbstractAllocator:
        """With the gates for this model. Raises BadInput if none are shipped."""
        return learned_budgets(shipped_gates(config_hash)).resolve(scorer, shape, config_hash)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedContest(ShippedLKVH):
    """`contest` with the gates that come with headwise for the model at hand, if there are any."""

    keeps_protected: ClassVar[bool] = True

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> AbstractAllocator:
        """With the gates for this model. Raises BadInput if none are shipped."""
        return contest(shipped_gates(config_hash)).resolve(scorer, shape, config_hash)


def contest(gates: Gates) -> AbstractAllocator:
    """The budgets that suit learned scores: one contest of all heads where scores compare, else LKV-H's."""
    return Global() if gates.comparable else learned_budgets(gates)


def learned_budgets(gates: Gates) -> LKVH:
    """LKV-H of these gates. Raises BadInput if only scores were trained."""
    if gates.budgets is None:
        raise BadInput("these gates hold scores only: use them as lkv-t@FILE+allocator.")
    return LKVH(gates=gates)
