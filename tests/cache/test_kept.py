"""A kept context is a value: equal to what it was made from, changed by nothing, and enough to continue from."""

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from families import random_ids, tiny_model
from mixed_budgets import mixed_budget

import headwise
from headwise import RaggedCache
from headwise.cache.kept import Kept
from headwise.cache.reading import read
from headwise.errors import UnsupportedGeneration
from headwise.interfaces import AbstractScorer
from headwise.methods.allocate import Uniform
from headwise.methods.allocate.profiled import LUKV
from headwise.methods.method import Method
from headwise.methods.registry import SCORERS

FAMILIES = ["llama", "gemma3_text"]


def compressed(family="llama", batch=1, keep=0.5):
    return headwise.compress(tiny_model(family), random_ids(batch, 40), "keydiff+adakv", keep=keep)


@torch.no_grad()
def answered(cache, seed=1, tokens=5):
    rows = len(cache.ragged_layers[0].rows)
    return cache.view.model(random_ids(rows, tokens, seed=seed), past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_made_of_it_goes_on_as_the_one_it_was_taken_from(family, batch):
    cache = compressed(family, batch)
    answered(cache)
    twin = RaggedCache.of(cache.view.model, cache.kept)
    assert twin.get_seq_length() == 45
    assert twin.nbytes == cache.nbytes - spare(cache)
    assert (twin.peak_nbytes, twin.provenance) == (cache.peak_nbytes, cache.provenance)
    assert twin.transcript.ids.equal(cache.transcript.ids)
    assert answered(twin, seed=2).logits.equal(answered(cache, seed=2).logits)


def spare(cache):
    """Bytes that are held in case more tokens come."""
    return sum(
        tail.untyped_storage().nbytes() - tail[:, :, : layer.tail_length].nbytes
        for layer in cache.frozen_layers
        for tail in (layer.tail_keys, layer.tail_values)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_context_kept_alike_is_equal_and_what_differs_is_not(family):
    kept = compressed(family).kept
    assert kept == compressed(family).kept
    assert hash(kept) == hash(compressed(family).kept)
    assert kept != compressed(family, keep=0.6).kept
    assert kept != headwise.compress(tiny_model(family), random_ids(1, 40, seed=9), "keydiff+adakv", keep=0.5).kept
    first, *others = kept.layers
    keys = first.tensors()["keys"].clone()
    keys.view(-1)[0] += 1
    assert kept != replace(kept, layers=(type(first).of({**first.tensors(), "keys": keys}), *others))
    assert kept != replace(kept, peak_nbytes=0)
    assert kept != "kept"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_goes_on_does_not_change_it(family):
    cache = compressed(family)
    kept, before = cache.kept, compressed(family).kept
    answered(cache)
    answered(RaggedCache.of(cache.view, kept))
    assert kept == before
    with pytest.raises(FrozenInstanceError):
        kept.seen = 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_holds_it(family, tmp_path):
    cache = compressed(family, batch=2)
    answered(cache)
    cache.kept.save(tmp_path / "kept.safetensors", cache.view.model)
    cache.save(tmp_path / "cache.safetensors")
    assert (tmp_path / "kept.safetensors").read_bytes() == (tmp_path / "cache.safetensors").read_bytes()
    assert Kept.load(tmp_path / "kept.safetensors", tiny_model(family)) == cache.kept


def test_a_file_of_a_budget_says_what_the_cache_says(tmp_path):
    budget = mixed_budget(tiny_model())  # its origin has tuples, which JSON does not
    method = Method(scorer=SCORERS["keydiff"].make(), allocator=LUKV(budget=budget))
    cache = headwise.compress(tiny_model(), random_ids(1, 40), method, keep=0.5)
    cache.save(tmp_path / "cache.safetensors")
    assert Kept.load(tmp_path / "cache.safetensors", tiny_model()) == cache.kept
    assert read(tiny_model(), random_ids(1, 40), [method.scorer]).cut(method, 0.5).kept.provenance == cache.provenance


def test_parameters_of_any_kind_are_told(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Weighted(AbstractScorer):
        weights: torch.Tensor
        how: object

        def score(self, observation):
            return observation.keys.norm(dim=-1)

    def kept(weights):
        method = Method(scorer=Weighted(weights=weights, how=set()), allocator=Uniform())
        return headwise.compress(tiny_model(), random_ids(1, 40), method, keep=0.5)

    cache = kept(torch.ones(3))
    cache.save(tmp_path / "cache.safetensors")
    assert Kept.load(tmp_path / "cache.safetensors", tiny_model()) == cache.kept == kept(torch.ones(3)).kept
    assert cache.kept != kept(torch.zeros(3)).kept


def test_a_reading_cuts_to_the_value_that_compress_keeps():
    model, context, method = tiny_model(), random_ids(1, 40), Method.parse("keydiff+adakv")
    cut = read(model, context, [method.scorer]).cut(method, 0.5)
    assert cut.kept == compressed().kept


def test_there_is_none_before_the_cut():
    with pytest.raises(UnsupportedGeneration, match="its context is not complete"):
        _ = RaggedCache(tiny_model(), "keydiff", keep=0.5).kept
