"""A cache continues what it has seen, and refuses what does not: silence would answer from another conversation."""

import copy
import gc

import pytest
import torch
import transformers
from families import random_ids, tiny_model
from packaging.version import Version
from transformers import DynamicCache

import headwise
from headwise import RaggedCache
from headwise.errors import BadInput, ShapeMismatch, UnsupportedGeneration

CONTEXT, QUESTION = random_ids(1, 100), random_ids(1, 6, seed=1)
PROMPT = torch.cat([CONTEXT, QUESTION], dim=-1)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def answered(model, cache, prompt=PROMPT, **options):
    return model.generate(prompt, past_key_values=cache, **{**GREEDY, **options})


def with_other_token(ids, at):
    ids = ids.clone()
    ids[0, at] = 3 + (ids[0, at] - 2) % 90
    return ids


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(params=["compress", "generate", "saved"])
def used(request, model, tmp_path):
    """A cache that has answered once, and the ids of everything it has seen and said."""
    if request.param == "generate":
        cache = RaggedCache(model, "keydiff", keep=0.5)
    else:
        cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    said = answered(model, cache)
    if request.param == "saved":
        cache.save(tmp_path / "cache.safetensors")
        cache = headwise.load(tmp_path / "cache.safetensors", model)
    return cache, said


def test_the_next_turn_of_the_same_conversation_goes_on(model, used):
    cache, said = used
    more = answered(model, cache, torch.cat([said, random_ids(1, 3, seed=2)], dim=-1))
    assert cache.get_seq_length() == more.shape[1] - 1
    assert torch.equal(cache.transcript.ids, more[:, :-1])


@pytest.mark.parametrize("length", [50, 100, 106, 109])
def test_ids_that_are_too_few_are_refused(model, used, length):
    """Once the cache took them for a new question of that many tokens."""
    cache, said = used
    held = cache.nbytes
    with pytest.raises(BadInput, match=rf"among {length} ids there are no new tokens .* has seen 109"):
        answered(model, cache, said[:, :length])
    assert (cache.get_seq_length(), cache.nbytes) == (109, held)


@pytest.mark.parametrize("at", [0, 99, 100, 105, 108])
def test_another_conversation_is_refused(model, used, at):
    """Given to a pipeline twice, or a second question without fork()."""
    cache, said = used
    other = torch.cat([with_other_token(said, at), random_ids(1, 9, seed=5)], dim=-1)
    with pytest.raises(BadInput, match=rf"not the tokens that this cache has seen \(token {at} of 109 .*fork\(\)"):
        answered(model, cache, other)
    assert answered(model, cache, torch.cat([said, QUESTION], dim=-1)).shape[1] == 120


def test_a_fork_asks_anew_and_the_cache_itself_may_be_used_for_the_last_question(model):
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    first = answered(model, cache.fork())
    assert torch.equal(answered(model, cache.fork()), first)
    assert torch.equal(answered(model, cache), first)


def test_rows_beams_and_copies_have_transcripts_of_their_own(model):
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    questions = torch.cat([CONTEXT.expand(3, -1), random_ids(3, 6, seed=8)], dim=-1)
    several = cache.fork(copies=3)
    said = answered(model, several, questions)
    with pytest.raises(BadInput, match="of row 1"):
        answered(model, several, torch.cat([said[[0, 0, 2]], random_ids(3, 2, seed=9)], dim=-1))
    assert answered(model, several, torch.cat([said, random_ids(3, 2, seed=9)], dim=-1)).shape == (3, 116)
    beams = cache.fork(copies=3)
    best = answered(model, beams, num_beams=3, num_return_sequences=3)
    assert any(torch.equal(row[:109], ids) for row in best for ids in beams.transcript.ids)


def test_padding_may_be_anything(model):
    ids, mask = random_ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    cache = headwise.compress(model, ids, "keydiff", keep=0.5, attention_mask=mask)
    other = ids.clone()
    other[1, :20] = 7
    question, seen = random_ids(2, 4, seed=3), torch.ones(2, 4, dtype=torch.long)
    said = [
        answered(model, cache.fork(), torch.cat([i, question], -1), attention_mask=torch.cat([mask, seen], -1))[:, 64:]
        for i in (ids, other)
    ]
    assert torch.equal(*said)


def test_a_mask_that_hides_or_shows_other_tokens_of_the_context_is_refused(model):
    ids, mask = random_ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    cache = headwise.compress(model, ids, "keydiff", keep=0.5, attention_mask=mask)
    question = random_ids(2, 4, seed=3)
    hidden, shown = mask.clone(), mask.clone()
    hidden[0, 30:40], shown[1, 10:20] = 0, 1
    for other in (hidden, shown):
        full = torch.cat([other, torch.ones(2, 4, dtype=torch.long)], dim=-1)
        with pytest.raises(BadInput, match="0 at the padding of the compressed context"):
            answered(model, cache.fork(), torch.cat([ids, question], -1), attention_mask=full)
    for length in (4, 63):
        with pytest.raises(BadInput, match=rf"for {length} tokens, but this cache has seen 60 and 4 are new"):
            model(question, past_key_values=cache.fork(), attention_mask=torch.ones(2, length, dtype=torch.long))


def test_a_mask_may_be_longer_than_what_it_is_for(model):
    """As transformers' caches take it: the one mask of a prompt that is read in pieces."""
    mask, cache = torch.ones(1, 106, dtype=torch.long), RaggedCache(model, "keydiff", keep=0.5, prompt_length=100)
    with torch.no_grad():
        for piece in (CONTEXT[:, :50], CONTEXT[:, 50:], QUESTION):
            logits = model(piece, attention_mask=mask, past_key_values=cache).logits
        whole = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
        torch.testing.assert_close(logits, model(QUESTION, past_key_values=whole).logits, atol=1e-4, rtol=1e-4)


def test_a_single_token_cannot_hide_context_either(model):
    cache, mask = headwise.compress(model, CONTEXT, "keydiff", keep=0.5), torch.ones(1, 107, dtype=torch.long)
    mask[0, :20] = 0
    with torch.no_grad():
        model(QUESTION, past_key_values=cache)
        with pytest.raises(BadInput, match="0 at the padding of the compressed context"):
            model(QUESTION[:, :1], attention_mask=mask, past_key_values=cache)


def test_masks_by_type_of_layer_are_left_to_the_model():
    model = tiny_model("qwen3")
    cache = RaggedCache(model, "keydiff", keep=0.5)
    with torch.no_grad():
        model(CONTEXT, attention_mask={"full_attention": None}, past_key_values=cache)
    assert cache.lengths.sum() == 3 * 2 * 50


def test_more_rows_than_the_cache_has_are_refused_as_such(model):
    ids, mask = random_ids(2, 60), torch.ones(2, 64, dtype=torch.long)
    mask[1, :20] = 0
    cache = headwise.compress(model, ids, "keydiff", keep=0.5, attention_mask=mask[:, :60])
    prompt = torch.cat([ids, random_ids(2, 4, seed=3)], dim=-1)
    with pytest.raises(ShapeMismatch, match=r"holds 2 rows but the batch has 4.*fork\(copies\)"):
        answered(model, cache, prompt, attention_mask=mask, num_beams=2)


def test_another_conversation_is_refused_in_pieces_too(model, used):
    cache, said = used
    other = torch.cat([with_other_token(said, 3), random_ids(1, 9, seed=5)], dim=-1)
    with pytest.raises(BadInput, match="token 3 of 109"):
        answered(model, cache, other, prefill_chunk_size=4)
    right = torch.cat([said, QUESTION], dim=-1)
    if Version(transformers.__version__) < Version("5.24"):  # 5.4 masks pieces as if nothing had been seen
        with pytest.raises(BadInput, match="attention_mask is for 4 tokens, but this cache has seen 109 and 4"):
            answered(model, cache, right, prefill_chunk_size=4)
    else:
        assert answered(model, cache, right, prefill_chunk_size=4).shape[1] == 120


def test_a_cache_that_is_not_to_be_used_is_refused(model):
    """Every step would give it the whole prompt again."""
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    with pytest.raises(BadInput, match="a cache and use_cache=False"):
        answered(model, cache, use_cache=False)


def test_what_a_user_has_put_on_the_model_stays(model):
    calls, own = [], type(model)._prefill.__get__(model)
    model._prefill = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
    answered(model, headwise.compress(model, CONTEXT, "keydiff", keep=0.5))
    assert calls == [1]


def test_a_shallow_copy_of_a_model_says_what_it_needs(model):
    headwise.enable(model)
    twin = copy.copy(tiny_model())
    headwise.enable(twin)
    expected = answered(twin, headwise.compress(twin, CONTEXT, "keydiff", keep=0.5))
    other = copy.copy(twin)
    del twin
    gc.collect()
    with pytest.raises(BadInput, match=r"copy\.copy\(\) of one that is gone: call headwise.enable"):
        answered(other, DynamicCache(config=other.config))
    headwise.enable(other)
    assert torch.equal(answered(other, headwise.compress(other, CONTEXT, "keydiff", keep=0.5)), expected)


def test_what_was_given_as_embeddings_is_not_known_and_not_refused(model):
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(QUESTION), past_key_values=cache)
    assert cache.transcript.ids is None
    assert answered(model, cache, torch.cat([random_ids(1, 106, seed=9), QUESTION], dim=-1)).shape[1] == 116


def test_a_pass_that_no_hook_tells_of_makes_the_ids_unknown(model, tmp_path):
    """Not refused for it, then or later, and not saved."""
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    with torch.no_grad():
        model.model(QUESTION, past_key_values=cache)
        model(QUESTION, past_key_values=cache)
    assert cache.transcript.ids is None
    cache.save(tmp_path / "cache.safetensors")
    assert headwise.load(tmp_path / "cache.safetensors", model).transcript.ids is None
    cache.crop(-7)
    assert answered(model, cache, torch.cat([random_ids(1, 105, seed=9), QUESTION], dim=-1)).shape[1] == 115


@pytest.mark.parametrize("fresh", [False, True])
def test_generate_takes_embeddings_as_before(model, fresh):
    embed = model.get_input_embeddings()
    cache = RaggedCache(model, "keydiff", keep=0.5) if fresh else headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    said = model.generate(inputs_embeds=embed(PROMPT), past_key_values=cache.fork() if not fresh else cache, **GREEDY)
    expected = answered(model, RaggedCache(model, "keydiff", keep=0.5) if fresh else cache)
    assert torch.equal(said, expected[:, 106:])


def test_cropped_and_joined_caches_know_what_is_left(model):
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    with torch.no_grad():
        model(QUESTION, past_key_values=cache)
    cache.crop(-2)
    assert torch.equal(cache.transcript.ids, PROMPT[:, :104])
    both = RaggedCache.join([headwise.compress(model, CONTEXT, name, keep=0.5) for name in ("keydiff", "knorm")])
    with pytest.raises(BadInput, match="of row 0"):
        answered(model, both, with_other_token(PROMPT, 3).expand(2, -1))
    assert answered(model, both, PROMPT.expand(2, -1)).shape == (2, 110)


def test_other_caches_notice_nothing(model):
    before = tiny_model().generate(PROMPT, past_key_values=DynamicCache(config=model.config), **GREEDY)
    headwise.enable(model)
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(PROMPT, past_key_values=cache, **GREEDY), before)


def test_attention_weights_are_refused_instead_of_left_empty(model):
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    with pytest.raises(UnsupportedGeneration, match="output_attentions"):
        answered(model, cache, output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(UnsupportedGeneration, match="output_attentions"):
        model(QUESTION, past_key_values=cache, output_attentions=True)
    assert cache.get_seq_length() == 100


def test_continuous_batching_is_refused_with_the_way_out(model):
    headwise.compress(model, CONTEXT, "keydiff", keep=0.5)
    with pytest.raises(ValueError, match=r"set_attn_implementation\('sdpa'\).*headwise.enable\(model\)"):
        model.generate_batch([CONTEXT[0].tolist()], max_new_tokens=2)
    model.set_attn_implementation("sdpa")
    with pytest.raises(AttributeError, match="asked for"):
        vars(model)["init_continuous_batching"](Probe())  # transformers' own is reached


class Probe:
    """Whatever transformers does with it first."""

    def __getattr__(self, name):
        raise AttributeError("asked for")
