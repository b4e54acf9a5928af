"""Sharing a work: who does what, and processes that hold a share of the weights each."""

import json
from pathlib import Path

import pytest
import torch
from launching import SHARDED, launch
from ranks import Rank

from headwise.errors import BadInput
from headwise.models.processes import Processes, Sharded, launched


@pytest.mark.parametrize("items", [0, 1, 3, 7])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_shares_are_everything_once(items, number):
    shares = [Rank(rank, number).share(items) for rank in range(number)]
    assert sorted(at for share in shares for at in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("number", [1, 2, 5])
def test_rows_are_gathered_in_their_order(number):
    rows = torch.randn(4, 3)
    parts = [Rank(rank, number) for rank in range(number)]
    found = sum(part.gather([rows[at] for at in part.share(4)], 4, torch.zeros(3)) for part in parts)
    assert found.equal(rows)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # nobody to share with
    found = launched("cpu")
    assert type(found) is Processes
    assert (found.rank, found.number) == (0, 1)
    assert found.sum(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("FSDP_VERSION", "1", "--fsdp_version 2"), ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params")],
)
def test_sharing_that_is_not_ours_is_refused(monkeypatch, variable, value, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadInput, match=message):
        launched("cpu")


def test_unequal_shares_of_gradients_are_refused():
    one = Sharded.__new__(Sharded)
    one.number = 2
    one.require_equal_shares(4)
    with pytest.raises(BadInput, match=r"5 contexts per step .* multiple of 2"):
        one.require_equal_shares(5)
    Rank(0, 2).require_equal_shares(5)  # with the whole model in each, shares may differ


@pytest.mark.slow
def test_processes_hold_half_of_the_weights_and_may_make_unequal_numbers_of_passes():
    said = launch(f"{Path(__file__).parent}/sharded_passes.py 4 1", how=SHARDED)
    found = sorted(map(json.loads, said.splitlines()), key=lambda one: one["rank"])
    assert [one["rank"] for one in found] == [0, 1]
    for one in found:
        assert one["made"] == 4  # the second ran along for three
        assert one["apart"] < 1e-5
        assert one["same_fingerprint"] and one["same_projections"]
        assert one["shares"] == [[at, at % 2] for at in range(5)]
    shared = found[0]["whole"] - found[0]["projections"]
    assert sum(one["held"] for one in found) == shared + 2 * found[0]["projections"]
    assert max(one["held"] for one in found) - found[0]["projections"] < 0.6 * shared
