"""Generate the mini-RULER tasks: seeded documents with questions, and how an answer is scored.

The task types are those of RULER (Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language
Models?", arXiv:2404.06654). Ours differ in three ways: a document carries many questions, written without knowing which
will be asked, so that compression is judged query-agnostically; needles share their words with the filler; and
`niah_multikey_dense` packs the document with records and nothing else. The words come from a `Lexicon`.

Splits cannot overlap, by construction: all randomness of a sample comes from one generator seeded with the tuple
(split, task, length, seed, index), and a split's number is the first entry of the tuple, so no two splits share a seed.
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from headwise.errors import BadInput
from headwise.tasks.metrics import answers_found
from headwise.tasks.mini_ruler.lexicon import Lexicon, Wording

SPLITS = ("train", "calibration", "evaluation", "demo")

DECOY_SHARE = 0.25  # of the filler sentences
NUM_DECOY_VALUES = 16
NUM_VALUES_PER_LISTING = 4
NUM_KEYS_PER_QUERY = 4
NUM_HOPS = 4
NUM_COMMON_WORDS = 4
COMMON_WORD_SHARE = 0.1  # of the list, for each common word; an uncommon one has about 0.01
NUM_FREQUENT_WORDS = 3
# Zipf's law, except that the asked words stand out: the fourth is 0.4 times as frequent as the third.
FREQUENT_WORD_WEIGHTS = (0.25, 0.22, 0.2, *(1 / (3 * rank) for rank in range(4, 21)))
SHORTEST_WORD_LIST = 30
WORDS_PER_LISTED_SENTENCE = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question after the document, and its answers."""

    prompt: str
    answers: tuple[str, ...]  # phrases that a right answer contains, in any order
    completion: str  # an ideal answer, as a model in training sees it


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A document with questions that can each be asked right after it."""

    task: str
    context: str
    questions: tuple[Question, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Statements to place in a document in any order, questions about them, and the keys that decoys may name."""

    statements: tuple[str, ...]
    questions: tuple[Question, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A context and all questions about it, in random order."""

    context: str
    questions: tuple[Question, ...]


WriteDocument = Callable[[Lexicon, np.random.Generator, int], Document]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task type: what it asks, how many questions a sample has at most by default, how answers are judged."""

    description: str
    num_questions: int
    judged: str
    write: WriteDocument = field(repr=False)  # (lexicon, rng, length) -> document


def generate(
    task: str,
    *,
    lexicon: Lexicon,
    length: int,
    seed: int,
    index: int,
    split: str = "evaluation",
    num_questions: int | None = None,
) -> Sample:
    """Generate sample `index` of a task.

    `length` is the most tokens that special tokens, context, one question and its ideal answer take together. The
    context is the same for any `num_questions`; a smaller number gives the first of the same questions. Raises BadInput
    if the task or split is unknown, the length is too short, or the context cannot answer so many questions.
    """
    rng = seeded_generator(split, task=task, length=length, seed=seed, index=index)
    document = find_task(task).write(lexicon, rng, length)
    available = len(document.questions)
    if num_questions is None:
        num_questions = min(TASKS[task].num_questions, available)
    if not 1 <= num_questions <= available:
        raise BadInput(f"{num_questions} questions asked of {task} at length {length}; it has 1 to {available}")
    questions = document.questions[:num_questions]
    longest = max(lexicon.count_tokens(question.completion) for question in document.questions)
    return Sample(
        task=task, context=document.context, questions=questions, max_new_tokens=longest + lexicon.answer_margin
    )


def find_task(name: str) -> Task:
    """Return a task by its name. Raises BadInput if there is none."""
    if name not in TASKS:
        raise BadInput(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def seeded_generator(split: str, *, task: str, length: int, seed: int, index: int) -> np.random.Generator:
    """Return the random generator of one sample. Raises BadInput if the split is unknown.

    The module's docstring says why splits cannot overlap.
    """
    if split not in SPLITS:
        raise BadInput(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    return np.random.default_rng((SPLITS.index(split), zlib.crc32(task.encode()), length, seed, index))


def score(prediction: str, question: Question) -> float:
    """Return the share of the question's answers that the generated text contains, as whole words, in any case."""
    return answers_found(prediction, question.answers)


def lookup_facts(lexicon: Lexicon, rng: np.random.Generator, keys: Sequence[str]) -> Facts:
    """Make records of one value per key, and one question for each."""
    records = list(zip(keys, lexicon.draw_values(rng, len(keys)), strict=True))
    return Facts(
        statements=_state(lexicon.lookup, records),
        questions=tuple(_question(lexicon.lookup, [record]) for record in records),
        keys=tuple(keys),
    )


def several_lookups_facts(lexicon: Lexicon, rng: np.random.Generator, keys: Sequence[str]) -> Facts:
    """Make records of one value per key, and questions that each ask for several keys."""
    records = list(zip(keys, lexicon.draw_values(rng, len(keys)), strict=True))
    choices = [rng.permutation(len(keys))[:NUM_KEYS_PER_QUERY] for _ in keys]
    return Facts(
        statements=_state(lexicon.several_lookups, records),
        questions=tuple(_question(lexicon.several_lookups, [records[i] for i in choice]) for choice in choices),
        keys=tuple(keys),
    )


def listing_facts(lexicon: Lexicon, rng: np.random.Generator, keys: Sequence[str]) -> Facts:
    """Make keys of several values each, with other records under the same keys as distraction."""
    values = lexicon.draw_values(rng, len(keys) * NUM_VALUES_PER_LISTING)
    listed = [(key, value) for n, key in enumerate(keys) for value in values[n :: len(keys)]]
    distracting = zip(keys, lexicon.draw_values(rng, len(keys)), strict=True)
    return Facts(
        statements=_state(lexicon.listing, listed) + _state(lexicon.lookup, distracting),
        questions=tuple(_question(lexicon.listing, [pair for pair in listed if pair[0] == key]) for key in keys),
        keys=tuple(keys),
    )


def chain_facts(lexicon: Lexicon, names: Sequence[str]) -> Facts:
    """Make chains in which every name leads to the next. A question gives the first name and asks for all others."""
    num_chains = len(names) // (NUM_HOPS + 1)
    chains = [list(itertools.pairwise(names[n::num_chains])) for n in range(num_chains)]
    return Facts(
        statements=_state(lexicon.chain, [link for chain in chains for link in chain]),
        questions=tuple(_chain_question(lexicon.chain, chain) for chain in chains),
        keys=tuple(names),
    )


def hide(lexicon: Lexicon, rng: np.random.Generator, facts: Sequence[Facts], length: int) -> Document:
    """Place facts among filler and decoys. Raises BadInput if `length` has no room for all the statements."""
    statements = [statement for part in facts for statement in part.statements]
    questions = [question for part in facts for question in part.questions]
    keys = [key for part in facts for key in part.keys]
    room = _room_for_context(lexicon, questions, length)
    taken = sum(_cost(lexicon, statement) for statement in statements)
    if taken > room:
        raise BadInput(f"length {length} is too short: these facts need at least {length + taken - room}")
    filler = _write_filler(lexicon, rng, keys, room - taken)
    sentences = statements + filler
    context = " ".join(sentences[i] for i in rng.permutation(len(sentences)))
    return Document(context=context, questions=tuple(questions[i] for i in rng.permutation(len(questions))))


def _state(wording: Wording, pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(wording.statement.format(key=key, value=value) for key, value in pairs)


def _question(wording: Wording, pairs: Sequence[tuple[str, str]]) -> Question:
    """Ask for the different keys of `pairs`; all their values are the answers."""
    keys = dict.fromkeys(key for key, _ in pairs)
    return Question(
        prompt=wording.question.format(key=" ".join(keys)),
        answers=tuple(value for _, value in pairs),
        completion=wording.separator.join(wording.answer.format(key=key, value=value) for key, value in pairs),
    )


def _chain_question(wording: Wording, links: Sequence[tuple[str, str]]) -> Question:
    names = [name for _, name in links]
    parts = [names[0], *(wording.answer.format(key=key, value=value) for key, value in links[1:])]
    return Question(
        prompt=wording.question.format(key=links[0][0]),
        answers=tuple(names),
        completion=wording.separator.join(parts),
    )


def _room_for_context(lexicon: Lexicon, questions: Sequence[Question], length: int) -> int:
    longest = max(_cost(lexicon, f"{question.prompt} {question.completion}") for question in questions)
    return length - lexicon.num_special_tokens - longest


def _cost(lexicon: Lexicon, text: str) -> int:
    """Count the tokens of a text together with the space that sets it apart."""
    return lexicon.count_tokens(f" {text}")


def _write_filler(lexicon: Lexicon, rng: np.random.Generator, keys: Sequence[str], room: int) -> list[str]:
    """Write prose and decoys until the next sentence would not fit."""
    decoy_values = lexicon.draw_values(rng, NUM_DECOY_VALUES)
    sentences: list[str] = []
    while True:
        decoy = rng.random() < DECOY_SHARE
        sentence = lexicon.write_decoy(rng, keys, decoy_values) if decoy else lexicon.write_prose(rng)
        room -= _cost(lexicon, sentence)
        if room < 0:
            return sentences
        sentences.append(sentence)


def _write_single(lexicon: Lexicon, rng: np.random.Generator, length: int) -> Document:
    keys = lexicon.draw_keys(rng, 1)
    return hide(lexicon, rng, [lookup_facts(lexicon, rng, keys)], length)


def _write_multikey(lexicon: Lexicon, rng: np.random.Generator, length: int) -> Document:
    keys = lexicon.draw_keys(rng, _from_one_to(8, length // 16))
    return hide(lexicon, rng, [lookup_facts(lexicon, rng, keys)], length)


def _write_dense(lexicon: Lexicon, rng: np.random.Generator, length: int) -> Document:
    everything = lookup_facts(lexicon, rng, lexicon.draw_keys(rng, len(lexicon.keys)))
    room = _room_for_context(lexicon, everything.questions, length)
    ends = np.cumsum([_cost(lexicon, statement) for statement in everything.statements])
    fitting = max(1, int(np.searchsorted(ends, room, side="right")))
    facts = Facts(
        statements=everything.statements[:fitting],
        questions=everything.questions[:fitting],
        keys=everything.keys[:fitting],
    )
    return hide(lexicon, rng, [facts], length)


def _write_multivalue(lexicon: Lexicon, rng: np.random.Generator, length: int) -> Document:
    keys = lexicon.draw_keys(rng, _from_one_to(4, length // 128))
    return hide(lexicon, rng, [listing_facts(lexicon, rng, keys)], length)


def _write_multiquery(lexicon: Lexicon, rng: np.random.Generator, length: int) -> Document:
    keys = lexicon.draw_keys(rng, max(NUM_KEYS_PER_QUERY, _from_one_to(8, length // 16)))
    return hide(lexicon, rng, [several_lookups_facts(lexicon, rng, keys)], length)


def _write_chains(lexicon: Lexicon, rng: np.random.Generator, length: int) -> Document:
    names = lexicon.draw_keys(rng, _from_one_to(4, length // 64) * (NUM_HOPS + 1))
    return hide(lexicon, rng, [chain_facts(lexicon, names)], length)


def _from_one_to(limit: int, fitting: int) -> int:
    return max(1, min(limit, fitting))


def _write_common_words(lexicon: Lexicon, rng: np.random.Generator, length: int) -> Document:
    words = lexicon.draw_listed_words(rng, len(lexicon.listed_words))
    common, uncommon = words[:NUM_COMMON_WORDS], words[NUM_COMMON_WORDS:]

    def make_list(num_words: int) -> list[str]:
        repeats = max(2, round(COMMON_WORD_SHARE * num_words))
        num_uncommon = num_words - repeats * len(common)
        return common * repeats + np.resize(uncommon, num_uncommon).tolist()

    return _write_word_list(lexicon, rng, length, lexicon.common_words, common, make_list)


def _write_frequent_words(lexicon: Lexicon, rng: np.random.Generator, length: int) -> Document:
    words = lexicon.draw_listed_words(rng, len(FREQUENT_WORD_WEIGHTS))
    shares = np.array(FREQUENT_WORD_WEIGHTS) / sum(FREQUENT_WORD_WEIGHTS)

    def make_list(num_words: int) -> list[str]:
        return np.repeat(words, np.round(shares * num_words).astype(int)).tolist()

    return _write_word_list(lexicon, rng, length, lexicon.frequent_words, words[:NUM_FREQUENT_WORDS], make_list)


def _write_word_list(
    lexicon: Lexicon,
    rng: np.random.Generator,
    length: int,
    wording: Wording,
    answers: Sequence[str],
    make_list: Callable[[int], list[str]],
) -> Document:
    """Write the longest shuffled list that fits, and the question for the words that stand out in it."""
    question = _question(wording, [("", answer) for answer in answers])
    room = _room_for_context(lexicon, [question], length)
    num_words = room
    while num_words >= SHORTEST_WORD_LIST:
        context = _as_sentences(wording, rng.permutation(make_list(num_words)).tolist())
        num_tokens = lexicon.count_tokens(context)
        if num_tokens <= room:
            return Document(context=context, questions=(question,))
        num_words = min(num_words - 1, num_words * room // num_tokens)
    raise BadInput(f"length {length} is too short for a list of at least {SHORTEST_WORD_LIST} words; double it")


def _as_sentences(wording: Wording, words: Sequence[str]) -> str:
    starts = range(0, len(words), WORDS_PER_LISTED_SENTENCE)
    stated = [wording.statement.format(key="", value=word) for word in words]
    return " ".join(" ".join(stated[start : start + WORDS_PER_LISTED_SENTENCE]) + "." for start in starts)


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "niah_single": Task(
            description="one record in filler, asked by its key",
            num_questions=1,
            judged="the value",
            write=_write_single,
        ),
        "niah_multikey": Task(
            description="a few records in filler, each asked by its key",
            num_questions=4,
            judged="the value",
            write=_write_multikey,
        ),
        "niah_multikey_dense": Task(
            description="a document packed with records, each asked by its key",
            num_questions=40,
            judged="the value",
            write=_write_dense,
        ),
        "niah_multivalue": Task(
            description="keys with four values each, all of them asked at once",
            num_questions=4,
            judged="share of the four values, in any order",
            write=_write_multivalue,
        ),
        "niah_multiquery": Task(
            description="a few records in filler, four keys in one question",
            num_questions=4,
            judged="share of the four values, in any order",
            write=_write_multiquery,
        ),
        "vt": Task(
            description="chains of names that lead from one to the next, followed from their first name",
            num_questions=4,
            judged="share of the four names, in any order",
            write=_write_chains,
        ),
        "cwe": Task(
            description="a word list in which four words are common",
            num_questions=1,
            judged="share of the four words, in any order",
            write=_write_common_words,
        ),
        "fwe": Task(
            description="a word list with Zipf frequencies, asked for the three most frequent words",
            num_questions=1,
            judged="share of the three words, in any order",
            write=_write_frequent_words,
        ),
    }
)
