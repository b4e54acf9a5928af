"""What a server keeps, without a server: the tiers of a served method as an allocator, for `headwise.compress`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import BadInput
from headwise.interfaces import AbstractAllocator, Demand, Provenance
from headwise.methods.keep import Keep
from headwise.methods.method import Method
from headwise.serving.settings import Served
from headwise.serving.tiers import Tiers


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiered(AbstractAllocator):
    """The counts of a server with these tiers and blocks of `block` tokens. Made by `equivalent`."""

    keeps_protected: ClassVar[bool] = False

    tiers: Tiers
    block: int
    sink_size: int
    window_size: int

    @property
    def sink(self) -> int:
        """Those of the served method."""
        return self.sink_size

    @property
    def window(self) -> int:
        """Those of the served method."""
        return self.window_size

    def provenance(self) -> Provenance:
        """Name, and what every head keeps, in millionths."""
        return {"name": type(self).__name__, "keeps": self.tiers.keeps, "floor": self.tiers.floor, "block": self.block}

    def allocate(
        self,
        scores: Float[Tensor, "layers batch kv_heads tokens"],
        candidates: Bool[Tensor, "batch tokens"],
        layers: Sequence[int],
        demand: Demand,
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts from the tiers. Raises BadInput for another total than theirs: the `keep` of `equivalent` has it."""
        counts = torch.tensor(
            [self.tiers.kept(tokens, self.block) for tokens in demand.tokens], dtype=torch.int64, device="cpu"
        )  # [B, L, H]
        totals = tuple(counts.flatten(1).sum(-1).tolist())
        if totals != demand.totals:
            raise BadInput(
                f"these tiers keep {totals} entries, but {demand.totals} were asked: use the keep they give."
            )
        return counts[:, list(layers)].transpose(0, 1).to(scores.device)


def equivalent(served: Served, tokens: int, block: int) -> tuple[Method, Keep]:
    """Method and keep that make `headwise.compress` keep what a server keeps of a prompt of so many tokens.

    >>> method, keep = equivalent(served, ids.shape[1], block=16)
    >>> cache = headwise.compress(model, ids, method, keep=keep)
    """
    method = served.method
    allocator = Tiered(tiers=served.tiers, block=block, sink_size=method.sink, window_size=method.window)
    total = sum(map(sum, served.tiers.kept(tokens, block)))
    keep = Keep(kind="tokens", amount=Fraction(total, served.shape.num_heads))
    if method.keeps_protected:
        return replace(method, allocator=allocator, protect_sink=method.sink, protect_window=method.window), keep
    return replace(method, allocator=allocator), keep
