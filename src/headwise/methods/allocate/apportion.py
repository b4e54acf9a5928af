"""Whole entries: every allocator ends here, turning shares and wishes into integer counts with exact sums."""

from fractions import Fraction
from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import BudgetInfeasible
from headwise.interfaces import Demand
from headwise.methods.keep import Keep


def require_feasible(demand: Demand, asked: Keep | None = None) -> None:
    """Raise BudgetInfeasible unless every row's total lies between its floors and its whole cache.

    The message names the keep that was `asked`, if it is known.
    """
    heads = demand.shape.num_heads
    for row, (tokens, total, floor) in enumerate(zip(demand.tokens, demand.totals, demand.floors, strict=True)):
        where = f" (row {row} of the batch)" if len(demand.tokens) > 1 else ""
        if total > tokens * heads:
            raise BudgetInfeasible(
                f"{total} entries were asked{where}, but {tokens} tokens x {heads} heads hold only {tokens * heads}."
            )
        if total < floor * heads:
            gives = "" if asked is None else f"keep={asked} gives "
            needs = f"sink and window need {floor}" if floor > 1 else "every head needs 1"
            raise BudgetInfeasible(
                f"{gives}{total} entries to {heads} heads{where}, {total / heads:.4g} entries per head, but {needs} of "
                f"{tokens} tokens. {_smallest_keep(demand)}"
            )


def even_shares(totals: Int[Tensor, "*rows"], parts: int) -> Int[Tensor, "*rows parts"]:
    """Share integers among `parts`: no two parts differ by more than one, the first parts get the remainder.

    Nested: no part shrinks when the total grows.
    """
    totals = totals.unsqueeze(-1)
    return totals // parts + (torch.arange(parts, device=totals.device, dtype=torch.int64) < totals % parts)


def apportion(
    wishes: Float[Tensor, "rows parts"],
    totals: Int[Tensor, " rows"],
    lower: Int[Tensor, "rows parts"],
    upper: Int[Tensor, "rows parts"],
) -> Int[Tensor, "rows parts"]:
    """Round real-valued wishes to integers within bounds, with exact row sums.

    First the point nearest to the wishes (least squares) that meets bounds and total: clamp(wish + shift). Then largest
    remainders, ties by index. Computed in float64. Raises BudgetInfeasible where bounds and total contradict.
    """
    _require_bounds(totals, lower, upper)
    nearest = _project(wishes.double(), totals, lower, upper)
    counts = nearest.floor().long()
    # Remainders that differ by rounding noise only are ties.
    remainder = ((nearest - counts) * 2**24).round().masked_fill(counts >= upper, -1)
    order = torch.argsort(remainder, dim=-1, descending=True, stable=True)
    missing = totals.unsqueeze(-1) - counts.sum(dim=-1, keepdim=True)
    winners = torch.arange(wishes.shape[-1], device=wishes.device, dtype=torch.int64) < missing
    return counts.scatter_add(-1, order, winners.long())


def _project(
    wishes: Float[Tensor, "rows parts"],
    totals: Int[Tensor, " rows"],
    lower: Int[Tensor, "rows parts"],
    upper: Int[Tensor, "rows parts"],
) -> Float[Tensor, "rows parts"]:
    # As the shift grows, sum(clamp(wishes + shift)) is piecewise linear: a part starts to grow at lower - wish and
    # stops at upper - wish. Walk these breakpoints to the first sum that reaches the total, then step back.
    breakpoints, order = torch.cat([lower - wishes, upper - wishes], dim=-1).sort(dim=-1)
    slopes = torch.where(order < wishes.shape[-1], 1, -1).cumsum(dim=-1)
    rises = (breakpoints.diff(dim=-1) * slopes[:, :-1]).cumsum(dim=-1)
    sums = lower.sum(dim=-1, keepdim=True) + torch.nn.functional.pad(rises, (1, 0))
    last = wishes.shape[-1] * 2 - 1
    reached = torch.searchsorted(sums, totals.unsqueeze(-1).double()).clamp(max=last)
    excess = sums.gather(-1, reached) - totals.unsqueeze(-1)
    slope = slopes.gather(-1, (reached - 1).clamp(min=0)).clamp(min=1)
    shift = breakpoints.gather(-1, reached) - excess.clamp(min=0) / slope
    return (wishes + shift).clamp(lower.double(), upper.double())


def _require_bounds(
    totals: Int[Tensor, " rows"], lower: Int[Tensor, "rows parts"], upper: Int[Tensor, "rows parts"]
) -> None:
    rows = zip(totals.tolist(), lower.sum(dim=-1).tolist(), upper.sum(dim=-1).tolist(), strict=True)
    for row, (total, least, most) in enumerate(rows):
        if not least <= total <= most:
            raise BudgetInfeasible(
                f"Row {row} is to share {total} entries, but its bounds allow no fewer than {least} and no more than "
                f"{most}; ask for a total within them."
            )
    if (lower > upper).any():
        raise BudgetInfeasible("A lower bound exceeds its upper bound; lower the floors to what the row has tokens.")


def _smallest_keep(demand: Demand) -> str:
    """Advice on the smallest `keep` that suits all rows, rounded up to four decimals."""
    needed = max(Fraction(floor, tokens) for floor, tokens in zip(demand.floors, demand.tokens, strict=True))
    return f"The smallest keep that works is {ceil(needed * 10_000) / 10_000:g} (or '{max(demand.floors)}tok')."
