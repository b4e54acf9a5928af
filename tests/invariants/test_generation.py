"""keep = 1.0 is the model itself: same greedy tokens as transformers' own cache, on every family and in every mode."""

import pytest
import torch
from families import FAMILIES, random_ids, tiny_model
from transformers import DynamicCache

import headwise
from headwise import RaggedCache
from headwise.errors import ShapeMismatch, UnsupportedGeneration
from headwise.kernels import usable

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def padded(lengths=(40, 27, 33)):
    longest = max(lengths)
    ids, mask = random_ids(len(lengths), longest), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return ids, mask


def stock(model, ids, **kwargs):
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return model.generate(ids, past_key_values=DynamicCache(config=model.config), **GREEDY, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv+uniform", "keydiff+global"])
def test_whole_budget_generates_what_the_stock_cache_does(family, method):
    model, ids = tiny_model(family), random_ids(1, 40)
    expected = stock(model, ids)
    assert torch.equal(model.generate(ids, past_key_values=RaggedCache(model, method, keep=1.0), **GREEDY), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_budget_in_a_batch_of_different_lengths(family):
    model, (ids, mask) = tiny_model(family), padded()
    expected = stock(model, ids, attention_mask=mask)
    cache = RaggedCache(model, "snapkv", keep=1.0)
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY), expected)
    heads = len(cache.ragged_layers) * model.config.num_key_value_heads
    assert cache.lengths.sum((0, 2)).tolist() == [heads * int(n) for n in mask.sum(-1)]  # no padding is stored


@pytest.mark.parametrize("family", FAMILIES)
def test_compress_then_ask_equals_the_stock_cache_at_full_budget(family):
    model, ids = tiny_model(family), random_ids(1, 40)
    question = random_ids(1, 7, seed=1)
    whole = torch.cat([ids, question], dim=-1)
    expected = stock(model, whole)
    cache = headwise.compress(model, ids, "keydiff", keep=1.0)
    for _ in range(2):  # the second question finds the cache as it was
        assert torch.equal(model.generate(whole, past_key_values=cache.fork(), **GREEDY), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_contexts_and_padded_questions(family):
    """Both context and question are padded on the left: padding lies in the middle of the sequence."""
    model, (ids, mask), (question, question_mask) = tiny_model(family), padded(), padded((6, 3, 5))
    whole, whole_mask = torch.cat([ids, question], dim=-1), torch.cat([mask, question_mask], dim=-1)
    expected = stock(model, whole, attention_mask=whole_mask)
    cache = headwise.compress(model, ids, "keydiff", keep=1.0, attention_mask=mask)
    out = model.generate(whole, attention_mask=whole_mask, past_key_values=cache.fork(), **GREEDY)
    assert torch.equal(out, expected)


def test_second_turn_continues_from_the_compressed_cache():
    model, ids = tiny_model(), random_ids(1, 40)
    first = stock(model, ids)
    expected = stock(model, torch.cat([first, random_ids(1, 5, seed=2)], dim=-1))
    cache = RaggedCache(model, "keydiff", keep=1.0)
    turn = model.generate(ids, past_key_values=cache, **GREEDY)
    turn = model.generate(torch.cat([turn, random_ids(1, 5, seed=2)], dim=-1), past_key_values=cache, **GREEDY)
    assert torch.equal(turn, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beam_search(family):
    model, ids = tiny_model(family), random_ids(2, 40)
    expected = stock(model, ids, num_beams=3)
    out = model.generate(ids, past_key_values=RaggedCache(model, "keydiff", keep=1.0), num_beams=3, **GREEDY)
    assert torch.equal(out, expected)


def test_beam_search_from_a_compressed_context_shares_it():
    model, ids, question = tiny_model(), random_ids(1, 40), random_ids(1, 4, seed=1)
    whole = torch.cat([ids, question], dim=-1)
    expected = stock(model, whole, num_beams=3)
    cache = headwise.compress(model, ids, "keydiff", keep=1.0)
    beams = cache.fork(copies=3)
    assert torch.equal(model.generate(whole, past_key_values=beams, num_beams=3, **GREEDY), expected)
    for layer, twin in zip(cache.ragged_layers, beams.ragged_layers, strict=True):
        assert twin.segments is layer.segments
    with pytest.raises(ShapeMismatch, match="fork"):
        model.generate(whole, past_key_values=cache.fork(), num_beams=3, **GREEDY)


def test_sampling_with_a_seed_equals_the_stock_cache():
    model, ids = tiny_model(), random_ids(2, 40)
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 5, "eos_token_id": None}
    model.set_attn_implementation("sdpa")
    torch.manual_seed(3)
    expected = model.generate(ids, **options)
    torch.manual_seed(3)
    out = model.generate(ids, past_key_values=RaggedCache(model, "keydiff", keep=1.0), **options)
    assert torch.equal(out, expected)


def test_many_questions_in_one_batch_on_one_context():
    model, ids, questions = tiny_model(), random_ids(1, 40), random_ids(5, 6, seed=1)
    cache = headwise.compress(model, ids, "snapkv+adakv", keep=0.9)
    whole = torch.cat([ids.expand(5, -1), questions], dim=-1)
    together = model.generate(whole, past_key_values=cache.fork(copies=5), **GREEDY)
    for row in range(5):
        alone = model.generate(whole[row : row + 1], past_key_values=cache.fork(), **GREEDY)
        assert torch.equal(together[row], alone[0])


def test_assisted_generation_takes_back_only_what_came_after_the_context():
    model, ids = tiny_model(), random_ids(1, 40)
    cache = headwise.compress(model, ids, "keydiff", keep=0.5)
    branch = cache.fork()
    with torch.no_grad():
        model(random_ids(1, 6, seed=1), past_key_values=branch)
    branch.crop(-4)
    assert branch.get_seq_length() == 42
    with pytest.raises(UnsupportedGeneration, match="compressed"):
        branch.crop(-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv", "expected", "h2o+adakv", "keydiff+global", "random"])
def test_chunked_prefill_selects_the_same_entries(family, method):
    model, (ids, mask) = tiny_model(family), padded((60, 41))
    whole = headwise.compress(model, ids, method, keep=0.85, attention_mask=mask)
    pieces = headwise.compress(model, ids, method, keep=0.85, attention_mask=mask, prefill_chunk_size=17)
    for layer, other in zip(whole.ragged_layers, pieces.ragged_layers, strict=True):
        assert layer.segments.lengths == other.segments.lengths
        assert torch.equal(layer.segments.positions, other.segments.positions)
        torch.testing.assert_close(layer.segments.keys, other.segments.keys, rtol=1e-4, atol=1e-4)


def test_chunked_prefill_in_generate_needs_the_prompt_length():
    model, ids = tiny_model(), random_ids(1, 60)
    expected = stock(model, ids, prefill_chunk_size=17)
    cache = RaggedCache(model, "snapkv", keep=1.0, prompt_length=60)
    assert torch.equal(model.generate(ids, past_key_values=cache, prefill_chunk_size=17, **GREEDY), expected)
    pieces = RaggedCache(model, "keydiff+adakv", keep=0.5, prompt_length=60)
    model.generate(ids, past_key_values=pieces, prefill_chunk_size=17, **GREEDY)
    assert torch.equal(pieces.lengths, headwise.compress(model, ids, "keydiff+adakv", keep=0.5).lengths)


@pytest.mark.parametrize("kernel", usable("cpu"))
@pytest.mark.parametrize("method", ["snapkv+adakv", "expected+global", "kvzip"])
@pytest.mark.parametrize("reading", [True, False])
def test_autocast(method, kernel, reading):
    """Under it values come in bfloat16, keys and queries in float32; a cache may be read with it or without."""
    model, ids, question = tiny_model(), random_ids(1, 60), random_ids(1, 5, seed=1)
    whole = torch.cat([ids, question], dim=-1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = model(whole).logits[:, 60:]
    with torch.autocast("cpu", torch.bfloat16, enabled=reading):
        cache = headwise.compress(model, ids, method, keep=1.0, kernel=kernel)
    for layer in cache.ragged_layers:
        stored = torch.bfloat16 if reading else torch.float32
        assert layer.segments.keys.dtype == layer.segments.values.dtype == stored
    for decoding in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=decoding), torch.no_grad():
            found = model(question, past_key_values=cache.fork()).logits
        assert (found.float() - plain.float()).norm() < 0.05 * plain.float().norm()
