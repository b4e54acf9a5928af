"""The oracle's importance = the paper's formula, read off full attention matrices of transformers' own model."""

from functools import cache

import pytest
import torch
from dense_decoding import decode, dense_twin, greedy_answer
from families import random_ids, tiny_model
from importance import entry_importance
from transformers import DynamicCache

import headwise
from headwise.cache.reading import read
from headwise.errors import BadInput
from headwise.methods.method import Method
from headwise.offline.watch import Importance, Sampling, follow

FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "gemma2", "gpt_oss"]
STEPS = 5


@cache
def context(tokens=37):
    return random_ids(1, tokens, seed=3)


@cache
def model_and_reading(family, end=None):
    model = tiny_model(family)
    model.generation_config.eos_token_id = end
    return model, read(model, context(), [Method.parse("keydiff").scorer])


def questions(*lengths):
    return [random_ids(1, length, seed=10 + number)[0] for number, length in enumerate(lengths)]


def norms_of_contributions(model, normalization):
    """||v W_O|| per compressible layer, [query_heads, tokens]."""
    held = model(context(), past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values
    for layer in headwise.models.families.view(model).shape.layers:
        values, weight = held.layers[layer].values[0], model.model.layers[layer].self_attn.o_proj.weight
        heads, dim = model.config.num_attention_heads, values.shape[-1]
        group = heads // len(values)
        written = [values[h // group] @ weight[:, h * dim : (h + 1) * dim].T for h in range(heads)]
        norms = torch.stack(written).norm(dim=-1)
        yield layer, norms / norms.sum() if normalization == "layer" else norms


@torch.no_grad()
def brute_force(family, question, *, steps=STEPS, normalization="layer", end=None):
    """[layers, kv_heads, tokens]: the largest contribution of each entry to any step and query head."""
    model, tokens = dense_twin(family), context().shape[1]
    rows = [
        [attention[:, :tokens] for attention in attentions]
        for attentions, _ in decode(family, context(), question, steps, end)
    ]
    found = []
    for layer, norms in norms_of_contributions(model, normalization):
        useful = torch.stack([row[layer] * norms for row in rows]).amax(0)
        found.append(useful.unflatten(0, (model.config.num_key_value_heads, -1)).amax(1))
    return torch.stack(found)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6 * float(expected.max()) + 1e-9)


def importance(family, asked, end=None, **options):
    model, reading = model_and_reading(family, end)
    return entry_importance(model, reading.whole, asked, **{"steps": STEPS, **options})


@pytest.mark.parametrize("normalization", ["layer", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_lengths_in_one_batch(family, normalization):
    asked = questions(6, 6, 6)
    found = importance(family, asked, normalization=normalization)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    for row, question in zip(found, asked, strict=True):
        assert_same(row, brute_force(family, question, normalization=normalization))


@pytest.mark.parametrize(
    ("family", "batch_size"), [("llama", 8), ("llama", 2), ("qwen3", 3), ("phi3", 8), ("gemma3_text", 1)]
)
def test_different_lengths(family, batch_size):
    """On Gemma3 one at a time: padding takes places in a sliding window, there as in transformers itself."""
    asked = questions(1, 9, 4, 2)
    for row, question in zip(importance(family, asked, batch_size=batch_size), asked, strict=True):
        assert_same(row, brute_force(family, question))


def test_only_decoding_steps_count():
    """The question's last token decodes the first token of the answer; the tokens before it are no future queries."""
    (question,) = questions(7)
    found = importance("llama", [question], steps=1)[0]
    assert_same(found, brute_force("llama", question, steps=1))
    whole = importance("llama", [question[: n + 1] for n in range(7)], steps=1).amax(0)
    assert (whole > found * 1.5).any()


def test_more_steps_never_lower_importance():
    asked = questions(4)
    few, many = (importance("llama", asked, steps=steps) for steps in (2, 6))
    assert (many >= few * (1 - 1e-5)).all()
    assert (many > few * 1.01).any()


def test_nothing_is_recorded_after_the_end_of_an_answer():
    asked = questions(5, 3)
    answers = [greedy_answer("llama", context(), question, 8) for question in asked]
    end = answers[0][1]
    assert end != answers[0][0]
    assert end not in answers[1][:3]
    found = importance("llama", asked, end=end, steps=8)
    assert_same(found[0], brute_force("llama", asked[0], steps=8, end=end))
    assert_same(found[0], brute_force("llama", asked[0], steps=2))
    assert_same(found[1], brute_force("llama", asked[1], steps=8, end=end))


def test_several_end_tokens_are_known():
    (question,) = questions(5)
    answer = greedy_answer("llama", context(), question, 3)
    found = importance("llama", [question], end=(96, answer[0]), steps=3)[0]
    assert_same(found, brute_force("llama", question, steps=1))


def test_sampling_repeats_with_its_seed_and_differs_from_greedy():
    asked = questions(5, 3)
    draw = [importance("llama", asked, sampling=Sampling(temperature=5.0, seed=seed)) for seed in (1, 1, 2)]
    assert draw[0].equal(draw[1])
    assert not draw[0].allclose(draw[2], rtol=1e-2)
    assert not draw[0].allclose(importance("llama", asked), rtol=1e-2)


def test_the_reading_is_left_as_it_was():
    _, reading = model_and_reading("llama")
    kernels = [layer.kernel for layer in reading.whole.ragged_layers]
    first = importance("llama", questions(4))
    assert importance("llama", questions(4)).equal(first)
    assert reading.whole.get_seq_length() == context().shape[1]
    assert [layer.kernel for layer in reading.whole.ragged_layers] == kernels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("opening", [0, 3])
def test_a_text_that_is_read_counts_as_if_each_of_its_tokens_were_an_answer(family, opening):
    """Of a text of 6 tokens after 3 others, those count that its tokens are predicted from."""
    model, reading = model_and_reading(family)
    ids = random_ids(1, 9, seed=5)[0]
    found = Importance(reading.whole)
    follow(model, reading.whole, ids[:opening], ids[opening:], [found], queries=100)
    first = max(opening, 1)
    expected = [brute_force(family, ids[:stop], steps=1, normalization="none") for stop in range(first, 9)]
    assert_same(found.take()[0], torch.stack(expected).amax(0))


def test_few_queries_of_a_text_are_evenly_spread():
    model, reading = model_and_reading("llama")
    ids, found, seen = random_ids(1, 12, seed=5)[0], Importance(reading.whole), []
    follow(model, reading.whole, ids[:2], ids[2:], [found, lambda rows: seen.append(rows)], queries=4)
    assert [len(rows.question) for rows in seen] == [4] * 3
    expected = [brute_force("llama", ids[:stop], steps=1, normalization="none") for stop in (2, 5, 8, 11)]
    assert_same(found.take()[0], torch.stack(expected).amax(0))


@pytest.mark.parametrize(("length", "queries"), [(1, 5), (0, 5), (4, 0)])
def test_a_text_with_nothing_to_look_at_is_refused(length, queries):
    model, reading = model_and_reading("llama")
    ids = random_ids(1, 9, seed=5)[0]
    with pytest.raises(BadInput, match="at least two tokens"):
        follow(model, reading.whole, ids[:0], ids[:length], [], queries=queries)


@pytest.mark.parametrize(
    ("asked", "steps"), [([], 3), ([torch.zeros(0, dtype=torch.long)], 3), ([torch.ones(2, dtype=torch.long)], 0)]
)
def test_nothing_to_ask_is_refused(asked, steps):
    with pytest.raises(BadInput, match="at least one step and one question"):
        importance("llama", asked, steps=steps)


def test_a_batch_and_a_cut_cache_are_refused():
    model, reading = model_and_reading("llama")
    batch = read(model, random_ids(2, 20), [Method.parse("keydiff").scorer]).whole
    for whole in (batch, reading.cut("keydiff+adakv", 0.5)):
        with pytest.raises(BadInput, match="one context at a time"):
            entry_importance(model, whole, questions(2), steps=1)
