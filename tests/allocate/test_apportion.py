"""Integer shares: exact sums, bounds, largest remainders, and the message when a budget cannot be met."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import BudgetInfeasible
from headwise.interfaces import Demand
from headwise.methods.allocate.apportion import apportion, even_shares, require_feasible
from headwise.methods.keep import parse_keep
from headwise.shapes import ModelShape

CASES = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    """Wishes, totals, lower and upper bounds of a few rows, always solvable."""
    rows, parts = draw(st.integers(1, 3)), draw(st.integers(1, 6))

    def table(elements):
        return [[draw(elements) for _ in range(parts)] for _ in range(rows)]

    lower = torch.tensor(table(st.integers(0, 20)))
    upper = lower + torch.tensor(table(st.integers(0, 30)))
    wishes = torch.tensor(table(st.floats(-10, 80)), dtype=torch.float64)
    totals = [draw(st.integers(int(a), int(b))) for a, b in zip(lower.sum(1), upper.sum(1), strict=True)]
    return wishes, torch.tensor(totals), lower, upper


def row(values, *, total, lower, upper):
    parts = len(values)
    wishes = torch.tensor([values], dtype=torch.float64)
    bounds = [torch.full((1, parts), bound) for bound in (lower, upper)]
    return apportion(wishes, torch.tensor([total]), *bounds)[0].tolist()


@CASES
@given(problems())
def test_sums_are_exact_and_bounds_hold(problem):
    wishes, totals, lower, upper = problem
    counts = apportion(wishes, totals, lower, upper)
    assert counts.sum(dim=1).equal(totals)
    assert ((counts >= lower) & (counts <= upper)).all()


@CASES
@given(problems())
def test_rows_are_independent(problem):
    together = apportion(*problem)
    alone = [apportion(*(part[at : at + 1] for part in problem)) for at in range(len(together))]
    assert together.equal(torch.cat(alone))


@CASES
@given(problems())
def test_an_integer_solution_is_its_own_answer(problem):
    counts = apportion(*problem)
    _, totals, lower, upper = problem
    assert apportion(counts.double(), totals, lower, upper).equal(counts)


@CASES
@given(problems())
def test_no_single_move_comes_nearer_to_the_wishes(problem):
    wishes, _, lower, upper = problem
    counts = apportion(*problem)
    distance = ((counts - wishes) ** 2).sum(dim=1)
    parts = range(wishes.shape[1])
    for giver, taker in [(a, b) for a in parts for b in parts if a != b]:
        moved = counts.clone()
        moved[:, giver] -= 1
        moved[:, taker] += 1
        allowed = ((moved >= lower) & (moved <= upper)).all(dim=1)
        assert (((moved - wishes) ** 2).sum(dim=1) >= distance - 1e-4)[allowed].all()


def test_largest_remainders_win_and_ties_go_to_the_first():
    assert row([1.2, 2.7, 3.1], total=7, lower=0, upper=9) == [1, 3, 3]
    assert row([1.5, 1.5, 1.5, 1.5], total=6, lower=0, upper=9) == [2, 2, 1, 1]
    assert row([0.1 + 0.2, 0.3, 0.4], total=1, lower=0, upper=1) == [0, 0, 1]


def test_what_a_bound_takes_is_shared_by_the_others():
    assert row([0.0, 10.0, 20.0], total=30, lower=4, upper=99) == [4, 8, 18]
    assert row([0.0, 10.0, 20.0], total=30, lower=0, upper=16) == [2, 12, 16]


def test_long_rows_stay_exact():
    wishes = torch.rand(2, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 131_072
    totals = torch.tensor([4096 * 131_072 // 7, 4096 * 131_072 - 1])
    counts = apportion(wishes, totals, torch.full((2, 4096), 36), torch.full((2, 4096), 131_072))
    assert counts.sum(dim=1).equal(totals)
    assert counts.min() >= 36
    assert counts.max() <= 131_072


@pytest.mark.parametrize("total", [5, 100])
def test_bounds_that_contradict_the_total_are_named(total):
    with pytest.raises(BudgetInfeasible, match=rf"{total} entries.*fewer than 6.*more than 27"):
        row([1.0, 2.0, 3.0], total=total, lower=2, upper=9)


def test_crossed_bounds_are_refused():
    with pytest.raises(BudgetInfeasible, match="lower bound"):
        apportion(torch.ones(1, 2), torch.tensor([4]), torch.tensor([[3, 0]]), torch.tensor([[2, 9]]))


@CASES
@given(st.integers(0, 1000), st.integers(1, 30))
def test_even_shares_are_exact_level_and_nested(total, parts):
    share, more = even_shares(torch.tensor([total, total + 1]), parts)
    assert share.sum() == total
    assert share.max() - share.min() <= 1
    assert (more >= share).all()


def demand(totals, floors, tokens=(512,)):
    shape = ModelShape(num_layers=2, layers=(0, 1), kv_heads=4, query_heads=8, head_dim=16)
    return Demand(shape=shape, tokens=tokens, totals=totals, floors=floors, protected=(0,) * len(tokens))


def test_an_infeasible_demand_names_the_smallest_keep_that_works():
    with pytest.raises(BudgetInfeasible, match=r"12 entries per head.*36 of 512.*0\.0704 \(or '36tok'\)"):
        require_feasible(demand(totals=(96,), floors=(36,)))


@pytest.mark.parametrize("advice", ["0.0704", "36tok"])
def test_the_advice_works(advice):
    base = demand(totals=(0,), floors=(36,))
    totals = parse_keep(advice).entries(shape=base.shape, tokens=base.tokens, entry_bytes=64)
    require_feasible(demand(totals=tuple(totals), floors=(36,)))


def test_the_row_is_named_in_a_batch():
    with pytest.raises(BudgetInfeasible, match=r"row 1 of the batch.*0\.36 "):
        require_feasible(demand(totals=(400, 80), floors=(36, 36), tokens=(512, 100)))


def test_more_than_the_cache_is_refused():
    with pytest.raises(BudgetInfeasible, match="hold only 4096"):
        require_feasible(demand(totals=(4097,), floors=(36,)))
