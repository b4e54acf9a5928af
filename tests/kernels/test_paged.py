"""Attention over a paged pool against one query at a time in float64; what no sequence owns is never looked at."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from headwise.kernels import paged
from headwise.kernels.paged import Sequences


class Case(NamedTuple):
    counts: tuple[int, ...]  # queries of every request
    lengths: tuple[tuple[int, ...], ...]  # of every request and head
    block: int
    group: int
    dim: int


CASES = [
    Case((1,) * 5, ((1, 300), (129, 128), (16, 17), (70, 500), (257, 33)), 16, 4, 64),  # decoding
    Case((1,), ((700,),), 32, 3, 40),
    Case((37,), ((37, 37),), 16, 3, 16),  # a prompt
    Case((5, 90), ((70, 12, 5), (90, 91, 300)), 48, 1, 96),  # with earlier entries
    Case((1, 33, 1, 0, 7), ((5, 290), (33, 70), (64, 1), (9, 0), (7, 300)), 32, 4, 24),  # both
    Case((1, 4), ((131, 7), (9, 4)), 1, 3, 8),
]
LONG = Case((530,), ((560, 530),), 48, 1, 16)  # more queries than are done at once


def make_arguments(case, dtype):
    """Pages of a sequence are anywhere. Entries that no sequence owns are NaN, page ids behind a table's are wrong."""
    counts, lengths, block, group, dim = case
    needed = [[-(-length // block) for length in heads] for heads in lengths]
    total = sum(map(sum, needed))
    pool = torch.full((total + 2, block + 1, 2 * dim + 8), torch.nan, dtype=dtype)[:, 1:, 8:]  # with gaps
    free = iter((torch.randperm(total) + 1).tolist())  # the first and the last page are nobody's
    tables = torch.full((len(counts), len(lengths[0]), max(map(max, needed)) + 2), -1)
    tables[..., 1::2] = 1 << 40
    for request, heads in enumerate(lengths):
        for head, length in enumerate(heads):
            for nth in range(needed[request][head]):
                page = tables[request, head, nth] = next(free)
                owned = min(block, length - nth * block)
                pool[page, :owned] = torch.randn(owned, 2 * dim).to(dtype)
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    query = 2 * torch.randn(starts[-1], len(lengths[0]) * group, dim).to(dtype)
    sequences = Sequences(tables=tables, lengths=torch.tensor(lengths), query_starts=tuple(starts))
    return query, pool, sequences, dim**-0.5


def exactly(query, pool, sequences, scaling):
    """One query and query head at a time, in float64."""
    out, starts = query.to(torch.float64, copy=True), sequences.query_starts
    group, dim = query.shape[1] // sequences.tables.shape[1], query.shape[2]
    for request, (start, stop) in enumerate(pairwise(starts)):
        for row in range(start, stop):
            for head in range(query.shape[1]):
                length = int(sequences.lengths[request, head // group]) - (stop - 1 - row)
                entries = owned(pool, sequences.tables[request, head // group], length).double()
                weights = (entries[:, :dim] @ out[row, head] * scaling).softmax(0)
                out[row, head] = weights @ entries[:, dim:]
    return out


def plainly(query, pool, sequences, scaling):
    """PyTorch's own attention in the same precision, one request and KV head at a time."""
    out, starts = torch.empty_like(query), sequences.query_starts
    group, dim = query.shape[1] // sequences.tables.shape[1], query.shape[2]
    for request, (start, stop) in enumerate(pairwise(starts)):
        for head, length in enumerate(sequences.lengths[request].tolist()):
            entries = owned(pool, sequences.tables[request, head], length).expand(group, -1, -1)
            visible = torch.ones(stop - start, length, dtype=torch.bool).tril(length - (stop - start))
            own = slice(start, stop), slice(head * group, (head + 1) * group)
            out[own] = scaled_dot_product_attention(
                query[own].transpose(0, 1), entries[..., :dim], entries[..., dim:], attn_mask=visible, scale=scaling
            ).transpose(0, 1)
    return out


def owned(pool, table, length):
    nth = torch.arange(length)
    return pool[table[nth // pool.shape[1]], nth % pool.shape[1]]


def assert_as_good_as_plain(attend, case, dtype, draws=8):
    """Over some draws together: of a single one either error may be small by luck."""
    ours, plain = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for _ in range(draws):
        arguments = make_arguments(case, dtype)
        exact, found = exactly(*arguments), attend(*arguments)
        assert found.dtype == dtype
        ours += (found.double() - exact).square().sum()
        plain += (plainly(*arguments).double() - exact).square().sum()
    assert ours.sqrt() <= 2 * plain.sqrt()


@pytest.mark.parametrize("case", [*CASES, LONG], ids=str)
def test_equals_one_by_one(case):
    arguments = make_arguments(case, torch.float64)
    torch.testing.assert_close(paged.attend(*arguments), exactly(*arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_attention(case, dtype):
    assert_as_good_as_plain(paged.attend, case, dtype)


def test_more_parts_than_are_read_at_once(monkeypatch):
    arguments = make_arguments(CASES[0], torch.float64)
    monkeypatch.setattr(paged, "MAX_PARTS", 2)
    torch.testing.assert_close(paged.attend(*arguments), exactly(*arguments), rtol=1e-9, atol=1e-9)


def test_no_queries():
    query, pool, sequences, scaling = make_arguments(Case((0,), ((5,),), 16, 1, 8), torch.float32)
    assert paged.attend(query, pool, sequences, scaling).shape == (0, 1, 8)


def test_read():
    _, pool, sequences, _ = make_arguments(Case((1,), ((40, 40),), 16, 1, 8), torch.float32)
    entries = paged.read(pool, sequences.tables[0], 40)
    assert entries.shape == (2, 40, 16)
    assert torch.equal(entries[1, 39], pool[sequences.tables[0, 1, 2], 7])
