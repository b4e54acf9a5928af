"""Masks of a caller's own: read rightly or refused, before and after the cut; nothing is dropped at keep=1."""

import pytest
import torch
from families import random_ids, tiny_model
from transformers import DynamicCache

import headwise
from headwise import RaggedCache
from headwise.errors import BadInput

N = 60
IDS, QUESTION = random_ids(1, N), random_ids(1, 5, seed=1)
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()


def additive(mask, low=-torch.inf):
    return torch.zeros(mask.shape).masked_fill(~mask, low)


def changed(rows, columns, value):
    mask = CAUSAL.clone()
    mask[rows, columns] = value
    return mask


def soft():
    mask = additive(CAUSAL)
    mask[:, :20] -= 0.5
    return mask


def alibi():
    distance = torch.arange(N) - torch.arange(N)[:, None]
    return additive(CAUSAL) + 0.1 * distance.clamp(max=0)


def read(model, mask, ids=IDS, keep=1.0, positions=None):
    cache = RaggedCache(model, "keydiff", keep=keep)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


@pytest.fixture
def model():
    return tiny_model()


@pytest.mark.parametrize(
    "mask",
    [CAUSAL, additive(CAUSAL), additive(CAUSAL, torch.finfo(torch.float32).min), additive(CAUSAL, -1e4)],
    ids=["bool", "-inf", "lowest", "-10000"],
)
def test_a_causal_mask_in_any_form_keeps_everything(model, mask):
    assert read(model, mask[None, None]).lengths.unique().tolist() == [N]


@pytest.mark.parametrize(
    "mask",
    {
        "packed": changed(slice(30, None), slice(0, 30), False),
        "packed, the first of one token": changed(slice(1, None), slice(0, 1), False),
        "hole": changed(slice(30, None), slice(10, 20), False),
        "one query": changed(slice(40, 41), slice(10, 20), False),
        "one entry": changed(slice(41, 42), slice(7, 8), False),
        "a look ahead": changed(slice(0, 30), slice(0, 30), True),
        "window": CAUSAL.triu(-20),
        "soft": soft(),
        "alibi": alibi(),
    }.items(),
    ids=lambda item: item[0],
)
def test_other_masks_are_refused_while_the_context_is_read(model, mask):
    with pytest.raises(BadInput, match=r"mask|padding must be on the left"):
        read(model, mask[1][None, None])


def test_heads_that_see_different_tokens_are_refused(model):
    mask = CAUSAL.repeat(1, 4, 1, 1)
    assert read(model, mask).lengths.unique().tolist() == [N]
    mask[0, 2, 50, 10] = False
    with pytest.raises(BadInput, match="hides tokens that are not padding"):
        read(model, mask)


def test_a_long_context_in_pieces_is_looked_at_to_its_end(model):
    """Rows are compared some at a time."""
    n = 1000
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    ids = random_ids(1, n)
    assert read(model, causal[None, None], ids).lengths.unique().tolist() == [n]
    causal[900, 3] = False
    with pytest.raises(BadInput, match="hides tokens"):
        read(model, causal[None, None], ids)


@pytest.mark.parametrize("low", [None, -torch.inf])
def test_padding_by_a_mask_of_four_axes_is_as_by_one_of_two(model, low):
    ids, mask = random_ids(2, N), torch.ones(2, N, dtype=torch.long)
    mask[1, :25] = 0
    wide = CAUSAL & mask.bool()[:, None, None]
    wide = wide if low is None else additive(wide, low)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain, other = (read(model, m, ids, 0.5, positions) for m in (mask, wide))
    assert torch.equal(plain.lengths, other.lengths)
    assert all(torch.equal(plain.positions(i, 1, 0), other.positions(i, 1, 0)) for i in range(3))


def continued(model, cache, mask):
    with torch.no_grad():
        return model(QUESTION, past_key_values=cache, attention_mask=mask).logits


def test_any_mask_of_the_tail_is_honoured_and_none_of_the_context(model):
    """Compared with the full cache of transformers, given the same mask over everything."""
    cache, full = headwise.compress(model, IDS, "keydiff", keep=1.0), DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=full)
    tail = torch.ones(5, 5, dtype=torch.bool).tril()
    tail[3:, 1:3] = False  # two questions in one row, say
    whole = torch.cat([torch.ones(5, N, dtype=torch.bool), tail], dim=-1)[None, None]
    expected = continued(model, full, whole)
    for mask in (whole, tail[None, None], additive(whole), additive(tail)[None, None]):
        torch.testing.assert_close(continued(model, cache.fork(), mask), expected, atol=1e-4, rtol=1e-4)
    hidden = whole.clone()
    hidden[..., 4, 10:20] = False
    for mask, message in (
        (hidden, "hides tokens of the compressed context"),
        (additive(whole) - 0.5, "holds numbers other than 0"),
        (torch.cat([whole, hidden[..., :1, :].expand_as(whole)], dim=1).tril(N), "differs from head to head"),
        (whole[..., -3:], "too small"),
    ):
        with pytest.raises(BadInput, match=message):
            continued(model, cache.fork(), mask)
