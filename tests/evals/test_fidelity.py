"""What a cut cache predicts, compared with the full one: against plain dense computation."""

import pytest
import torch
from families import random_ids, tiny_model
from folders import word_tokenizer

import headwise
from headwise import RaggedCache
from headwise.evals.answers import FullMemory
from headwise.evals.fidelity import Continuations, Fidelity, Yardstick, compare

FAMILIES = ["llama", "gemma3_text"]


def setting(family="llama"):
    tokenizer = word_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer))
    context = random_ids(1, 60)
    questions = [random_ids(1, n, seed=n)[0] for n in (5, 3, 5)]
    texts = [random_ids(1, n, seed=10 + n)[0] for n in (4, 6, 0)]
    return model, tokenizer, context, Continuations.of(questions, texts)


def plain(model, context, question, text):
    """Log-probabilities at every token of the text, from one pass over everything."""
    ids = torch.cat([context[0], question, text])[None]
    return model(ids).logits[0, -len(text) - 1 : -1].float().log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_cache_predicts_what_a_plain_pass_does(family):
    model, tokenizer, context, asked = setting(family)
    assert len(asked.texts) == 2  # nothing follows the third
    yardstick = Yardstick(model, tokenizer, FullMemory(model, context), context, asked)
    for number, (question, text) in enumerate(zip(asked.questions, asked.texts, strict=True)):
        torch.testing.assert_close(yardstick.full[number], plain(model, context, question, text), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_caches_are_each_measured_alone(family):
    model, tokenizer, context, asked = setting(family)
    yardstick = Yardstick(model, tokenizer, FullMemory(model, context), context, asked)
    cuts = [headwise.compress(model, context, "keydiff", keep=keep) for keep in (0.1, 0.5, 1.0)]
    together = yardstick.measure(RaggedCache.join(cuts), 3)
    for cut, found in zip(cuts, together, strict=True):
        (alone,) = yardstick.measure(cut, 1)
        for name in ("kl", "agreement", "nll"):
            assert getattr(found, name) == pytest.approx(getattr(alone, name), abs=1e-5)
    if family == "llama":  # the other is so sure of its predictions that hardly any digit is left
        assert together[0].kl > together[1].kl > together[2].kl
    assert together[2].kl == pytest.approx(0, abs=1e-6)
    assert together[2].agreement == 1


@torch.no_grad()
def test_the_log_likelihood_is_that_of_the_text():
    model, tokenizer, context, asked = setting()
    memory = FullMemory(model, context)
    (found,) = Yardstick(model, tokenizer, memory, context, asked).measure(memory, 1)
    likelihoods = [
        -plain(model, context, q, t).gather(-1, t[:, None]).mean()
        for q, t in zip(asked.questions, asked.texts, strict=True)
    ]
    assert found.nll == pytest.approx(float(torch.stack(likelihoods).mean()), rel=1e-4)


def test_divergence_and_agreement_by_hand():
    full = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    cut = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]).log()
    (found,) = compare(full, cut[None], torch.tensor([0, 1]))
    assert found.kl == pytest.approx((0.5 * torch.tensor(2.0).log() + 0.25 * torch.tensor(0.5).log()).item() / 2)
    assert found.agreement == 0.5
    assert found.nll == pytest.approx((torch.tensor(4.0).log() + torch.tensor(2.0).log()).item() / 2)


def test_means_leave_out_what_was_not_measured():
    assert Fidelity.mean([]) == Fidelity()
    assert Fidelity.mean([Fidelity(kl=1.0), Fidelity(kl=3.0, agreement=0.5)]) == Fidelity(kl=2.0, agreement=0.5)
