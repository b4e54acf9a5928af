"""Muon: momentum whose update is the nearest orthogonal matrix, for the two-dimensional weights of a small model.

After Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024). Ours differs in that matrices of
one shape are stacked and orthogonalised in a single chain of batched products, which is several times faster on a CPU.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of every matrix of a [batch, rows <= columns] stack towards one."""
    linear, cubic, quintic = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    x = x.bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(1, 2)
        polynomial = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        x = torch.baddbmm(x, polynomial, x, beta=linear)
    return x.float()


def _as_wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix; every parameter must be two-dimensional."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            same_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    same_shape[tuple(sorted(param.shape))].append(param)
            for params in same_shape.values():
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lookaheads = []
        for param in params:
            assert param.grad is not None
            average = self.state[param].setdefault("momentum", torch.zeros_like(param))
            average.lerp_(param.grad, 1 - group["momentum"])
            lookaheads.append(_as_wide(param.grad.lerp(average, group["momentum"])))
        for param, update in zip(params, orthogonalize(torch.stack(lookaheads)), strict=True):
            rows, columns = param.shape
            oriented = update if rows <= columns else update.T
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(oriented, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
