"""What stands for an allocator until the model is known."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import BadInput
from headwise.interfaces import AbstractAllocator, Demand


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped(AbstractAllocator):
    """Stands for a file that comes with headwise: `resolve` puts the allocator of the model's file in its place."""

    def allocate(
        self,
        scores: Float[Tensor, "layers batch kv_heads tokens"],
        candidates: Bool[Tensor, "batch tokens"],
        layers: Sequence[int],
        demand: Demand,
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """Raise BadInput: no model has been named."""
        raise BadInput("a file that is shipped must be resolved for a model before it can allocate.")
