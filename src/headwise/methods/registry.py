"""The registry: which scorers, allocators and short names there are. A new one is one line in SCORERS or ALLOCATORS.

Names are checked without torch, which takes seconds to import: what a line makes is imported when it is made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from headwise.errors import BadInput

FULL = "full"  # no method: transformers' own cache, the yardstick of commands and evaluations
AUTO = "auto"  # the default of a model, see `method.choose`
ORACLE = "oracle"  # a yardstick of `headwise eval` (evals/oracle.py), and no method
HUB = "hub:"  # begins the name of a file on the model hub, see hub.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of the registry."""

    make: Callable[..., Any]
    summary: str
    paper: str  # its arXiv id; empty where there is none
    file: Literal["none", "optional", "needed"] = "none"
    # Whether vLLM can be served with it: a scorer that needs no more than a head's keys, values and the last queries;
    # an allocator whose counts are the same for every prompt of a length.
    served: bool = False


def scorer(name: str) -> Callable[[], Any]:
    """Makes a scorer of headwise.methods.scores, by the name of its class."""
    return lambda: getattr(import_module("headwise.methods.scores"), name)()


def allocator(name: str) -> Callable[[], Any]:
    """Makes an allocator of headwise.methods.allocate, by the name of its class."""
    return lambda: getattr(import_module("headwise.methods.allocate"), name)()


def _learned_scores(path: Path | None = None, source: str = "") -> Any:
    from headwise.artifacts.gates import load_gates
    from headwise.methods.scores import ShippedLKVT, learned_scorer

    return ShippedLKVT() if path is None else learned_scorer(load_gates(path, source))


def _learned_budgets(path: Path | None = None, source: str = "") -> Any:
    from headwise.artifacts.gates import load_gates
    from headwise.methods.allocate import ShippedLKVH, learned_budgets

    return ShippedLKVH() if path is None else learned_budgets(load_gates(path, source))


def _contest(path: Path | None = None, source: str = "") -> Any:
    from headwise.artifacts.gates import load_gates
    from headwise.methods.allocate import ShippedContest, contest

    return ShippedContest() if path is None else contest(load_gates(path, source))


def _solved(path: Path | None = None, source: str = "") -> Any:
    from headwise.artifacts.budget import Budget
    from headwise.methods.allocate import LUKV, ShippedLUKV

    return ShippedLUKV() if path is None else LUKV(budget=replace(Budget.load(path), source=source))


def _fixed(path: Path, source: str = "") -> Any:
    from headwise.artifacts.budget import Budget
    from headwise.methods.allocate import Fixed

    return Fixed(budget=replace(Budget.load(path), source=source))


SCORERS: Mapping[str, Entry] = MappingProxyType(
    {
        "random": Entry(
            make=scorer("Random"), summary="uniform random scores: the floor every method must beat", paper=""
        ),
        "streaming": Entry(
            make=scorer("Streaming"), summary="first 4 tokens and the most recent ones", paper="2309.17453", served=True
        ),
        "knorm": Entry(make=scorer("Knorm"), summary="small key norm", paper="2406.11430", served=True),
        "keydiff": Entry(make=scorer("KeyDiff"), summary="keys unlike the mean key", paper="2504.15364", served=True),
        "snapkv": Entry(
            make=scorer("SnapKV"), summary="attention of the last window of queries", paper="2404.14469", served=True
        ),
        "tova": Entry(make=scorer("TOVA"), summary="attention of the last query", paper="2401.06104"),
        "h2o": Entry(make=scorer("H2O"), summary="attention accumulated over all queries", paper="2306.14048"),
        "expected": Entry(
            make=scorer("ExpectedAttention"), summary="attention expected from future queries", paper="2510.00636"
        ),
        "criticalkv": Entry(
            make=scorer("CriticalKV"), summary="SnapKV weighted by what the value writes", paper="2502.03805"
        ),
        "kvzip": Entry(
            make=scorer("KVzip"), summary="attention while the model repeats the context (2 passes)", paper="2505.23416"
        ),
        "kvzip-l2": Entry(
            make=scorer("KVzipL2"),
            summary="as kvzip, by the sum of squared attention instead of the largest (2 passes)",
            paper="2505.23416",
        ),
        "lkv-t": Entry(
            make=_learned_scores,
            summary="learned from keys and values: lkv-t@FILE, or lkv-t where gates are shipped",
            paper="2605.06676",
            file="optional",
            served=True,
        ),
    }
)

ALLOCATORS: Mapping[str, Entry] = MappingProxyType(
    {
        "uniform": Entry(make=allocator("Uniform"), summary="the same count for every head", paper="", served=True),
        "pyramid": Entry(
            make=allocator("Pyramid"),
            summary="more for early layers, linearly less for late ones",
            paper="2406.02069",
            served=True,
        ),
        "adakv": Entry(
            make=allocator("AdaKV"), summary="heads of a layer compete with their scores", paper="2407.11550"
        ),
        "global": Entry(
            make=allocator("Global"), summary="all heads of all layers compete with their scores", paper=""
        ),
        "fixed": Entry(
            make=_fixed,
            summary="per-head fractions from a Budget file: fixed@FILE",
            paper="2410.10819",
            file="needed",
            served=True,
        ),
        "lukv": Entry(
            make=_solved,
            summary="solved from a profile of the model and scorer: lukv@FILE, or lukv where a budget is shipped",
            paper="2602.08585",
            file="optional",
            served=True,
        ),
        "lkv-h": Entry(
            make=_learned_budgets,
            summary="learned budgets: lkv-h@FILE, or lkv-h where gates are shipped",
            paper="2605.06676",
            file="optional",
            served=True,
        ),
        "lkv-c": Entry(
            make=_contest,
            summary="learned scores of all heads compete; lkv-h where the file's scores do not compare",
            paper="2605.06676",
            file="optional",
            served=True,  # with the budgets of lkv-h, which know no prompt
        ),
    }
)

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        **{name: f"{name}+uniform" for name in SCORERS},
        "kvzip": "kvzip+global",
        "kvzip-l2": "kvzip-l2+global",
        "pyramidkv": "snapkv+pyramid",
        "adakv": "snapkv+adakv",
        "lkv": "lkv-t+lkv-c",
    }
)


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
    _found(SCORERS, scorer, name, "scorer")
    _found(ALLOCATORS, allocator, name, "allocator")
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
    entry, path = _found(registry, text, name, kind)
    if not path.startswith(HUB):
        return entry.make(Path(path)) if path else entry.make()
    from headwise.files.hub import fetch

    # Files of a repository are called as those that headwise ships: gates lkv, budgets by their scorer.
    file = fetch(path, "lkv.safetensors" if text.startswith("lkv-") else f"{scorer}.safetensors")
    return entry.make(file.path, file.source)


def _found(registry: Mapping[str, Entry], text: str, name: str, kind: str) -> tuple[Entry, str]:
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
