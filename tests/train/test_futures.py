"""What futures pay to a context: against transformers' own attention.

Tolerance. Squares of softmax weights are added in another order, in float32: 1e-4 of each sum, far above what is seen.
"""

from functools import cache

import pytest
import torch
from families import random_ids, tiny_model

from headwise.cache.reading import read
from headwise.models.families import view
from headwise.offline.train import futures
from headwise.offline.train.futures import attention_paid

TOKENS = 30
FUTURES = (random_ids(1, 9, seed=3)[0], random_ids(1, 4, seed=4)[0])


@cache
def paid(family):
    model = tiny_model(family)
    return attention_paid(model, read(model, random_ids(1, TOKENS), []).whole, FUTURES)


def expected(family):
    """From the attention weights of transformers' eager attention over context and future together."""
    model = tiny_model(family)
    shape, total = view(model).shape, 0.0
    model.set_attn_implementation("eager")
    for future in FUTURES:
        ids = torch.cat([random_ids(1, TOKENS), future[None]], dim=1)
        weights = model(ids, output_attentions=True).attentions
        layers = [weights[layer][0, :, TOKENS:, :TOKENS].unflatten(0, (shape.kv_heads, -1)) for layer in shape.layers]
        total = total + torch.stack([layer.square().sum(2).mean(1) for layer in layers])
    return total


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_what_is_paid_is_the_squared_attention_of_later_queries(family):
    torch.testing.assert_close(paid(family), expected(family), rtol=1e-4, atol=1e-9)


def test_blocks_of_queries_change_nothing(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(futures, "QUERIES", 2)
    some = attention_paid(model, read(model, random_ids(1, TOKENS), []).whole, FUTURES)
    torch.testing.assert_close(some, paid("llama"), rtol=1e-5, atol=1e-9)


def test_a_future_leaves_the_context_as_it_was():
    model = tiny_model("llama")
    whole = read(model, random_ids(1, TOKENS), []).whole
    attention_paid(model, whole, FUTURES)
    assert whole.get_seq_length() == TOKENS
    torch.testing.assert_close(attention_paid(model, whole, FUTURES), paid("llama"), rtol=0, atol=0)
