"""Stage 1 data: sequences of random tokens whose continuation can only be copied from earlier in the sequence.

A model that starts here finds the induction circuit, on which every retrieval task rests. Small alphabets make single
tokens ambiguous, so that matching has to look at two tokens and not only at one.
"""

from collections.abc import Iterator

import numpy as np

from .trainer import Batch

FIRST_ORDINARY_TOKEN = 4  # the special tokens come before it
SMALLEST_ALPHABET = 12


def copying_batch(rng: np.random.Generator, *, rows: int, length: int, vocab_size: int, ambiguous: bool) -> Batch:
    """Mix repeated segments and queried tables half and half; every token that can be copied has weight one."""
    ids = np.zeros((rows, length), np.int64)
    weights = np.zeros((rows, length), np.float32)
    for row in range(rows):
        alphabet = _alphabet(rng, vocab_size, ambiguous=ambiguous and row % 4 < 2)
        fill = _repeated_segment if row % 2 else _queried_table
        ids[row], weights[row] = fill(rng, alphabet, length)
    return Batch.from_numpy(ids, weights, labels=["table" if row % 2 == 0 else "repeat" for row in range(rows)])


def _alphabet(rng: np.random.Generator, vocab_size: int, *, ambiguous: bool) -> np.ndarray:
    num_ordinary = vocab_size - FIRST_ORDINARY_TOKEN
    tokens = rng.permutation(num_ordinary) + FIRST_ORDINARY_TOKEN
    if not ambiguous:
        return tokens
    size = np.exp(rng.uniform(np.log(SMALLEST_ALPHABET), np.log(num_ordinary)))
    return tokens[: int(size)]


def _repeated_segment(rng: np.random.Generator, alphabet: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    period = int(np.exp(rng.uniform(np.log(3), np.log(length // 2))))
    ids = np.resize(rng.choice(alphabet, period), length)
    weights = np.zeros(length, np.float32)
    weights[period + 1 :] = 1.0
    return ids, weights


def _queried_table(rng: np.random.Generator, alphabet: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Records `mark key value value end`, then `ask mark key value value end` over and over in shuffled order."""
    mark, end, ask, *words = alphabet.tolist()
    most = min(len(words), length // 2 // 5)
    num_records = int(rng.integers(2, most + 1)) if most > 2 else 2
    keys = rng.permutation(words)[:num_records]
    records = [[mark, key, *rng.choice(words, 2), end] for key in keys]
    stream = [np.array(record) for record in records]
    stream_weights = [np.zeros(5, np.float32) for _ in records]
    for index in _endless_shuffles(rng, num_records):
        if sum(map(len, stream)) >= length:
            break
        stream.append(np.array([ask, *records[index]]))
        stream_weights.append(np.array([0, 0, 0, 1, 1, 0.2], np.float32))
    return np.concatenate(stream)[:length], np.concatenate(stream_weights)[:length]


def _endless_shuffles(rng: np.random.Generator, count: int) -> Iterator[int]:
    while True:
        yield from rng.permutation(count).tolist()
