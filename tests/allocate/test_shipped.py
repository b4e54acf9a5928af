"""The budgets that come with the reference model fit it, and do what they are for."""

import pytest
import torch
from evaluated import evaluated
from families import random_ids, tiny_model

import headwise
from headwise.artifacts.budget import Budget
from headwise.errors import ArtifactMismatch, BadInput
from headwise.methods.allocate import LUKV
from headwise.methods.method import Method
from headwise.models.loading import load, reference_path

SCORERS = ("snapkv", "keydiff", "expected")


@pytest.fixture(scope="module")
def reference():
    return load("reference")


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_shipped_budget_is_found_and_exact(reference, scorer):
    model, _ = reference
    ids = torch.randint(10, 500, (1, 400), generator=torch.Generator().manual_seed(0))
    cache = headwise.compress(model, ids, f"{scorer}+lukv", keep=0.2)
    assert isinstance(cache.prefill.method.allocator, LUKV)
    assert cache.prefill.method.allocator.budget.origin.scorer == scorer
    assert int(cache.lengths.sum()) == round(0.2 * 24 * 400)


def test_heads_give_up_protected_tokens_for_others(reference):
    """Of 36 protected tokens a head keeps the first ones, then the latest."""
    model, _ = reference
    ids = torch.randint(10, 500, (1, 400), generator=torch.Generator().manual_seed(0))
    cache = headwise.compress(model, ids, "snapkv+lukv", keep=0.1)
    order, few = [0, 1, 2, 3, *range(399, 367, -1)], 0
    for layer, head in cache.lengths[:, 0].ge(0).nonzero().tolist():
        kept = cache.positions(layer, 0, head).tolist()
        assert set(kept) & set(order) == set(order[: len(kept)])
        few += len(kept) < 36
    assert 0 < few < 24
    assert int(cache.lengths.sum()) == 24 * 40
    even = headwise.compress(model, ids, "snapkv", keep=0.1)
    assert all({*range(368, 400)} <= set(even.positions(layer, 0, 0).tolist()) for layer in range(len(even.lengths)))


def test_it_beats_the_even_share_at_the_same_bytes(reference):
    """Samples of a seed of their own: neither calibration nor any table in docs/ has them."""
    model, tokenizer = reference
    records = evaluated(
        model, tokenizer, "mini-ruler:niah_multikey_dense", ["snapkv", "snapkv+lukv"], [0.2], samples=3, seed=901
    )
    even, solved = (record.accuracy for record in records)
    assert records[0].kv_fraction == records[1].kv_fraction
    assert solved > even + 0.15


def test_no_budget_is_shipped_for_other_models_and_scorers(reference):
    model, _ = reference
    with pytest.raises(BadInput, match="headwise profile"):
        headwise.compress(model, random_ids(1, 60), "knorm+lukv", keep=0.5)
    with pytest.raises(BadInput, match="headwise profile"):
        headwise.compress(tiny_model(), random_ids(1, 60), "keydiff+lukv", keep=0.5)


def test_a_budget_of_another_scorer_is_refused(reference):
    model, _ = reference
    budget = Budget.load(reference_path() / "budgets" / "snapkv.safetensors")
    method = Method(scorer=Method.parse("keydiff").scorer, allocator=LUKV(budget=budget))
    with pytest.raises(ArtifactMismatch, match="SnapKV"):
        headwise.compress(model, random_ids(1, 60), method, keep=0.9)


def test_the_shipped_gates_beat_hand_made_scores_with_solved_budgets(reference):
    """At the same bytes, on samples of a seed of their own; `lkv` alone finds the file, and it is small."""
    model, tokenizer = reference
    records = evaluated(
        model,
        tokenizer,
        "mini-ruler:niah_multikey_dense,cwe",
        ["keydiff+lukv", "lkv"],
        [0.1],
        samples=4,
        seed=901,
        length=768,
    )
    assert all(record.kv_fraction == pytest.approx(0.1, rel=0.01) for record in records)
    rivals, ours = ([r.accuracy for r in records if r.method == method] for method in ("keydiff+lukv", "lkv"))
    assert sum(ours) > sum(rivals)
    assert sum(ours) > 1.6
    (gates,) = (reference_path() / "gates").glob("*.safetensors")
    assert gates.stat().st_size < 2**20
