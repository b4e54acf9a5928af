"""Caches of one context, cut in many ways, continued as one batch."""

import pytest
import torch
from families import random_ids, tiny_model

import headwise
from headwise import RaggedCache
from headwise.errors import BadInput, UnsupportedGeneration
from headwise.kernels import get_kernel


def continued(model, cache, ids, rows, tokens=4):
    """Greedy tokens after every row of `cache`, each continued with one of `rows`."""
    whole = torch.cat([ids.expand(len(rows), -1), rows], dim=-1)
    made = model.generate(whole, past_key_values=cache, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return made[:, whole.shape[1] :]


@pytest.mark.parametrize("kernel", ["pages", "reference"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.slow
def test_joined_caches_go_on_as_each_would(family, kernel):
    model, ids, questions = tiny_model(family), random_ids(1, 70), random_ids(3, 5, seed=1)
    cuts = [
        headwise.compress(model, ids, method, keep=keep)
        for method, keep in (("keydiff", 0.05), ("snapkv+adakv", 0.6), ("random", 1.0))
    ]
    for cut in cuts:
        for layer in cut.ragged_layers:
            layer.kernel = get_kernel(kernel)
    joined = RaggedCache.join(cuts)
    assert joined.get_seq_length() == 70
    assert joined.nbytes == joined.peak_nbytes == sum(cut.nbytes for cut in cuts)
    assert torch.equal(joined.lengths, torch.cat([cut.lengths for cut in cuts], dim=1))
    together = continued(model, joined.fork(copies=3), ids, questions.repeat(3, 1))
    apart = [continued(model, cut.fork(copies=3), ids, questions) for cut in cuts]
    assert torch.equal(together, torch.cat(apart))


def test_what_was_joined_is_left_alone():
    model, ids = tiny_model(), random_ids(1, 40)
    cuts = [headwise.compress(model, ids, "keydiff", keep=keep) for keep in (0.2, 0.5)]
    before = [cut.nbytes for cut in cuts]
    continued(model, RaggedCache.join(cuts), ids, random_ids(2, 3, seed=1))
    assert [(cut.nbytes, cut.get_seq_length()) for cut in cuts] == [(size, 40) for size in before]


def test_forks_of_batches_can_be_joined():
    model, ids = tiny_model(), random_ids(2, 40)
    cuts = [headwise.compress(model, ids, "keydiff", keep=keep).fork(copies=2) for keep in (0.2, 0.5)]
    joined = RaggedCache.join(cuts)
    assert joined.ragged_layers[0].rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_only_caches_at_the_same_place_can_be_joined():
    model = tiny_model()
    short, long = (headwise.compress(model, random_ids(1, n), "keydiff", keep=0.5) for n in (30, 40))
    with pytest.raises(BadInput, match=r"30, 40"):
        RaggedCache.join([short, long])
    continued(model, short, random_ids(1, 30), random_ids(1, 3))
    with pytest.raises(BadInput, match="tokens after their context"):
        RaggedCache.join([short])
    with pytest.raises(BadInput, match="no cache"):
        RaggedCache.join([])
    with pytest.raises(UnsupportedGeneration, match="not complete"):
        RaggedCache.join([RaggedCache(model, "keydiff", keep=0.5)])
