"""The student: equal to transformers' own model where all is kept, to headwise's own cache where some is.

Tolerance. Both sides add the same products in float32 in another order: 1e-5 of the norm of the logits, ten times the
most that is seen.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from families import random_ids, tiny_model
from torch import Tensor

import headwise
from headwise.cache.reading import read
from headwise.interfaces import AbstractAllocator, AbstractScorer
from headwise.methods.method import Method
from headwise.offline.train.student import Kept, _KeptAttention, student_logits

TOKENS, ROWS, NEW = 40, 3, 6
TOLERANCE = 1e-5
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "gemma2", "gpt_oss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffled(AbstractScorer):
    """Another order in every layer and head."""

    def score(self, observation):
        generator = torch.Generator().manual_seed(observation.layer)
        return torch.rand(observation.keys.shape[:3], generator=generator)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Given(AbstractAllocator):
    """Counts from outside, [layers, heads]."""

    counts: Tensor

    def allocate(self, scores, candidates, layers, demand):
        return self.counts[list(layers), None]

    def provenance(self):
        return {"name": "Given"}


@cache
def reading(family):
    """A model, and a context it has read."""
    model = tiny_model(family).requires_grad_(False)
    return model, read(model, random_ids(1, TOKENS), [Shuffled()])


@cache
def questions():
    return random_ids(ROWS, NEW, seed=5)


@cache
def dense(family):
    """Logits of transformers' own model over context and question, without a cache."""
    ids = torch.cat([random_ids(1, TOKENS).expand(ROWS, -1), questions()], dim=-1)
    with torch.no_grad():
        return tiny_model(family)(ids, use_cache=False).logits[:, TOKENS:]


def mask_like(family, share=0.6, seed=0):
    """Which entries are kept: a share of them, at random."""
    model, found = reading(family)
    sizes = len(found.whole.ragged_layers), model.config.num_key_value_heads, TOKENS
    return torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < share


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def logits(family, mask, ids=None):
    model, found = reading(family)
    kept = None if mask is None else Kept(mask=mask.float())
    return student_logits(model, found.whole, questions() if ids is None else ids, kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_in_view_it_is_transformers_own_model(family):
    """Gemma3's sliding-window layers are whole, Phi3 rotates half of a head."""
    assert distance(logits(family, None), dense(family)) < TOLERANCE
    assert distance(logits(family, mask_like(family, 1.1)), dense(family)) < TOLERANCE
    assert distance(logits(family, mask_like(family)), dense(family)) > 1000 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_with_some_kept_it_is_headwise_s_own_cache(family):
    """What training sees is what inference does with the same entries kept."""
    model, found = reading(family)
    layers = len(found.whole.ragged_layers)
    counts = torch.arange(5, 5 + 4 * layers * 2, 4).view(layers, 2)  # from a few of the 40 to most of them
    cut = found.cut(Method(scorer=Shuffled(), allocator=Given(counts=counts)), keep=float(counts.float().mean() / 40))
    mask = torch.zeros(layers, 2, TOKENS)
    for layer in range(layers):
        for head in range(2):
            mask[layer, head, cut.positions(layer, 0, head)] = 1.0
    assert mask.sum(-1).equal(counts.float())
    with torch.no_grad():
        at = torch.arange(TOKENS, TOKENS + NEW).expand(ROWS, -1)
        kept = model(questions(), position_ids=at, past_key_values=cut.fork(copies=ROWS)).logits
    assert distance(logits(family, mask), kept) < TOLERANCE
    assert distance(logits(family, mask), dense(family)) > 1000 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_changes_nothing_before_it(family):
    padded = torch.nn.functional.pad(questions(), (0, 4))
    found, expected = logits(family, mask_like(family), padded)[:, :NEW], logits(family, mask_like(family))
    assert distance(found, expected) < TOLERANCE
    alone = logits(family, mask_like(family), questions()[1:2, :4])
    assert distance(alone, expected[1:2, :4]) < TOLERANCE


def test_the_context_is_read_once_and_stays_as_it_is():
    model, found = reading("llama")
    layer = found.whole.ragged_layers[1]
    before = layer.segments.keys.clone()
    student_logits(model, found.whole, questions(), Kept.of(mask_like("llama"))).sum().backward()
    assert layer.segments.keys.equal(before)
    assert found.whole.get_seq_length() == TOKENS
    assert not layer.segments.keys.requires_grad


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2", "gpt_oss"])
def test_effects_of_every_choice_are_found_and_no_other_gradient(family):
    model, found = reading(family)
    kept = Kept.of(mask_like(family))
    student_logits(model, found.whole, questions(), kept).square().mean().backward()
    assert (kept.mask.grad != 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def attention_states():
    """Query, context and own keys and values: 2 questions, 2 KV heads of 3 query heads, 9 entries, 4 new tokens."""
    draw = torch.Generator().manual_seed(3)
    sizes = [(2, 2, 3, 4, 8), (2, 9, 8), (2, 9, 8), (2, 2, 4, 8), (2, 2, 4, 8)]
    return [torch.randn(size, generator=draw) * (0.5 if len(size) == 5 else 1.0) for size in sizes]


SINKS = torch.tensor([[-1.0, 0.5, 2.0], [0.0, 1.0, 3.0]])[..., None, None]
SPECIAL = {"plain": (None, None), "capped": (1.5, None), "sinks": (None, SINKS), "both": (1.5, SINKS)}
specials = pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL)


@specials
def test_an_effect_is_the_whole_difference_that_a_choice_makes(special):
    """Of a loss that is linear in the output, against making the other choice; squares, question by question."""
    states = attention_states()
    choice = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    direction = torch.randn(2, 2, 3, 4, 8, generator=torch.Generator().manual_seed(2))

    def parts(mask):
        """[questions, kv_heads]."""
        return (_KeptAttention.apply(*states, mask, None, *special) * direction).sum((2, 3, 4)).double()

    kept = Kept.of(choice[None])
    loss = (_KeptAttention.apply(*states, kept.mask[0], kept, *special) * direction).sum()
    (first,) = torch.autograd.grad(loss, kept.mask, retain_graph=True)
    with kept.squared():
        (second,) = torch.autograd.grad(loss, kept.mask)
    for head in range(2):
        for entry in range(9):
            without, having = choice.float(), choice.float()
            without[head, entry], having[head, entry] = 0.0, 1.0
            change = parts(having)[:, head] - parts(without)[:, head]
            assert float(first[0, head, entry]) == pytest.approx(float(change.sum()), rel=1e-3, abs=1e-4)
            assert float(second[0, head, entry]) == pytest.approx(float(change.square().sum()), rel=1e-3, abs=1e-4)


@specials
def test_other_gradients_are_those_of_plain_attention(special):
    """Against autograd through a masked softmax; an entry with all of the attention has a finite effect."""
    states = [state.double().requires_grad_(number in (0, 3, 4)) for number, state in enumerate(attention_states())]
    query, context_keys, context_values, keys, values = states
    mask = torch.ones(2, 9, dtype=torch.double)
    mask[0, :4], mask[1, 2] = 0, 0
    softcap, sinks = special[0], None if special[1] is None else special[1].double()
    logits = [torch.einsum("bhgtd,hnd->bhgtn", query, context_keys), torch.einsum("bhgtd,bhsd->bhgts", query, keys)]
    if softcap is not None:
        logits = [(part / softcap).tanh() * softcap for part in logits]
    logits[0] = logits[0].masked_fill(mask[:, None, None] == 0, -torch.inf)
    logits[1] = logits[1].masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
    logits += [] if sinks is None else [sinks.expand(2, -1, -1, 4, 1)]
    weights = torch.cat(logits, dim=-1).softmax(-1)
    plain = torch.einsum("bhgtn,hnd->bhgtd", weights[..., :9], context_values)
    plain = plain + torch.einsum("bhgts,bhsd->bhgtd", weights[..., 9:13], values)
    found = _KeptAttention.apply(*states, mask, None, softcap, sinks)
    torch.testing.assert_close(found, plain)
    for ours, theirs in zip(
        torch.autograd.grad(found.sin().sum(), (query, keys, values)),
        torch.autograd.grad(plain.sin().sum(), (query, keys, values)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    kept = Kept.of(torch.ones(1, 2, 9, dtype=torch.bool))
    sharp = _KeptAttention.apply(100 * query.detach(), *states[1:], kept.mask[0].double(), kept, softcap, sinks)
    sharp.sum().backward()
    assert kept.mask.grad.isfinite().all()


def test_a_compressed_model_goes_on_as_before():
    """Student and cache share the attention function."""
    model, ids = tiny_model(), random_ids(1, 50)
    before = headwise.compress(model, ids, "keydiff", keep=0.5)
    kept = Kept.of(torch.ones(3, 2, 50, dtype=torch.bool))
    student_logits(model, read(model, ids, []).whole, questions(), kept).sum().backward()
    after = headwise.compress(model, ids, "keydiff", keep=0.5)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    whole = torch.cat([ids, ids[:, :4]], dim=-1)
    first, second = (model.generate(whole, past_key_values=cache, **options) for cache in (before, after))
    assert first.equal(second)
