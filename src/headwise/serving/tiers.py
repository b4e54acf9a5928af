"""Budget tiers: head budgets, rounded so that vLLM's KV-cache groups can hold them.

vLLM gives every request one block table per KV-cache group, and all groups blocks of the same number of layers. Here a
"layer" is one KV head, a group is a handful of heads that keep the same fraction, and a tier is one or more groups. So
fractions are rounded to a few values, each shared by a multiple of the same number of heads, and what all heads keep
together stays the same.

When a prompt has been read, what a head keeps moves into the LAST slots of the prompt and the leading blocks go back to
the pool, as with a sliding window. `freed_blocks` says how many: the one formula that scheduler and workers share.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int

from headwise.errors import BadInput

WHOLE = 1_000_000  # fractions are integers in millionths: processes must not disagree about rounding
GROUPS_PER_TIER = 4  # at most, on average: every group costs the scheduler time at each step


@lru_cache(maxsize=2**16)
def freed_blocks(prompt: int, *, keep: int, floor: int, block: int) -> int:
    """Leading blocks that a head gives back when a prompt has been read.

    It keeps `keep` millionths of the prompt's tokens, rounded up, but at least `floor` tokens; and what it must to give
    back whole blocks of `block` tokens.
    """
    kept = max(-(-prompt * keep // WHOLE), floor)
    return max(0, (prompt - kept) // block)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiers:
    """What every KV head keeps of a prompt: `keeps[layer][head]`, in millionths; and at least `floor` tokens."""

    keeps: tuple[tuple[int, ...], ...]
    floor: int

    @property
    def sizes(self) -> dict[int, int]:
        """How many heads keep how much, from much to little."""
        flat = [keep for row in self.keeps for keep in row]
        return {keep: flat.count(keep) for keep in sorted(set(flat), reverse=True)}

    @property
    def keep(self) -> float:
        """Fraction kept on average."""
        return sum(map(sum, self.keeps)) / (WHOLE * sum(map(len, self.keeps)))

    @property
    def heads_per_group(self) -> int:
        """KV heads of one of vLLM's KV-cache groups: as many as the smallest tier has."""
        return min(self.sizes.values())

    def blocks(self, prompt: int, block: int) -> tuple[int, int]:
        """Blocks of vLLM's pool that a prompt takes while it is read, and when it has been."""
        whole = -(-prompt // block)
        left = [
            (whole - freed_blocks(prompt, keep=keep, floor=self.floor, block=block)) * heads // self.heads_per_group
            for keep, heads in self.sizes.items()
        ]
        return whole * sum(self.sizes.values()) // self.heads_per_group, sum(left)

    def kept(self, prompt: int, block: int) -> list[list[int]]:
        """Entries that every head keeps of a prompt of so many tokens, in blocks of `block`."""
        return [
            [prompt - block * freed_blocks(prompt, keep=keep, floor=self.floor, block=block) for keep in row]
            for row in self.keeps
        ]


def quantise(
    fractions: Float[torch.Tensor, "layers kv_heads"],
    tiers: int,
    *,
    floor: int = 1,
    tokens: int | None = None,
    ranks: int = 1,
) -> Tiers:
    """Round fractions in [0, 1] to at most `tiers` values that preserve their sum, to within a millionth.

    Heads that keep alike share a tier: their fractions in order are cut where the squared error is least, and a tier
    keeps the mean of its heads. The number of heads of every tier is a multiple of that of the smallest, so that vLLM
    pads no group, and groups are at most four times as many as `tiers`. Fractions that are counts of so many `tokens`
    are equal to within one token. With tensor parallelism each of `ranks` processes holds some heads of every layer,
    and a block takes memory in all of them: every tier then has as many heads of each. Raises BadInput.
    """
    if tiers < 1:
        raise BadInput(f"tiers={tiers}: give 1 (all heads keep alike) or more; 8 is usual.")
    if ranks < 1 or fractions.shape[1] % ranks:
        raise BadInput(f"ranks={ranks} must be a number that divides the model's {fractions.shape[1]} KV heads.")
    flat = fractions.double().flatten()
    order = _order(fractions, ranks)
    ranked = flat[order].tolist()
    noise = 0.0 if tokens is None else len(ranked) / tokens**2
    best = min(
        (found for unit in _divisors(len(ranked), ranks) if (found := _cut(ranked, unit, tiers, noise)) is not None),
        key=lambda found: (round(found.error, 12), -found.unit),
    )
    keeps = torch.empty(len(ranked), dtype=torch.long, device="cpu")
    start = 0
    for size in best.sizes:
        mean = sum(ranked[start : start + size]) / size
        keeps[order[start : start + size]] = min(WHOLE, round(mean * WHOLE))
        start += size
    table = keeps.view(fractions.shape).tolist()
    return Tiers(keeps=tuple(map(tuple, table)), floor=floor)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cut:
    """A way to cut heads into tiers; `unit` heads make a group."""

    unit: int
    sizes: tuple[int, ...]
    error: float


def _order(fractions: Float[torch.Tensor, "layers kv_heads"], ranks: int) -> Int[torch.Tensor, " heads"]:
    """Heads from much to little: the first of every rank, then the second of every rank, and so on."""
    numbers = (
        torch.arange(fractions.numel(), dtype=torch.int64, device="cpu")
        .view(len(fractions), ranks, -1)
        .transpose(0, 1)
        .flatten(1)
    )  # [ranks, n]
    within = torch.argsort(fractions.double().flatten()[numbers], dim=-1, descending=True, stable=True)
    return numbers.gather(1, within).T.flatten()


def _divisors(count: int, ranks: int) -> list[int]:
    return [d for d in range(ranks, count + 1, ranks) if count % d == 0]


def _cut(ranked: list[float], unit: int, tiers: int, noise: float) -> _Cut | None:
    """The best cut into groups of `unit` heads, by dynamic programming; None if too many groups, or unequal ones.

    A tier more must lower the error by more than `noise`.
    """
    groups = len(ranked) // unit
    if groups > max(1, GROUPS_PER_TIER * tiers):
        return None
    sums = _prefix(ranked, unit, 1)
    squares = _prefix(ranked, unit, 2)

    def error(start: int, stop: int) -> float:
        total = sums[stop] - sums[start]
        return max(0.0, squares[stop] - squares[start] - total * total / (unit * (stop - start)))

    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] + [(float("inf"), ())] * groups
    for _ in range(min(tiers, groups)):
        best = [
            min([best[stop], *((best[s][0] + error(s, stop) + noise, (*best[s][1], stop - s)) for s in range(stop))])
            for stop in range(groups + 1)
        ]
    found, parts = best[groups]
    sizes = _merged(ranked, tuple(part * unit for part in parts))
    if any(size % min(sizes) for size in sizes):
        return None
    return _Cut(unit=min(sizes), sizes=sizes, error=found)


def _prefix(ranked: list[float], unit: int, power: int) -> list[float]:
    """Sums of the first 0, unit, 2 unit... fractions, to a power."""
    sums = [0.0]
    for start in range(0, len(ranked), unit):
        sums.append(sums[-1] + sum(x**power for x in ranked[start : start + unit]))
    return sums


def _merged(ranked: list[float], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Neighbouring tiers that keep the same to within a millionth are one."""
    merged: list[int] = []
    means: list[int] = []
    start = 0
    for size in sizes:
        mean = round(sum(ranked[start : start + size]) / size * WHOLE)
        if means and means[-1] == mean:
            merged[-1] += size
        else:
            merged.append(size)
            means.append(mean)
        start += size
    return tuple(merged)
