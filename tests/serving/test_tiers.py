"""Budget tiers: mass preserved, groups that vLLM does not pad, and the formula for freed blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import BadInput
from headwise.serving.tiers import GROUPS_PER_TIER, WHOLE, Tiers, freed_blocks, quantise

FRACTIONS = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40)


@given(FRACTIONS, st.integers(1, 10))
@pytest.mark.slow
def test_what_all_heads_keep_together_stays_the_same(fractions, tiers):
    found = quantise(torch.tensor([fractions]), tiers)
    assert found.keep == pytest.approx(sum(fractions) / len(fractions), abs=1e-6)
    assert all(0 <= keep <= WHOLE for keep in found.keeps[0])


@given(FRACTIONS, st.integers(1, 10))
@pytest.mark.slow
def test_groups_are_few_and_equal(fractions, tiers):
    sizes = quantise(torch.tensor([fractions]), tiers).sizes
    smallest = min(sizes.values())
    assert len(sizes) <= tiers
    assert all(size % smallest == 0 for size in sizes.values())
    assert len(fractions) // smallest <= max(1, GROUPS_PER_TIER * tiers)


@given(FRACTIONS, st.integers(1, 10))
@pytest.mark.slow
def test_a_head_with_more_never_gets_less(fractions, tiers):
    keeps = quantise(torch.tensor([fractions]), tiers).keeps[0]
    ranked = [keep for _, keep in sorted(zip(fractions, keeps, strict=True))]
    assert ranked == sorted(ranked)


def test_as_many_tiers_as_different_heads_lose_nothing():
    fractions = torch.tensor([[1.0, 0.125, 0.125], [0.5, 0.125, 1.0]])
    assert quantise(fractions, 3).keeps == ((WHOLE, 125_000, 125_000), (500_000, 125_000, WHOLE))


def test_the_one_head_that_matters_keeps_its_tier():
    """A budget of which one head in 24 is whole: equal tiers would give it a third."""
    fractions = torch.full((6, 4), 0.05)
    fractions[3, 1] = 1.0
    assert quantise(fractions, 8).keeps[3][1] == WHOLE


def test_differences_of_one_token_make_no_tier():
    fractions = torch.tensor([[820.0, 819.0, 819.0, 819.0]]) / 4096
    assert len(quantise(fractions, 8, tokens=4096).sizes) == 1
    assert len(quantise(fractions, 8).sizes) == 2


def test_many_heads_are_fast_and_few_groups():
    torch.manual_seed(0)
    sizes = quantise(torch.rand(80, 8) ** 3, 8).sizes
    assert sum(sizes.values()) // min(sizes.values()) <= 32


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_tier_has_as_many_heads_of_every_rank(ranks):
    torch.manual_seed(0)
    fractions = torch.rand(12, 4) ** 3
    tiers = quantise(fractions, 6, ranks=ranks)
    for keep in tiers.sizes:
        heads = [sum(row[h] == keep for row in tiers.keeps) for h in range(4)]
        shares = [sum(heads[r * 4 // ranks : (r + 1) * 4 // ranks]) for r in range(ranks)]
        assert len(set(shares)) == 1
    assert tiers.keep == pytest.approx(fractions.mean().item(), abs=1e-6)
    assert tiers.heads_per_group % ranks == 0


def test_ranks_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(BadInput, match="ranks=3 must be a number that divides the model's 4 KV heads"):
        quantise(torch.ones(2, 4), 8, ranks=3)


def test_no_tiers_is_refused():
    with pytest.raises(BadInput, match="tiers=0"):
        quantise(torch.ones(1, 1), 0)


@given(st.integers(1, 5000), st.integers(0, WHOLE), st.integers(1, 200), st.sampled_from([1, 16, 32, 128]))
def test_freed_blocks(prompt, keep, floor, block):
    freed = freed_blocks(prompt, keep=keep, floor=floor, block=block)
    left = prompt - freed * block
    wanted = min(prompt, max(-(-prompt * keep // WHOLE), floor))
    assert wanted <= left < wanted + block
    assert left >= 1


def test_short_prompts_are_left_whole():
    assert freed_blocks(36, keep=1, floor=36, block=1) == 0
    assert freed_blocks(100, keep=WHOLE, floor=1, block=16) == 0
    assert freed_blocks(20, keep=200_000, floor=1, block=32) == 0


def test_kept_is_what_every_head_keeps():
    tiers = Tiers(keeps=((WHOLE, 250_000), (1, 125_000)), floor=3)
    assert tiers.kept(100, 1) == [[100, 25], [3, 13]]
    assert tiers.kept(100, 16) == [[100, 36], [4, 20]]
    assert tiers.sizes == {WHOLE: 1, 250_000: 1, 125_000: 1, 1: 1}
