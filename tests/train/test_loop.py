"""A step of training sees what inference does, changes gates and nothing else, and finds the head that matters."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from families import tiny_model
from folders import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from random_gates import make_gates
from ranks import Rank
from transformers import DynamicCache

import headwise
from headwise.artifacts.gates import EntryScores, HeadBudgets, summary_width
from headwise.artifacts.soft_topk import soft_topk
from headwise.cache.reading import read
from headwise.methods.allocate import learned_budgets
from headwise.methods.allocate.learned import budget_counts
from headwise.methods.method import Method
from headwise.methods.registry import SCORERS
from headwise.methods.scores import learned_scorer
from headwise.methods.select import protected_mask, protection_order, select
from headwise.models.families import view
from headwise.offline.calibration import Example, encode
from headwise.offline.train.loop import (
    Settings,
    Trainer,
    hard_choice,
    lesson_scores,
    lesson_step,
    prepare,
    raw_scores,
    with_protection,
)

QUICK = Settings(steps=40, contexts_per_step=2, questions=3, answer_tokens=4, sink=2, window=5)
WORDS = "locker apple red stone. the key was under the old tower, near a river. "
EXAMPLES = [
    Example(context=f"then {WORDS * 2} she had a", questions=("? locker apple", "? the red tower near", "? who")),
    Example(context=f"he saw a {WORDS * 3}", questions=("? old river",)),
    Example(context=f"she had a {WORDS * 2}"),
]


def small_model(family="llama", **changes):
    tokenizer = word_tokenizer()
    changes |= {"final_logit_softcapping": 5.0} if family == "gemma3_text" else {}  # or it is sure whatever it sees
    return tiny_model(family, vocab_size=len(tokenizer), **changes).requires_grad_(False), tokenizer


@cache
def lesson(family="llama", number=0, scorer=None):
    model, tokenizer = small_model(family)
    headwise.enable(model)
    fixed = None if scorer is None else SCORERS[scorer].make()
    return model, prepare(model, tokenizer, EXAMPLES[number], QUICK, fixed)


@cache
def gates(family="llama"):
    model, _ = lesson(family)
    return make_gates(view(model).shape, sink=QUICK.sink, window=QUICK.window)


# --- a lesson ---


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
def test_a_lesson_is_what_the_model_itself_says(family, number):
    """Teacher and answers against transformers' own greedy generation; padding is on the right and counts nowhere."""
    _, found = lesson(family, number)
    plain, tokenizer = small_model(family)
    context, questions = encode(tokenizer, EXAMPLES[number], device="cpu")
    teaching = found.teaching
    assert teaching.ids.shape[0] == len(questions)
    for row, question in enumerate(questions):
        prompt = torch.cat([context, question[None]], dim=-1)
        said = plain.generate(
            prompt, past_key_values=DynamicCache(config=plain.config), max_new_tokens=4, do_sample=False
        )[0, prompt.shape[1] :]
        text = torch.cat([question, said])
        assert teaching.ids[row, : len(text)].equal(text)
        steps = torch.arange(teaching.ids.shape[1])
        assert (teaching.weight[row] > 0).equal(steps < len(text) - 1)
        assert teaching.answer[row].equal((steps >= len(question) - 1) & (steps < len(text) - 1))
        with torch.no_grad():
            logits = plain(torch.cat([context, text[None]], dim=-1)).logits[0, context.shape[1] :]
        expected = logits - logits.mean(-1, keepdim=True)
        torch.testing.assert_close(
            teaching.logits[row, : len(text)], expected, rtol=1e-3, atol=1e-3 * float(logits.std())
        )


def test_questions_are_as_many_as_asked_for():
    model, tokenizer = small_model()
    headwise.enable(model)
    assert prepare(model, tokenizer, EXAMPLES[0], replace(QUICK, questions=2)).teaching.ids.shape[0] == 2


# --- what training selects ---


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(0, 4), st.integers(0, 8), st.integers(0, 99), st.data())
def test_the_hard_selection_is_that_of_select(tokens, sink, window, seed, data):
    """Protected tokens in their order, then the best scores; ties go to the earlier position."""
    scores = torch.randint(0, 6, (2, 3, tokens), generator=torch.Generator().manual_seed(seed)).float() - 3
    counts = torch.tensor([data.draw(st.integers(0, tokens)) for _ in range(6)]).view(2, 3)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    order = protection_order(valid, sink, window)
    expected = select(scores, counts, valid, protected_mask(valid, sink, window), order)
    assert hard_choice(with_protection(scores, sink, window), counts).equal(expected)


@pytest.mark.parametrize("scorer", ["keydiff", "snapkv"])
def test_scores_of_a_fixed_scorer_keep_their_order(scorer):
    model, found = lesson(scorer=scorer)
    reading = read(model, encode(word_tokenizer(), EXAMPLES[0], device="cpu")[0], [SCORERS[scorer].make()])
    (scores,) = reading.scores.values()
    ranked = lesson_scores(found, None)
    assert ranked.argsort(dim=-1).equal(scores[:, 0].argsort(dim=-1))
    torch.testing.assert_close(ranked.mean(-1), torch.zeros(3, 2), rtol=0, atol=1e-3)
    assert ((ranked.std(-1) > 0.8) & (ranked.std(-1) < 1.1)).all()


def step_of(found, family, keep, *, trained=None, fixed=False, draw=None):
    made, (model, _) = trained or gates(family), lesson(family)
    scores = None if fixed else made.scores
    return lesson_step(model, found, made.budgets, scores, keep=keep, settings=QUICK, draw=draw)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "gemma2", "gpt_oss"])
def test_a_step_sees_what_inference_does(family):
    """The loss by hand: from the answers of a cache that `compress` made with the same gates."""
    model, found = lesson(family)
    tokens, heads = found.features.shape[2], gates(family).origin.shape.num_heads
    total = tokens * heads // 4
    method = Method(scorer=learned_scorer(gates(family)), allocator=learned_budgets(gates(family)))
    context, _ = encode(word_tokenizer(), EXAMPLES[0], device="cpu")
    cut = headwise.compress(model, context, method, keep=f"{total / heads}tok")
    assert cut.lengths.unique().numel() > 2
    teaching = found.teaching
    rows, new = teaching.ids.shape
    at = torch.arange(tokens, tokens + new).expand(rows, -1)
    with torch.no_grad():
        kept = model(teaching.ids, position_ids=at, past_key_values=cut.fork(copies=rows)).logits
    kept = kept - kept.mean(-1, keepdim=True)
    squares = teaching.weight[..., None] * (kept - teaching.logits).square()
    by_hand = float(squares.sum() / (teaching.weight[..., None] * teaching.logits.square()).sum())
    objective, judged = step_of(found, family, total / (tokens * heads))
    assert judged.loss == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
    assert by_hand > 1e-3
    assert float(objective) == 0
    agree = (kept.argmax(-1) == teaching.logits.argmax(-1))[teaching.answer].float().mean()
    assert judged.agreement == pytest.approx(float(agree))


def test_with_everything_kept_there_is_nothing_to_lose():
    _, found = lesson(scorer="keydiff")
    judged = step_of(found, "llama", 1.0, fixed=True)[1]
    assert judged.loss == pytest.approx(0.0, abs=1e-8)
    assert judged.agreement == 1.0
    assert step_of(found, "llama", 0.1, fixed=True)[1].loss > 0.01


def test_soft_shares_become_the_hard_selection_as_they_cool():
    """What gradients go through, and what inference keeps."""
    _, found = lesson()
    with torch.no_grad():
        ranked = with_protection(lesson_scores(found, raw_scores(found, gates().scores)), QUICK.sink, QUICK.window)
        counts = budget_counts(
            gates().budgets(0.3, found.summary), ranked.shape[-1], round(0.3 * 6 * ranked.shape[-1])
        ).view(3, 2)
        hard = hard_choice(ranked, counts).float()
        distances = [
            float((soft_topk(ranked, counts.float(), warm) - hard).abs().mean()) for warm in (1.0, 0.1, 1e-2, 1e-5)
        ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.05 and distances[-1] < 1e-4


def test_every_parameter_of_both_parts_learns():
    _, found = lesson()
    made = make_gates(gates().origin.shape, sink=QUICK.sink, window=QUICK.window)
    for module in (made.budgets, made.scores):
        module.requires_grad_()
    step_of(found, "llama", 0.3, trained=made, draw=torch.Generator().manual_seed(0))[0].backward()
    for module in (made.budgets, made.scores):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and (parameter.grad != 0).any(), name
            assert parameter.grad.isfinite().all(), name


# --- steps ---


def trainer(model, lessons, *, scorer=None, part="lkv", changes=None, seed=0):
    torch.manual_seed(seed)
    shape, made = view(model).shape, replace(QUICK, **(changes or {}))
    return Trainer(
        model=model,
        lessons=lessons,
        settings=made,
        budgets=None if part == "lkv-t" else HeadBudgets(shape.num_heads, summary_width(shape)),
        scores=None if part == "lkv-h" else EntryScores(len(shape.layers), shape.kv_heads, shape.head_dim),
    )


def lessons_of(family="llama", scorer=None):
    return lesson(family)[0], [lesson(family, number, scorer)[1] for number in range(3)]


@pytest.mark.parametrize("number", [0, 30])
def test_a_step_does_the_same_whenever_it_is_done(number):
    """Whatever other random numbers were drawn; another seed or step does something else."""
    found = []
    for seed, step in ((7, number), (7, number), (8, number), (7, number + 1)):
        made = trainer(*lessons_of(), changes={"seed": seed})
        torch.rand(len(found))
        found.append((made.step(step), [parameter.detach().clone() for parameter in made.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(a.equal(b) for a, b in zip(found[0][1], found[1][1], strict=True))
    for other in found[2:]:
        assert other[0] != found[0][0]


@pytest.mark.parametrize("part", ["lkv", "lkv-h", "lkv-t"])
def test_a_step_changes_all_gates_and_nothing_else(part):
    model, lessons = lessons_of(scorer="keydiff" if part == "lkv-h" else None)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = trainer(model, lessons, part=part, changes={"keeps": (0.3, 0.5)})
    before = [parameter.detach().clone() for parameter in made.parameters()]
    for number in range(3):  # what follows a layer that starts with zeros moves one step later
        loss, agree = made.step(number)
        assert loss > 0
        assert 0 <= agree <= 1
    assert all(not new.equal(old) for new, old in zip(made.parameters(), before, strict=True))
    assert all(weight.equal(weights[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    kinds = {"lkv": 2, "lkv-h": 1, "lkv-t": 1}
    assert len(made.optimizer.param_groups) == kinds[part]


def test_without_budgets_of_their_own_all_heads_keep_alike():
    model, lessons = lessons_of()
    assert trainer(model, lessons, part="lkv-t").fractions(0.3).tolist() == pytest.approx([0.3] * 6)


def test_validation_is_of_the_averaged_gates_and_leaves_the_latest():
    model, lessons = lessons_of()
    made = trainer(model, lessons)
    for number in range(4):
        made.step(number)
    latest = [parameter.detach().clone() for parameter in made.parameters()]
    found = made.validate(lessons)
    assert all(a.equal(b) for a, b in zip(made.parameters(), latest, strict=True))
    assert found == made.validate(lessons)
    made.put(made.mean)
    assert made.validate(lessons) == found
    assert any(not mean.equal(last) for mean, last in zip(made.mean, latest, strict=True))


def test_processes_that_share_a_step_see_all_of_it_once():
    """Two ranks, one after the other: their sums are those of one process alone."""
    model, lessons = lessons_of()
    sums = []
    for rank, number in ((0, 1), (0, 2), (1, 2)):
        made = trainer(model, lessons)
        made.processes = Rank(rank, number)
        made.step(0)
        sums.append(made.processes.summed)
    for alone, first, second in zip(*sums, strict=True):
        torch.testing.assert_close(first + second, alone, rtol=1e-4, atol=1e-6)
    assert any((first != 0).any() for first in sums[1]) and any((second != 0).any() for second in sums[2])


# --- a planted problem ---


def planted_model(layer, head):
    """A model in which one KV head alone writes anything."""
    model, tokenizer = small_model()
    for number, decoder in enumerate(model.model.layers):
        weight = decoder.self_attn.o_proj.weight.view(-1, 2, 32)  # two query heads of 16 to a KV head
        weight[:, [h for h in range(2) if (number, h) != (layer, head)]] = 0
        weight *= 2
    return model, tokenizer


@pytest.mark.parametrize(("part", "layer", "head"), [("lkv", 1, 0), ("lkv-h", 2, 1)])
def test_training_gives_the_budget_to_the_head_that_matters(part, layer, head):
    model, tokenizer = planted_model(layer, head)
    headwise.enable(model)
    scorer = SCORERS["keydiff"].make() if part == "lkv-h" else None
    lessons = [prepare(model, tokenizer, example, QUICK, scorer) for example in EXAMPLES]
    changes = {"steps": 40, "lr_budgets": 5e-2, "sink": 0, "window": 0, "averaging": 0.8}
    made = trainer(model, lessons, part=part, changes=changes)
    before, _ = made.validate(lessons)
    for number in range(40):
        made.step(number)
    after, _ = made.validate(lessons)
    made.put(made.mean)
    with torch.no_grad():
        found = made.fractions(0.15).view(3, 2)
    others = [float(found[at]) for at in [(a, b) for a in range(3) for b in range(2)] if at != (layer, head)]
    assert float(found[layer, head]) > 3 * max(others)
    assert after < 0.7 * before
    assert math.isclose(float(found.mean()), 0.15, rel_tol=1e-4)
