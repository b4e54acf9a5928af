"""Decoding over a ragged cache equals dense attention masked to the kept entries: every method, family and mode.

Tolerance. In float32 one rounding is 6e-8; the two sides add the same products in another order, three layers deep.
What is allowed, 1e-5 of the norm of the logits, is six times the most that is seen. Keeping one entry more or less
changes the logits by far more (`test_the_oracle_notices_one_entry`). In bfloat16 the error against float64 may be at
most twice that of masked dense attention in bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from dense_oracle import NAME as ORACLE
from dense_oracle import distance, kept_by, masked_dense, model_of, oracle_of, positions_of, ragged
from families import FAMILIES, WITH_EXPERTS, random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from random_gates import method_for

import headwise
from headwise import Method, RaggedCache
from headwise.interfaces import AbstractAllocator
from headwise.kernels import usable
from headwise.methods.registry import ALIASES
from headwise.methods.scores import Random

TOLERANCE = 1e-5
PAIRS = ["expected+global", "keydiff+adakv", "criticalkv+adakv", "h2o+pyramid", "kvzip+adakv", "random+global"]
TURNS = (5, 1, 1, 4, 1)  # a question, two tokens of answer, a second question, a token of answer
LATER = sum(TURNS)


def tolerance_of(family):
    """States are summed up in other pieces."""
    return TOLERANCE * (2 if family == "qwen3_next" else 1)


def batch_of(lengths, seed=0, later=LATER):
    """Contexts padded on the left, followed by `later` tokens: ids and mask of all, and the contexts' width."""
    width = max(lengths)
    ids = random_ids(len(lengths), width + later, seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = 0
        mask[row, : width - length] = 0
    return ids, mask, width


def compressed(model, ids, mask, width, method, keep, **options):
    return headwise.compress(model, ids[:, :width], method, keep=keep, attention_mask=mask[:, :width], **options)


def compare(family, method, keep, lengths, dtype=torch.float32, pieces=TURNS, **options):
    """Relative distance of the two sides, in one precision."""
    ids, mask, width = batch_of(lengths, later=sum(pieces))
    model = model_of(family, dtype)
    cache = compressed(model, ids, mask, width, method, keep, **options)
    kept = kept_by(cache, mask[:, :width])
    expected = masked_dense(oracle_of(family, dtype), ids, mask, kept)
    return distance(ragged(model, cache, ids, mask, pieces), expected)


@pytest.mark.parametrize("method", [*ALIASES, *PAIRS])
def test_every_method(method):
    assert compare("llama", method_for(method, model_of("llama")), 0.5, (96, 75)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv+adakv", "expected+global", "streaming"])
def test_every_family(family, method):
    """Gemma3's sliding-window layers are whole, Phi3 rotates only half of a head. States are summed up in pieces."""
    assert compare(family, method, 0.55, (70, 81, 64)) < tolerance_of(family)


@pytest.mark.parametrize("kernel", usable("cpu"))
def test_every_kernel(kernel):
    assert compare("llama", "h2o+global", 0.3, (96, 75), kernel=kernel) < TOLERANCE


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_one_kv_head_and_as_many_as_query_heads(kv_heads):
    ids, mask, width = batch_of((60, 44))
    model, oracle = (tiny_model(num_key_value_heads=kv_heads) for _ in range(2))
    oracle.set_attn_implementation(ORACLE)
    cache = compressed(model, ids, mask, width, "snapkv+global", 0.8)
    expected = masked_dense(oracle, ids, mask, kept_by(cache, mask[:, :width]))
    assert distance(ragged(model, cache, ids, mask, TURNS), expected) < TOLERANCE


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITH_EXPERTS])
@pytest.mark.parametrize("method", ["keydiff+adakv", "h2o+global"])
def test_bfloat16_error_is_at_most_twice_that_of_masked_dense_attention(family, method):
    ids, mask, width = batch_of((80, 57))
    model = model_of(family, torch.bfloat16)
    cache = compressed(model, ids, mask, width, method, 0.4)
    kept = kept_by(cache, mask[:, :width])
    exact = masked_dense(oracle_of(family, torch.float64, weights=torch.bfloat16), ids, mask, kept)
    plain = masked_dense(oracle_of(family, torch.bfloat16, weights=torch.bfloat16), ids, mask, kept)
    ours = ragged(model, cache, ids, mask, TURNS)
    assert distance(ours, exact) <= 2 * distance(plain, exact)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given(AbstractAllocator):
    """The counts it was made with, [layers, batch, kv_heads], whatever the demand."""

    counts: torch.Tensor

    def allocate(self, scores, candidates, layers: Sequence[int], demand):
        return self.counts[list(layers)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenLate(Given):
    """The same, decided when all layers are done."""

    scope: ClassVar = "model"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_selection(data):
    family = data.draw(st.sampled_from(FAMILIES))
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    shape = (len(model_of(family).config.layer_types) - 1 if family == "gemma3_text" else 3, len(lengths), 2)
    counts = torch.tensor([data.draw(st.integers(1, n)) for _ in range(shape[0]) for n in lengths for _ in range(2)])
    allocator = data.draw(st.sampled_from([Given, GivenLate]))(counts=counts.view(shape))
    method = Method(scorer=Random(seed=data.draw(st.integers(0, 9))), allocator=allocator)
    pieces = tuple(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)))
    chunk = data.draw(st.sampled_from([None, 16, 31]))
    assert compare(family, method, 1.0, lengths, pieces=pieces, prefill_chunk_size=chunk) < tolerance_of(family)


def test_the_oracle_notices_one_entry():
    ids, mask, width = batch_of((60,))
    cache = compressed(model_of("llama"), ids, mask, width, "keydiff", 0.5)
    kept = kept_by(cache, mask[:, :width])
    expected = masked_dense(oracle_of("llama"), ids, mask, kept)
    kept[1][0, 1, int(kept[1][0, 1].nonzero()[-1])] = False
    assert distance(masked_dense(oracle_of("llama"), ids, mask, kept), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_question_padded_on_the_left_lies_after_its_context(family):
    """Padding in the middle of the sequence: of the second row's question only three tokens are real."""
    ids, mask, width = batch_of((60, 44))
    mask[1, width : width + 2] = 0
    model = model_of(family)
    cache = compressed(model, ids, mask, width, "keydiff+adakv", 0.5)
    expected = masked_dense(oracle_of(family), ids, mask, kept_by(cache, mask[:, :width]))
    assert distance(ragged(model, cache, ids, mask, TURNS), expected, mask[:, width:]) < tolerance_of(family)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_many_questions_on_one_of_two_contexts(family):
    """Rows that share a frozen context, not equally many each: as beam search leaves them."""
    ids, mask, width = batch_of((60, 44))
    model = model_of(family)
    cache = compressed(model, ids, mask, width, "snapkv+global", 0.8)
    kept = kept_by(cache, mask[:, :width])
    branch, rows = cache.fork(), torch.tensor([1, 0, 1, 1])
    branch.reorder_cache(rows)
    ids, mask = ids[rows], mask[rows]
    ids[:, width:] = random_ids(4, LATER, seed=5)
    expected = masked_dense(oracle_of(family), ids, mask, {layer: m[rows] for layer, m in kept.items()})
    assert distance(ragged(model, branch, ids, mask, TURNS), expected) < tolerance_of(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_from_a_whole_prompt_is_greedy_decoding_of_the_masked_model(family):
    """Query-aware: the prompt, question included, is the context; its first answer token comes from exact prefill."""
    prompt = random_ids(2, 50)
    model = model_of(family)
    cache = RaggedCache(model, "keydiff+adakv", keep=0.3)
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
    kept = kept_by(cache, torch.ones_like(prompt))
    expected = masked_dense(oracle_of(family), out, torch.ones_like(out), kept).argmax(-1)
    assert torch.equal(out[:, 51:], expected[:, :-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_itself_is_read_exactly(family):
    """Prefill is not approximated: logits of the prompt are those of the model without headwise."""
    ids, mask, _ = batch_of((60, 44), later=0)
    cache = RaggedCache(model_of(family), "snapkv+adakv", keep=0.8)
    plain = oracle_of(family)
    with torch.no_grad():
        positions = positions_of(mask)
        found = model_of(family)(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        expected = plain(ids, attention_mask=mask, position_ids=positions, use_cache=False, kept={}).logits
    assert distance(found, expected, mask) < tolerance_of(family)
