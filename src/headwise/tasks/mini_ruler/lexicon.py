"""The words of the mini-RULER tasks: pools, sentence templates, filler prose. The tasks are in suite.py.

A lexicon knows how a fact is stated, asked for and answered, and how many tokens a text takes; it knows no task.
`REFERENCE_LEXICON` is the one of the bundled reference model: lower-case English, a token per word or punctuation mark.

Its facts hide well. Keys, values and filler share their words, and decoy sentences name the very keys of the document,
so no word is rare where it matters. A record reads `locker marble copper lantern.`: the key `marble` stands right
before its value, in the record and in the question `? locker marble`, so that one induction step answers it. In a list
of answers each one, the first too, follows the same mark: what was given can be found, and is not given again.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headwise.errors import BadInput

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """How one kind of fact is written; every field but `separator` is a format string."""

    statement: str  # fields: key, value
    question: str  # field: key; several keys are joined by spaces
    answer: str  # fields: key, value
    separator: str = ", "  # between the parts of an answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Lexicon:
    """Word pools and templates, enough to write every task of suite.py in one language and for one tokenizer."""

    name: str
    count_tokens: Callable[[str], int]  # special tokens not counted
    num_special_tokens: int  # those the tokenizer puts before a document
    answer_margin: int  # tokens a model may generate beyond the ideal answer
    keys: tuple[str, ...]
    value_parts: tuple[tuple[str, ...], ...]  # a value is one word of each pool
    listed_words: tuple[str, ...]  # of the counting tasks
    prose_words: Mapping[str, tuple[str, ...]]  # placeholder -> words
    prose: tuple[str, ...]
    decoys: tuple[str, ...]  # prose that also has the placeholders key and value
    lookup: Wording
    several_lookups: Wording
    listing: Wording
    chain: Wording
    common_words: Wording
    frequent_words: Wording

    def draw_keys(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draw `count` different keys. Raises BadInput if there are not so many."""
        return _draw(rng, self.keys, count)

    def draw_listed_words(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draw `count` different words for a word list. Raises BadInput if there are not so many."""
        return _draw(rng, self.listed_words, count)

    def draw_values(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draw `count` different values. Their first words repeat only after all the pool has been used."""
        first_pool, *other_pools = self.value_parts
        values: dict[str, None] = {}  # a set that remembers the order
        while len(values) < count:
            for start in rng.permutation(len(first_pool)):
                words = [first_pool[start], *(pool[rng.integers(len(pool))] for pool in other_pools)]
                values[" ".join(words)] = None
        return list(values)[:count]

    def write_prose(self, rng: np.random.Generator) -> str:
        """Write one sentence of filler."""
        return _fill(rng, self.prose, self.prose_words)

    def write_decoy(self, rng: np.random.Generator, keys: Sequence[str], values: Sequence[str]) -> str:
        """Write one sentence that names one of `keys` and one of `values` without stating a fact."""
        return _fill(rng, self.decoys, {**self.prose_words, "key": keys, "value": values})


def count_words_and_marks(text: str) -> int:
    """Count the tokens of a text for the word-level tokenizer."""
    return len(split_words_and_marks(text))


def split_words_and_marks(text: str) -> list[str]:
    """Split a text as the word-level tokenizer does."""
    return _WORD_OR_MARK.findall(text)


def _draw(rng: np.random.Generator, pool: Sequence[str], count: int) -> list[str]:
    if count > len(pool):
        raise BadInput(f"{count} different words asked from a pool of {len(pool)}; ask for fewer")
    return [pool[int(index)] for index in rng.permutation(len(pool))[:count]]


def _fill(rng: np.random.Generator, templates: Sequence[str], words: Mapping[str, Sequence[str]]) -> str:
    template = templates[int(rng.integers(len(templates)))]
    draws = iter(rng.integers(2**31, size=template.count("{")).tolist())

    def choose(match: re.Match[str]) -> str:
        pool = words[match[1]]
        return pool[int(next(draws)) % len(pool)]

    return _PLACEHOLDER.sub(choose, template)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NOUNS = _words(
    """
    acorn anchor angel ant apple apron arch arrow axe badge bakery ball banjo banner barn barrel bay beach bead bean
    bear beard bee bell bench berry bird biscuit blade blanket boat bone book boot bottle bowl box branch bread
    brick bridge broom brush bucket bus button cabin cage cake camel camp candle canoe cap card carpet carrot castle
    cat cave chain chair chalk cherry chest chicken church circle city clay cliff clock cloud coat cobra coin comb
    compass cook corn cottage couch cow crab cradle crane crown cup curtain daisy deer desk dish doctor dog doll
    dolphin door dove dragon drawer dress drum duck eagle ear egg elbow engine falcon farm feather fence fern ferry
    field finger fire fish flag flame flute fly forest fork fountain fox frog garden gate ghost giant glass glove
    goat goose grape grass hammer hand harbor harp hat hawk hill hive honey hook horn horse hotel house iris island
    ivy jacket jar jewel judge jug kettle key king kite kitten knee knife ladder lake lamb lamp lantern leaf lemon
    letter lily lion lizard loaf lock marble market mask meadow melon mill mirror monk moon moose moth mountain
    mouse museum nail needle nest net nurse nut oak oar ocean olive onion orange orchid organ otter oven owl ox
    paddle painter palace palm panda paper parrot peach pearl pebble pencil pepper piano pigeon pillow pilot pine
    pipe plate plum pocket pond pony pot prince pump queen quilt rabbit raft ribbon ring river robin roof rose
    saddle sail ship star stone tiger tower window
    """
)

_ADJECTIVES = _words(
    """
    amber ancient angry bald bitter black blue bold brave bright broken bronze brown calm cheap clean clear clever
    cold copper crimson curly damp dark deep dry dull dusty early empty fair faint famous fast fat final flat fresh
    gentle giddy gold grand gray green happy hard heavy hidden high hollow honest hot huge icy idle iron jolly kind
    large late lazy little lonely long loose loud lucky narrow neat new noisy odd old open pale pink plain polite
    proud purple quick quiet rapid rare red rich ripe rotten rough round royal rusty sad salty sharp shiny short shy
    silent silver slow small smooth soft solid square steep stiff strange striped strong sunny sweet swift tall tame
    thick thin tidy tiny vast warm wet white wide wild wooden young
    """
)

_VERBS = _words(
    """
    admired bought broke built burned called carried caught chased cleaned counted covered crossed drew dropped fed
    fixed followed forgot found guarded heard hid held kept left liked lost loved moved opened painted passed pulled
    pushed reached sang saw sold stole touched took turned washed watched wore chose climbed drank drove gave lifted
    lit mended missed named needed owned packed picked raised tied wanted won
    """
)

_FUNCTION_WORDS = _words(
    """
    the a this that every no some and but or of in on under behind beside near with from to by was were not had she
    he they it there who then while before after all his her our my their into over again always never still
    """
)

_MARKERS = ("locker", "lockers", "basket", "road", "common", "frequent", "words")
_MARKS = (".", ",", "?", ":", ";", "!")

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"

REFERENCE_VOCABULARY = (
    PAD,
    BOS,
    EOS,
    UNKNOWN,
    *_MARKS,
    *_MARKERS,
    *_FUNCTION_WORDS,
    *_VERBS,
    *_ADJECTIVES,
    *_NOUNS,
)

REFERENCE_LEXICON = Lexicon(
    name="reference",
    count_tokens=count_words_and_marks,
    num_special_tokens=1,
    answer_margin=4,
    keys=_NOUNS,
    value_parts=(_ADJECTIVES, _NOUNS),
    listed_words=_NOUNS[::4],
    prose_words={"noun": _NOUNS, "adjective": _ADJECTIVES, "verb": _VERBS},
    prose=(
        "the {adjective} {noun} {verb} the {noun}.",
        "a {noun} {verb} the {adjective} {noun} near the {noun}.",
        "she {verb} the {noun} and the {adjective} {noun}.",
        "he {verb} every {noun} in the {adjective} {noun}.",
        "they {verb} a {adjective} {noun} behind the {noun}.",
        "the {noun} was {adjective}, and the {noun} was {adjective}.",
        "there was a {adjective} {noun} under the {noun}.",
        "it was not the {noun} but the {adjective} {noun}.",
        "some {noun} {verb} the {noun} before the {noun} {verb} it.",
        "the {noun} of the {noun} {verb} this {adjective} {noun}.",
        "the {noun} who {verb} that {adjective} {noun} was {adjective}.",
        "then the {noun} from the {noun} {verb} all the {adjective} words.",
        "the locker near the {noun} was {adjective}.",
        "she {verb} a basket of {noun} while he {verb} the {noun}.",
        "the road to the {adjective} {noun} was {adjective}.",
        "our {noun} always {verb} my {noun} after the {adjective} {noun}.",
        "their {noun} and his {noun} were still on the {adjective} {noun}!",
        "her {noun} never had a {adjective} {noun} or a {noun}; it {verb} all the common {noun}.",
        "he {verb} the {adjective} {noun} again, over the {noun} and into the {noun}.",
        "the lockers beside the {noun} were {adjective}, with frequent {noun} in every {noun}.",
    ),
    decoys=(
        "the {key} {verb} the {value}.",
        "no locker of {key} had a {value}.",
        "the {value} was near the {key}.",
        "they {verb} the {key} and a {value} by the road.",
        "there was a {key} with a {value} in the basket.",
    ),
    lookup=Wording(statement="locker {key} {value}.", question="? locker {key}", answer="{value}"),
    several_lookups=Wording(
        statement="locker {key} {value}.", question="? lockers {key}:", answer="locker {key} {value}", separator="; "
    ),
    listing=Wording(statement="basket {key} {value}.", question="? basket {key},", answer="{value}"),
    chain=Wording(
        statement="road {key} {value}.", question="? road {key}", answer="road {key} {value}", separator="; "
    ),
    common_words=Wording(statement="{value}", question="? common words:", answer="{value}", separator=": "),
    frequent_words=Wording(statement="{value}", question="? frequent words:", answer="{value}", separator=": "),
)
