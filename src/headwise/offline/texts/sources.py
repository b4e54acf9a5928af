"""Find source files on every machine that runs headwise: the standard library, and what headwise itself needs.

Nothing is imported to be read, but for Python's reference manual, which is data. A file belongs to one split, by its
name. Files repeat each other (licences, the same sentence in two docstrings): what the split "train" has in common with
"calibration" in eight words or more is taken out of "train", so that no such span is in both.
"""

import re
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from headwise.errors import BadInput

SPLITS = ("calibration", "train")
SPAN = 8  # words
SMALLEST, LARGEST = 4_000, 150_000  # bytes of a file
SHORTEST = 1_500  # characters of what is left of a document

_PACKAGES = {
    "torch": ("nn/modules", "optim", "distributions"),
    "numpy": ("lib", "linalg", "polynomial"),
    "transformers": ("generation",),
}
_STANDARD = (".", "asyncio", "collections", "concurrent/futures", "email", "http", "importlib", "json", "logging")
_STANDARD += ("multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml/etree", "xmlrpc", "zoneinfo")
_DULL = re.compile(r"_.*|.*_(?:templates|data|tables)|this|antigravity")
_WORD = re.compile(r"\w+")


@cache
def manual(split: str) -> dict[str, str]:
    """Return the sections of Python's reference manual, by name."""
    from pydoc_data.topics import topics

    return {name: text for name, text in sorted(topics.items()) if _split_of(name) == split and len(text) >= SHORTEST}


@cache
def standard_files(split: str) -> tuple[Path, ...]:
    """Return the modules of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(path for folder in _STANDARD for path in _files(root / folder, root, split))


@cache
def package_files(split: str) -> tuple[Path, ...]:
    """Return modules of the packages that headwise needs. Raises BadInput if one is not installed."""
    paths: list[Path] = []
    for package, folders in _PACKAGES.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise BadInput(f"the package {package}, which headwise needs, is not installed: install headwise again.")
        root = Path(spec.submodule_search_locations[0])
        paths += [path for folder in folders for path in _files(root / folder, root.parent, split)]
    return tuple(paths)


@cache
def read(path: Path) -> str:
    """Read a source file, the ends of its lines as "\\n"."""
    return path.read_text(encoding="utf-8", errors="replace")


def own_parts(text: str, split: str) -> Iterator[str]:
    """Yield the parts of a document that belong to its split, from one paragraph's start to another one's end."""
    if split == SPLITS[0]:
        yield text
        return
    taken, start = _spans_of_calibration(), 0
    for first, last in [*_shared(text, taken), (len(text), len(text))]:
        before = text.rfind("\n\n", start, first) if first < len(text) else len(text)
        part = text[start:before].strip("\n") if before > start else ""
        if len(part) >= SHORTEST:
            yield part
        after = text.find("\n\n", last)
        start = max(start, len(text) if after < 0 else after)


def _shared(text: str, taken: frozenset[int]) -> Iterator[tuple[int, int]]:
    """Yield start and end of every span of SPAN words that is taken."""
    words = list(_WORD.finditer(text))
    for place, span in enumerate(_spans([word[0] for word in words])):
        if span in taken:
            yield words[place].start(), words[place + SPAN - 1].end()


@cache
def _spans_of_calibration() -> frozenset[int]:
    texts = [*manual(SPLITS[0]).values(), *map(read, standard_files(SPLITS[0])), *map(read, package_files(SPLITS[0]))]
    return frozenset(span for text in texts for span in _spans(_WORD.findall(text)))


def _spans(words: list[str]) -> Iterator[int]:
    return map(hash, zip(*(words[start:] for start in range(SPAN)), strict=False))


def _files(folder: Path, root: Path, split: str) -> list[Path]:
    """Return the files of a folder that are neither tiny nor huge, and of this split."""
    return [
        path
        for path in sorted(folder.glob("*.py"))
        if not _DULL.fullmatch(path.stem)
        and SMALLEST <= path.stat().st_size <= LARGEST
        and _split_of(path.relative_to(root).as_posix()) == split
    ]


def _split_of(name: str) -> str:
    return SPLITS[zlib.crc32(name.encode()) % len(SPLITS)]
