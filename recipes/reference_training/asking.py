"""Stage 2 data: mini-RULER documents followed by their questions and ideal answers, as token ids.

The stream is the one inference sees: the beginning of the document is token 1, then the context, then a question. In
training more questions and answers follow, which supervises many tokens per document.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from headwise.tasks.mini_ruler import suite as mini_ruler
from headwise.tasks.mini_ruler.lexicon import BOS, EOS, REFERENCE_LEXICON, REFERENCE_VOCABULARY, split_words_and_marks
from headwise.tasks.mini_ruler.suite import Document, Question

from .trainer import Batch

MIXED = "mixed"  # records, listings and chains in one document, as in the demo
LISTINGS = "listings"  # a document packed with keys of several values
LISTING_TOKENS = 25  # four values of a key and a record that distracts
CONTEXT_WEIGHT = 0.002
END_WEIGHT = 0.2
MOST_ALTERNATIVES = mini_ruler.NUM_COMMON_WORDS - 1
# The least share of a row that the context takes; the rest is for questions. Rows of few questions have it all.
LEAST_CONTEXT_SHARE = {
    "niah_multikey": 0.7,
    "niah_multikey_dense": 0.5,
    "niah_multivalue": 0.85,
    "niah_multiquery": 0.6,
    "vt": 0.8,
    MIXED: 0.6,
    LISTINGS: 0.5,
}
SHORTEST_SHARED_LENGTH = 128  # below it the context of every task takes all it can

_TOKEN_IDS = {word: index for index, word in enumerate(REFERENCE_VOCABULARY)}
# Questions whose answers may come in any order (every answer not yet given counts as right): prompt -> separator.
_UNORDERED = {
    wording.question.split("{")[0]: wording.separator
    for wording in (REFERENCE_LEXICON.listing, REFERENCE_LEXICON.common_words, REFERENCE_LEXICON.frequent_words)
}


def encode(text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    return [_TOKEN_IDS[word] for word in split_words_and_marks(text)]


def encode_document(text: str) -> list[int]:
    """Return the token ids of a text that stands at the beginning, as the tokenizer writes them by default."""
    return [_TOKEN_IDS[BOS], *encode(text)]


def asking_batch(rng: np.random.Generator, *, rows: int, length: int, mix: Mapping[str, float], seed: int) -> Batch:
    """Draw the task of every row from `mix` and write its stream; unused room at the end of a row weighs nothing."""
    shares = np.array(list(mix.values()))
    labels = rng.choice(list(mix), rows, p=shares / shares.sum()).tolist()
    streams = [_stream(rng, task, length, seed) for task in labels]
    return Batch.from_numpy(
        np.stack([stream.ids for stream in streams]),
        np.stack([stream.weights for stream in streams]),
        labels=labels,
        alternatives=np.stack([stream.alternatives for stream in streams]),
    )


def mixed_document(rng: np.random.Generator, length: int) -> Document:
    """Write a document of records, listings and chains, mostly records; no key has two records."""
    lexicon = REFERENCE_LEXICON
    num_lookups, num_listings, num_chains = (max(1, length // tokens) for tokens in (14, 400, 200))
    num_several = max(mini_ruler.NUM_KEYS_PER_QUERY, num_lookups // 8)
    keys = lexicon.draw_keys(rng, num_lookups + num_several + num_listings)
    facts = [
        mini_ruler.lookup_facts(lexicon, rng, keys[:num_lookups]),
        mini_ruler.several_lookups_facts(lexicon, rng, keys[num_lookups:-num_listings]),
        mini_ruler.listing_facts(lexicon, rng, keys[-num_listings:]),
        mini_ruler.chain_facts(lexicon, lexicon.draw_keys(rng, num_chains * (mini_ruler.NUM_HOPS + 1))),
    ]
    return mini_ruler.hide(lexicon, rng, facts, length)


class _Stream:
    """One row being filled: ids, loss weights and alternatives, all of the row's length."""

    def __init__(self, length: int) -> None:
        self.ids = np.zeros(length, np.int64)
        self.weights = np.zeros(length, np.float32)
        self.alternatives = np.full((length, MOST_ALTERNATIVES), -1, np.int64)
        self.used = 0

    def append(self, ids: Sequence[int], weight: float) -> None:
        """Write tokens that weigh `weight` each."""
        end = self.used + len(ids)
        self.ids[self.used : end] = ids
        self.weights[self.used : end] = weight
        self.used = end

    @property
    def room(self) -> int:
        return len(self.ids) - self.used


def _stream(rng: np.random.Generator, task: str, length: int, seed: int) -> _Stream:
    document = _document(rng, task, length, seed)
    stream = _Stream(length)
    stream.append(encode_document(document.context), CONTEXT_WEIGHT)
    for question in _asked(rng, document.questions):
        prompt = encode(question.prompt)
        if stream.room <= len(prompt) + len(encode(question.completion)):
            break
        stream.append(prompt, 0.0)
        _append_answer(rng, stream, question)
        stream.append([_TOKEN_IDS[EOS]], END_WEIGHT)
    answer = stream.weights > CONTEXT_WEIGHT
    # Rows with many answers would drown those with few.
    stream.weights[answer] /= answer.sum() ** 0.5
    return stream


def _document(rng: np.random.Generator, task: str, length: int, seed: int) -> Document:
    least = LEAST_CONTEXT_SHARE.get(task, 1.0) if length >= SHORTEST_SHARED_LENGTH else 1.0
    context_length = round(length * rng.uniform(least, 1.0)) - 1  # one token is for the end of the answer
    index = int(rng.integers(2**62))
    sample_rng = mini_ruler.seeded_generator("train", task=task, length=length, seed=seed, index=index)
    if task == MIXED:
        return mixed_document(sample_rng, context_length)
    if task == LISTINGS:
        return _listings_document(sample_rng, context_length)
    return mini_ruler.find_task(task).write(REFERENCE_LEXICON, sample_rng, context_length)


def _listings_document(rng: np.random.Generator, length: int) -> Document:
    most = (length - LISTING_TOKENS) // LISTING_TOKENS
    num_keys = int(rng.integers((most + 1) // 2, most + 1))
    keys = REFERENCE_LEXICON.draw_keys(rng, num_keys)
    return mini_ruler.hide(REFERENCE_LEXICON, rng, [mini_ruler.listing_facts(REFERENCE_LEXICON, rng, keys)], length)


def _append_answer(rng: np.random.Generator, stream: _Stream, question: Question) -> None:
    separator = _separator_if_unordered(question)
    if separator is None:
        stream.append(encode(question.completion), 1.0)
        return
    answers = [encode(question.answers[i]) for i in rng.permutation(len(question.answers))]
    for index, answer in enumerate(answers):
        if index:
            stream.append(encode(separator), 1.0)
        others = [other[0] for other in answers[index + 1 :]]
        stream.alternatives[stream.used, : len(others)] = others
        # The more has been given, the harder it is to find what has not.
        stream.append(answer[:1], 1.0 + index)
        stream.append(answer[1:], 1.0)


def _separator_if_unordered(question: Question) -> str | None:
    for start, separator in _UNORDERED.items():
        if question.prompt.startswith(start):
            return separator
    return None


def _asked(rng: np.random.Generator, questions: Sequence[Question]) -> Iterator[Question]:
    """Ask every question once, then again those in order: a list would be copied from when it was given before."""
    yield from _shuffled(rng, questions)
    ordered = [question for question in questions if _separator_if_unordered(question) is None]
    while ordered:
        yield from _shuffled(rng, ordered)


def _shuffled(rng: np.random.Generator, questions: Sequence[Question]) -> list[Question]:
    return [questions[i] for i in rng.permutation(len(questions))]
