"""A method = one scorer + one allocator + one protection. Written `scorer+allocator`, or by a short name.

This file is the registry: a new scorer or allocator is one line in SCORERS or ALLOCATORS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from headwise.allocate import LUKV, AdaKV, Fixed, Global, Pyramid, ShippedLKVH, ShippedLUKV, Uniform, learned_budgets
from headwise.artifacts import Budget
from headwise.errors import BadInput
from headwise.gates import load_gates
from headwise.interfaces import AbstractAllocator, AbstractScorer
from headwise.scores import (
    H2O,
    TOVA,
    CriticalKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVzip,
    Random,
    ShippedLKVT,
    SnapKV,
    Streaming,
    learned_scorer,
)
from headwise.shapes import ModelShape

ORACLE = "oracle"  # a yardstick of `headwise eval` (evals/oracle.py), and no method


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What to keep. Protected tokens are kept first, inside the budget (None: those of the scorer's paper).

    Every head keeps all of them, unless the allocator decides how many a head gets (`lukv`); tokens that are named here
    are kept by every head of every method.

    >>> Method.parse("snapkv+adakv")
    >>> Method(scorer=SnapKV(window_size=64), allocator=AdaKV(safeguard=0.05), protect_sink=4)
    """

    scorer: AbstractScorer
    allocator: AbstractAllocator
    protect_sink: int | None = None
    protect_window: int | None = None

    @property
    def sink(self) -> int:
        """First tokens always kept."""
        return max(self.scorer.sink, self.allocator.sink) if self.protect_sink is None else self.protect_sink

    @property
    def window(self) -> int:
        """Last tokens always kept."""
        return max(self.scorer.window, self.allocator.window) if self.protect_window is None else self.protect_window

    @property
    def keeps_protected(self) -> bool:
        """Whether every head keeps all protected tokens."""
        named = self.protect_sink is not None or self.protect_window is not None
        return named or self.allocator.keeps_protected

    @classmethod
    def parse(cls, name: "str | Method") -> "Method":
        """From an alias ("adakv"), a scorer ("keydiff" means keydiff+uniform) or a pair ("keydiff+adakv").

        An allocator that reads a file takes it after @: "keydiff+fixed@budget.safetensors". Raises BadInput.
        """
        if isinstance(name, Method):
            return name
        if not isinstance(name, str):
            raise BadInput(
                f"method={name!r}: give a name such as 'snapkv+adakv', or Method(scorer=..., allocator=...)."
            )
        scorer, allocator = _halves(name.strip())
        return cls(
            scorer=_make(SCORERS, scorer, name, "scorer"),
            allocator=_make(ALLOCATORS, allocator, name, "allocator"),
        )

    def for_model(self, shape: ModelShape, config_hash: str) -> "Method":
        """The method to use on this model. Raises ArtifactMismatch if its budget is for another model or scorer."""
        scorer = self.scorer.resolve(shape, config_hash)
        return replace(self, scorer=scorer, allocator=self.allocator.resolve(scorer, shape, config_hash))

    def provenance(self) -> dict[str, Any]:
        """Names and parameters, for records and saved caches."""
        return {
            "scorer": self.scorer.provenance(),
            "allocator": self.allocator.provenance(),
            "sink": self.sink,
            "window": self.window,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of the registry."""

    make: Callable[..., Any]
    summary: str
    paper: str = ""
    file: Literal["none", "optional", "needed"] = "none"
    # Whether vLLM can be served with it: a scorer that needs no more than a head's keys, values and the last queries;
    # an allocator whose counts are the same for every prompt of a length.
    served: bool = False


SCORERS: Mapping[str, Entry] = MappingProxyType(
    {
        "random": Entry(make=Random, summary="uniform random scores: the floor every method must beat"),
        "streaming": Entry(
            make=Streaming, summary="first 4 tokens and the most recent ones", paper="2309.17453", served=True
        ),
        "knorm": Entry(make=Knorm, summary="small key norm", paper="2406.11430", served=True),
        "keydiff": Entry(make=KeyDiff, summary="keys unlike the mean key", paper="2504.15364", served=True),
        "snapkv": Entry(
            make=SnapKV, summary="attention of the last window of queries", paper="2404.14469", served=True
        ),
        "tova": Entry(make=TOVA, summary="attention of the last query", paper="2401.06104"),
        "h2o": Entry(make=H2O, summary="attention accumulated over all queries", paper="2306.14048"),
        "expected": Entry(make=ExpectedAttention, summary="attention expected from future queries", paper="2510.00636"),
        "criticalkv": Entry(make=CriticalKV, summary="SnapKV weighted by what the value writes", paper="2502.03805"),
        "kvzip": Entry(
            make=KVzip, summary="attention while the model repeats the context (2 passes)", paper="2505.23416"
        ),
        "lkv-t": Entry(
            make=lambda path=None: ShippedLKVT() if path is None else learned_scorer(load_gates(path)),
            summary="learned from keys and values: lkv-t@FILE, or lkv-t where gates are shipped",
            paper="2605.06676",
            file="optional",
            served=True,
        ),
    }
)

ALLOCATORS: Mapping[str, Entry] = MappingProxyType(
    {
        "uniform": Entry(make=Uniform, summary="the same count for every head", served=True),
        "pyramid": Entry(
            make=Pyramid,
            summary="more for early layers, linearly less for late ones",
            paper="2406.02069",
            served=True,
        ),
        "adakv": Entry(make=AdaKV, summary="heads of a layer compete with their scores", paper="2407.11550"),
        "global": Entry(make=Global, summary="all heads of all layers compete with their scores"),
        "fixed": Entry(
            make=lambda path: Fixed(budget=Budget.load(path)),
            summary="per-head fractions from a Budget file: fixed@FILE",
            paper="2410.10819",
            file="needed",
            served=True,
        ),
        "lukv": Entry(
            make=lambda path=None: ShippedLUKV() if path is None else LUKV(budget=Budget.load(path)),
            summary="solved from a profile of the model and scorer: lukv@FILE, or lukv where a budget is shipped",
            paper="2602.08585",
            file="optional",
            served=True,
        ),
        "lkv-h": Entry(
            make=lambda path=None: ShippedLKVH() if path is None else learned_budgets(load_gates(path)),
            summary="learned budgets: lkv-h@FILE, or lkv-h where gates are shipped",
            paper="2605.06676",
            file="optional",
            served=True,
        ),
    }
)

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "random": "random+uniform",
        "streaming": "streaming+uniform",
        "knorm": "knorm+uniform",
        "keydiff": "keydiff+uniform",
        "snapkv": "snapkv+uniform",
        "tova": "tova+uniform",
        "h2o": "h2o+uniform",
        "expected": "expected+uniform",
        "criticalkv": "criticalkv+uniform",
        "kvzip": "kvzip+global",
        "pyramidkv": "snapkv+pyramid",
        "adakv": "snapkv+adakv",
        "lkv-t": "lkv-t+uniform",
        "lkv": "lkv-t+lkv-h",
    }
)


def entries_of(name: str) -> tuple[str, str]:
    """Which scorer and which allocator a name stands for, as SCORERS and ALLOCATORS know them. Raises BadInput."""
    Method.parse(name)
    scorer, allocator = (half.partition("@")[0] for half in _halves(name.strip()))
    return scorer, allocator


def paper_of(alias: str) -> str:
    """The arXiv id of a short name: its allocator's paper, or else its scorer's; empty if neither has one."""
    scorer, _, allocator = ALIASES[alias].partition("+")
    return ALLOCATORS[allocator].paper or SCORERS[scorer].paper


def _halves(name: str) -> tuple[str, str]:
    """Scorer and allocator, as they are written; a short name for two parts of one file gives it to both: lkv@FILE."""
    word, at, path = name.partition("@")
    scorer, _, allocator = ALIASES.get(word, "").partition("+")
    if at and scorer and SCORERS[scorer].file != "none" and ALLOCATORS[allocator].file != "none":
        return f"{scorer}@{path}", f"{allocator}@{path}"
    scorer, plus, allocator = ALIASES.get(name, name).partition("+")
    return scorer.strip(), allocator.strip() if plus else "uniform"


def _make(registry: Mapping[str, Entry], text: str, name: str, kind: str) -> Any:
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
    return entry.make(Path(path)) if at else entry.make()


def _hint(registry: Mapping[str, Entry], word: str, name: str) -> str:
    """What an unknown word was probably meant to be."""
    if word in ALLOCATORS:
        return f" It is an allocator: write scorer+{word}."
    if word in ALIASES:
        return f" It is short for {ALIASES[word]}."
    aliases = () if "+" in name else ALIASES
    close = get_close_matches(word.lower(), [*registry, *aliases], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
