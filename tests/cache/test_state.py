"""Layers that are left as they are: a state is forked, joined and put back, and a second reading leaves no trace."""

import pytest
import torch
from families import random_ids, tiny_model

import headwise
from headwise.cache.state import StateLayer
from headwise.errors import UnsupportedGeneration

CONTEXT, QUESTION = random_ids(1, 60), random_ids(1, 5, seed=1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_next")


def states_of(cache):
    return [tensor for layer in cache.layers if isinstance(layer, StateLayer) for tensor in layer.picked(lambda t: t)]


@torch.no_grad()
def ask(model, cache, ids=QUESTION):
    return model(ids, past_key_values=cache).logits


def test_states_are_counted(model):
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    assert states_of(cache)
    assert cache.sliding_nbytes == sum(tensor.nbytes for tensor in states_of(cache))


def test_a_fork_has_a_state_of_its_own(model):
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    before = [tensor.clone() for tensor in states_of(cache)]
    first, second = ask(model, cache.fork()), ask(model, cache.fork())
    assert torch.equal(first, second)
    assert all(map(torch.equal, before, states_of(cache)))


@pytest.mark.parametrize("family", ["qwen3_next", "gemma3_text"])
def test_a_second_reading_leaves_layers_that_are_left_whole_as_they_were(family):
    model = tiny_model(family)
    once, twice = (headwise.compress(model, CONTEXT, method, keep=1.0) for method in ("keydiff", "kvzip"))
    torch.testing.assert_close(ask(model, once), ask(model, twice), atol=1e-4, rtol=1e-4)
    assert once.sliding_nbytes == twice.sliding_nbytes


@pytest.mark.parametrize("layer", [0, 2])
def test_a_pass_that_fails_leaves_no_trace(model, layer):
    """In the layer of the state itself, and in a later one."""
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    expected = ask(model, cache.fork())

    def fail(*_):
        raise ZeroDivisionError

    hook = model.model.layers[layer].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        ask(model, cache)
    hook.remove()
    assert torch.equal(ask(model, cache), expected)


def test_joined_and_chosen_rows_go_on_as_alone(model):
    caches = [headwise.compress(model, random_ids(1, 60, seed), "keydiff", keep=0.5) for seed in (0, 1)]
    alone = torch.cat([ask(model, cache.fork()) for cache in caches])
    whole = headwise.RaggedCache.join(caches)
    torch.testing.assert_close(ask(model, whole.fork(), QUESTION.expand(2, -1)), alone, atol=1e-4, rtol=1e-4)
    whole.batch_select_indices(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(ask(model, whole, QUESTION.expand(3, -1)), alone[[1, 0, 1]], atol=1e-4, rtol=1e-4)


def test_a_state_cannot_take_back_tokens(model):
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    ask(model, cache)
    with pytest.raises(UnsupportedGeneration, match="layers with a state"):
        cache.crop(-2)
    assert cache.get_seq_length() == 65
