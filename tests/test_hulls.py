"""Hulls are isotonic regressions; sharing along them is what dynamic programming and a heap would do."""

import heapq
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from headwise.artifacts.hulls import concave_hulls, share
from headwise.errors import BudgetInfeasible

CASES = settings(max_examples=40, deadline=None, derandomize=True)
CURVES = {
    "random": torch.rand(7, 50),
    "heavy tails": torch.rand(5, 64) ** 20,
    "constant": torch.full((3, 16), 0.25),
    "falling": torch.rand(4, 20).sort(descending=True).values,
    "rising": torch.rand(4, 20).sort().values,  # the scorer had it backwards
    "all at the end": torch.eye(12)[-2:],
    "sawtooth": (torch.arange(40) % 7).float().expand(2, 40),
    "nothing": torch.zeros(2, 9),
    "one rank": torch.rand(3, 1),
    "scales": torch.rand(3, 30) * torch.logspace(-30, 30, 30),
    "more is worse": torch.randn(4, 30),
}


def slopes_by_rank(hulls, ranks):
    """The slope over each of `ranks` equal parts."""
    steps = (hulls.width * ranks).round().long()
    rows = [slope.repeat_interleave(step) for slope, step in zip(hulls.slope, steps, strict=True)]
    return torch.stack(rows) / ranks


@pytest.mark.parametrize("curves", CURVES.values(), ids=CURVES)
def test_a_hull_is_the_isotonic_regression_of_the_marginals(curves):
    hulls = concave_hulls(curves)
    ranks = curves.shape[1]
    expected = np.stack(
        [IsotonicRegression(increasing=False).fit_transform(np.arange(ranks), row) for row in curves.double().numpy()]
    )
    np.testing.assert_allclose(slopes_by_rank(hulls, ranks).numpy(), expected, rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(hulls.width.sum(-1), torch.ones(len(curves), dtype=torch.float64))
    assert ((hulls.slope.diff(dim=-1) <= 0) | (hulls.width[:, 1:] == 0)).all()
    assert (hulls.width >= 0).all()


def test_a_hull_lies_on_or_above_its_curve_and_ends_where_it_ends():
    curves = torch.rand(6, 40).double() ** 3
    hulls = concave_hulls(curves)
    for kept in range(41):
        on_hull = hulls.utility(torch.full((6,), kept / 40, dtype=torch.float64))
        assert (on_hull >= curves[:, :kept].sum(-1) - 1e-12).all()
    torch.testing.assert_close(on_hull, curves.sum(-1))


@CASES
@given(data=st.data(), heads=st.integers(1, 3), ranks=st.integers(1, 8))
def test_a_wide_rank_is_as_many_narrow_ones(data, heads, ranks):
    """A rank without width is none."""
    times = data.draw(st.lists(st.integers(0, 5), min_size=ranks, max_size=ranks).filter(any))
    times = torch.tensor(times)
    gains = torch.randn(heads, ranks, dtype=torch.float64) * (times > 0)
    width = (times / times.sum(dtype=torch.float64)).expand(heads, -1)
    wide, narrow = concave_hulls(gains, width), concave_hulls((gains / times).repeat_interleave(times, dim=-1))
    torch.testing.assert_close(wide.width.sum(-1), torch.ones(heads, dtype=torch.float64))
    for kept in torch.linspace(0, 1, 23, dtype=torch.float64):
        fractions = kept.expand(heads)
        torch.testing.assert_close(wide.utility(fractions), narrow.utility(fractions))


def best_total(gained, total):
    """Exact dynamic programming over heads, in plain Python. `gained[h][b]` is the utility of keeping b."""
    best = [0.0] + [-np.inf] * total
    for curve in gained.tolist():
        best = [max(best[t - b] + curve[b] for b in range(min(t, len(curve) - 1) + 1)) for t in range(total + 1)]
    return best[total]


def by_heap(marginals, total):
    """Take the largest marginal utility of any head, again and again; the first head wins ties."""
    counts = [0] * len(marginals)
    waiting = [(-row[0], head) for head, row in enumerate(marginals)]
    heapq.heapify(waiting)
    for _ in range(total):
        _, head = heapq.heappop(waiting)
        counts[head] += 1
        if counts[head] < len(marginals[head]):
            heapq.heappush(waiting, (-marginals[head][counts[head]], head))
    return counts


def cumulated(marginal):
    return torch.nn.functional.pad(marginal.cumsum(-1), (1, 0))


@st.composite
def marginals(draw):
    """Marginal utilities [heads][entries] as plain numbers, many of them equal."""
    heads, entries = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    numbers = st.integers(0, 12)
    return [draw(st.lists(numbers, min_size=entries, max_size=entries)) for _ in range(heads)]


@CASES
@given(rows=marginals(), data=st.data())
def test_on_concave_curves_sharing_is_exact_dynamic_programming_and_a_heap(rows, data):
    curves = torch.tensor(rows, dtype=torch.float64).sort(descending=True).values
    heads, entries = curves.shape
    total = data.draw(st.integers(0, heads * entries))
    counts = share(concave_hulls(curves), entries=entries, total=total)
    gained = cumulated(curves)
    assert float(gained.gather(1, counts[:, None]).sum()) == pytest.approx(best_total(gained, total), abs=1e-9)
    assert sum(by_heap(curves.tolist(), total)) == int(counts.sum()) == total


def test_where_no_two_utilities_are_equal_the_heap_gives_the_very_counts():
    curves = torch.rand(9, 40, dtype=torch.float64).sort(descending=True).values
    for total in range(0, 361, 7):
        assert share(concave_hulls(curves), entries=40, total=total).tolist() == by_heap(curves.tolist(), total)


@CASES
@given(rows=marginals())
def test_at_breakpoints_of_the_hulls_sharing_is_exact_on_any_curve(rows):
    """Between them the hull promises what the curve need not hold; at them it is the curve."""
    curves = torch.tensor(rows, dtype=torch.float64)
    entries = curves.shape[1]
    hulls = concave_hulls(curves)
    order = hulls.slope.flatten().argsort(descending=True, stable=True)
    steps = (hulls.width.flatten()[order] * entries).round().long()
    gained = cumulated(curves)
    for total in steps.cumsum(0).unique().tolist():
        counts = share(hulls, entries=entries, total=total)
        kept = gained.gather(1, counts[:, None]).sum()
        assert float(kept) == pytest.approx(best_total(gained, total), abs=1e-9)
        assert float(hulls.utility(counts.double() / entries).sum()) == pytest.approx(float(kept), abs=1e-9)


@CASES
@given(rows=marginals(), entries=st.integers(1, 30), data=st.data())
def test_totals_are_exact_floors_and_caps_hold_and_more_never_takes(rows, entries, data):
    hulls = concave_hulls(torch.tensor(rows, dtype=torch.float64))
    heads, floor = len(rows), data.draw(st.integers(0, entries))
    before = torch.full((heads,), floor)
    for total in range(heads * floor, heads * entries + 1):
        counts = share(hulls, entries=entries, total=total, floor=floor)
        assert int(counts.sum()) == total
        assert (counts >= before).all()
        assert (counts <= entries).all()
        before = counts


def test_heads_may_be_named_in_any_order():
    curves, order = torch.rand(8, 33, dtype=torch.float64), torch.randperm(8)
    for total, floor in ((0, 0), (41, 2), (100, 3), (264, 5)):
        straight = share(concave_hulls(curves), entries=33, total=total, floor=floor)
        assert share(concave_hulls(curves[order]), entries=33, total=total, floor=floor).equal(straight[order])


def test_equal_heads_are_served_in_order():
    hulls = concave_hulls(torch.tensor([[2.0, 1.0]] * 3))
    assert [share(hulls, entries=2, total=t).tolist() for t in range(1, 5)] == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [2, 1, 1],
    ]


@pytest.mark.parametrize(("total", "floor"), [(-1, 0), (13, 0), (5, 2), (13, 5)])
def test_contradictions_are_refused(total, floor):
    with pytest.raises(BudgetInfeasible, match=rf"{total} entries cannot be shared among 3 heads"):
        share(concave_hulls(torch.rand(3, 4)), entries=4, total=total, floor=floor)


def test_many_heads_at_full_length_take_seconds_at_most():
    """32 layers x 8 heads x 32k tokens; the target of the project is 2 s on one core."""
    curves = torch.rand(256, 32768) ** 30
    start = time.process_time()
    counts = share(concave_hulls(curves), entries=32768, total=256 * 32768 // 7, floor=327)
    assert time.process_time() - start < 2
    assert int(counts.sum()) == 256 * 32768 // 7
