"""What PyTorch's kernels may not be given either: attention on a CPU reads on where values are fewer than keys."""

from dataclasses import fields, replace
from inspect import unwrap

import pytest
import torch

from headwise.errors import ShapeMismatch
from headwise.kernels import paged, pages
from headwise.kernels.segments import Segments, readers


def unchecked(made, **changes):
    """A changed copy that nobody has looked at: tests check annotations of shapes, users do not."""
    copy = object.__new__(type(made))
    for field in fields(made):
        object.__setattr__(copy, field.name, changes.get(field.name, getattr(made, field.name)))
    return copy


SEGMENTS = Segments(
    keys=torch.randn(9, 16),
    values=torch.randn(9, 16),
    positions=torch.arange(9, dtype=torch.int32),
    lengths=(4, 0, 2, 3),
    kv_heads=2,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": (4, 0, 2, 4)},
        {"lengths": (4, 0, -2, 7)},
        {"lengths": (4, 0, 5)},
        {"lengths": ()},
        {"kv_heads": 0},
        {"kv_heads": 3},
        {"values": SEGMENTS.values[:5]},
        {"values": SEGMENTS.values[:, :8].contiguous()},
        {"values": SEGMENTS.values.double()},
        {"values": SEGMENTS.values.T.contiguous().T},
        {"positions": SEGMENTS.positions[:8]},
    ],
)
def test_a_storage_whose_parts_do_not_fit(changes):
    with pytest.raises(ShapeMismatch):
        unwrap(Segments.__post_init__)(unchecked(SEGMENTS, **changes))


def case():
    states = torch.randn(3, 2, 5, 16)
    return [torch.randn(3, 2, 2, 1, 16), SEGMENTS, torch.tensor([0, 1, 1]), states, states.clone(), None, 0.25]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, torch.randn(3, 2, 2, 1, 8)),
        (0, torch.randn(3, 4, 2, 1, 16)),
        (0, torch.randn(2, 2, 2, 1, 16)),
        (0, torch.randn(3, 2, 2, 16)),
        (2, torch.tensor([0, 1])),
        (2, torch.tensor([0, 1, 2])),
        (2, torch.tensor([0, 1, -1])),
        (3, torch.randn(3, 2, 4, 16)),
        (4, torch.randn(3, 2, 4, 16)),
        (4, torch.randn(3, 1, 5, 16)),
        (5, torch.ones(3, 1, 4, dtype=torch.bool)),
    ],
)
def test_arguments_that_do_not_fit(at, value):
    arguments = case()
    assert torch.isfinite(pages.attend(*arguments)).all()
    arguments[at] = value
    with pytest.raises(ShapeMismatch):
        pages.attend(*arguments)


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_of_no_context_have_no_readers(row):
    with pytest.raises(ShapeMismatch, match="there are 2 contexts"):
        readers(torch.tensor([0, row]), 2)


POOL = torch.randn(6, 4, 32)
SEQUENCES = paged.Sequences(
    tables=torch.tensor([[[0, 1], [2, 3]]]), lengths=torch.tensor([[8, 5]]), query_starts=(0, 1)
)  # two heads of one request


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": torch.tensor([[9, 5]])},
        {"lengths": torch.tensor([[8, -1]])},
        {"lengths": torch.tensor([[8]])},
        {"query_starts": (0, 2)},
        {"query_starts": (-1, 1)},
        {"query_starts": (1, 0)},
        {"query_starts": (0, 1, 1)},
        {"tables": SEQUENCES.tables[0]},
        {"tables": SEQUENCES.tables.repeat(1, 2, 1)},
    ],
)
def test_sequences_that_do_not_fit_the_pool(changes):
    query = torch.randn(1, 4, 16)
    assert torch.isfinite(paged.attend(query, POOL, SEQUENCES, 0.25)).all()
    with pytest.raises(ShapeMismatch, match="do not fit"):
        unwrap(paged.attend)(query, POOL, unchecked(SEQUENCES, **changes), 0.25)


def test_a_pool_of_other_heads_and_a_page_that_is_not_there():
    query = torch.randn(1, 4, 16)
    with pytest.raises(ShapeMismatch, match="do not fit"):
        paged.attend(query, POOL[..., :16], SEQUENCES, 0.25)
    with pytest.raises(IndexError):
        paged.attend(query, POOL, replace(SEQUENCES, tables=SEQUENCES.tables + 10), 0.25)
