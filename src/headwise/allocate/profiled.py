"""Budgets solved from a profile of the model: LU-KV."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.allocate.apportion import even_shares, require_feasible
from headwise.artifacts import Budget, fingerprint
from headwise.errors import ArtifactMismatch, BadInput
from headwise.hulls import Hulls, share
from headwise.interfaces import AbstractAllocator, AbstractScorer, Demand, Provenance
from headwise.shapes import ModelShape

LEAST_SHARE = 0.01  # of the context: what every head keeps; a budget below that is shared evenly


@dataclass(frozen=True, kw_only=True, slots=True)
class LUKV(AbstractAllocator):
    """Counts by marginal utility on the hulls of a Budget that was solved for this model and scorer.

    LU-KV (arXiv 2602.08585). Every head keeps the protected tokens and at least 1% of the context; what is left goes to
    the steepest steps of all heads' hulls. Exact at any total and nested: more never takes an entry from a head. Ours
    differs from the authors' online step, which takes the nearest of 99 tables and rounds within a layer.
    """

    budget: Budget

    @property
    def sink(self) -> int:
        """First tokens that the profile's scorer protected."""
        return self.budget.origin.sink

    @property
    def window(self) -> int:
        """Last tokens that the profile's scorer protected."""
        return self.budget.origin.window

    def provenance(self) -> Provenance:
        """Name, and which budget: its origin and a fingerprint of its hulls."""
        hull = fingerprint(self.budget.hull["width"], self.budget.hull["slope"])
        return {"name": type(self).__name__, "budget": {**asdict(self.budget.origin), "fingerprint": hull}}

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> "LUKV":
        """Itself. Raises ArtifactMismatch for another scorer (its parameters included), model or shape."""
        if not self.budget.hull:
            raise ArtifactMismatch("this budget has no hulls: use it as fixed@FILE, or make one with 'headwise solve'.")
        self.budget.require(shape, config_hash)
        made_for, found = dict(self.budget.origin.scorer_parameters), json.loads(json.dumps(scorer.provenance()))
        if made_for != found:
            raise ArtifactMismatch(
                f"the budget was solved for {made_for}, but the scorer is {found}. Profile and solve for this scorer."
            )
        return self

    def allocate(
        self,
        scores: Float[Tensor, "layers batch kv_heads tokens"],
        candidates: Bool[Tensor, "batch tokens"],
        layers: Sequence[int],
        demand: Demand,
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts from the hulls, whatever the scores. Raises ArtifactMismatch if it is for another ModelShape."""
        self.budget.require(demand.shape)
        require_feasible(demand)
        hulls = Hulls(width=self.budget.hull["width"], slope=self.budget.hull["slope"])
        protected = (torch.tensor(demand.tokens) - candidates.sum(-1).cpu()).tolist()
        rows = [self._counts(hulls, demand, row, kept) for row, kept in enumerate(protected)]
        table = torch.stack(rows, dim=1).unflatten(0, (len(demand.shape.layers), demand.shape.kv_heads))
        return table.transpose(1, 2)[list(layers)].to(scores.device)  # [L, H, B] -> [l, B, H]

    def _counts(self, hulls: Hulls, demand: Demand, row: int, protected: int) -> Int[Tensor, " heads"]:
        tokens, total, heads = demand.tokens[row], demand.totals[row], demand.shape.num_heads
        least = max(demand.floors[row], int(LEAST_SHARE * tokens))
        if total < heads * least:  # a floor that grew with the total would take from the steepest heads again
            return even_shares(torch.tensor(total), heads)
        rest = share(
            hulls, entries=tokens - protected, total=total - heads * protected, floor=max(least - protected, 0)
        )
        return protected + rest


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedLUKV(AbstractAllocator):
    """LUKV with the budget that comes with headwise for the model and scorer at hand (the bundled model has some)."""

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> LUKV:
        """The budget for this model and scorer. Raises BadInput if none is shipped."""
        wanted = json.loads(json.dumps(scorer.provenance()))
        for path in sorted((Path(str(files("headwise"))) / "reference" / "budgets").glob("*.safetensors")):
            budget = Budget.load(path)
            if budget.origin.config_hash == config_hash and dict(budget.origin.scorer_parameters) == wanted:
                return LUKV(budget=budget).resolve(scorer, shape, config_hash)
        raise BadInput(
            f"no budget of {type(scorer).__name__} is shipped for this model: make one with 'headwise profile' and "
            "'headwise solve', then write scorer+lukv@FILE."
        )

    def allocate(
        self,
        scores: Float[Tensor, "layers batch kv_heads tokens"],
        candidates: Bool[Tensor, "batch tokens"],
        layers: Sequence[int],
        demand: Demand,
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """Never asked: `resolve` puts a LUKV in its place."""
        raise BadInput("a shipped budget must be resolved for a model before it can allocate.")
