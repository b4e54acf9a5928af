import re
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import BadInput
from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON
from headwise.tasks.mini_ruler.suite import (
    DECOY_SHARE,
    NUM_COMMON_WORDS,
    NUM_FREQUENT_WORDS,
    TASKS,
    Question,
    Sample,
    generate,
    score,
)

LENGTHS = (64, 128, 300, 1024)
LONGEST_SENTENCE = 24  # of the filler, in tokens
COUNTING_TASKS = ("cwe", "fwe")
RECORD_TASKS = ("niah_single", "niah_multikey", "niah_multikey_dense", "niah_multiquery")


def make(task: str, length: int = 256, **changes) -> Sample:
    return generate(task, **{"lexicon": REFERENCE_LEXICON, "length": length, "seed": 0, "index": 0} | changes)


def num_tokens(sample: Sample) -> int:
    """Count special tokens, the context, and the question that takes most with its ideal answer."""
    count = REFERENCE_LEXICON.count_tokens
    longest = max(count(f"{question.prompt} {question.completion}") for question in sample.questions)
    return REFERENCE_LEXICON.num_special_tokens + count(sample.context) + longest


@pytest.mark.parametrize("task", TASKS)
def test_same_arguments_same_sample(task):
    assert make(task) == make(task)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("change", [{"seed": 1}, {"index": 1}, {"length": 257}, {"split": "train"}])
def test_every_part_of_the_seed_matters(task, change):
    assert make(task).context != make(task, **change).context


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint(task):
    contexts = {
        split: {make(task, 128, split=split, index=index).context for index in range(8)}
        for split in ("train", "calibration", "evaluation", "demo")
    }
    assert sum(map(len, contexts.values())) == len(set.union(*contexts.values())) == 32


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_length_is_met_to_within_a_sentence(task, length):
    assert length - LONGEST_SENTENCE < num_tokens(make(task, length)) <= length


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_answer_stands_in_the_context_and_in_the_completion(task, length):
    sample = make(task, length)
    for question in sample.questions:
        assert all(re.search(rf"\b{answer}\b", sample.context) for answer in question.answers)
        assert score(question.completion, question) == 1.0


@pytest.mark.parametrize("task", RECORD_TASKS)
def test_a_record_states_the_answer_once_and_right_after_its_key(task):
    sample = make(task, 512)
    for question in sample.questions:
        keys = question.prompt.removesuffix(":").split()[2:]
        for key, answer in zip(keys, question.answers, strict=True):
            assert re.findall(rf"\blocker {key} (\w+ \w+)\.", sample.context) == [answer]


def test_multivalue_states_all_values_of_the_key():
    sample = make("niah_multivalue", 512)
    for question in sample.questions:
        key = question.prompt.removesuffix(",").split()[-1]
        assert sorted(re.findall(rf"\bbasket {key} (\w+ \w+)\.", sample.context)) == sorted(question.answers)
        assert len({answer.split()[0] for answer in question.answers}) == len(question.answers) == 4


def test_chain_can_be_followed_hop_by_hop():
    sample = make("vt", 512)
    roads = dict(re.findall(r"\broad (\w+) (\w+)\.", sample.context))
    for question in sample.questions:
        name = question.prompt.split()[-1]
        for answer in question.answers:
            name = roads[name]
            assert name == answer
        assert name not in roads


@pytest.mark.parametrize(("task", "asked"), [("cwe", NUM_COMMON_WORDS), ("fwe", NUM_FREQUENT_WORDS)])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_asked_words_stand_out(task, asked, length):
    sample = make(task, length)
    words = re.findall(r"\w+", sample.context)
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert set(ranked[:asked]) == set(sample.questions[0].answers)
    assert words.count(ranked[asked - 1]) >= 1.4 * words.count(ranked[asked])


@pytest.mark.parametrize("task", TASKS)
def test_context_does_not_depend_on_what_is_asked(task):
    everything = make(task)
    for count in {1, len(everything.questions) // 2 or 1}:
        fewer = make(task, num_questions=count)
        assert fewer.context == everything.context
        assert fewer.questions == everything.questions[:count]
        assert fewer.max_new_tokens == everything.max_new_tokens


@pytest.mark.parametrize("task", TASKS)
def test_questions_of_a_sample_differ(task):
    prompts = [question.prompt for question in make(task, 1024).questions]
    assert len(set(prompts)) == len(prompts) == TASKS[task].num_questions


def test_dense_task_is_full_of_records_and_asks_forty():
    sample = make("niah_multikey_dense", 512)
    assert len(sample.questions) == 40
    records = re.findall(r"\blocker \w+ \w+ \w+\.", sample.context)
    assert " ".join(records) == sample.context


def test_dense_task_uses_every_key_and_then_filler():
    sample = make("niah_multikey_dense", 2048)
    assert len(re.findall(r"\blocker \w+ \w+ \w+\.", sample.context)) == len(REFERENCE_LEXICON.keys)
    assert 2048 - LONGEST_SENTENCE < num_tokens(sample) <= 2048


@pytest.mark.parametrize("task", ["niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt"])
def test_decoys_name_keys_outside_the_facts(task):
    sample = make(task, 1024)
    sentences = re.findall(r"[^.!]+[.!]", sample.context)
    filler = [sentence for sentence in sentences if not re.match(r" ?(locker|basket|road) \w+ \w+( \w+)?\.", sentence)]
    keys = set(re.findall(r"\b(?:locker|basket|road) (\w+) \w+(?: \w+)?\.", sample.context))
    decoys = [sentence for sentence in filler if keys & set(re.findall(r"\w+", sentence))]
    assert len(decoys) > DECOY_SHARE / 2 * len(filler)


def test_filler_knows_all_keys_and_value_words():
    rng = np.random.default_rng(0)
    words = {word for _ in range(1200) for word in re.findall(r"\w+", REFERENCE_LEXICON.write_prose(rng))}
    assert set(REFERENCE_LEXICON.keys) <= words
    assert {word for pool in REFERENCE_LEXICON.value_parts for word in pool} <= words


def test_max_new_tokens_covers_every_completion():
    for task in TASKS:
        sample = make(task, 512)
        longest = max(REFERENCE_LEXICON.count_tokens(question.completion) for question in sample.questions)
        assert longest < sample.max_new_tokens <= longest + 8


@settings(max_examples=25, deadline=None)
@given(task=st.sampled_from(sorted(TASKS)), length=st.integers(80, 1500), index=st.integers(0, 10**9))
def test_any_length_works(task, length, index):
    sample = make(task, length, index=index, split="train")
    assert num_tokens(sample) <= length
    assert sample.questions


def test_unknown_task_names_those_there_are():
    with pytest.raises(BadInput, match=r"'niah'.*niah_single"):
        make("niah")


def test_unknown_split_names_those_there_are():
    with pytest.raises(BadInput, match=r"'test'.*evaluation"):
        make("vt", split="test")


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_is_refused(task):
    with pytest.raises(BadInput, match="length 10 is too short"):
        make(task, 10)


@pytest.mark.parametrize("count", [0, 2])
def test_wrong_number_of_questions_is_refused(count):
    with pytest.raises(BadInput, match="it has 1 to 1"):
        make("cwe", num_questions=count)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("old gate, red boat", 1.0),
        ("Red boat and then the OLD\n gate", 1.0),
        ("old gate", 0.5),
        ("old, gate red boats", 0.0),
        ("bold gate, red boat", 0.5),
        ("", 0.0),
    ],
)
def test_score_is_the_share_of_answers_found_as_whole_words(prediction, expected):
    question = Question(prompt="? basket oak", answers=("old gate", "red boat"), completion="old gate, red boat")
    assert score(prediction, question) == expected


def test_samples_are_frozen():
    with pytest.raises(FrozenInstanceError):
        make("vt").context = ""
