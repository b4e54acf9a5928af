"""Losses by count: the change of a head's output against plain float64 softmax over what is left, and bookkeeping."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from dense_decoding import decode as dense_decode
from dense_decoding import dense_twin, greedy_answer
from families import random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.cache.reading import read
from headwise.cache.whole import states_of
from headwise.kernels.partial import capped
from headwise.kernels.quantised import ENTRIES
from headwise.methods.allocate import Uniform
from headwise.methods.method import Method
from headwise.methods.select import protected_mask, protection_order, select
from headwise.models.families import view
from headwise.offline.losses import RANKS, OutputLoss, Stored, keeping_order, marginal_utility, spread_points
from headwise.offline.watch import Rows, Written, decode

CASES = settings(max_examples=60, deadline=None, derandomize=True)
KEYDIFF = Method.parse("keydiff").scorer
STEPS, TOKENS = 4, 41
ALL = 100  # points per octave: one by one


@cache
def context():
    return random_ids(1, TOKENS, seed=3)


@cache
def model_and_reading(family):
    model = tiny_model(family)
    return model, read(model, context(), [KEYDIFF])


def questions(*lengths):
    return [random_ids(1, length, seed=10 + number)[0] for number, length in enumerate(lengths)]


def measured(family, asked, *, sink=1, window=3, per_octave=ALL, end=None, batch_size=8, steps=STEPS):
    """OutputLoss of the greedy answers, entries in KeyDiff's order."""
    model, found = model_and_reading(family)
    model.generation_config.eos_token_id = end
    order = keeping_order(found.scores[KEYDIFF][:, 0], sink, window)
    loss = OutputLoss(found.whole, order, sink + window, per_octave=per_octave)
    for _ in decode(model, found.whole, asked, [loss], steps=steps, batch_size=batch_size):
        pass
    return loss


@torch.no_grad()
def change_of_output(logits, values, order, kept, output_weights):
    """(o_b - o) W_O of every query head, [kv_heads, points, group, hidden], in float64.

    `logits` are [kv_heads, group, all], `values` [kv_heads, all, D]; tokens behind the ordered ones are always seen.
    """
    heads, tokens = order.shape
    found = torch.zeros(heads, len(kept), logits.shape[1], output_weights.shape[-1], dtype=torch.float64)
    for point, count in enumerate(kept):
        for head in range(heads):
            seen, value = torch.ones(logits.shape[-1], dtype=torch.bool), values[head].double()
            seen[order[head, count:tokens]] = False
            for member, logit in enumerate(logits[head].double()):
                change = logit[seen].softmax(-1) @ value[seen] - logit.softmax(-1) @ value
                found[head, point, member] = change @ output_weights[head, member].double()
    return found


def with_sink(attention, values):
    """Logits, and values, with one more token that has the attention which is left, if a sink has any, and writes 0."""
    sink = 1 - attention.sum(-1, keepdim=True)
    sink = torch.where(sink > 1e-5, sink, 0)
    return torch.cat([attention, sink], dim=-1).log(), torch.nn.functional.pad(values, (0, 0, 0, 1))


def brute_force(family, asked, loss, end=None, steps=STEPS):
    """[layers, kv_heads, points], from full attention matrices of transformers' own model."""
    seen, changes = view(dense_twin(family)), []
    for question in asked:
        for attentions, values in dense_decode(family, context(), question, steps, end):
            layers = [
                change_of_output(
                    *with_sink(attentions[model_layer].unflatten(0, (seen.shape.kv_heads, -1)), values[model_layer]),
                    loss.order[layer],
                    loss.kept.tolist(),
                    seen.output_weight(layer).unflatten(0, (seen.shape.kv_heads, -1)),
                )
                for layer, model_layer in enumerate(seen.shape.layers)
            ]
            changes.append(torch.stack(layers))
    found = torch.stack(changes)  # what all steps have in common tells no answer from another
    return (found - found.mean(0)).square().sum((0, -1, -2))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-6 * float(expected.max()))


# --- the change of the output ---


@pytest.mark.parametrize("per_octave", [ALL, 2], ids=["one by one", "in blocks"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_several_questions_of_different_length(family, per_octave):
    asked = questions(6, 1, 9)
    loss = measured(family, asked, per_octave=per_octave, batch_size=2)
    kept = range(TOKENS + 1) if per_octave == ALL else [0, 1, 2, 3, 4, 6, 8, 12, 17, 24, 34, TOKENS]
    assert loss.kept.tolist() == list(kept)
    assert_same(loss.loss(), brute_force(family, asked, loss))
    assert (loss.loss()[..., -1] == 0).all()
    assert (loss.loss()[..., 0] > 0).all()


@pytest.mark.parametrize("per_octave", [ALL, 1])
@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "gpt_oss"])
def test_sliding_layers_are_left_out_and_soft_caps_and_sinks_count(family, per_octave):
    """One question at a time: padding takes places in a sliding window, there as in transformers itself."""
    asked = questions(7, 3)
    loss = measured(family, asked, per_octave=per_octave, batch_size=1)
    assert loss.loss().shape[0] == 2
    assert_same(loss.loss(), brute_force(family, asked, loss))


@pytest.mark.parametrize(("sink", "window", "per_octave"), [(0, 0, ALL), (4, 36, 1), (2, 0, 4), (0, 41, 3), (0, 5, 8)])
def test_any_protection_and_resolution(sink, window, per_octave):
    asked = questions(4)
    loss = measured("llama", asked, sink=sink, window=window, per_octave=per_octave)
    assert sink + window in loss.points
    assert_same(loss.loss(), brute_force("llama", asked, loss))


def test_nothing_is_counted_after_the_end_of_an_answer():
    asked = questions(5, 3)
    answers = [greedy_answer("llama", context(), question, 6) for question in asked]
    end = answers[0][1]
    assert end not in (answers[0][0], *answers[1][:3])
    loss = measured("llama", asked, end=end, steps=6)
    assert_same(loss.loss(), brute_force("llama", asked, loss, end=end, steps=6))
    assert float(loss.loss().sum()) < 0.95 * float(measured("llama", asked, steps=6).loss().sum())


def after_one_step(logits, tail_logits, **options):
    """The loss after one Step with these logits in the first layer, and the same by brute force."""
    _, found = model_and_reading("llama")
    whole, order = found.whole, keeping_order(found.scores[KEYDIFF][:, 0], 1, 3)
    loss, tail_values = OutputLoss(whole, order, 4, **options), torch.randn(1, 2, tail_logits.shape[-1], 16)
    rows = Rows(
        layer=0,
        queries=torch.zeros(2, 2, 1, 16),  # of which these logits are none: entries in fewer bits are not looked at
        context=logits[0][:, :, None],
        tail=tail_logits[0].logsumexp(-1)[..., None],
        tail_output=(tail_logits[0].softmax(-1) @ tail_values[0])[:, :, None],
        question=torch.zeros(1, dtype=torch.int64),
    )
    loss(rows)
    expected = change_of_output(
        torch.cat([logits, tail_logits], dim=-1)[0],
        torch.cat([states_of(whole, 0)[1], tail_values[0]], dim=1),
        order[0],
        loss.kept.tolist(),
        whole.view.output_weight(0).unflatten(0, (2, -1)),
    )
    return loss.loss()[0], expected.square().sum((-1, -2))  # a single step: nothing is taken off


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", ENTRIES)
def test_entries_in_fewer_bits_are_those_of_a_cache_and_compared_with_all_native_ones(name, softcap):
    """A head's output over its first entries in fewer bits, beside the tail, against that over all entries."""
    _, found = model_and_reading("llama")
    whole, order, written = found.whole, keeping_order(found.scores[KEYDIFF][:, 0], 1, 3), Written(found.whole)
    small = found.cut(Method(scorer=KEYDIFF, allocator=Uniform()), 1.0, entries=name).frozen_layers[0].segments
    queries, tail_logits, tail_values = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 5), torch.randn(2, 5, 16)
    keys, values = states_of(whole, 0)
    stored = {name: Stored(whole, ENTRIES[name], written)}
    loss = OutputLoss(whole, order, 4, written=written, stored=stored, per_octave=ALL)
    loss(
        Rows(
            layer=0,
            queries=queries,
            context=capped(queries @ keys[:, None].mT, softcap),
            tail=tail_logits.logsumexp(-1),
            tail_output=tail_logits.softmax(-1) @ tail_values[:, None],
            question=torch.zeros(1, dtype=torch.int64),
            softcap=softcap,
        )
    )
    weights = whole.view.output_weight(0).detach().unflatten(0, (2, -1)).double()
    for head in range(2):
        codes = [torch.cat(pair) for pair in zip(_first(small, head), small.quantised[0].segment(head), strict=True)]
        for point, count in enumerate(loss.kept.tolist()):
            seen = order[0, head, :count]
            squares = 0.0
            for member in range(2):
                query, tail = queries[head, member, 0].double(), tail_logits[head, member, 0].double()
                full, few = (
                    torch.cat([capped(k.double() @ query, softcap), tail]).softmax(-1)
                    @ torch.cat([v, tail_values[head]]).double()
                    for k, v in ((keys[head], values[head]), (codes[0][seen], codes[1][seen]))
                )
                squares += float(((few - full) @ weights[head, member]).square().sum())
            assert float(loss.loss(name)[0, head, point]) == pytest.approx(squares, rel=2e-3, abs=1e-6)
    assert loss.loss(name)[0, :, 0].equal(loss.loss()[0, :, 0]), "nothing is kept: nothing is stored in fewer bits"
    assert (loss.loss(name)[0, :, -1] > loss.loss()[0, :, -1]).all()


def _first(segments, head):
    return segments.keys[segments.slice(head)], segments.values[segments.slice(head)]


@pytest.mark.parametrize("per_octave", [ALL, 2])
def test_logits_of_any_size(per_octave):
    """Sinks stand far above everything; entries that nothing outweighs must not be lost beside them."""
    logits, tail = torch.randn(1, 2, 2, TOKENS) * 50, torch.randn(1, 2, 2, 5)
    logits[..., 0] = 300
    tail[..., :2] = -torch.inf  # padding before a short question
    assert_same(*after_one_step(logits, tail, per_octave=per_octave))


@pytest.mark.parametrize("sink_logit", [1e3, 1e5, -1e5])
def test_huge_gaps_give_finite_numbers(sink_logit):
    logits, tail = torch.randn(1, 2, 2, TOKENS), torch.randn(1, 2, 2, 5)
    logits[..., 0] = sink_logit
    found, expected = after_one_step(logits, tail, per_octave=ALL)
    assert found.isfinite().all()
    assert_same(found, expected)


def test_a_peak_that_is_kept_last_gives_finite_numbers():
    _, found = model_and_reading("llama")
    logits, last = torch.randn(1, 2, 2, TOKENS), keeping_order(found.scores[KEYDIFF][0, 0], 1, 3)[:, -1]
    logits[0].scatter_(-1, last.view(2, 1, 1).expand(2, 2, 1), 1e4)
    loss, expected = after_one_step(logits, torch.randn(1, 2, 2, 5))
    assert loss.isfinite().all()
    assert_same(loss[:, :1], expected[:, :1])  # nothing but the tail is left


# --- marginal utilities ---


@pytest.mark.parametrize("per_octave", [ALL, 8, 1])
def test_what_keeping_more_takes_off_the_loss(per_octave):
    """Straight between the points, protected entries one by one."""
    loss = measured("llama", questions(5), sink=3, window=4, per_octave=per_octave)
    found = loss.marginal()
    assert found.shape == (3, 2, 7 + RANKS)
    torch.testing.assert_close(found.sum(-1), loss.loss()[..., 0], rtol=1e-12, atol=0)
    at = [*range(1, 7), *np.linspace(7, TOKENS, RANKS + 1)]
    for gained, one_loss in zip(found.flatten(0, 1).cumsum(-1), loss.loss().flatten(0, 1), strict=True):
        by_hand = np.interp(at, loss.kept.numpy(), (one_loss[0] - one_loss).numpy())
        np.testing.assert_allclose(gained.numpy(), by_hand, rtol=1e-9)


@pytest.mark.parametrize("per_octave", [1, 4, 16])
@pytest.mark.parametrize(("tokens", "protected"), [(1, 0), (2, 2), (30, 36), (1000, 36), (4096, 0)])
def test_points_are_close_together_where_few_are_kept(tokens, protected, per_octave):
    found = spread_points(tokens, protected, per_octave)
    assert (found[0], found[-1]) == (0, tokens)
    assert min(protected, tokens) in found
    assert len(found) <= 4 + per_octave * (1 + np.log2(tokens))
    for before, after in pairwise(found):
        assert before < after <= before + max(1, -(-before * (2 ** (1 / per_octave) - 1) // 1) + 1)


def test_marginal_utility_by_hand():
    importance = torch.tensor([[[9.0, 1.0, 5.0, 2.0, 0.0, 7.0]]])
    order = torch.tensor([[[0, 5, 4, 2, 3, 1]]])

    def found(protected, ranks):
        return marginal_utility(importance, order, protected, ranks=ranks).tolist()

    assert found(2, 4) == [[[9.0, 7.0, 0.0, 5.0, 2.0, 1.0]]]
    assert found(2, 2) == [[[9.0, 7.0, 5.0, 3.0]]]
    assert found(2, 8) == [[[9.0, 7.0, 0.0, 0.0, 2.5, 2.5, 1.0, 1.0, 0.5, 0.5]]]
    assert found(0, 3) == [[[16.0, 5.0, 3.0]]]
    assert found(3, 2) == [[[9.0, 7.0, 0.0, 6.0, 2.0]]]  # an entry may be shared between ranks


@pytest.mark.parametrize("protected", [0, 5])
@pytest.mark.parametrize("tokens", [6, 7, RANKS - 1, RANKS, RANKS + 1, RANKS + 5, 3000])
def test_resampling_keeps_the_sum(tokens, protected):
    importance = torch.rand(2, 3, tokens)
    order = torch.rand(2, 3, tokens).argsort(-1)
    found = marginal_utility(importance, order, protected)
    assert found.shape == (2, 3, protected + RANKS)
    torch.testing.assert_close(found.sum(-1), importance.double().sum(-1))
    torch.testing.assert_close(found[..., :protected], importance.double().gather(-1, order[..., :protected]))
    assert (found >= -1e-12).all()


# --- the order of keeping ---


@CASES
@given(data=st.data(), tokens=st.integers(1, 12), sink=st.integers(0, 3), window=st.integers(0, 4))
def test_entries_are_kept_in_the_order_in_which_select_keeps_them(data, tokens, sink, window):
    """Ties, infinities and, at protected tokens, NaN included."""
    values = st.sampled_from(
        [-torch.inf, torch.finfo(torch.float32).min, -1.0, 0.0, -0.0, 2.0, torch.finfo(torch.float32).max, torch.inf]
    )
    scores = torch.tensor([[[data.draw(values) for _ in range(tokens)] for _ in range(2)]])
    valid = torch.ones(1, tokens, dtype=torch.bool)
    protected, ranking = protected_mask(valid, sink, window), protection_order(valid, sink, window)
    scores = scores.masked_fill(protected[:, None], torch.nan)
    order = keeping_order(scores[0], sink, window)
    for count in range(1, tokens + 1):
        expected = torch.zeros(2, tokens, dtype=torch.bool).scatter(-1, order[:, :count], True)
        counts = torch.tensor([[count, count]])
        assert select(scores, counts, valid, protected, ranking)[0].equal(expected)
        if count >= int(protected.sum()):
            assert select(scores, counts, valid, protected)[0].equal(expected)
