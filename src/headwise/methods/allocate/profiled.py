"""Budgets solved from a profile of the model: LU-KV."""

import json
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.artifacts.budget import Budget
from headwise.artifacts.hulls import Hulls, concave_hulls, share
from headwise.artifacts.shipped import shipped
from headwise.artifacts.tensors import fingerprint
from headwise.errors import ArtifactMismatch, BadInput
from headwise.interfaces import AbstractScorer, Demand, Provenance, StaticAllocator
from headwise.kernels.quantised import ENTRIES, Bits
from headwise.methods.allocate.apportion import even_shares, require_feasible
from headwise.methods.allocate.mixed import share_bytes, worth
from headwise.methods.allocate.unresolved import Shipped
from headwise.methods.storage import Limits
from headwise.shapes import ModelShape

LEAST_SHARE = Fraction(1, 100)  # of the context: what every head keeps; a budget below that is shared evenly


@dataclass(frozen=True, kw_only=True, slots=True)
class LUKV(StaticAllocator):
    """Counts by marginal utility on the hulls of a Budget that was solved for this model and scorer.

    LU-KV (arXiv 2602.08585). Every head keeps at least 1% of the context; what is left goes to the steepest steps of
    all heads' hulls. Exact at any total and nested: more never takes an entry from a head. Ours differs from the
    authors' online step, which takes the nearest of 99 tables and rounds within a layer, and in that protected tokens
    come first in every head, but how many of them a head keeps is solved like everything else. With a budget that has
    hulls of entries in fewer bits it also chooses each head's bits (mixed.py).
    """

    keeps_protected: ClassVar[bool] = False

    budget: Budget

    @property
    def sink(self) -> int:
        """First tokens that come first in the profile."""
        return self.budget.origin.sink

    @property
    def window(self) -> int:
        """Last tokens that come next in the profile."""
        return self.budget.origin.window

    @property
    def made_for(self) -> str:
        """Of the budget."""
        return self.budget.origin.model

    def provenance(self) -> Provenance:
        """Name, and which budget: its origin and a fingerprint of its hulls."""
        hulls = [self.budget.hull, *(hull for _, hull in sorted(self.budget.kinds.items()))]
        used = fingerprint(*(hull[name] for hull in hulls for name in ("protected", "width", "slope")))
        return {"name": type(self).__name__, "budget": self.budget.provenance(used)}

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> "LUKV":
        """Itself. Raises ArtifactMismatch for another scorer (its parameters included), model or shape."""
        if not self.budget.hull:
            raise ArtifactMismatch("this budget has no hulls: use it as fixed@FILE, or make one with 'headwise solve'.")
        self.budget.require(shape, config_hash)
        made_for, asked = dict(self.budget.origin.scorer_parameters), json.loads(json.dumps(scorer.provenance()))
        if made_for != asked:
            raise ArtifactMismatch(
                f"the budget was solved for {made_for}, but the scorer is {asked}. Profile and solve for this scorer."
            )
        return self

    def counts(self, demand: Demand) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts from the hulls. Raises ArtifactMismatch if they are for another ModelShape."""
        self.budget.require(demand.shape)
        require_feasible(demand)
        first = self.budget.hull["protected"]
        rest = Hulls(width=self.budget.hull["width"], slope=self.budget.hull["slope"])
        limits = zip(demand.tokens, demand.protected, demand.totals, demand.floors, strict=True)
        rows = [lukv_counts(first, rest, *row) for row in limits]
        table = torch.stack(rows, dim=1).unflatten(0, (len(demand.shape.layers), demand.shape.kv_heads))
        return table.transpose(1, 2)  # [L, H, B] -> [L, B, H]

    @property
    def kinds(self) -> tuple[Bits | None, ...]:
        """Native, and the bits that the budget has hulls of."""
        return (None, *(bits for name, bits in ENTRIES.items() if name in self.budget.kinds))

    def stored(
        self, demand: Demand, limits: Limits
    ) -> tuple[Int[Tensor, "layers batch kv_heads"], Int[Tensor, "layers batch kv_heads"]]:
        """Counts and kinds from the hulls of all kinds. Raises ArtifactMismatch if they are for another ModelShape."""
        self.budget.require(demand.shape)
        hulls = [self.budget.hull, *(self.budget.kinds[name] for name in ENTRIES if name in self.budget.kinds)]
        rows: list[list[tuple[int, int]]] = []
        for tokens, floor, nbytes in zip(demand.tokens, demand.floors, limits.nbytes, strict=True):
            counts = torch.arange(tokens + 1, dtype=torch.int64, device="cpu")
            kinds = [worth(hull, limits.price(counts, number)) for number, hull in enumerate(hulls)]
            floor, least = max(floor, int(LEAST_SHARE * tokens)), min(floor, tokens)
            choices = share_bytes(kinds, nbytes=nbytes, floor=floor, least=least)
            rows.append([(choice.count, choice.kind) for choice in choices])
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").unflatten(1, (-1, demand.shape.kv_heads))
        counts, chosen = table.transpose(0, 1).unbind(-1)  # [B, L, H, 2] -> [L, B, H]
        return counts, chosen


def published_counts(
    marginal: Float[Tensor, "layers kv_heads steps"], protected: int, tokens: int
) -> Int[Tensor, "ratios layers kv_heads"]:
    """What LU-KV's authors solve for one question: counts at 1% to 99% kept, protected tokens kept by every head."""
    layers, heads, _ = marginal.shape
    first, rest = marginal.flatten(0, 1).tensor_split([protected], dim=-1)
    hulls, floor = concave_hulls(rest), max(1, protected)
    totals = [round(Fraction(percent, 100) * layers * heads * tokens) for percent in range(1, 100)]
    rows = [lukv_counts(first, hulls, tokens, protected, total, floor) for total in totals]
    return torch.stack(rows).unflatten(1, (layers, heads))


def lukv_counts(
    first: Float[Tensor, "heads known"], rest: Hulls, tokens: int, protected: int, total: int, floor: int
) -> Int[Tensor, " heads"]:
    """Counts in a context of `tokens`: `first` is the utility of the protected ones, `rest` the hulls of the others."""
    heads, least = len(rest.width), max(floor, int(LEAST_SHARE * tokens))
    if total < heads * least:  # a floor that grew with the total would take from the steepest heads again
        return even_shares(torch.tensor(total, dtype=torch.int64, device="cpu"), heads)
    if floor >= protected:  # they are paid for, whatever they are worth
        spent, others = heads * protected, tokens - protected
        return protected + share(rest, entries=others, total=total - spent, floor=max(least - protected, 0))
    return share(_joined(first[:, :protected], rest, tokens), entries=tokens, total=total, floor=least)


def _joined(first: Float[Tensor, "heads protected"], rest: Hulls, tokens: int) -> Hulls:
    """Hulls over a whole context: its protected tokens one by one, then the others in the profile's shares."""
    others = 1 - first.shape[1] / tokens
    return concave_hulls(
        torch.cat([first.double(), rest.width * rest.slope * (others > 0)], dim=-1),
        torch.cat([torch.full_like(first, 1 / tokens).double(), rest.width * others], dim=-1),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedLUKV(Shipped):
    """LUKV with the budget that comes with headwise for the model and scorer at hand (the bundled model has some)."""

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> LUKV:
        """The budget for this model and scorer. Raises BadInput if none is shipped."""
        wanted = json.loads(json.dumps(scorer.provenance()))
        for file in shipped("budget", config_hash, wanted):
            return LUKV(budget=Budget.load(file.path)).resolve(scorer, shape, config_hash)
        raise BadInput(
            f"no budget of {type(scorer).__name__} is shipped for this model: make one with 'headwise profile' and "
            "'headwise solve', then write scorer+lukv@FILE."
        )
