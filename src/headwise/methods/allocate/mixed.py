"""Share bytes among heads whose entries may be stored in different bits: how many each keeps, and in which bits.

Every kind of bits has a curve for every head: the utility of keeping so many entries in these bits. Entries in few bits
are worth less and cost less. Over bytes the points of all kinds have one upper concave hull per head, on which marginal
utility only falls. So the steepest steps of all heads' hulls are taken until the bytes are spent, as LU-KV (arXiv
2602.08585) does it for entries. At the end of a step that is the optimum. For bytes in between, the head whose step
does not fit takes the kind that is worth most within them, and what it leaves goes to the next ones. Ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Worth:
    """What heads gain by how many entries of one kind they keep in a context, and what these cost.

    The curve of head h is straight between the points `counts[h]` (ascending, from 0 to all tokens) and `utility[h]`.
    """

    counts: Float[np.ndarray, "heads points"]
    utility: Float[np.ndarray, "heads points"]
    price: Int[np.ndarray, " prices"]  # bytes of a head that keeps 0, 1, ... entries

    def of(self, head: int, counts: np.ndarray) -> np.ndarray:
        """The utility of a head at some counts."""
        return np.interp(counts, self.counts[head], self.utility[head])

    @cached_property
    def full(self) -> Int[np.ndarray, " full"]:
        """Counts after which an entry costs more than others do, ascending: it opens a block of keys."""
        steps = np.diff(self.price)
        return np.flatnonzero(steps > steps.min())

    def bends(self, head: int, floor: int) -> Int[np.ndarray, " counts"]:
        """All counts at which the utility of a head over bytes may bend, from the floor on."""
        counts, full = self.counts[head], self.full
        bends = np.concatenate([np.floor(counts), np.ceil(counts)]).astype(np.int64)
        if len(full):
            near = np.searchsorted(full, bends)
            bends = np.concatenate([bends, full[(near - 1).clip(min=0)], full[near.clip(max=len(full) - 1)]])
        return np.unique(bends.clip(floor, len(self.price) - 1))

    def most(self, nbytes: int) -> int:
        """How many entries fit into some bytes."""
        return int(np.searchsorted(self.price, nbytes, side="right")) - 1


def worth(hull: Mapping[str, Tensor], price: Int[Tensor, " prices"]) -> Worth:
    """The curves of a kind in a context, from its hulls in a Budget: protected tokens one by one, then the others."""
    first, width, slope = (hull[name].double().cpu().numpy() for name in ("protected", "width", "slope"))
    tokens, protected = len(price) - 1, min(len(price) - 1, first.shape[1])
    edges = protected + width.cumsum(-1) * (tokens - protected)
    single = np.broadcast_to(np.arange(protected + 1.0), (len(first), protected + 1))
    gains = np.concatenate([np.zeros((len(first), 1)), first[:, :protected], width * slope * (tokens > protected)], 1)
    counts = np.concatenate([single, edges.clip(max=tokens)], 1)
    return Worth(counts=counts, utility=gains.cumsum(-1), price=price.cpu().numpy())


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a head may keep: so many entries of a kind."""

    kind: int
    count: int
    nbytes: int
    utility: float


def share_bytes(kinds: Sequence[Worth], *, nbytes: int, floor: int, least: int) -> list[Choice]:
    """What every head keeps: at most `nbytes` in all, at the largest utility on the curves.

    Every head keeps `floor` entries, or as many as fit in all heads, but at least `least`, which must fit. The result
    is never worth less than with one kind for all heads. Bytes are left over where no head can use them: less than an
    entry takes, unless every head is whole in bits that more bytes would not better.
    """
    heads = len(kinds[0].counts)
    floor = max(least, min(floor, max(kind.most(nbytes // heads) for kind in kinds)))
    alone = [(number,) for number in range(len(kinds))] if len(kinds) > 1 else []
    found = [_shared(kinds, some, nbytes, floor) for some in (tuple(range(len(kinds))), *alone)]
    return max(filter(None, found), key=lambda choices: sum(choice.utility for choice in choices))


def _shared(kinds: Sequence[Worth], some: Sequence[int], nbytes: int, floor: int) -> list[Choice]:
    """With some of the kinds; nothing if the floor does not fit."""
    hulls = [_hull(kinds, some, head, floor) for head in range(len(kinds[0].counts))]
    chosen, closed = [hull[0] for hull in hulls], [False] * len(hulls)
    left, entry = nbytes - sum(choice.nbytes for choice in chosen), min(int(np.diff(k.price).min()) for k in kinds)
    if left < 0:
        return []
    for head, to in _steepest_first(hulls):
        if left < entry:
            break
        if closed[head]:
            continue
        now = chosen[head]
        closed[head] = to.nbytes - now.nbytes > left
        if closed[head]:
            within = [_most(kinds, kind, head, now.nbytes + left) for kind in some]
            within = [now, *(choice for choice in within if choice.count >= floor)]
            to = max(within, key=lambda choice: (choice.utility, choice.nbytes))
        chosen[head], left = to, left - (to.nbytes - now.nbytes)
    for head, now in enumerate(chosen):  # what no kind could use at a gain
        if left >= entry:
            chosen[head] = _most(kinds, now.kind, head, now.nbytes + left)
            left -= chosen[head].nbytes - now.nbytes
    return chosen


def _steepest_first(hulls: Sequence[Sequence[Choice]]) -> list[tuple[int, Choice]]:
    """The steps of all hulls by falling utility per byte: whose it is, and where it leads. Earlier heads win ties."""
    steps = [
        ((after.utility - before.utility) / (after.nbytes - before.nbytes), head, after)
        for head, hull in enumerate(hulls)
        for before, after in pairwise(hull)
    ]
    return [(head, after) for _, head, after in sorted(steps, key=lambda step: -step[0])]


def _most(kinds: Sequence[Worth], kind: int, head: int, nbytes: int) -> Choice:
    """As many entries of a kind as fit into some bytes."""
    count = kinds[kind].most(nbytes)
    utility = float(kinds[kind].of(head, np.array([count]))[0])
    return Choice(kind=kind, count=count, nbytes=int(kinds[kind].price[count]), utility=utility)


def _hull(kinds: Sequence[Worth], some: Sequence[int], head: int, floor: int) -> list[Choice]:
    """The vertices of the upper concave hull of a head's choices over bytes, from the floor on."""
    number, counts, prices, utilities = [], [], [], []
    for kind in some:
        at = kinds[kind].bends(head, floor)
        number.append(np.full(len(at), kind))
        counts.append(at)
        prices.append(kinds[kind].price[at])
        utilities.append(kinds[kind].of(head, at))
    kind, count, price, utility = (np.concatenate(part) for part in (number, counts, prices, utilities))
    order = np.lexsort((kind, -utility, price))
    price, utility = price[order], utility[order]
    better = np.concatenate([[True], utility[1:] > np.maximum.accumulate(utility)[:-1]])
    # The dearest choice stays, or bytes could not be spent where nothing gains by them.
    better[-1] |= price[-1] > price[better].max()
    index = better.nonzero()[0]
    if len(index) > 1:
        width = np.diff(price[index]).astype(np.float64)
        index = index[isotonic_regression(np.diff(utility[index]) / width, weights=width, increasing=False).blocks]
    rows = zip(kind[order][index], count[order][index], price[index], utility[index], strict=True)
    return [Choice(kind=int(k), count=int(c), nbytes=int(p), utility=float(u)) for k, c, p, u in rows]
