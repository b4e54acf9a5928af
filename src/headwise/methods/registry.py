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


def scorer(name: str) -> Callable[..., Any]:
    """Makes a scorer of headwise.methods.scores, by the name of its class."""
    return lambda: getattr(import_module("headwise.methods.scores"), name)()


def allocator(name: str) -> Callable[..., Any]:
    """Makes an allocator of headwise.methods.allocate, by the name of its class."""
    return lambda: getattr(import_module("headwise.methods.allocate"), name)()


def of_file(name: str) -> Callable[..., Any]:
    """Makes what a file describes, by the name of a function of headwise.methods.of_files."""
    return lambda *file: getattr(import_module("headwise.methods.of_files"), name)(*file)


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
            make=of_file("learned_scores"),
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
            make=of_file("fixed"),
            summary="per-head fractions from a Budget file: fixed@FILE",
            paper="2410.10819",
            file="needed",
            served=True,
        ),
        "lukv": Entry(
            make=of_file("solved"),
            summary="solved from a profile of the model and scorer: lukv@FILE, or lukv where a budget is shipped",
            paper="2602.08585",
            file="optional",
            served=True,
        ),
        "lkv-h": Entry(
            make=of_file("learned_budgets"),
            summary="learned budgets: lkv-h@FILE, or lkv-h where gates are shipped",
            paper="2605.06676",
            file="optional",
            served=True,
        ),
        "lkv-c": Entry(
            make=of_file("contest"),
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
