"""Where training starts: scores that every head learned by itself, budgets that are LU-KV's for these scores."""

from dataclasses import replace

import pytest
import torch
from families import tiny_model
from folders import word_tokenizer
from random_gates import scatter
from ranks import Rank

import headwise
from headwise.artifacts.gates import EntryScores, HeadBudgets
from headwise.artifacts.hulls import concave_hulls
from headwise.cache.whole import states_of
from headwise.methods.allocate.profiled import lukv_counts
from headwise.methods.registry import SCORERS
from headwise.models.processes import Processes
from headwise.offline.calibration import Example
from headwise.offline.losses import OutputLoss, keeping_order
from headwise.offline.train.loop import Settings, hard_choice, lesson_scores, prepare, raw_scores, with_protection
from headwise.offline.train.warm import _mean_curve, alone_step, warm_budgets, warm_scores
from headwise.offline.watch import decode

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


def test_scores_learn_what_a_head_s_output_rests_on(taught):
    """Better than untrained ones, on other budgets than those of training."""
    _, lessons, _ = taught
    torch.manual_seed(0)
    scores, told = EntryScores(3, 2, 16), []

    def lost():
        draws = [torch.Generator().manual_seed(seed) for seed in range(20)]
        return sum(alone_step(lessons[n % 2], scores, QUICK, draw)[1] for n, draw in enumerate(draws)) / len(draws)

    before = lost()
    warm_scores(
        lessons, scores, replace(QUICK, warm_steps=100), Processes(), lambda step, loss: told.append((step, loss))
    )
    assert 0 < lost() < 0.8 * before
    assert [step for step, _ in told] == list(range(1, 101))
    assert all(loss > 0 for _, loss in told)


def test_alone_a_head_loses_what_changes_in_what_it_writes(taught):
    """By hand: outputs of a masked softmax over the context, the question and the answer, through W_O."""
    model, (lesson, _), _ = taught
    torch.manual_seed(0)
    scores, asked = EntryScores(3, 2, 16), replace(QUICK, warm_questions=40, warm_keeps=(0.5, 0.5))
    _, found = alone_step(lesson, scores, asked, torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(1)
    tokens = lesson.features.shape[2]
    torch.rand(3, 2, generator=draw)
    chosen = torch.randint(3, (40,), generator=draw)
    ranked = with_protection(lesson_scores(lesson, raw_scores(lesson, scores)), 1, 3)
    mask = hard_choice(ranked, torch.full((3, 2), round(tokens * 0.5)))
    weight = lesson.teaching.weight[chosen] / lesson.teaching.weight[chosen].sum()
    everything, parts = lesson.teaching.weight / lesson.teaching.weight.sum(), []
    for layer, record in enumerate(lesson.teaching.records):
        keys, values = states_of(lesson.whole, layer)
        weight_out = model.model.layers[layer].self_attn.o_proj.weight.view(64, 2, 2, 16)
        for head in range(2):
            written = []
            for seen in (torch.ones(tokens, dtype=torch.bool), mask[layer, head]):
                context = torch.einsum("bgtd,nd->bgtn", record.query[:, head], keys[head])
                own = torch.einsum("bgtd,bsd->bgts", record.query[:, head], record.keys[:, head])
                later = torch.ones(own.shape[-2:], dtype=torch.bool).triu(1)
                logits = torch.cat([context.masked_fill(~seen, -torch.inf), own.masked_fill(later, -torch.inf)], -1)
                both = torch.cat([values[head].expand(len(own), -1, -1), record.values[:, head]], dim=1)
                out = torch.einsum("bgtn,bnd->bgtd", logits.softmax(-1), both)
                written.append(torch.einsum("bgtd,ogd->bto", out, weight_out[:, head]))
            whole, some = written
            change = (weight[..., None] * (some - whole)[chosen].square()).sum()
            mean = (everything[..., None] * whole).sum((0, 1))
            parts.append(change / (everything[..., None] * (whole - mean).square()).sum())
    assert found == pytest.approx(float(torch.stack(parts).mean()), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_head_that_keeps_everything_loses_nothing(family):
    """Soft caps and sinks are those of the lesson."""
    tokenizer = word_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer)).requires_grad_(False)
    headwise.enable(model)
    lesson = prepare(model, tokenizer, EXAMPLES[0], QUICK, None)
    layers = len(lesson.whole.ragged_layers)
    for keep, bound in ((1.0, (0, 1e-9)), (0.5, (1e-3, 10))):
        asked = replace(QUICK, warm_questions=4, warm_keeps=(keep, keep))
        found = alone_step(lesson, EntryScores(layers, 2, 16), asked, torch.Generator().manual_seed(1))[1]
        assert bound[0] <= found <= bound[1]


def test_the_same_seed_warms_alike(taught):
    _, lessons, _ = taught
    found = []
    for _ in range(2):
        scores = scatter(EntryScores(3, 2, 16)).requires_grad_()
        warm_scores(lessons, scores, QUICK, Processes(), lambda step, loss: None)
        found.append(raw_scores(lessons[0], scores).detach())
        torch.rand(3)
    assert found[0].equal(found[1])


@pytest.mark.parametrize("kind", ["trained scores", "a fixed scorer"])
def test_budgets_start_as_lu_kv_s(taught, kind):
    model, *both = taught
    lessons = both[kind == "a fixed scorer"][:1]
    scores = scatter(EntryScores(3, 2, 16)) if kind == "trained scores" else None
    budgets, (lesson,) = HeadBudgets(6, len(lessons[0].summary)), lessons
    warm_budgets(model, lessons, scores, budgets, QUICK, Processes())
    (found,) = lesson.fixed if scores is None else (raw_scores(lesson, scores),)
    loss = OutputLoss(lesson.whole, keeping_order(found, 1, 3), 4)
    list(decode(model, lesson.whole, lesson.questions, [loss], steps=4))
    curve, tokens = loss.marginal().flatten(0, 1), lesson.features.shape[2]
    wanted = lukv_counts(curve[:, :4], concave_hulls(curve[:, 4:]), tokens, 4, round(0.25 * 6 * tokens), 1) / tokens
    with torch.no_grad():
        after = budgets(0.25)
    torch.testing.assert_close(after, wanted.float().clamp(1e-3), rtol=0.03, atol=1e-3)  # 0.25 is a knot


def test_processes_share_the_curves_also_when_there_are_more_of_them_than_lessons(taught):
    """Every process brings a curve of the same shape to the sum."""
    model, _, lessons = taught
    parts = [_mean_curve(model, lessons, None, QUICK, Rank(rank, 3)) for rank in range(3)]
    assert parts[0].shape == parts[2].shape
    assert float(parts[2].abs().sum()) == 0
    torch.testing.assert_close(sum(parts), _mean_curve(model, lessons, None, QUICK, Processes()))
