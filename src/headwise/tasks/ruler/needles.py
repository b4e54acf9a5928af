"""Make RULER's haystacks: sentences among noise, essays or each other (niah), and assignments among noise (vt)."""

import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np

from headwise.tasks.ruler.drafts import Draft, Family, Prepared, Prompt, Setting, largest
from headwise.tasks.ruler.sources import NOISE, Essays, Words, draw_strings, load_essays, load_words

Kind = Literal["words", "numbers", "uuids"]

DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)  # where in an essay needles may be, in percent of its sentences
EXAMPLE_TOKENS = 500  # of vt's example


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draws:
    """Keys and values of one sample, none twice."""

    rng: np.random.Generator
    words: Words
    taken: set[str] = field(default_factory=set)

    def different(self, kind: Kind, count: int, *, absent_from: str = "") -> list[str]:
        """Draw keys or values that were not drawn before and that a text does not contain."""
        drawn = []
        while len(drawn) < count:
            candidate = self._draw(kind)
            if candidate not in self.taken and candidate not in absent_from:
                self.taken.add(candidate)
                drawn.append(candidate)
        return drawn

    def _draw(self, kind: Kind) -> str:
        match kind:
            case "words":
                adjectives, nouns = self.words.adjectives, self.words.nouns
                return f"{adjectives[self.rng.integers(len(adjectives))]}-{nouns[self.rng.integers(len(nouns))]}"
            case "numbers":
                return str(self.rng.integers(10**6, 10**7))
            case "uuids":
                return str(uuid.UUID(bytes=self.rng.bytes(16), version=4))


@dataclass(frozen=True, kw_only=True, slots=True)
class Needles(Family):
    """Needle in a haystack: sentences that give keys values, and the values of some keys are asked."""

    type_haystack: Literal["noise", "essay", "needle"]
    type_needle_k: Kind = "words"
    type_needle_v: Kind = "numbers"
    num_needle_k: int = 1
    num_needle_v: int = 1
    num_needle_q: int = 1
    tokens_to_generate: int = 128

    @property
    def num_keys(self) -> int:
        """Number of keys in the haystack: each asked key must be there."""
        return max(self.num_needle_k, self.num_needle_q)

    def prepare(self, setting: Setting) -> Prepared:
        words = load_words()
        essays = load_essays(setting.data_dir) if self.type_haystack == "essay" else None
        draft = Draft(write=partial(self._write, words, essays), fewest=self.num_keys * self.num_needle_v)
        return Prepared(draft=lambda index: draft)

    def _write(self, words: Words, essays: Essays | None, rng: np.random.Generator, size: int) -> Prompt:
        text = essays.text if essays else ""
        draw = _Draws(rng=rng, words=words)
        keys = draw.different(self.type_needle_k, self.num_keys, absent_from=text)
        values = draw.different(self.type_needle_v, self.num_keys * self.num_needle_v, absent_from=text)
        of_key = [values[start : start + self.num_needle_v] for start in range(0, len(values), self.num_needle_v)]
        needles = [self._needle(key, value) for key, owned in zip(keys, of_key, strict=True) for value in owned]
        queried = rng.choice(self.num_keys, self.num_needle_q, replace=False)
        shuffled = [needles[i] for i in rng.permutation(len(needles))]
        if essays:
            context = _among_sentences(rng, essays.first_words(size), shuffled)
        else:
            context = "\n".join(_among_lines(rng, self._lines(draw, size), shuffled))
        return self._prompt(context, [keys[i] for i in queried], tuple(value for i in queried for value in of_key[i]))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.type_needle_v} for {key} is: {value}."

    def _lines(self, draw: _Draws, size: int) -> list[str]:
        """Return the haystack without its needles."""
        if self.type_haystack == "noise":
            return [NOISE] * size
        keys, values = draw.different(self.type_needle_k, size), draw.different(self.type_needle_v, size)
        return [self._needle(key, value) for key, value in zip(keys, values, strict=True)]

    def _prompt(self, context: str, keys: Sequence[str], values: tuple[str, ...]) -> Prompt:
        query = f"{', '.join(keys[:-1])}, and {keys[-1]}" if len(keys) > 1 else keys[0]
        if len(values) == 1:
            kind, article, are_all, are = self.type_needle_v.removesuffix("s"), "A", "is", "is"
        else:
            kind, article, are_all, are = self.type_needle_v, "Some", "are all", "are"
        return Prompt(
            context=f"{article} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n{context}",
            question=f"\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text?",
            answer_prefix=f" The special magic {kind} for {query} mentioned in the provided text {are}",
            answers=values,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VariableTracking(Family):
    """Chains of assignments in noise: which variables have the value that the first one of a chain got?"""

    num_chains: int = 1
    num_hops: int = 4
    tokens_to_generate: int = 30

    def prepare(self, setting: Setting) -> Prepared:
        fewest = self.num_hops + 1  # the lines of a chain have different places

        def count(size: int) -> int:
            rng = np.random.default_rng(0)
            values = ["12345"] * self.num_chains
            return setting.count_tokens(self._chain_prompt(rng, size, name_length=3, values=values).text)

        example_size, _ = largest(count, room=EXAMPLE_TOKENS, slack=0, fewest=fewest)
        draft = Draft(write=partial(self._write, example_size), fewest=fewest)
        return Prepared(draft=lambda index: draft)

    def _write(self, example_size: int, rng: np.random.Generator, size: int) -> Prompt:
        values = _draw_values(rng, 2 * self.num_chains)
        example = self._chain_prompt(rng, example_size, name_length=3, values=values[: self.num_chains])
        prompt = self._chain_prompt(rng, size, name_length=5, values=values[self.num_chains :])
        return prompt.after(f"{example.text} {' '.join(example.answers)}\n\n")

    def _chain_prompt(self, rng: np.random.Generator, size: int, *, name_length: int, values: Sequence[str]) -> Prompt:
        """Write a prompt without an example; the first chain is asked for."""
        num_names = self.num_hops + 1
        names = draw_strings(rng, string.ascii_uppercase, name_length, num_names * self.num_chains)
        lines = [NOISE] * size
        for chain, value in enumerate(values):
            lines = _among_lines(rng, lines, _assignments(names[chain * num_names :][:num_names], value))
        return Prompt(
            context="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + "\n".join(lines),
            question=f"\nQuestion: Find all variables that are assigned the value {values[0]} in the text above.",
            answer_prefix=" Answer: According to the chain(s) of variable assignment in the text above, "
            f"{num_names} variables are assigned the value {values[0]}, they are: ",
            answers=tuple(names[:num_names]),
        )


def _assignments(names: Sequence[str], value: str) -> list[str]:
    """Write the lines of a chain; the space at the end of all but the first is RULER's."""
    return [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in pairwise(names))]


def _draw_values(rng: np.random.Generator, count: int) -> list[str]:
    """Draw different numbers of five digits."""
    values: dict[str, None] = {}  # a set that remembers the order
    while len(values) < count:
        values[str(rng.integers(10_000, 99_999))] = None
    return list(values)


def _among_lines(rng: np.random.Generator, lines: Sequence[str], inserted: Sequence[str]) -> list[str]:
    """Put each of `inserted`, in their order, before another one of the lines."""
    places = np.sort(rng.choice(len(lines), len(inserted), replace=False))
    mixed = list(lines)
    for num_before, (place, line) in enumerate(zip(places, inserted, strict=True)):
        mixed.insert(place + num_before, line)
    return mixed


def _among_sentences(rng: np.random.Generator, sentences: Sequence[str], inserted: Sequence[str]) -> str:
    """Put each of `inserted`, in their order, at another depth; two may meet, with RULER's second space between."""
    depths = np.sort(rng.choice(DEPTHS, len(inserted), replace=False))
    cuts = [0, *(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
    parts = [" ".join(sentences[start:end]) for start, end in pairwise(cuts)]
    mixed = [text for pair in zip(parts, inserted, strict=False) for text in pair]
    return " ".join([*mixed, parts[-1]])
