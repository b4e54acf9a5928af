"""Make RULER's word lists: the most frequent words of a numbered list (cwe) and of a coded text (fwe)."""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import zeta

from headwise.tasks.ruler.drafts import Draft, Family, Prepared, Prompt, Setting
from headwise.tasks.ruler.sources import draw_strings, load_more_words, load_words

SHORT_LENGTH = 4096  # a cwe prompt below it has shorter lists
CODED_WORD_LENGTH = 6
TOKENS_PER_CODED_WORD = 50  # of the length, for each word of the coded vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class ListSizes:
    """How often words are listed in a cwe prompt."""

    example_words: int
    example_common: int
    example_uncommon: int
    common: int
    uncommon: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonWords(Family):
    """A numbered list of words, of which the most frequent are asked."""

    freq_cw: int = 30
    freq_ucw: int = 3
    num_cw: int = 10
    tokens_to_generate: int = 120

    def prepare(self, setting: Setting) -> Prepared:
        sizes, words = self._sizes(setting.length), load_words()
        plain, more = words.adjectives + words.nouns, load_more_words(setting.data_dir, words)
        longer = Draft(write=partial(self._write, sizes, plain, more), fewest=self.num_cw, most=len(more))
        draft = Draft(
            write=partial(self._write, sizes, plain, None),
            fewest=self.num_cw,
            most=len(plain) - sizes.example_words,
            then=lambda size: longer,
        )
        return Prepared(draft=lambda index: draft)

    def _sizes(self, length: int) -> ListSizes:
        if length < SHORT_LENGTH:
            return ListSizes(example_words=20, example_common=3, example_uncommon=1, common=6, uncommon=1)
        return ListSizes(
            example_words=40, example_common=10, example_uncommon=3, common=self.freq_cw, uncommon=self.freq_ucw
        )

    def _write(
        self,
        sizes: ListSizes,
        plain: tuple[str, ...],
        more: tuple[str, ...] | None,
        rng: np.random.Generator,
        size: int,
    ) -> Prompt:
        """Write a list of `size` different words, of the plain ones, or of `more` if these are too few."""
        shuffled = [plain[i] for i in rng.permutation(len(plain))]
        shown, remaining = shuffled[: sizes.example_words], shuffled[sizes.example_words :]
        listed = remaining[:size] if more is None else [more[i] for i in rng.permutation(len(more))[:size]]
        example = self._list_prompt(rng, shown, sizes.example_common, sizes.example_uncommon)
        prompt = self._list_prompt(rng, listed, sizes.common, sizes.uncommon)
        return prompt.after(f"{example.text} {_enumerate(example.answers)}\n")

    def _list_prompt(self, rng: np.random.Generator, words: list[str], common: int, uncommon: int) -> Prompt:
        """Write a prompt without an example."""
        answers = words[: self.num_cw]
        listed = [*answers * common, *words[self.num_cw :] * uncommon]
        shuffled = [listed[i] for i in rng.permutation(len(listed))]
        return Prompt(
            context="Below is a numbered list of words. In these words, some appear more often than others. "
            f"Memorize the ones that appear most often.\n{_enumerate(shuffled)}",
            question="\nQuestion: What are the 10 most common words in the above list?",
            answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
            answers=tuple(answers),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FrequentWords(Family):
    """Coded words with the frequencies of a zeta distribution; the three most frequent are asked."""

    alpha: float = 2.0
    tokens_to_generate: int = 50

    def prepare(self, setting: Setting) -> Prepared:
        num_words = max(5, (setting.length - self.tokens_to_generate) // TOKENS_PER_CODED_WORD)
        # From this size on, the fourth word is more frequent than the fifth.
        fewest = math.ceil(zeta(self.alpha) / (4**-self.alpha - 5**-self.alpha))
        draft = Draft(write=partial(self._write, num_words), fewest=fewest)
        return Prepared(draft=lambda index: draft)

    def _write(self, num_words: int, rng: np.random.Generator, size: int) -> Prompt:
        """Write about `size` words; the most frequent one is dots, as noise."""
        words = ["...", *draw_strings(rng, string.ascii_lowercase, CODED_WORD_LENGTH, num_words - 1)]
        counts = size * np.arange(1, num_words + 1) ** -self.alpha / zeta(self.alpha)
        coded = np.repeat(words, counts.astype(int))
        return Prompt(
            context="Read the following coded text and track the frequency of each coded word. Find the three most "
            f"frequently appeared coded words. {' '.join(rng.permutation(coded).tolist())}",
            question="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?",
            answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
            answers=tuple(words[1:4]),
        )


def _enumerate(words: Sequence[str]) -> str:
    return " ".join(f"{n}. {word}" for n, word in enumerate(words, start=1))
