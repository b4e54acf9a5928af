"""The registry: which scorers, allocators and short names there are. A new one is one line in SCORERS or ALLOCATORS.

Names are checked without torch, which takes seconds to import: what a line makes is imported when it is made. How names
are read is in `names.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal

FULL = "full"  # no method: transformers' own cache, the yardstick of commands and evaluations
AUTO = "auto"  # the default of a model, see `method.choose`
ORACLE = "oracle"  # a yardstick of `headwise eval` (evals/oracle.py), and no method
HUB = "hub:"  # begins the name of a file on the model hub, see hub.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of the registry."""

    make: Callable[..., Any]  # what takes a file is given its path and, from the hub, where it came from
    summary: str
    paper: str  # its arXiv id; empty where there is none
    file: Literal["none", "optional", "needed"] = "none"
    # Whether vLLM can be served with it: a scorer that needs no more than a head's keys, values and the last queries;
    # an allocator whose counts are the same for every prompt of a length (a StaticAllocator).
    served: bool = False


def scorer(name: str, summary: str, paper: str = "", *, served: bool = False) -> Entry:
    """The line of a class of headwise.methods.scores."""
    make = lambda: getattr(import_module("headwise.methods.scores"), name)()  # noqa: E731
    return Entry(make=make, summary=summary, paper=paper, served=served)


def allocator(name: str, summary: str, paper: str = "", *, served: bool = False) -> Entry:
    """The line of a class of headwise.methods.allocate."""
    make = lambda: getattr(import_module("headwise.methods.allocate"), name)()  # noqa: E731
    return Entry(make=make, summary=summary, paper=paper, served=served)


def of_file(name: str, summary: str, paper: str, *, file: Literal["optional", "needed"] = "optional") -> Entry:
    """The line of what a file describes, made by a function of headwise.methods.of_files."""
    make = lambda *file: getattr(import_module("headwise.methods.of_files"), name)(*file)  # noqa: E731
    return Entry(make=make, summary=summary, paper=paper, file=file, served=True)


SCORERS: Mapping[str, Entry] = MappingProxyType(
    {
        "random": scorer("Random", "uniform random scores: the floor every method must beat"),
        "streaming": scorer("Streaming", "first 4 tokens and the most recent ones", "2309.17453", served=True),
        "knorm": scorer("Knorm", "small key norm", "2406.11430", served=True),
        "keydiff": scorer("KeyDiff", "keys unlike the mean key", "2504.15364", served=True),
        "snapkv": scorer("SnapKV", "attention of the last window of queries", "2404.14469", served=True),
        "tova": scorer("TOVA", "attention of the last query", "2401.06104"),
        "h2o": scorer("H2O", "attention accumulated over all queries", "2306.14048"),
        "expected": scorer("ExpectedAttention", "attention expected from future queries", "2510.00636"),
        "criticalkv": scorer("CriticalKV", "SnapKV weighted by what the value writes", "2502.03805"),
        "kvzip": scorer("KVzip", "attention while the model repeats the context (2 passes)", "2505.23416"),
        "kvzip-l2": scorer(
            "KVzipL2", "as kvzip, by the sum of squared attention instead of the largest (2 passes)", "2505.23416"
        ),
        "lkv-t": of_file(
            "learned_scores", "learned from keys and values: lkv-t@FILE, or lkv-t where gates are shipped", "2605.06676"
        ),
    }
)

ALLOCATORS: Mapping[str, Entry] = MappingProxyType(
    {
        "uniform": allocator("Uniform", "the same count for every head", served=True),
        "pyramid": allocator(
            "Pyramid", "more for early layers, linearly less for late ones", "2406.02069", served=True
        ),
        "adakv": allocator("AdaKV", "heads of a layer compete with their scores", "2407.11550"),
        "global": allocator("Global", "all heads of all layers compete with their scores"),
        "fixed": of_file("fixed", "per-head fractions from a Budget file: fixed@FILE", "2410.10819", file="needed"),
        "lukv": of_file(
            "solved",
            "solved from a profile of the model and scorer: lukv@FILE, or lukv where a budget is shipped",
            "2602.08585",
        ),
        "lkv-h": of_file(
            "learned_budgets", "learned budgets: lkv-h@FILE, or lkv-h where gates are shipped", "2605.06676"
        ),
        # served with the budgets of lkv-h, which know no prompt
        "lkv-c": of_file(
            "contest",
            "learned scores of all heads compete; lkv-h where the file's scores do not compare",
            "2605.06676",
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
