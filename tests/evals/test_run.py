"""Evaluation on generated tasks: records, measured fractions, the same again for the same seed."""

import pytest
from families import tiny_model
from folders import CHAT_TEMPLATE, word_tokenizer

from headwise.errors import BadInput, BudgetInfeasible
from headwise.evals.lexicon import REFERENCE_LEXICON
from headwise.evals.mini_ruler import TASKS, generate
from headwise.evals.run import Record, evaluate, lexicon_for, parse_tasks

FIELDS = {
    "method",
    "keep",
    "task",
    "length",
    "samples",
    "accuracy",
    "full_accuracy",
    "kv_fraction",
    "seed",
    "protocol",
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=len(word_tokenizer()))


def evaluated(model, **changes) -> list[Record]:
    options = {
        "tasks": ["niah_single", "vt"],
        "methods": ["full", "snapkv", "keydiff+global"],
        "keeps": [0.25, 0.5],
        "samples": 2,
        "length": 160,
    }
    return evaluate(model, word_tokenizer(), **{**options, **changes})


@pytest.fixture(scope="module")
def records(model):
    return evaluated(model)


def test_a_record_for_every_task_method_and_keep(records):
    assert [(r.task, r.method, r.keep) for r in records] == [
        (task, method, keep)
        for task in ("niah_single", "vt")
        for method, keep in [
            ("full", 1.0),
            ("snapkv", 0.25),
            ("snapkv", 0.5),
            ("keydiff+global", 0.25),
            ("keydiff+global", 0.5),
        ]
    ]
    for record in records:
        assert set(Record.__dataclass_fields__) == FIELDS
        assert (record.length, record.samples, record.seed, record.protocol) == (160, 2, 0, "query-agnostic")
        assert 0 <= record.accuracy <= 1


def test_fractions_are_measured_and_near_to_what_was_asked(records):
    for record in records:
        assert record.kv_fraction == pytest.approx(record.keep, abs=0.005)


def test_full_rows_are_the_yardstick(records):
    for record in records:
        (full,) = [r for r in records if (r.task, r.method) == (record.task, "full")]
        assert (full.keep, full.kv_fraction, full.accuracy) == (1.0, 1.0, full.full_accuracy)
        assert record.full_accuracy == full.accuracy


def test_everything_kept_is_as_good_as_the_full_cache(model):
    for record in evaluated(model, methods=["random"], keeps=[1.0], tasks=["niah_multikey"]):
        assert (record.accuracy, record.kv_fraction) == (record.full_accuracy, 1.0)


def test_the_same_seed_gives_the_same_records(model, records):
    assert evaluated(model) == records


def test_another_seed_gives_other_samples(model, monkeypatch):
    seen = {}
    for seed in (0, 1):
        texts = seen.setdefault(seed, [])

        def noted(*args, texts=texts, **kwargs):
            sample = generate(*args, **kwargs)
            texts.append(sample.context)
            return sample

        monkeypatch.setattr("headwise.evals.run.generate", noted)
        evaluated(model, seed=seed, methods=["full"])
        assert texts
    assert not set(seen[0]) & set(seen[1])


def test_names_given_twice_count_once(model):
    records = evaluated(model, tasks=["vt", "vt"], methods=["snapkv", "snapkv"], keeps=[0.5, "0.5", "50%"], samples=1)
    assert [(r.task, r.method, r.keep, r.samples) for r in records] == [("vt", "snapkv", 0.5, 1)]


def test_progress_counts_samples(model):
    steps = []
    evaluated(model, methods=["full"], progress=lambda done, total: steps.append((done, total)))
    assert steps == [(n, 4) for n in range(5)]


def test_lengths_are_counted_with_the_tokenizer_at_hand():
    tokenizer = word_tokenizer()
    lexicon = lexicon_for(tokenizer)
    assert lexicon.num_special_tokens == 1
    assert lexicon.count_tokens("locker apple, copper.") == 5
    assert lexicon.keys == REFERENCE_LEXICON.keys


def test_a_chat_model_is_evaluated_too(model):
    (record,) = evaluate(
        model, word_tokenizer(CHAT_TEMPLATE), tasks=["vt"], methods=["snapkv"], keeps=["40tok"], samples=1, length=160
    )
    assert record.keep == "40tok"
    assert 0.2 < record.kv_fraction < 0.4


def test_task_names():
    assert parse_tasks("mini-ruler") == list(TASKS)
    assert parse_tasks("mini-ruler:vt, niah_single,") == ["vt", "niah_single"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the suite is 'mini-ruler'"),
        ("ruler", "the suite is 'mini-ruler'"),
        ("mini-ruler:", "names no task"),
        ("mini-ruler:vt,nope", "'nope'; the tasks are"),
    ],
)
def test_task_names_that_are_none(text, message):
    with pytest.raises(BadInput, match=message):
        parse_tasks(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keeps": [0.5, 0.1]}, r"snapkv cannot work with keep=0\.1"),
        ({"tasks": ["niah_single", "cwe"], "length": 60, "keeps": [0.5]}, "snapkv cannot work with keep=0.5"),
    ],
)
def test_a_budget_that_some_task_cannot_meet_is_refused_before_any_work(model, monkeypatch, changes, message):
    for name in ("read_context", "read"):
        monkeypatch.setattr(f"headwise.evals.run.{name}", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(BudgetInfeasible, match=message):
        evaluated(model, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"length": -5}, "length=-5"),
        ({"seed": -1}, "seed=-1"),
        ({"length": 8}, "too short"),
        ({"length": 5000}, "made for 1024"),
        ({"tasks": []}, "nothing to evaluate"),
        ({"tasks": ["nope"]}, "the tasks are"),
        ({"keeps": []}, "nothing to evaluate"),
        ({"keeps": [2.0]}, "outside"),
        ({"methods": []}, "no method is named"),
        ({"methods": ["nope"]}, "no scorer 'nope'"),
    ],
)
def test_what_cannot_be_evaluated(model, changes, message):
    with pytest.raises(BadInput, match=message):
        evaluated(model, **changes)
