"""Sharing bytes among heads in mixed bits: exact dynamic programming, single kinds, bytes that are met, floors."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.artifacts.hulls import concave_hulls
from headwise.kernels.quantised import ENTRIES
from headwise.methods.allocate import mixed
from headwise.methods.allocate.mixed import share_bytes, worth
from headwise.methods.storage import Storage

CASES = settings(max_examples=60, deadline=None, derandomize=True)
STORAGES = [Storage(head_dim=16, itemsize=2, bits=bits) for bits in (None, *ENTRIES.values())]
PROTECTED = 3


def hulls_of(heads, seed, ranks=16):
    """Hulls of native entries and of three kinds that are each worth less, the first (sink) entries apart."""
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(heads, PROTECTED + ranks, generator=generator, dtype=torch.float64) ** 4
    gains *= 10 ** -(3 * torch.rand(heads, 1, generator=generator, dtype=torch.float64))
    made = []
    for loss in (0.0, 0.02, 0.1, 0.3):
        spoilt = torch.rand(heads, PROTECTED + ranks, generator=generator, dtype=torch.float64) * 2 * loss
        first, rest = (gains * (1 - spoilt)).tensor_split([PROTECTED], dim=-1)
        hulls = concave_hulls(rest)
        made.append({"protected": first, "width": hulls.width, "slope": hulls.slope})
    return made


def worths(heads, seed, tokens, kinds=range(4)):
    counts, hulls = torch.arange(tokens + 1), hulls_of(heads, seed)
    return [worth(hulls[k], STORAGES[k].nbytes(counts)) for k in kinds]


def total(choices):
    return sum(choice.utility for choice in choices)


def spent(choices):
    return sum(choice.nbytes for choice in choices)


def best(kinds, nbytes, floor):
    """Exact dynamic programming over heads, on every kind and count of each, in steps of one byte."""
    found = np.zeros(nbytes + 1)
    for head in range(len(kinds[0].counts)):
        after = np.full(nbytes + 1, -np.inf)
        for kind in kinds:
            tokens = len(kind.price) - 1
            counts = np.arange(floor, tokens + 1)
            for price, utility in zip(kind.price[counts].tolist(), kind.of(head, counts), strict=True):
                if price <= nbytes:
                    np.maximum(after[price:], found[: nbytes + 1 - price] + utility, out=after[price:])
        found = after
    return found[nbytes]


def range_of(heads, tokens):
    """The fewest bytes that heads can take, one entry each, and the most."""
    fewest, most = torch.tensor(1), torch.tensor(tokens)
    return heads * min(int(s.nbytes(fewest)) for s in STORAGES), heads * int(STORAGES[0].nbytes(most))


@CASES
@given(data=st.data(), seed=st.integers(0, 10**6), heads=st.integers(1, 4), tokens=st.integers(6, 60))
def test_nothing_is_above_dynamic_programming_and_the_greedy_is_within_one_step_of_it(data, seed, heads, tokens):
    kinds, (low, high) = worths(heads, seed, tokens), range_of(heads, tokens)
    nbytes = data.draw(st.integers(low, min(high, low + 6000)))
    choices = share_bytes(kinds, nbytes=nbytes, floor=1, least=1)
    optimum = best(kinds, nbytes, 1)
    assert spent(choices) <= nbytes
    assert total(choices) <= optimum + 1e-9
    hulls = [mixed._hull(kinds, range(4), head, 1) for head in range(heads)]
    step = max(after.utility - before.utility for hull in hulls for before, after in pairwise(hull))
    assert total(choices) >= optimum - step
    for choice in choices:
        assert choice.nbytes == kinds[choice.kind].price[choice.count]
        assert 1 <= choice.count <= tokens


def test_on_average_hardly_anything_is_lost_against_dynamic_programming():
    lost = []
    for seed in range(12):
        kinds, (low, high) = worths(4, seed, 50), range_of(4, 50)
        for nbytes in (low + 900, low + 2000, (low + high) // 2):
            optimum = best(kinds, nbytes, 1)
            lost.append(1 - total(share_bytes(kinds, nbytes=nbytes, floor=1, least=1)) / optimum)
    assert -1e-9 < np.mean(lost) < 0.005
    assert max(lost) < 0.05


@CASES
@given(data=st.data(), seed=st.integers(0, 10**6), heads=st.integers(1, 6), tokens=st.integers(6, 400))
def test_no_single_kind_is_better_and_its_bytes_are_spent(data, seed, heads, tokens):
    kinds, (low, high) = worths(heads, seed, tokens), range_of(heads, tokens)
    nbytes = data.draw(st.integers(low, high + 100))
    choices = share_bytes(kinds, nbytes=nbytes, floor=1, least=1)
    for kind in range(4):
        alone = share_bytes(worths(heads, seed, tokens, [kind]), nbytes=nbytes, floor=1, least=1)
        assert total(alone) <= total(choices) + 1e-12
        assert spent(alone) <= nbytes
        whole = all(choice.count == tokens for choice in alone)
        entry = int(np.diff(kinds[kind].price).max())
        assert whole or nbytes - spent(alone) < entry
    whole = all(choice.count == tokens for choice in choices)
    assert whole or nbytes - spent(choices) < max(int(np.diff(kinds[c.kind].price).max()) for c in choices)


@pytest.mark.parametrize("seed", range(6))
def test_at_the_ends_of_steps_it_is_the_optimum_and_no_head_loses_bytes_to_another(seed):
    kinds = worths(3, seed, 30)
    hulls = [mixed._hull(kinds, range(4), head, 1) for head in range(3)]
    at = [hull[0] for hull in hulls]
    for head, to in mixed._steepest_first(hulls):
        at[head] = to
        choices = share_bytes(kinds, nbytes=spent(at), floor=1, least=1)
        assert choices == at
        assert total(choices) == pytest.approx(best(kinds, spent(at), 1), abs=1e-9)


def test_all_bytes_keep_all_entries_native():
    kinds, (_, high) = worths(5, 1, 80), range_of(5, 80)
    assert {(c.kind, c.count) for c in share_bytes(kinds, nbytes=high, floor=1, least=1)} == {(0, 80)}
    assert {(c.kind, c.count) for c in share_bytes(kinds, nbytes=10 * high, floor=1, least=1)} == {(0, 80)}


def test_the_floor_is_kept_where_it_fits_and_fewer_where_it_does_not():
    kinds = worths(6, 2, 200)
    cheapest = int(STORAGES[3].nbytes(torch.tensor(50)))
    assert min(c.count for c in share_bytes(kinds, nbytes=6 * cheapest + 500, floor=50, least=1)) == 50
    counts = [c.count for c in share_bytes(kinds, nbytes=6 * cheapest // 2, floor=50, least=1)]
    assert 10 < min(counts) <= max(counts) < 50


def test_a_head_that_gains_nothing_gets_no_more_than_its_floor():
    hulls = hulls_of(3, 5)
    for hull in hulls:
        hull["protected"][1] = 0
        hull["slope"][1] = 0
    kinds = [worth(hull, s.nbytes(torch.arange(101))) for hull, s in zip(hulls, STORAGES, strict=True)]
    choices = share_bytes(kinds, nbytes=4000, floor=2, least=1)
    assert choices[1].count == 2
    assert choices[0].nbytes + choices[2].nbytes > 3500


def test_a_context_of_protected_tokens_only_has_no_hull():
    kinds = worths(2, 3, 2)
    assert [c.count for c in share_bytes(kinds, nbytes=10**6, floor=1, least=1)] == [2, 2]


def test_many_heads_at_full_length_take_seconds_at_most():
    kinds = worths(256, 0, 32768)
    start = time.process_time()
    choices = share_bytes(kinds, nbytes=256 * 32768 * 6, floor=327, least=1)
    assert time.process_time() - start < 5
    assert len({choice.kind for choice in choices}) > 1
