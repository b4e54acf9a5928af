"""How the name of a method is read: `scorer+allocator`, each with a file after @ if it takes one, or a short name."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from headwise.errors import BadInput
from headwise.methods.registry import ALIASES, ALLOCATORS, AUTO, FULL, HUB, ORACLE, SCORERS, Entry


def require_names(names: Sequence[str], *, oracle: bool = False) -> None:
    """Raise BadInput unless there are names, and each is "full", "auto" or a method's; or "oracle", where that may be.

    Files are not looked at.
    """
    if not names:
        raise BadInput(f"no method is named; name some, such as {FULL} and snapkv+adakv.")
    for name in names:
        if name not in (FULL, AUTO) and not (oracle and name == ORACLE):
            entries_of(name)


def entries_of(name: str) -> tuple[str, str]:
    """Which scorer and which allocator a name stands for, as SCORERS and ALLOCATORS know them. Raises BadInput."""
    scorer, allocator = halves(name)
    _entry(SCORERS, scorer, name, "scorer")
    _entry(ALLOCATORS, allocator, name, "allocator")
    return scorer.partition("@")[0], allocator.partition("@")[0]


def paper_of(alias: str) -> str:
    """The arXiv id of a short name: its allocator's paper, or else its scorer's; empty if neither has one."""
    scorer, _, allocator = ALIASES[alias].partition("+")
    return ALLOCATORS[allocator].paper or SCORERS[scorer].paper


def made(name: str) -> tuple[Any, Any]:
    """The scorer and the allocator that a name stands for. Raises BadInput."""
    scorer, allocator = halves(name)
    word = scorer.partition("@")[0]
    return _make(SCORERS, scorer, name, "scorer", word), _make(ALLOCATORS, allocator, name, "allocator", word)


def halves(name: str) -> tuple[str, str]:
    """Scorer and allocator, as they are written; a short name for two parts of one file gives it to both: lkv@FILE."""
    name = name.strip()
    word, at, path = name.partition("@")
    scorer, _, allocator = ALIASES.get(word, "").partition("+")
    if at and scorer and SCORERS[scorer].file != "none" and ALLOCATORS[allocator].file != "none":
        return f"{scorer}@{path}", f"{allocator}@{path}"
    scorer, plus, allocator = ALIASES.get(name, name).partition("+")
    return scorer.strip(), allocator.strip() if plus else "uniform"


def _make(registry: Mapping[str, Entry], text: str, name: str, kind: str, scorer: str) -> Any:
    entry, path = _entry(registry, text, name, kind)
    if not path.startswith(HUB):
        return entry.make(Path(path)) if path else entry.make()
    from headwise.files.hub import fetch

    # Files of a repository are called as those that headwise ships: gates lkv, budgets by their scorer.
    file = fetch(path, "lkv.safetensors" if text.startswith("lkv-") else f"{scorer}.safetensors")
    return entry.make(file.path, file.source)


def _entry(registry: Mapping[str, Entry], text: str, name: str, kind: str) -> tuple[Entry, str]:
    """The entry of one half of a name, and the file it is given."""
    word, at, path = text.partition("@")
    entry = registry.get(word)
    if word == ORACLE:
        raise BadInput(
            f"method {name!r}: the oracle has seen the questions and answers, so it is a yardstick and no method. Only "
            f"'headwise eval' shows it: --methods full,{ORACLE},..."
        )
    if entry is None:
        known = f"Known {kind}s: {', '.join(registry)}."
        raise BadInput(f"method {name!r}: there is no {kind} {word!r}.{_hint(registry, word, name)} {known}")
    if (entry.file == "needed" or at) and not path:
        raise BadInput(f"method {name!r}: {kind} {word!r} needs a file, as in {word}@FILE.")
    if at and entry.file == "none":
        raise BadInput(f"method {name!r}: {kind} {word!r} takes no file.")
    return entry, path


def _hint(registry: Mapping[str, Entry], word: str, name: str) -> str:
    """What an unknown word was probably meant to be."""
    if word in ALLOCATORS:
        return f" It is an allocator: write scorer+{word}."
    if word in ALIASES:
        return f" It is short for {ALIASES[word]}."
    aliases = () if "+" in name else ALIASES
    close = get_close_matches(word.lower(), [*registry, *aliases], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
