"""Where training starts: scores that know what is important, budgets that are LU-KV's for these scores."""

import pytest
import torch
from families import tiny_model
from folders import word_tokenizer
from random_gates import scatter

import headwise
from headwise.allocate.profiled import lukv_counts
from headwise.calibration import Example
from headwise.gates import EntryScores, HeadBudgets
from headwise.hulls import concave_hulls
from headwise.losses import OutputLoss, keeping_order
from headwise.method import SCORERS
from headwise.oracle import decode, entry_importance
from headwise.train.loop import Settings, importance_loss, prepare, raw_scores
from headwise.train.warm import warm_budgets, warm_scores

QUICK = Settings(warm_steps=40, contexts_per_step=2, questions=3, answer_tokens=4, sink=1, window=3, lr_scores=3e-3)
WORDS = "locker apple red stone. the key was under the old tower, near a river. "
EXAMPLES = [
    Example(context=f"then {WORDS * 2} she had a", questions=("? locker apple", "? the red tower near", "? who")),
    Example(context=f"he saw a {WORDS * 3}", questions=("? old river",)),
]


@pytest.fixture(scope="module")
def taught():
    """A model, lessons, and lessons with the scores of KeyDiff."""
    tokenizer = word_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer)).requires_grad_(False)
    headwise.enable(model)
    fixed = SCORERS["keydiff"].make()
    return model, *([prepare(model, tokenizer, e, QUICK, scorer) for e in EXAMPLES] for scorer in (None, fixed))


def test_scores_learn_what_is_important(taught):
    _, lessons, _ = taught
    scores, told = EntryScores(3, 2, 16), []

    def lost():
        with torch.no_grad():
            return sum(float(importance_loss(lesson, raw_scores(lesson, scores), QUICK)) for lesson in lessons)

    least = sum(float(importance_loss(lesson, lesson.importance.log(), QUICK)) for lesson in lessons)
    before = lost()
    warm_scores(lessons, scores, QUICK, lambda step, loss: told.append(step))
    assert least < lost() < least + 0.6 * (before - least)
    assert told == list(range(1, 41))


def test_the_same_seed_warms_alike(taught):
    _, lessons, _ = taught
    found = []
    for _ in range(2):
        scores = scatter(EntryScores(3, 2, 16)).requires_grad_()
        warm_scores(lessons, scores, QUICK, lambda step, loss: None)
        found.append(raw_scores(lessons[0], scores).detach())
        torch.rand(3)
    assert found[0].equal(found[1])


def test_a_lesson_s_importance_is_lu_kv_s_over_its_questions(taught):
    model, lessons, _ = taught
    for lesson in lessons:
        alone = entry_importance(model, lesson.whole, lesson.questions, steps=4, normalization="none")
        torch.testing.assert_close(lesson.importance, alone.amax(0), rtol=1e-3, atol=1e-5 * float(alone.max()))


@pytest.mark.parametrize("kind", ["trained scores", "a fixed scorer"])
def test_budgets_start_as_lu_kv_s(taught, monkeypatch, kind):
    monkeypatch.setattr("headwise.train.warm.FIT_STEPS", 150)
    model, *both = taught
    lessons = both[kind == "a fixed scorer"][:1]
    scores = scatter(EntryScores(3, 2, 16)) if kind == "trained scores" else None
    budgets, (lesson,) = HeadBudgets(6, 4), lessons
    before = budgets(0.2, 40).detach()
    warm_budgets(model, lessons, scores, budgets, QUICK)
    found = lesson.fixed_scores if scores is None else raw_scores(lesson, scores)
    loss = OutputLoss(lesson.whole, keeping_order(found, 1, 3), 4)
    list(decode(model, lesson.whole, lesson.questions, [loss], steps=4))
    curve, tokens = loss.marginal().flatten(0, 1), lesson.features.shape[2]
    wanted = lukv_counts(curve[:, :4], concave_hulls(curve[:, 4:]), tokens, 4, round(0.2 * 6 * tokens), 1) / tokens
    with torch.no_grad():
        after = budgets(0.2, tokens)
    assert (after - wanted).abs().mean() < 0.8 * (before - wanted).abs().mean()  # a quarter of the steps, or fewer
