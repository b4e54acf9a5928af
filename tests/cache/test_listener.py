"""Listeners hear what passes through a cache's layers, and what they hear is what the scorers and kernels are given."""

from dataclasses import dataclass, replace

import pytest
import torch
from families import random_ids, tiny_model

import headwise
from headwise import Method
from headwise.cache.listener import Listener
from headwise.errors import BadInput, UnsupportedGeneration
from headwise.interfaces import AbstractScorer
from headwise.methods.allocate import Uniform
from headwise.methods.scores import H2O, KeyDiff, KVzip, SnapKV

CONTEXT, KEEP = 60, 0.6


class Ear(Listener):
    """Notes everything."""

    def __init__(self, *scorers):
        self.asked, self.heard, self.steps = scorers, [], []

    @property
    def scorers(self):
        return self.asked

    def observed(self, scorer, observation):
        self.heard.append((scorer, observation))

    def of(self, scorer):
        return [observation for who, observation in self.heard if who == scorer]

    def attends(self, layer, query, tail_keys, tail_values, mask, scaling):
        self.steps.append((layer, query.clone(), tail_keys.clone(), tail_values.clone(), mask, scaling))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def context():
    return random_ids(1, CONTEXT, seed=3)


def test_every_scorer_is_told_of_every_layer_as_if_it_were_alone(model, context):
    ear, window = Ear(KeyDiff(), SnapKV(window_size=8)), SnapKV(window_size=8)
    cache = headwise.compress(model, context, "knorm", keep=KEEP, listeners=[ear], prefill_chunk_size=16)
    layers = len(cache.ragged_layers)
    assert len(ear.heard) == 3 * layers
    alone = Ear()
    headwise.compress(model, context, Method(scorer=window, allocator=Uniform()), keep=KEEP, listeners=[alone])
    own = [observation for scorer, observation in ear.heard if scorer == window]
    for mine, other in zip(own, [observation for _, observation in alone.heard], strict=True):
        torch.testing.assert_close(window.score(mine), window.score(other))
        assert mine.queries.shape[2] == 8


def test_listeners_change_nothing(model, context):
    plain = headwise.compress(model, context, "keydiff+adakv", keep=KEEP)
    heard = headwise.compress(model, context, "keydiff+adakv", keep=KEEP, listeners=[Ear(SnapKV(window_size=8))])
    twice = headwise.compress(model, context, "keydiff+adakv", keep=KEEP, listeners=[Ear(KVzip())])
    assert plain.kept == heard.kept
    assert twice.peak_nbytes > plain.peak_nbytes, "for a second reading all layers stay whole"
    assert plain.kept == replace(twice.kept, peak_nbytes=plain.peak_nbytes)


@pytest.mark.parametrize("method", ["h2o", "expected", "kvzip"])
def test_a_second_reading_is_for_those_who_ask_for_it(model, context, method):
    """Whoever scores by all queries must not count those that repeat the context."""
    plain = headwise.compress(model, context, method, keep=KEEP)
    ear = Ear(H2O(), KVzip())
    heard = headwise.compress(model, context, method, keep=KEEP, listeners=[ear])
    assert plain.kept == replace(heard.kept, peak_nbytes=plain.peak_nbytes)
    alone = Ear(H2O())
    headwise.compress(model, context, "knorm", keep=KEEP, listeners=[alone])
    for mine, other in zip(ear.of(H2O()), alone.of(H2O()), strict=True):
        torch.testing.assert_close(H2O().score(mine), H2O().score(other))


def test_a_scorer_need_not_be_hashable(model, context):
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Weighted(AbstractScorer):
        weights: list

        def score(self, observation):
            return observation.values.float().norm(dim=-1) * self.weights[0]

    scorer, ear = Weighted(weights=[2.0]), Ear(Weighted(weights=[3.0]))
    cache = headwise.compress(model, context, Method(scorer=scorer, allocator=Uniform()), keep=KEEP, listeners=[ear])
    assert len(ear.of(ear.asked[0])) == len(cache.ragged_layers) == len(ear.of(scorer))


def test_two_listeners_hear_their_own_scorers(model, context):
    first, second = Ear(H2O()), Ear(KeyDiff())
    headwise.compress(model, context, "knorm", keep=KEEP, listeners=[first, second])
    assert {type(scorer).__name__ for scorer, _ in first.heard} == {"Knorm", "H2O"}
    assert {type(scorer).__name__ for scorer, _ in second.heard} == {"Knorm", "KeyDiff"}


def test_what_a_listener_cannot_hear_is_refused(model, context):
    with pytest.raises(BadInput, match="in another way"):
        headwise.compress(model, context, "kvzip", keep=KEEP, listeners=[Ear(KVzip(chunk_size=16))])
    ear = Ear()
    with pytest.raises(BadInput, match="already"):
        headwise.compress(model, context, "knorm", keep=KEEP, listeners=[ear, ear])
    cache = headwise.RaggedCache(model, "knorm", keep=KEEP, prompt_length=CONTEXT)
    model(context[:, :20], past_key_values=cache, use_cache=True)
    with pytest.raises(BadInput, match="before the context is read"):
        cache.listen(Ear(KeyDiff()))
    cache.listen(Ear())


def test_a_second_reading_is_made_for_a_listener(model, context):
    ear = Ear(KVzip(chunk_size=16))
    headwise.compress(model, context, "knorm", keep=KEEP, listeners=[ear])
    scorer = ear.asked[0]
    scores = torch.stack([scorer.score(observation) for who, observation in ear.heard if who == scorer])
    alone = Ear()
    headwise.compress(model, context, Method(scorer=scorer, allocator=Uniform()), keep=KEEP, listeners=[alone])
    torch.testing.assert_close(scores, torch.stack([scorer.score(observation) for _, observation in alone.heard]))


def test_a_second_reading_that_nobody_makes_is_refused(model):
    cache = headwise.RaggedCache(model, "knorm", keep=KEEP)
    with pytest.raises(UnsupportedGeneration, match="read the context twice"):
        cache.listen(Ear(KVzip()))
    assert cache.prefill is not None and not cache.prefill.listeners


def test_a_step_is_heard_before_it_attends(model, context):
    cache = headwise.compress(model, context, "knorm", keep=KEEP)
    ear, new = Ear(), random_ids(1, 3, seed=4)
    cache.listen(ear)
    fork = cache.fork()
    model(new, past_key_values=fork, use_cache=True)
    assert not ear.steps, "a fork has no listeners"
    model(new, past_key_values=cache, use_cache=True)
    assert [step[0] for step in ear.steps] == list(range(len(cache.ragged_layers)))
    for (layer, query, keys, values, mask, scaling), frozen in zip(ear.steps, cache.frozen_layers, strict=True):
        assert torch.equal(keys, frozen.tail[0]) and torch.equal(values, frozen.tail[1])
        assert query.shape[-2] == 3 and torch.equal(mask, torch.ones(1, 3, 3).tril().bool())
        assert scaling == pytest.approx(query.shape[-1] ** -0.5) and layer == frozen.index


def test_who_heard_the_reading_hears_the_steps(model, context):
    ear = Ear()
    cache = headwise.compress(model, context, "knorm", keep=KEEP, listeners=[ear])
    model(random_ids(1, 1, seed=4), past_key_values=cache, use_cache=True)
    assert len(ear.steps) == len(cache.ragged_layers)


def test_by_default_a_listener_does_nothing(model, context):
    listener = Listener()
    assert listener.scorers == ()
    cache = headwise.compress(model, context, "knorm", keep=KEEP, listeners=[listener])
    model(random_ids(1, 1, seed=4), past_key_values=cache, use_cache=True)
