"""Fixed: a Budget's table becomes counts for any total, floor and context length."""

import json

import pytest
import torch

from headwise.artifacts.budget import Budget
from headwise.artifacts.origin import Origin
from headwise.errors import ArtifactMismatch
from headwise.interfaces import Demand
from headwise.methods.allocate.fixed import Fixed
from headwise.shapes import ModelShape

SHAPE = ModelShape(num_layers=3, layers=(0, 2), kv_heads=2, query_heads=4, head_dim=8)


def budget(rows, ratios, shape=SHAPE):
    fractions = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(shape.layers), shape.kv_heads)
    return Budget(ratios=torch.tensor(ratios), fractions=fractions, origin=Origin(shape=shape, model="m"))


def counts(table, *, tokens, total, floor=1):
    demand = Demand(shape=table.origin.shape, tokens=(tokens,), totals=(total,), floors=(floor,), protected=(0,))
    return Fixed(budget=table).counts(demand)[:, 0].flatten().tolist()


TABLE = budget([[0.1, 0.1, 0.1, 0.5], [0.2, 0.4, 0.4, 1.0]], [0.2, 0.5])


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (80, [10, 10, 10, 50]),  # a row of the table
        (200, [20, 40, 40, 100]),  # the other
        (140, [15, 25, 25, 75]),  # half way between
        (42, [6, 6, 5, 25]),  # half way between the floor of 1 and the lowest row
        (300, [60, 70, 70, 100]),  # half way between the highest row and everything
        (81, [10, 10, 10, 51]),  # largest remainder
    ],
)
def test_any_total_lies_on_the_line_through_the_rows(total, expected):
    assert counts(TABLE, tokens=100, total=total) == expected


def test_a_head_kept_whole_stays_whole_when_floors_must_be_paid():
    whole = budget([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]], [0.25, 0.5, 0.75])
    assert counts(whole, tokens=100, total=160, floor=20) == [20, 20, 20, 100]
    assert counts(whole, tokens=100, total=200, floor=20) == [20, 20, 60, 100]


def test_a_table_whose_rows_miss_their_ratios_still_meets_the_total():
    """Published tables average rounded fractions, so that a row's mean is not its ratio."""
    skewed = budget([[0.3, 0.3, 0.3, 0.3]], [0.2])
    assert counts(skewed, tokens=10, total=8) == [2, 2, 2, 2]


def test_layers_asked_one_by_one_are_rows_of_one_table():
    demand = Demand(shape=SHAPE, tokens=(100, 37), totals=(81, 75), floors=(1, 5), protected=(0, 0))
    allocator = Fixed(budget=TABLE)
    scores, candidates = torch.zeros(1, 2, 2, 100), torch.ones(2, 100, dtype=torch.bool)
    layers = [allocator.allocate(scores, candidates, [at], demand) for at in range(2)]
    assert torch.cat(layers).equal(allocator.counts(demand))


def test_a_budget_of_another_model_is_refused_naming_both():
    other = ModelShape(num_layers=3, layers=(0, 1, 2), kv_heads=2, query_heads=4, head_dim=8)
    demand = Demand(shape=other, tokens=(10,), totals=(30,), floors=(1,), protected=(0,))
    with pytest.raises(ArtifactMismatch, match=r"m with 2 layers of 2 KV heads; this model has 3 layers of 2 KV heads"):
        Fixed(budget=TABLE).counts(demand)


def test_provenance_names_the_budget_without_its_table():
    found = Fixed(budget=TABLE).provenance()
    assert found["name"] == "Fixed"
    assert found["budget"]["model"] == "m"
    assert len(json.dumps(found)) < 500
    assert found == Fixed(budget=budget([[0.1, 0.1, 0.1, 0.5], [0.2, 0.4, 0.4, 1.0]], [0.2, 0.5])).provenance()
    assert found != Fixed(budget=budget([[0.1, 0.1, 0.1, 0.5]], [0.2])).provenance()
