"""The differentiable top-k: exact sums, the hard top-k as its limit, and the gradients of the solution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from headwise.artifacts.soft_topk import soft_topk

CASES = settings(max_examples=60, deadline=None, derandomize=True)


def random_rows(*shape, seed=0, spread=2.0):
    return spread * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def number(value):
    return torch.tensor(value, dtype=torch.float64)


# --- the shares ---


@CASES
@given(
    st.integers(1, 50),
    st.floats(0, 1),
    st.sampled_from([0.01, 0.1, 0.5, 1.0, 5.0]),
    st.sampled_from([0.1, 3.0, 100.0]),
    st.integers(0, 99),
)
def test_the_sum_is_k(n, part, temperature, spread, seed):
    scores = random_rows(3, n, seed=seed, spread=spread)
    k = n * torch.tensor([part, part / 3, 1 - part], dtype=torch.float64)
    shares = soft_topk(scores, k, temperature)
    assert ((shares >= 0) & (shares <= 1)).all()
    torch.testing.assert_close(shares.sum(-1), k, rtol=1e-9, atol=1e-12)
    single = soft_topk(scores.float(), k.float(), temperature)
    torch.testing.assert_close(single.sum(-1), k.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 13])
def test_cold_it_is_the_hard_top_k(n):
    scores = random_rows(4, n)
    for k in range(n + 1):
        shares = soft_topk(scores, torch.full((4,), float(k), dtype=torch.float64), 1e-6)
        hard = torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)
        torch.testing.assert_close(shares, hard, rtol=0, atol=1e-9)


def test_cold_the_entry_at_the_edge_gets_the_fraction_that_is_left():
    shares = soft_topk(number([3.0, 1.0, 2.0, 0.0]), number(2.25), 1e-6)
    torch.testing.assert_close(shares, number([1.0, 0.25, 1.0, 0.0]))


@pytest.mark.parametrize("temperature", [1e-6, 1.0])
def test_ties_share_alike(temperature):
    torch.testing.assert_close(soft_topk(number([0.5] * 8), number(2.0), temperature), number([0.25] * 8))
    shares = soft_topk(number([1.0, 2.0, 1.0, 0.0, 1.0]), number(2.5), temperature)
    assert shares[0] == shares[2] == shares[4]
    if temperature < 1:
        torch.testing.assert_close(shares, number([0.5, 1.0, 0.5, 0.0, 0.5]))


def test_better_scores_get_more_and_a_larger_k_takes_nothing_away():
    scores, before = random_rows(1, 20), torch.zeros(1, 20, dtype=torch.float64)
    for k in range(1, 20):
        shares = soft_topk(scores, number([float(k)]), 0.5)
        assert shares[0].argsort().equal(scores[0].argsort())
        assert (shares > before).all()
        before = shares


def test_only_differences_of_scores_matter():
    scores, k = random_rows(2, 9), number([2.0, 5.5])
    for shift in (-1000.0, 0.1, 1000.0):
        torch.testing.assert_close(soft_topk(scores + shift, k, 0.3), soft_topk(scores, k, 0.3))
    torch.testing.assert_close(soft_topk(7 * scores, k, 7 * 0.3), soft_topk(scores, k, 0.3))


def test_rows_of_a_batch_do_not_see_each_other():
    scores, k = random_rows(2, 3, 9), number([[0.0, 9.0, 2.0], [4.5, 1e-3, 1.0]])
    together = soft_topk(scores, k, 0.3)
    for row in range(2):
        for column in range(3):
            at = row, column
            torch.testing.assert_close(soft_topk(scores[at], k[at], 0.3), together[at])


# --- the gradients ---


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gradients_are_those_of_the_solution(temperature):
    scores, k = random_rows(2, 3, 7), number([[1.0, 2.5, 6.0], [0.5, 3.0, 4.0]])
    inputs = [tensor.requires_grad_() for tensor in (scores, k)]
    assert gradcheck(lambda s, k: soft_topk(s, k, temperature), inputs)


def test_with_nothing_to_decide_all_or_nothing_is_kept_and_nothing_is_learned():
    for k, share in ((0.0, 0.0), (3.0, 1.0)):
        scores, wanted = number([1.0, -2.0, 1.0]).requires_grad_(), number(k).requires_grad_()
        shares = soft_topk(scores, wanted, 0.5)
        assert shares.tolist() == [share] * 3
        (shares * number([1.0, 2.0, 3.0])).sum().backward()
        assert scores.grad.tolist() == [0.0] * 3
        assert wanted.grad.item() == 0.0


@pytest.mark.parametrize("k", [1e-6, 3 - 1e-6, 2.0])
@pytest.mark.parametrize("temperature", [1e-6, 0.1])
def test_gradients_stay_finite_close_to_a_decision(k, temperature):
    scores, wanted = torch.tensor([5.0, 1.0, -5.0], requires_grad=True), torch.tensor(k, requires_grad=True)
    (soft_topk(scores, wanted, temperature) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores.grad.isfinite().all()
    assert wanted.grad.isfinite()
