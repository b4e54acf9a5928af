"""`cache.inputs`: what generate() is given to go on, in any version of transformers, without a warning."""

import pytest
import torch
from families import random_ids, tiny_model

import headwise
from headwise import RaggedCache
from headwise.errors import BadInput, UnsupportedGeneration
from headwise.models.families import given

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_question_follows_what_the_cache_has_seen(family):
    model, context, question = tiny_model(family), random_ids(1, 60), random_ids(1, 5, seed=1)
    cache = headwise.compress(model, context, "keydiff", keep=0.5)
    whole = torch.cat([context, question], dim=-1)
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), **given(model, cache.fork()), **GREEDY)
    for ids in (question, question[0]):
        assert torch.equal(model.generate(**cache.fork().inputs(ids), **GREEDY), expected)


def test_a_loaded_cache_brings_its_document_along(tmp_path):
    model, context, question = tiny_model(), random_ids(1, 60), random_ids(1, 5, seed=1)
    cache = headwise.compress(model, context, "snapkv+adakv", keep=0.6)
    cache.save(tmp_path / "cache.safetensors")
    loaded = headwise.load(tmp_path / "cache.safetensors", model)
    assert torch.equal(loaded.inputs(question)["input_ids"], torch.cat([context, question], dim=-1))
    answers = [model.generate(**one.fork().inputs(question), **GREEDY) for one in (cache, loaded)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("method", ["keydiff", "kvzip"])  # kvzip is cut after its second reading, outside a pass
def test_padded_contexts_stay_masked(method):
    model, context, question = tiny_model(), random_ids(2, 50), random_ids(2, 4, seed=1)
    mask = torch.ones(2, 50, dtype=torch.long)
    context[1, :9], mask[1, :9] = 0, 0
    cache = headwise.compress(model, context, method, keep=0.5, attention_mask=mask)
    inputs = cache.fork().inputs(question)
    assert torch.equal(inputs["attention_mask"], torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=-1))
    turned = cache.fork()
    turned.batch_select_indices(torch.tensor([1, 0]))
    assert torch.equal(turned.inputs(question)["attention_mask"][:, :50], mask.flip(0))
    fewer = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(cache.fork().inputs(question, fewer)["attention_mask"][:, 50:], fewer)
    assert model.generate(**inputs, **GREEDY).shape == (2, 60)


def test_a_conversation_goes_on_without_a_fork():
    model, turns = tiny_model(), [random_ids(1, 40), random_ids(1, 5, seed=1), random_ids(1, 5, seed=2)]
    cache = RaggedCache(model, "keydiff", keep=0.5)
    said = torch.empty(1, 0, dtype=torch.long)
    for turn in turns:
        inputs = cache.inputs(turn)
        assert inputs["input_ids"].shape[1] == cache.get_seq_length() + turn.shape[1]
        said = model.generate(**inputs, **GREEDY)
    assert torch.equal(cache.transcript.ids, said[:, : cache.get_seq_length()])


def test_rows_must_fit_and_be_known():
    model, context = tiny_model(), random_ids(1, 40)
    cache = headwise.compress(model, context, "keydiff", keep=0.5)
    with pytest.raises(BadInput, match="this cache has 1 rows, the new ids 2"):
        cache.inputs(random_ids(2, 4))
    assert cache.fork(copies=2).inputs(random_ids(2, 4))["input_ids"].shape == (2, 44)
    blind = RaggedCache(model, "keydiff", keep=0.5)
    with torch.no_grad():
        model.get_decoder()(inputs_embeds=model.get_input_embeddings()(context), **given(model, blind), use_cache=True)
    with pytest.raises(UnsupportedGeneration, match="does not know the tokens"):
        blind.inputs(random_ids(1, 4))
