"""Concave hulls of utility curves, and the best way to share a budget among heads that have them.

LU-KV (arXiv 2602.08585): keeping the best b entries of a head by some scorer retains the utility U(b), the sum of the
oracle importance of those b entries. U is not concave, because the scorer's order is not the oracle's; its concave hull
is. On hulls the marginal utilities of a head only fall, so taking the largest ones over all heads until the budget is
spent is exactly optimal: one sort. Ours differs from the published code in the totals, exact for any ratio (no 1%
grid), and in ties, which go to the first head, so that budgets are nested.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression
from torch import Tensor

from headwise.errors import BudgetInfeasible, ShapeMismatch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hulls:
    """Concave hulls of retained utility, one per head, as steps of falling marginal utility.

    `width[h, i]` is the share of the head's entries that step i covers (a row sums to 1; unused steps have width 0) and
    `slope[h, i]` the utility gained per unit of width, non-increasing along a row.
    """

    width: Float[Tensor, "heads steps"]
    slope: Float[Tensor, "heads steps"]

    def __post_init__(self) -> None:
        if self.width.shape != self.slope.shape:
            raise ShapeMismatch(f"widths {tuple(self.width.shape)} and slopes {tuple(self.slope.shape)} do not match.")

    def utility(self, kept: Float[Tensor, " heads"]) -> Float[Tensor, " heads"]:
        """What each head's hull retains when it keeps these fractions."""
        before = self.width.cumsum(-1) - self.width
        covered = (kept[:, None] - before).clamp(min=0).minimum(self.width)
        return (covered * self.slope).sum(-1)


def concave_hulls(marginal: Float[Tensor, "heads ranks"], width: Float[Tensor, "heads ranks"] | None = None) -> Hulls:
    """Hulls of curves given by what each rank adds to the utility, best first; a rank covers `width` of the head.

    Without `width` all ranks are equal shares. Slopes are the non-increasing isotonic regression of the marginal
    utilities per width (pool adjacent violators). Ranks of width 0 must add nothing.
    """
    gains = marginal.double().cpu().numpy()
    widths = np.full(gains.shape, 1 / gains.shape[1]) if width is None else width.double().cpu().numpy()
    hulls = [_hull(gain[wide > 0], wide[wide > 0]) for gain, wide in zip(gains, widths, strict=True)]
    steps = max(len(slope) for slope, _ in hulls)
    padded = np.zeros((2, len(hulls), steps))
    for head, (slope, wide) in enumerate(hulls):
        padded[:, head, : len(slope)] = slope, wide
    return Hulls(width=torch.from_numpy(padded[1]), slope=torch.from_numpy(padded[0]))


def _hull(gain: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and width of every step of one hull."""
    fitted = isotonic_regression(gain / width, weights=width, increasing=False)
    starts = fitted.blocks[:-1]
    return fitted.x[starts], np.add.reduceat(width, starts)


def share(hulls: Hulls, *, entries: int, total: int, floor: int = 0) -> Int[Tensor, " heads"]:
    """Entries every head keeps of its `entries`: `total` in all, at least `floor` each, at the largest utility.

    Nested: no head loses an entry when `total` grows. Raises BudgetInfeasible if floors and total contradict.
    """
    heads = len(hulls.width)
    if not heads * floor <= total <= heads * entries:
        raise BudgetInfeasible(
            f"{total} entries cannot be shared among {heads} heads that keep {floor} to {entries} entries each."
        )
    edges = (hulls.width.cumsum(-1) * entries).round().long().clamp(floor, entries)
    edges[:, -1] = entries
    taken = edges.diff(dim=-1, prepend=edges.new_full((heads, 1), floor))
    # Floors and padding can leave empty steps; among equal slopes earlier heads and earlier steps come first.
    order = hulls.slope.flatten().argsort(descending=True, stable=True)
    steps = taken.flatten()[order]
    left = total - heads * floor - (steps.cumsum(0) - steps)
    granted = torch.empty_like(steps)
    granted[order] = steps.minimum(left.clamp(min=0))
    return floor + granted.view_as(taken).sum(-1)
