"""Answers from a cache: batched as one by one, the full cache as plain generate, forks that leave it alone."""

import pytest
import torch
from families import tiny_model
from folders import word_tokenizer
from text_tokenizers import byte_tokenizer

from headwise.cache.cache import RaggedCache
from headwise.errors import BadInput
from headwise.evals import answers
from headwise.evals.answers import FullMemory, Memory, answer, as_texts, known_methods, read_context, room_for_answers
from headwise.evals.answers import time_decoding as timed
from headwise.models.attention import is_enabled
from headwise.tasks.document import Tokens, tokenize

CONTEXT = "locker apple copper lantern. " * 24
QUESTIONS = ["? locker apple", "? lockers apple badge bakery ball banjo:", "?"]  # of different lengths
METHODS = ["full", "streaming", "snapkv", "keydiff+adakv", "expected+global"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text"])
def model(request, tokenizer):
    # With tied embeddings the tiny Gemma repeats its last token, whatever it sees.
    return tiny_model(request.param, vocab_size=len(tokenizer), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer))


@pytest.fixture
def tokens(tokenizer):
    return tokenize(tokenizer, CONTEXT, QUESTIONS)


def storage(memory: Memory) -> list[torch.Tensor]:
    """Copies of everything a memory holds."""
    if isinstance(memory, RaggedCache):
        kept = [x for layer in memory.ragged_layers for x in (layer.segments.keys, layer.segments.values)]
        return [x.clone() for x in kept]
    return [x.clone() for layer in memory.cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("method", METHODS)
def test_questions_asked_together_are_answered_as_one_by_one(model, tokenizer, tokens, method):
    memory = read_context(model, tokens.context, method, 0.4)
    together = answer(model, tokenizer, memory, tokens, max_new_tokens=8)
    for batch_size in (1, 2):
        assert answer(model, tokenizer, memory, tokens, max_new_tokens=8, batch_size=batch_size) == together
    assert len(set(together)) > 1


def test_padding_pushes_nothing_out_of_a_sliding_window(model, tokenizer, tokens, monkeypatch):
    """Beside a long question a short one was once answered as if its window were narrower by the padding."""
    order = [question for question in tokens.questions for _ in range(2)]
    asked = Tokens(context=tokens.context, questions=(*order, tokens.questions[0].flip(0)))
    sizes, join = [], answers.follow
    monkeypatch.setattr(
        answers, "follow", lambda context, batch, pad: sizes.append(len(batch)) or join(context, batch, pad)
    )
    found = answer(model, tokenizer, read_context(model, tokens.context, "streaming", 0.4), asked, max_new_tokens=4)
    assert sizes == ([3, 2, 2] if model.config.model_type == "gemma3_text" else [7])
    assert found[:6:2] == found[1:6:2]


def test_the_full_memory_answers_as_plain_generate(model, tokenizer, tokens):
    found = answer(model, tokenizer, FullMemory(model, tokens.context), tokens, max_new_tokens=8)
    for question, text in zip(tokens.questions, found, strict=True):
        ids = torch.cat([tokens.context, question[None]], dim=-1)
        plain = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert text == tokenizer.decode(plain, skip_special_tokens=True)


def test_spaces_around_an_answer_are_part_of_it():
    """Code once lost its indentation before it was judged."""
    bytewise, said = byte_tokenizer(), "    return 1\n\n"
    ids = torch.tensor([*bytewise(said, add_special_tokens=False)["input_ids"], bytewise.eos_token_id])
    assert as_texts(bytewise, [ids, ids[:3], ids[-1:]]) == [said, "   ", ""]


def test_everything_kept_answers_as_the_full_memory(model, tokenizer, tokens):
    full = answer(model, tokenizer, read_context(model, tokens.context, "full", 1.0), tokens, max_new_tokens=8)
    whole = answer(model, tokenizer, read_context(model, tokens.context, "adakv", 1.0), tokens, max_new_tokens=8)
    assert whole == full


@pytest.mark.parametrize("method", METHODS)
def test_answering_and_timing_leave_the_memory_as_it_was(model, tokenizer, tokens, method):
    memory = read_context(model, tokens.context, method, 0.4)
    before, nbytes = storage(memory), memory.nbytes
    first = answer(model, tokenizer, memory, tokens, max_new_tokens=4)
    assert timed(model, memory, tokens) > 0
    assert answer(model, tokenizer, memory, tokens, max_new_tokens=4) == first
    assert all(torch.equal(a, b) for a, b in zip(before, storage(memory), strict=True))
    assert memory.nbytes == nbytes


def test_pieces_of_prefill_fill_the_full_memory_alike(model, tokens):
    whole, pieces = FullMemory(model, tokens.context), FullMemory(model, tokens.context, 7)
    assert whole.nbytes == pieces.nbytes
    for a, b in zip(storage(whole), storage(pieces), strict=True):
        torch.testing.assert_close(a, b)


def test_the_full_memory_is_the_same_whether_attention_is_routed_through_headwise_or_not(llama, tokens):
    llama.set_attn_implementation("sdpa")
    stock = FullMemory(llama, tokens.context).cache.layers[-1].keys
    read_context(llama, tokens.context, "snapkv", 0.4)
    assert is_enabled(llama)
    assert torch.equal(FullMemory(llama, tokens.context).cache.layers[-1].keys, stock)


def test_full_caches_are_copied_within_bounds(llama, tokenizer, tokens, monkeypatch):
    """Twenty questions on a full cache of 16 GiB once made twenty copies of it."""
    memory, copies, fork = FullMemory(llama, tokens.context), [], FullMemory.fork

    def counted(self, copies_asked):
        copies.append(copies_asked)
        return fork(self, copies_asked)

    expected = answer(llama, tokenizer, memory, tokens, max_new_tokens=4)
    monkeypatch.setattr(FullMemory, "fork", lambda self, copies=1: counted(self, copies))
    monkeypatch.setattr(answers, "COPIED_BYTES", 2 * memory.nbytes)
    assert answer(llama, tokenizer, memory, tokens, max_new_tokens=4) == expected
    assert copies == [2, 1]


def test_an_answer_ends_at_the_last_position(llama, tokenizer, tokens):
    room = room_for_answers(llama, tokens)
    assert room == llama.config.max_position_embeddings - tokens.context.shape[1] - max(map(len, tokens.questions))
    one = Tokens(context=tokens.context, questions=tokens.questions[:1])
    small = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=tokens.context.shape[1] + 10)
    memory = read_context(small, tokens.context, "streaming", 0.4)
    found = answer(small, tokenizer, memory, one, max_new_tokens=10**6)
    assert 0 < len(tokenizer(found[0], add_special_tokens=False)["input_ids"]) <= 10 - len(one.questions[0])


def test_a_question_without_room_for_an_answer_is_refused(tokenizer, tokens):
    """The full cache once read documents beyond the model's positions without a word."""
    limit = tokens.context.shape[1] + max(map(len, tokens.questions))
    small = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=limit)
    with pytest.raises(BadInput, match=f"made for {limit}"):
        answer(small, tokenizer, FullMemory(small, tokens.context), tokens, max_new_tokens=4)


def test_a_tokenizer_without_padding(llama, tokenizer, tokens, monkeypatch):
    """Rows that end early are filled with a token that is not shown."""
    bare = word_tokenizer()
    bare.pad_token = None
    memory = read_context(llama, tokens.context, "snapkv", 0.4)
    first = answer(llama, tokenizer, memory, tokens, max_new_tokens=1)[0]
    monkeypatch.setattr(llama.generation_config, "eos_token_id", tokenizer.convert_tokens_to_ids(first))
    expected = answer(llama, tokenizer, memory, tokens, max_new_tokens=8)
    assert expected[0] == first
    assert max(map(len, expected)) > len(first)
    assert answer(llama, bare, memory, tokens, max_new_tokens=8) == expected


def test_methods_are_checked_before_any_work():
    known_methods(["full", "adakv"])
    with pytest.raises(BadInput, match="Did you mean 'adakv'"):
        known_methods(["full", "adakw"])
    with pytest.raises(BadInput, match="no method is named"):
        known_methods([])
