import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from headwise.errors import BadInput
from headwise.tasks.mini_ruler.lexicon import (
    REFERENCE_LEXICON,
    REFERENCE_VOCABULARY,
    count_words_and_marks,
    split_words_and_marks,
)
from headwise.tasks.mini_ruler.suite import TASKS, generate


def test_vocabulary_has_512_different_tokens():
    assert len(REFERENCE_VOCABULARY) == len(set(REFERENCE_VOCABULARY)) == 512


def test_every_text_of_every_task_is_in_the_vocabulary():
    known = set(REFERENCE_VOCABULARY)
    for task in TASKS:
        sample = generate(task, lexicon=REFERENCE_LEXICON, length=512, seed=0, index=0)
        texts = [sample.context, *(f"{asked.prompt} {asked.completion}" for asked in sample.questions)]
        assert set(split_words_and_marks(" ".join(texts))) <= known


def test_tokens_are_words_and_marks():
    assert split_words_and_marks("? locker oak: old gate.") == ["?", "locker", "oak", ":", "old", "gate", "."]
    assert count_words_and_marks("no locker of oak had a red gate.") == 9


def test_keys_and_value_words_are_words_of_the_prose():
    prose = {word for pool in REFERENCE_LEXICON.prose_words.values() for word in pool}
    assert set(REFERENCE_LEXICON.keys) <= prose
    assert {word for pool in REFERENCE_LEXICON.value_parts for word in pool} <= prose
    assert set(REFERENCE_LEXICON.listed_words) <= prose


def test_drawn_keys_differ():
    keys = REFERENCE_LEXICON.draw_keys(np.random.default_rng(0), len(REFERENCE_LEXICON.keys))
    assert sorted(keys) == sorted(REFERENCE_LEXICON.keys)


def test_drawing_more_keys_than_there_are_is_refused():
    with pytest.raises(BadInput, match="257 different words asked from a pool of 256"):
        REFERENCE_LEXICON.draw_keys(np.random.default_rng(0), 257)


def test_drawn_values_differ_and_use_up_the_first_words():
    values = REFERENCE_LEXICON.draw_values(np.random.default_rng(0), 300)
    first_words = Counter(value.split()[0] for value in values)
    assert len(set(values)) == 300
    assert set(first_words.values()) <= {2, 3}


def test_prose_fills_every_placeholder():
    rng = np.random.default_rng(0)
    sentences = [REFERENCE_LEXICON.write_prose(rng) for _ in range(300)]
    assert len(set(sentences)) > 290
    assert all(re.fullmatch(r"[a-z ,;]+[.!]", sentence) for sentence in sentences)


def test_decoys_name_a_key_and_a_value_but_state_nothing():
    rng = np.random.default_rng(0)
    for _ in range(100):
        decoy = REFERENCE_LEXICON.write_decoy(rng, ["oak"], ["old gate"])
        assert "oak" in decoy
        assert "old gate" in decoy
        assert not re.search(r"(locker|basket|road) oak", decoy)


def test_another_lexicon_needs_no_change_of_the_tasks():
    numbers = tuple(f"{number:07d}" for number in range(1_000_000, 1_000_300))
    spelled = replace(REFERENCE_LEXICON, name="spelled", count_tokens=len, value_parts=(numbers,), answer_margin=20)
    sample = generate("niah_multikey", lexicon=spelled, length=3000, seed=0, index=0)
    assert sample.questions[0].answers[0] in numbers
    assert 2800 < len(sample.context) <= 3000
