"""What `headwise inspect` says of a file in a few lines: what it is, for which model, how to use it, what it keeps."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Any

from headwise.errors import BadInput
from headwise.files.terminal import size

WHAT = {
    "budget": "a budget: how much every head keeps",
    "cache": "a compressed context, for headwise.load",
    "gates": "gates: what was learned about heads and entries",
    "profile": "a profile: what every head gains by what it keeps",
    "part": "a part of a profile that is being made, or was killed",
    "training": "the state of a training that is under way, or was killed",
}
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


def summary(path: str | os.PathLike[str], found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of a name and what is said, made of what `facts` found. What the file does not say is left out.

    Raises BadInput where a header is not one that headwise writes.
    """
    kind = str(found.get("kind"))
    try:
        rows = [("what", WHAT.get(kind, kind)), *_model(found), *_OF_KIND.get(kind, _nothing)(path, found)]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: its header is damaged ({error!r:.80}). --json shows all of it.") from error
    written = f"format {found.get('format_version')}, by headwise {found.get('library_version')}"
    return [*rows, ("file", f"{size(Path(path).stat().st_size)}, {written}")]


def spread(budgets: Mapping[str, Sequence[Sequence[float]]]) -> list[tuple[str, ...]]:
    """By keep: what the heads keep at least, in the middle and at most, and the layers on average."""
    rows = []
    for keep, layers in budgets.items():
        heads, means = [*chain.from_iterable(layers)], [fmean(layer) for layer in layers]
        shares = (min(heads), median(heads), max(heads), min(means), max(means))
        rows.append((f"{float(keep):.4g}", *(f"{share:.1%}" for share in shares)))
    return rows


SPREAD = ("keep", "least of a head", "median", "most", "least of a layer", "most")


def _model(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    origin = found.get("origin") or {}
    name, shape = origin.get("model") or found.get("model"), origin.get("shape")
    if shape:
        layers, every = len(shape["layers"]), shape["num_layers"]
        some = f"{layers} layers" if layers == every else f"{layers} of {every} layers"
        sizes = f"{some} x {shape['kv_heads']} KV heads of {shape['head_dim']}"
        yield "made for", f"{name}: {sizes}" if name else f"a model of {sizes}"
    elif name:
        yield "made for", str(name)


def _budget(path: str | os.PathLike[str], found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    origin = found["origin"]
    solved = any(name.startswith("hull.") for name in found["tensors"])
    scorer = origin.get("scorer") or "SCORER"
    yield "method", f"{scorer}+{'lukv' if solved else 'fixed'}@{path}"
    if origin.get("loss"):
        yield "solved for", f"the loss {origin['loss']!r}"
    yield "keep", "any" if solved else f"any, between {found['tensors']['ratios']['shape'][0]} tabulated ones"
    yield from _protected(origin)


def _gates(path: str | os.PathLike[str], found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    parts, origin = found.get("parts", []), found["origin"]
    scorer = origin.get("scorer") or "SCORER"
    method = "lkv" if len(parts) == 2 else "lkv-t" if "scores" in "".join(parts) else f"{scorer}+lkv-h"
    yield "method", f"{method}@{path}"
    yield "holds", " and ".join(parts)
    settings = found.get("settings") or {}
    if found.get("comparable"):
        yield "keep", "any; its heads compete, for their scores compare"
    elif "keeps" in settings and "steps" in settings:
        yield "keep", "any; trained for {} to {}, {} steps".format(*settings["keeps"], settings["steps"])
    yield from _protected(origin)


def _profile(path: str | os.PathLike[str], found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    scorers = [*found.get("protection", {})]
    yield "scorers", ", ".join(scorers)
    domains = zip(found.get("domains", []), found.get("contexts", []), strict=False)
    yield "contexts", ", ".join(f"{number} of {name}" for name, number in domains)
    yield "next", f"headwise solve {path} --scorer {scorers[0] if scorers else 'SCORER'} --out ..."


def _cache(path: str | os.PathLike[str], found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    method, tensors = found.get("method") or {}, found["tensors"]
    names = [part["name"] for part in (method.get("scorer"), method.get("allocator")) if part]
    yield "method", f"{' + '.join(names)}, keep {found.get('keep')}"
    rows = found.get("context_tokens") or []
    yield "tokens", f"{', '.join(map(str, rows))} read and compressed, {found.get('seen')} seen in all"
    states = [one for name, one in tensors.items() if name.rpartition(".")[2] in ("keys", "values")]
    held = sum(prod(one["shape"]) * ITEM_BYTES.get(one["dtype"], 0) for one in states)
    yield "KV held", f"{size(held)}; at most {size(found.get('peak_nbytes') or 0)} while the context was read"
    layers = [name.rpartition(".")[0] for name in tensors if name.endswith(".lengths")]
    heads = {layer: sum(rows) * tensors[f"{layer}.lengths"]["shape"][-1] for layer in layers}
    kept = [tensors[f"{layer}.keys"]["shape"][0] / heads[layer] for layer in layers if heads[layer]]
    if kept:
        yield "entries kept", f"{fmean(kept):.1%} of those read; {min(kept):.1%} to {max(kept):.1%} by layer"


def _protected(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if origin.get("sink") or origin.get("window"):
        yield "protected", f"first {origin['sink']} and last {origin['window']} tokens"


def _nothing(path: str | os.PathLike[str], found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    return iter(())


_OF_KIND = {"budget": _budget, "gates": _gates, "profile": _profile, "cache": _cache}
