"""A cache continues what it has seen, and refuses what does not: silence would answer from another conversation."""

import pytest
import torch
from families import random_ids, tiny_model
from transformers import DynamicCache

import headwise
from headwise import RaggedCache
from headwise.errors import BadInput, UnsupportedGeneration

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
    for length in (4, 63, 65):
        with pytest.raises(BadInput, match=rf"for {length} tokens, but this cache has seen 60 and 4 are new"):
            model(question, past_key_values=cache.fork(), attention_mask=torch.ones(2, length, dtype=torch.long))


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
