"""Read what RULER's prompts are made of: haystacks and words, from a folder of the user's or bundled.

A data folder may hold, each under any of its names:

    PaulGrahamEssays.json or PaulGrahamEssays/*.txt   the essays of niah; without them a bundled text of ours
    english_words.json, words.zip or words/en         English words for long word lists; without them pairs of ours
    squad.json, dev-v2.0.json, *squad*.json, xquad*   SQuAD, for qa_1; read in documents.py
    hotpotqa.json or *hotpot*.json                    HotpotQA, for qa_2; read in documents.py

The bundled text is generated prose, which differs more from a needle than an essay does. `haystack_name` says which of
the two a prompt has: scores on one cannot be compared with scores on the other.
"""

import re
import zipfile
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.archives import DAMAGE, pieces
from headwise.files.bounded import read_bytes
from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON

MOST_BYTES, MOST_WORD_BYTES = 2**28, 2**25  # of a file: documents and questions; words
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NUM_BUNDLED_SENTENCES = 10_000  # about 100000 words, as many as the essays have
NOUNS_PER_PAIRED_NOUN = 8  # a pair is an adjective and every eighth noun: far more than a list of 128k tokens holds

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PLAIN_WORD = re.compile(r"[a-z]{3,}")
_SENTENCE_END = re.compile(r"""[.!?]["')\]\u2019\u201d]*\s+(?=["'(\[\u2018\u201c]?[A-Z0-9])""")
_NO_SENTENCE_END = frozenset({"Mr", "Mrs", "Ms", "Dr", "St", "Prof", "Jr", "Sr", "vs", "etc", "e.g", "i.e", "cf", "No"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Essays:
    """A text in sentences. If it is too short, it is read again from its beginning."""

    text: str
    sentences: tuple[str, ...]
    ends: tuple[int, ...]  # words up to the end of each sentence

    def first_words(self, num_words: int) -> list[str]:
        """Return the first words, in sentences; the last one may be cut."""
        rounds, remainder = divmod(num_words, self.ends[-1])
        num_whole = bisect_right(self.ends, remainder)
        num_left = remainder - (self.ends[num_whole - 1] if num_whole else 0)
        cut = [" ".join(self.sentences[num_whole].split()[:num_left])] if num_left else []
        return [*self.sentences * rounds, *self.sentences[:num_whole], *cut]


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """The bundled English words; none is both an adjective and a noun."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]


def haystack_name(data_dir: Path | None) -> str:
    """Return which text the essay haystacks are: "paul-graham" or "bundled"."""
    return "paul-graham" if _essay_files(data_dir) else "bundled"


def load_essays(data_dir: Path | None) -> Essays:
    """Read Paul Graham's essays, or make the bundled text if the folder has none. Raises BadInput if they are empty."""
    texts = [_read_essay(path) for path in _essay_files(data_dir)]
    if not texts:
        return _bundled_essays()
    essays = _as_essays(sentence for text in texts for sentence in split_sentences(text))
    if not essays.sentences:
        raise BadInput(f"the essays in {data_dir} are empty; put the texts there, or remove the files.")
    return essays


def split_sentences(text: str) -> list[str]:
    """Split a text after `.`, `!` and `?` if a capital letter or a digit follows. White space becomes one space."""
    text = " ".join(text.split())
    cuts = [match.end() for match in _SENTENCE_END.finditer(text) if not _is_abbreviation(text, match.start())]
    parts = (text[start:end].strip() for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True))
    return [part for part in parts if part]


def load_words() -> Words:
    """Read the bundled words."""
    return Words(adjectives=_bundled_words("adjectives.txt"), nouns=_bundled_words("nouns.txt"))


def load_more_words(data_dir: Path | None, words: Words) -> tuple[str, ...]:
    """Read English words other than the bundled ones from the folder, or pair the bundled ones if it has none."""
    path = first_file(data_dir, ("english_words.json", "words.zip", "words/en"))
    if path is None:
        return tuple(
            f"{adjective}-{noun}" for adjective in words.adjectives for noun in words.nouns[::NOUNS_PER_PAIRED_NOUN]
        )
    more_words = {word for word in _read_words(path) if _PLAIN_WORD.fullmatch(word)} - {*words.adjectives, *words.nouns}
    if not more_words:
        raise BadInput(f"{path} holds no English words; put nltk's word list (words.zip) there, or remove the file.")
    return tuple(sorted(more_words))


def draw_strings(rng: np.random.Generator, alphabet: str, length: int, count: int) -> list[str]:
    """Draw different strings of random letters."""
    drawn: dict[str, None] = {}  # a set that remembers the order
    while len(drawn) < count:
        drawn["".join(alphabet[i] for i in rng.integers(len(alphabet), size=length))] = None
    return list(drawn)


def first_file(data_dir: Path | None, patterns: Iterable[str]) -> Path | None:
    """Return the first file of the first pattern that matches any. Raises BadInput if there is no such folder."""
    if data_dir is None:
        return None
    if not data_dir.is_dir():
        raise BadInput(f"there is no data folder {data_dir}.")
    matches = (path for pattern in patterns for path in sorted(data_dir.glob(pattern)) if path.is_file())
    return next(matches, None)


def read_json(path: Path, max_bytes: int = MOST_BYTES) -> Any:
    """Read a JSON file. Raises BadInput if it cannot be read or is damaged."""
    try:
        return strict_json.loads(_read(path, max_bytes))
    except ValueError as error:
        raise BadInput(f"{path} is damaged, it is no JSON: {error}. Get it again.") from error


def _essay_files(data_dir: Path | None) -> list[Path]:
    single = first_file(data_dir, ("PaulGrahamEssays.json",))
    if single is not None or data_dir is None:
        return [single] if single else []
    return sorted((data_dir / "PaulGrahamEssays").glob("*.txt"))


def _read_essay(path: Path) -> str:
    if path.suffix != ".json":
        return _read(path)
    match read_json(path):
        case {"text": str(text)}:
            return text
    raise BadInput(f'{path} is not RULER\'s file of essays; it should hold {{"text": "..."}}.')


def _read(path: Path, max_bytes: int = MOST_BYTES) -> str:
    try:
        text = read_bytes(path, max_bytes).decode()
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}.") from error


@cache
def _bundled_essays() -> Essays:
    """Write prose of the mini-RULER's; with a seed of its own, so that it is one text and no sample's."""
    rng, pools = np.random.default_rng(0), REFERENCE_LEXICON.prose_words
    templates = [_PLACEHOLDER.split(template) for template in REFERENCE_LEXICON.prose]
    sentences = []
    for which in rng.integers(len(templates), size=NUM_BUNDLED_SENTENCES):
        parts = list(templates[which])
        # Every second part is the name of a pool.
        parts[1::2] = [pools[name][rng.integers(len(pools[name]))] for name in parts[1::2]]
        sentences.append("".join(parts).capitalize())
    return _as_essays(sentences)


def _as_essays(sentences: Iterable[str]) -> Essays:
    kept = tuple(sentences)
    return Essays(
        text=" ".join(kept), sentences=kept, ends=tuple(accumulate(len(sentence.split()) for sentence in kept))
    )


def _is_abbreviation(text: str, stop: int) -> bool:
    """Return whether the mark at `stop` closes an abbreviation or an initial."""
    word = text[text.rfind(" ", 0, stop) + 1 : stop].lstrip("\"'([\u2018\u201c")
    return word in _NO_SENTENCE_END or (len(word) == 1 and word.isupper() and word != "I")


def _bundled_words(name: str) -> tuple[str, ...]:
    return tuple((files("headwise.tasks") / "words" / name).read_text(encoding="utf-8").split())


def _read_words(path: Path) -> list[str]:
    """Read a word list: RULER's JSON, nltk's archive, or the file in it."""
    match path.suffix:
        case ".json":
            content = read_json(path, MOST_WORD_BYTES)
            words = content.values() if isinstance(content, dict) else content
            return [word for word in words if isinstance(word, str)] if isinstance(words, Iterable) else []
        case ".zip":
            try:
                with zipfile.ZipFile(path) as archive:
                    return b"".join(pieces(archive, "words/en", MOST_WORD_BYTES)).decode("utf-8").split()
            except BadInput:
                raise
            except DAMAGE as error:
                raise BadInput(f"{path} is damaged or not nltk's word list: {error}. Get it again.") from error
    return _read(path, MOST_WORD_BYTES).split()
