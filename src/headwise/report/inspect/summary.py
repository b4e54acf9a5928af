"""Summarise a file for `headwise inspect`: what it is, for which model, how to use it, what it keeps."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Any

from headwise.errors import BadInput
from headwise.files.terminal import size
from headwise.shapes import KINDS as KINDS_OF_ENTRIES

KINDS = {
    "budget": "a budget: how much every head keeps",
    "cache": "a compressed context, for headwise.load",
    "gates": "gates: what was learned about heads and entries",
    "profile": "a profile: what every head gains by what it keeps",
    "part": "a part of a profile that is being made, or was killed",
    "training": "the state of a training that is under way, or was killed",
}
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1}
BITS = re.compile(r"\.k([48])v([48])_")  # of a number of a key and of a value, in the names of a layer's tensors
STATES = re.compile(r"\.(k[48]v[48]_)?(keys|values|key_scales|value_scales)$")


def summary(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return rows of a name and a text, made of a file's `facts`. A fact that is missing has no row.

    Raises BadInput if the header is not one that headwise writes.
    """
    kind = str(facts.get("kind"))
    try:
        rows = [("what", KINDS.get(kind, kind)), *_model(facts), *_OF_KIND.get(kind, _nothing)(path, facts)]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: its header is damaged ({error!r:.80}). --json shows all of it.") from error
    written = f"format {facts.get('format_version')}, by headwise {facts.get('library_version')}"
    return [*rows, ("file", f"{size(Path(path).stat().st_size)}, {written}")]


def spread(budgets: Mapping[str, Sequence[Sequence[float]]]) -> list[tuple[str, ...]]:
    """Return a row for every keep: the least, median and most that heads keep, and the least and most of layers."""
    rows = []
    for keep, layers in budgets.items():
        heads, means = [*chain.from_iterable(layers)], [fmean(layer) for layer in layers]
        shares = (min(heads), median(heads), max(heads), min(means), max(means))
        rows.append((f"{float(keep):.4g}", *(f"{share:.1%}" for share in shares)))
    return rows


SPREAD = ("keep", "least of a head", "median", "most", "least of a layer", "most")


def _model(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    origin = facts.get("origin") or {}
    name, shape = origin.get("model") or facts.get("model"), origin.get("shape")
    if shape:
        layers, num_layers = len(shape["layers"]), shape["num_layers"]
        layer_text = f"{layers} layers" if layers == num_layers else f"{layers} of {num_layers} layers"
        sizes = f"{layer_text} x {shape['kv_heads']} KV heads of {shape['head_dim']}"
        yield "made for", f"{name}: {sizes}" if name else f"a model of {sizes}"
    elif name:
        yield "made for", str(name)


def _budget(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    origin = facts["origin"]
    solved = any(name.startswith("hull.") for name in facts["tensors"])
    scorer = origin.get("scorer") or "SCORER"
    yield "method", f"{scorer}+{'lukv' if solved else 'fixed'}@{path}"
    if origin.get("loss"):
        yield "solved for", f"the loss {origin['loss']!r}"
    yield "keep", "any" if solved else f"any, between {facts['tensors']['ratios']['shape'][0]} tabulated ones"
    kinds = [kind for kind in KINDS_OF_ENTRIES if f"{kind}.width" in facts["tensors"]]
    if kinds:
        yield "entries", f"auto, or any: what {', '.join(kinds)} cost every head is known"
    yield from _protected(origin)


def _gates(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    parts, origin = facts.get("parts", []), facts["origin"]
    scorer = origin.get("scorer") or "SCORER"
    method = "lkv" if len(parts) == 2 else "lkv-t" if "scores" in "".join(parts) else f"{scorer}+lkv-h"
    yield "method", f"{method}@{path}"
    yield "holds", " and ".join(parts)
    settings = facts.get("settings") or {}
    if facts.get("comparable"):
        yield "keep", "any; its heads compete, for their scores compare"
    elif "keeps" in settings and "steps" in settings:
        yield "keep", "any; trained for {} to {}, {} steps".format(*settings["keeps"], settings["steps"])
    yield from _protected(origin)


def _profile(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    scorers = [*facts.get("protection", {})]
    yield "scorers", ", ".join(scorers)
    domains = zip(facts.get("domains", []), facts.get("contexts", []), strict=False)
    yield "contexts", ", ".join(f"{number} of {name}" for name, number in domains)
    kinds = [kind for kind in KINDS_OF_ENTRIES if any(name.endswith(f".{kind}") for name in facts["tensors"])]
    if kinds:
        yield "entries", f"native, {', '.join(kinds)}"
    yield "next", f"headwise solve {path} --scorer {scorers[0] if scorers else 'SCORER'} --out ..."


def _cache(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    method, tensors = facts.get("method") or {}, facts["tensors"]
    names = [part["name"] for part in (method.get("scorer"), method.get("allocator")) if part]
    yield "method", f"{' + '.join(names)}, keep {facts.get('keep')}"
    rows = facts.get("context_tokens") or []
    yield "tokens", f"{', '.join(map(str, rows))} read and compressed, {facts.get('seen')} seen in all"
    yield from _stored(facts)
    yield (
        "KV held",
        f"{size(_nbytes(tensors))}; at most {size(facts.get('peak_nbytes') or 0)} while the context was read",
    )
    layers = [name.rpartition(".")[0] for name in tensors if name.endswith(".lengths")]
    heads = {layer: sum(rows) * tensors[f"{layer}.lengths"]["shape"][-1] for layer in layers}
    own = {layer: {n: t for n, t in tensors.items() if n.startswith(f"{layer}.")} for layer in layers}
    kept = [_entries(own[layer]) / heads[layer] for layer in layers if heads[layer]]
    if kept:
        yield "entries kept", f"{fmean(kept):.1%} of those read; {min(kept):.1%} to {max(kept):.1%} by layer"


def _stored(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield how entries are stored."""
    tensors = facts["tensors"]
    layers = {name.rpartition(".")[0] for name in tensors if name.endswith(".lengths")}
    own = {name: header for name, header in tensors.items() if name.rpartition(".")[0] in layers}
    small = {name: header for name, header in own.items() if BITS.search(name)}
    large = {name: header for name, header in own.items() if name not in small}
    dtypes = {header["dtype"] for name, header in large.items() if name.endswith(".keys")}
    native = f"in the model's dtype ({', '.join(sorted(dtypes))})"
    if not small:
        yield "entries", f"{facts.get('entries')}: {native}"
        return
    label = "entries"
    for keys, values in sorted({match.groups() for name in small if (match := BITS.search(name))}, reverse=True):
        own = {name: header for name, header in small.items() if f".k{keys}v{values}_" in name}
        told = f"{_entries(own):,} with {keys} bits a key, {values} a value, {size(_nbytes(own))} with scales"
        yield label, told if label == "" else f"{facts.get('entries')}: {told}"
        label = ""
    of_first = "" if facts.get("entries") == "auto" else "of the first tokens "
    yield "", f"{_entries(large):,} {of_first}{native}, {size(_nbytes(large))}"


def _entries(tensors: Mapping[str, Any]) -> int:
    """Return how many entries there are in some tensors."""
    return sum(header["shape"][0] for name, header in tensors.items() if name.endswith("positions"))


def _nbytes(tensors: Mapping[str, Any]) -> int:
    """Return the bytes of the keys and values among some tensors, scales included."""
    states = [header for name, header in tensors.items() if STATES.search(name)]
    return sum(prod(header["shape"]) * ITEM_BYTES.get(header["dtype"], 0) for header in states)


def _protected(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if origin.get("sink") or origin.get("window"):
        yield "protected", f"first {origin['sink']} and last {origin['window']} tokens"


def _nothing(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    return iter(())


_OF_KIND = {"budget": _budget, "gates": _gates, "profile": _profile, "cache": _cache}
