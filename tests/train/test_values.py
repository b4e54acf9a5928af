"""What an entry is worth: against really making the other choice."""

import pytest
import torch
from families import random_ids, tiny_model

import headwise
from headwise.cache.reading import read
from headwise.offline.train.student import Kept, student_logits
from headwise.offline.train.values import Teaching, judge

TOKENS, QUESTIONS, NEW = 30, 3, 5


@pytest.fixture(scope="module")
def taught():
    """A model, a context it has read, and what it says about three questions.

    Its attention writes little, so that the rest of it is nearly linear: what is not linear no value can know.
    """
    model = tiny_model().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.01)
    headwise.enable(model)
    whole = read(model, random_ids(1, TOKENS), []).whole
    ids = random_ids(QUESTIONS, NEW, seed=5)
    real = torch.arange(NEW).expand(QUESTIONS, -1) < torch.tensor([[4], [3], [4]])
    answer = real & (torch.arange(NEW) > 1)
    return model, whole, Teaching.of(model, whole, ids, answer, real, 0.1)


def choice(share, seed=0):
    return torch.rand(3, 2, TOKENS, generator=torch.Generator().manual_seed(seed)) < share


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_loss_is_the_unexplained_part_of_the_teacher_s_logits(taught):
    model, whole, teaching = taught
    mask = choice(0.3)
    with torch.no_grad():
        expected = student_logits(model, whole, teaching.ids, None)
        found = student_logits(model, whole, teaching.ids, Kept.of(mask))
    expected, found = (x - x.mean(-1, keepdim=True) for x in (expected, found))
    weight = teaching.answer / teaching.answer.sum()
    real = torch.zeros_like(weight)
    for row, length in enumerate((4, 3, 4)):
        real[row, :length] = 1.0
    weight = (weight + 0.1 * real / real.sum())[..., None]
    by_hand = float((weight * (found - expected).square()).sum() / (weight * expected.square()).sum())
    judged = judge(model, whole, teaching, mask)
    assert judged.loss == pytest.approx(by_hand, rel=1e-4)
    assert judged.loss > 1e-5
    agree = (found.argmax(-1) == expected.argmax(-1))[teaching.answer].float().mean()
    assert judged.agreement == pytest.approx(float(agree))
    assert judged.values is None


def test_with_everything_kept_there_is_nothing_to_gain_and_everything_to_lose(taught):
    judged = judge(*taught, choice(1.1), generator())
    assert judged.loss == pytest.approx(0.0, abs=1e-8)
    assert judged.agreement == 1.0
    assert (judged.values >= -1e-6).all() and float(judged.values.max()) > 1e-9


@pytest.mark.parametrize("share", [0.3, 0.8, 1.1])
def test_a_value_is_about_what_the_other_choice_costs(taught, share):
    """Averaged over many r."""
    mask, (model, whole, teaching) = choice(share), taught
    before = judge(*taught, mask).loss
    values = torch.stack([judge(*taught, mask, generator(n)).values for n in range(200)]).mean(0)
    found, expected = [], []
    for layer in range(3):
        for head in range(2):
            for entry in range(0, TOKENS, 3):
                other = mask.clone()
                other[layer, head, entry] ^= True
                change = judge(model, whole, teaching, other).loss - before
                expected.append(change if mask[layer, head, entry] else -change)
                found.append(float(values[layer, head, entry]))
    found, expected = torch.tensor(found), torch.tensor(expected)
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.99
    assert float(found.norm() / expected.norm()) == pytest.approx(1.0, rel=0.2)


def test_the_same_r_gives_the_same_values(taught):
    first, again, other = (judge(*taught, choice(0.5), generator(n)).values for n in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
