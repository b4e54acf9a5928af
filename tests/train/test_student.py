"""The student: equal to transformers' own model where nothing is weighted, to headwise's own cache where it is cut.

Tolerance. Both sides add the same products in float32 in another order, and an entry with share 0 keeps a weight of
1e-6: 1e-5 of the norm of the logits, ten times the most that is seen.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from families import random_ids, tiny_model
from torch import Tensor

import headwise
from headwise.interfaces import AbstractAllocator, AbstractScorer
from headwise.method import Method
from headwise.reading import read
from headwise.train.student import student_logits

TOKENS, ROWS, NEW = 40, 3, 6
TOLERANCE = 1e-5
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3"]


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


def ones(family):
    model, found = reading(family)
    return torch.ones(len(found.whole.ragged_layers), model.config.num_key_value_heads, TOKENS)


def shares_like(family, seed=0):
    return 0.05 + 0.9 * torch.rand(ones(family).shape, generator=torch.Generator().manual_seed(seed))


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def logits(family, shares, ids=None):
    model, found = reading(family)
    return student_logits(model, found.whole, questions() if ids is None else ids, shares)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_in_view_it_is_transformers_own_model(family):
    """Gemma3's sliding-window layers are whole, Phi3 rotates half of a head."""
    assert distance(logits(family, None), dense(family)) < TOLERANCE
    assert distance(logits(family, ones(family)), dense(family)) < TOLERANCE
    assert distance(logits(family, shares_like(family)), dense(family)) > 1000 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_with_shares_of_0_and_1_it_is_headwise_s_own_cache(family):
    """What training sees is what inference does with the same entries kept."""
    model, found = reading(family)
    layers = len(found.whole.ragged_layers)
    counts = torch.arange(5, 5 + 4 * layers * 2, 4).view(layers, 2)  # from a few of the 40 to most of them
    cut = found.cut(Method(scorer=Shuffled(), allocator=Given(counts=counts)), keep=float(counts.float().mean() / 40))
    shares = torch.zeros(layers, 2, TOKENS)
    for layer in range(layers):
        for head in range(2):
            shares[layer, head, cut.positions(layer, 0, head)] = 1.0
    assert shares.sum(-1).equal(counts.float())
    with torch.no_grad():
        at = torch.arange(TOKENS, TOKENS + NEW).expand(ROWS, -1)
        kept = model(questions(), position_ids=at, past_key_values=cut.fork(copies=ROWS)).logits
    assert distance(logits(family, shares), kept) < TOLERANCE
    assert distance(logits(family, shares), dense(family)) > 1000 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_changes_nothing_before_it(family):
    padded = torch.nn.functional.pad(questions(), (0, 4))
    found, expected = logits(family, shares_like(family), padded)[:, :NEW], logits(family, shares_like(family))
    assert distance(found, expected) < TOLERANCE
    alone = logits(family, shares_like(family), questions()[1:2, :4])
    assert distance(alone, expected[1:2, :4]) < TOLERANCE


def test_the_context_is_read_once_and_stays_as_it_is():
    model, found = reading("llama")
    layer = found.whole.ragged_layers[1]
    before = layer.segments.keys.clone()
    student_logits(model, found.whole, questions(), shares_like("llama").requires_grad_()).sum().backward()
    assert layer.segments.keys.equal(before)
    assert found.whole.get_seq_length() == TOKENS
    assert not layer.segments.keys.requires_grad


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradients_reach_every_share_and_nothing_else(family):
    model, found = reading(family)
    shares = shares_like(family).requires_grad_()
    student_logits(model, found.whole, questions(), shares).square().mean().backward()
    assert (shares.grad != 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("at", [(0, 1, 3), (1, 0, 17), (2, 1, 39)])
def test_gradients_against_finite_differences(at):
    model, found = reading("llama")
    direction = torch.randn(ROWS, NEW, 97)
    shares = shares_like("llama").requires_grad_()
    (student_logits(model, found.whole, questions(), shares) * direction).sum().backward()
    losses = []
    for change in (0.02, -0.02):
        moved = shares.detach().clone()
        moved[at] += change
        losses.append(float((logits("llama", moved) * direction).double().sum()))
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(float(shares.grad[at]), rel=0.01)


def test_a_compressed_model_goes_on_as_before():
    """Student and cache share the attention function."""
    model, ids = tiny_model(), random_ids(1, 50)
    shares = ones("llama")[..., :50].new_ones(3, 2, 50)
    before = headwise.compress(model, ids, "keydiff", keep=0.5)
    student_logits(model, read(model, ids, []).whole, questions(), shares.requires_grad_()).sum().backward()
    after = headwise.compress(model, ids, "keydiff", keep=0.5)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    whole = torch.cat([ids, ids[:, :4]], dim=-1)
    first, second = (model.generate(whole, past_key_values=cache, **options) for cache in (before, after))
    assert first.equal(second)
