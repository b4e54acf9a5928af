"""Selection against a naive oracle: ties, padding, protection, infinities, and what is refused."""

from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import BadInput, NonFiniteValues, ShapeMismatch
from headwise.methods.select import protected_mask, protection_order, select

CASES = settings(max_examples=100, deadline=None, derandomize=True)


def naive_protected(valid, sink, window):
    rows = []
    for row in valid.tolist():
        tokens = [at for at, real in enumerate(row) if real]
        chosen = set(tokens[:sink]) | set(tokens[max(0, len(tokens) - window) :])
        rows.append([at in chosen for at in range(len(row))])
    return torch.tensor(rows)


def naive_order(valid, sink, window):
    """First tokens in front, then the last ones backwards; every other token behind them."""
    order = torch.full(valid.shape, valid.shape[1])
    for row, real in enumerate(valid.tolist()):
        tokens = [at for at, is_real in enumerate(real) if is_real]
        first, rest = tokens[:sink], tokens[sink:]
        for place, at in enumerate([*first, *rest[::-1][:window]]):
            order[row, at] = place
    return order


def naive_select(scores, counts, valid, protected, order=None):
    first = torch.where(protected, 0, 1) if order is None else order
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        tokens = [at for at in range(scores.shape[2]) if valid[row, at]]
        for head in range(scores.shape[1]):
            values = scores[row, head].tolist()
            ranked = sorted(
                tokens, key=lambda at: (int(first[row, at]), -values[at] if not protected[row, at] else 0, at)
            )
            kept[row, head, ranked[: counts[row, head]]] = True
    return kept


@st.composite
def batches(draw, soft=False):
    """Scores with many ties, NaN at padding, counts between the protected (if soft: none) and all tokens of a row."""
    batch, heads, size = (draw(st.integers(1, most)) for most in (3, 3, 16))
    tokens = torch.tensor([draw(st.integers(1, size)) for _ in range(batch)])
    valid = torch.arange(size) >= size - tokens[:, None]
    sink, window = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    protected = protected_mask(valid, sink, window)
    values = st.sampled_from([-torch.inf, -1.0, -0.0, 0.0, 0.5, 2.0])
    scores = torch.tensor([[[draw(values) for _ in range(size)] for _ in range(heads)] for _ in range(batch)])
    scores = scores.masked_fill((protected | ~valid)[:, None], torch.nan)
    bounds = zip((protected.sum(1) * (not soft)).tolist(), tokens.tolist(), strict=True)
    counts = torch.tensor([[draw(st.integers(least, most)) for _ in range(heads)] for least, most in bounds])
    return (scores, counts, valid, protected, *([protection_order(valid, sink, window)] if soft else []))


@CASES
@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(0, 7),
    st.integers(0, 7),
)
def test_protected_are_the_first_and_last_real_tokens(valid, sink, window):
    mask = torch.tensor(valid)
    assert protected_mask(mask, sink, window).equal(naive_protected(mask, sink, window))


@CASES
@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(0, 7),
    st.integers(0, 7),
)
def test_the_order_of_the_protected_is_first_tokens_then_the_latest_backwards(valid, sink, window):
    mask = torch.tensor(valid)
    assert protection_order(mask, sink, window).equal(naive_order(mask, sink, window))


def test_short_rows_are_protected_whole():
    valid = torch.tensor([[False, False, True, True, True, True, True, True], [False] * 5 + [True] * 3])
    expected = [[False, False, True, False, False, False, True, True], [False] * 5 + [True] * 3]
    assert protected_mask(valid, 1, 2).tolist() == expected


def test_negative_protection_is_refused():
    with pytest.raises(BadInput, match="window=-1"):
        protected_mask(torch.ones(1, 4, dtype=torch.bool), 0, -1)


@CASES
@given(batches())
def test_select_is_the_naive_oracle(batch):
    kept = select(*batch)
    assert kept.equal(naive_select(*batch))
    assert kept.sum(dim=-1).equal(batch[1])


@CASES
@given(batches(soft=True))
def test_with_an_order_counts_below_the_protected_are_the_naive_oracle(batch):
    kept = select(*batch)
    assert kept.equal(naive_select(*batch))
    assert kept.sum(dim=-1).equal(batch[1])


def test_with_an_order_every_count_adds_one_entry_sinks_first_then_latest_then_scores():
    """Two rows, one of them with three tokens of padding in front."""
    valid = torch.arange(8) >= torch.tensor([[0], [3]])
    scores = torch.tensor([[[0.0, 0, 5, 1, 3, 5, 0, 0]], [[torch.nan] * 4 + [0, 0, 0, 0]]])
    protected, order = protected_mask(valid, 2, 2), protection_order(valid, 2, 2)
    added, before = [[], []], torch.zeros(2, 1, 8, dtype=torch.bool)
    for count in range(1, 9):
        kept = select(scores, torch.tensor([[count], [min(count, 5)]]), valid, protected, order)
        for row in range(2):
            added[row] += (kept[row, 0] & ~before[row, 0]).nonzero()[:, 0].tolist()
        assert (kept | before).equal(kept)
        before = kept
    assert added == [[0, 1, 7, 6, 2, 5, 4, 3], [3, 4, 7, 6, 5]]


def test_ties_go_to_the_earlier_position():
    valid = torch.ones(1, 6, dtype=torch.bool)
    kept = select(torch.zeros(1, 2, 6), torch.tensor([[2, 5]]), valid, torch.zeros_like(valid))
    assert kept[0].long().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("extreme", [torch.inf, torch.finfo(torch.float32).max])
def test_no_score_beats_protection(extreme):
    valid = torch.ones(1, 3, dtype=torch.bool)
    scores = torch.tensor([[[extreme, extreme, -extreme]]])
    kept = select(scores, torch.tensor([[1]]), valid, torch.tensor([[False, False, True]]))
    assert kept.tolist() == [[[False, False, True]]]


def test_no_score_falls_below_padding():
    valid = torch.tensor([[False, True, True]])
    scores = torch.tensor([[[9.0, -torch.inf, -torch.inf]]])
    assert select(scores, torch.tensor([[2]]), valid, torch.zeros_like(valid)).tolist() == [[[False, True, True]]]


def test_the_answer_is_the_same_on_one_and_two_threads():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 4, 4096, generator=generator).mul(8).round()
    valid = torch.ones(2, 4096, dtype=torch.bool)
    counts, protected = torch.full((2, 4), 700), protected_mask(valid, 4, 32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(select(scores, counts, valid, protected))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1])


def arguments():
    valid = torch.ones(2, 5, dtype=torch.bool)
    return torch.zeros(2, 3, 5), torch.full((2, 3), 2), valid, protected_mask(valid, 1, 1)


def test_nan_scores_are_refused():
    scores, counts, valid, protected = arguments()
    scores[1, 2, 2] = torch.nan
    with pytest.raises(NonFiniteValues, match="NaN"):
        select(scores, counts, valid, protected)


@pytest.mark.parametrize("count", [-1, 1, 6])
def test_counts_outside_protected_and_tokens_are_refused(count):
    scores, counts, valid, protected = arguments()
    counts[1, 0] = count
    with pytest.raises(BadInput, match=r"protected tokens \[2, 2\] and its tokens \[5, 5\]"):
        select(scores, counts, valid, protected)


def test_with_an_order_counts_outside_0_and_tokens_are_refused():
    scores, counts, valid, protected = arguments()
    for count in (-1, 6):
        counts[1, 0] = count
        with pytest.raises(BadInput, match=r"its tokens \[5, 5\]"):
            select(scores, counts, valid, protected, protection_order(valid, 1, 1))


def test_sizes_that_do_not_fit_are_refused():
    scores, counts, valid, protected = arguments()
    bare = unwrap(select)  # under pytest the shape annotations would complain first
    with pytest.raises(ShapeMismatch, match=r"counts has shape \(3, 3\)"):
        bare(scores, torch.full((3, 3), 2), valid, protected)
    with pytest.raises(ShapeMismatch, match=r"valid has shape \(2, 4\)"):
        bare(scores, counts, valid[:, :4], protected)
