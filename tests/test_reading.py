"""Cutting a shared reading gives the very caches that `compress` makes."""

from itertools import product

import pytest
import torch
from families import random_ids, tiny_model

import headwise
from headwise.cache.prefill import keep_entries, make_plan
from headwise.cache.reading import read
from headwise.errors import BadInput, ShapeMismatch
from headwise.methods.allocate import Uniform
from headwise.methods.keep import parse_keep
from headwise.methods.method import Method
from headwise.methods.scores import KeyDiff

METHODS = ["snapkv", "tova", "h2o+adakv", "expected+global", "keydiff+pyramid", "knorm+adakv", "streaming", "random"]
METHODS += ["criticalkv", "criticalkv+adakv"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cut_of_a_reading_is_what_compress_makes(family):
    model, ids, mask = tiny_model(family), random_ids(2, 70), torch.ones(2, 70, dtype=torch.long)
    ids[1, :9], mask[1, :9] = 0, 0
    reading = read(model, ids, [Method.parse(m).scorer for m in METHODS], attention_mask=mask)
    for method, keep in product(METHODS, (0.55, 0.7)):
        cut, own = reading.cut(method, keep), headwise.compress(model, ids, method, keep=keep, attention_mask=mask)
        for layer, other in zip(cut.ragged_layers, own.ragged_layers, strict=True):
            assert layer.segments.lengths == other.segments.lengths
            for name in ("keys", "values", "positions"):
                assert torch.equal(getattr(layer.segments, name), getattr(other.segments, name)), method
        assert (cut.nbytes, cut.provenance) == (own.nbytes, own.provenance)
        assert cut.peak_nbytes == own.peak_nbytes
        whole, whole_mask = torch.cat([ids, ids[:, -5:]], dim=-1), torch.cat([mask, mask[:, -5:]], dim=-1)
        options = {"attention_mask": whole_mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        a = model.generate(whole, past_key_values=cut.fork(), **options)
        assert torch.equal(a, model.generate(whole, past_key_values=own.fork(), **options))


def test_the_whole_cache_of_a_reading_is_everything():
    model, ids = tiny_model(), random_ids(1, 50)
    reading = read(model, ids, [Method.parse("keydiff").scorer])
    assert bool((reading.whole.lengths == 50).all())


@pytest.mark.parametrize("names", [("kvzip", "keydiff"), ("keydiff", "kvzip")])
def test_scorers_that_read_in_other_ways_do_not_watch_together(names):
    model, ids = tiny_model(), random_ids(1, 50)
    with pytest.raises(BadInput, match="do not read the context in the same way"):
        read(model, ids, [Method.parse(name).scorer for name in names])


def test_a_scorer_that_did_not_watch_cannot_cut():
    model, ids = tiny_model(), random_ids(1, 50)
    reading = read(model, ids, [Method.parse("keydiff").scorer])
    with pytest.raises(BadInput, match="KeyDiff did"):
        reading.cut("knorm", 0.5)


def test_one_repetition_of_the_context_serves_every_keep_and_scorer():
    model, ids = tiny_model(), random_ids(1, 60)
    reading = read(model, ids, [Method.parse(name).scorer for name in ("kvzip", "kvzip-l2")])
    for method, keep in (("kvzip", 0.3), ("kvzip", 0.6), ("kvzip+uniform", 0.3), ("kvzip-l2", 0.3)):
        cut, own = reading.cut(method, keep), headwise.compress(model, ids, method, keep=keep)
        assert torch.equal(cut.lengths, own.lengths)
        assert (cut.nbytes, cut.peak_nbytes) == (own.nbytes, own.peak_nbytes)
        for layer, other in zip(cut.ragged_layers, own.ragged_layers, strict=True):
            assert torch.equal(layer.segments.positions, other.segments.positions)


def a_plan(method):
    model = tiny_model()
    shape = headwise.RaggedCache(model, method, keep=0.5).view.shape
    valid, positions = torch.ones(1, 20, dtype=torch.bool), torch.arange(20)[None]
    keep = parse_keep(0.5)
    return shape, make_plan(method, keep, shape=shape, itemsize=2, valid=valid, positions=positions)


def test_scores_of_a_wrong_shape_are_refused():
    """A contributor's scorer that forgets the groups: one score per query head instead of per KV head."""
    method = Method(scorer=KeyDiff(), allocator=Uniform())
    shape, plan = a_plan(method)
    scores = torch.zeros(len(shape.layers), 1, shape.query_heads, 20)
    with pytest.raises(ShapeMismatch, match="KeyDiff gave scores"):
        keep_entries(method, scores, range(len(shape.layers)), plan)
