"""A differentiable top-k: how much each of n candidates is kept, k in all.

m_i = sigmoid((s_i - t) / T) with the threshold t chosen so that the sum of m_i is k exactly. T -> 0 is the hard top-k.
The gradients are those of the solution, not of the search for t (implicit differentiation). With
p_i = m_i (1 - m_i) / T and S their sum:

    dm_i / ds_j = p_i (delta_ij - p_j / S)      dm_i / dk = p_i / S

The second is the path on which a learned budget is trained (LKV, arXiv 2605.06676).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_BISECTIONS = 60
_REACH = 40.0  # thresholds this far beyond all scores keep nothing, or everything, to float precision


def soft_topk(
    scores: Float[Tensor, "*rows n"], k: Float[Tensor, "*rows"], temperature: float = 1.0
) -> Float[Tensor, "*rows n"]:
    """Shares in [0, 1] whose sum is `k` (0 <= k <= n) in every row; differentiable in both."""
    result: Tensor = _SoftTopK.apply(scores, k, temperature)  # pyright: ignore[reportAssignmentType]
    return result


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: Tensor, temperature: float) -> Tensor:
        x, wanted = scores / temperature, k.unsqueeze(-1)
        low, high = x.amin(-1, keepdim=True) - _REACH, x.amax(-1, keepdim=True) + _REACH
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            too_many = torch.sigmoid(x - middle).sum(-1, keepdim=True) > wanted
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        shares = torch.sigmoid(x - (low + high) / 2)
        shares = shares.masked_fill(wanted <= 0, 0.0).masked_fill(wanted >= scores.shape[-1], 1.0)
        ctx.save_for_backward(shares)
        ctx.temperature = temperature
        return shares

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (shares,) = gradients, ctx.saved_tensors
        steep = shares * (1 - shares)
        whole = steep.sum(-1, keepdim=True)
        # Where nothing is undecided (0 or all kept, or a hard choice) there is nothing to learn from.
        mean = torch.where(whole > 0, (gradient * steep).sum(-1, keepdim=True) / whole.clamp(min=1e-30), 0.0)
        return steep * (gradient - mean) / ctx.temperature, mean.squeeze(-1), None
