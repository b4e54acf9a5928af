"""What budgets and profiles hold: tables of their tensors and fields, and what must hold between these.

budget.py and profile.py read the files; files/schema.py and files/strict_json.py hold them against the tables.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.schema import Header, Numbers, Schema
from headwise.shapes import KINDS as KINDS
from headwise.shapes import ModelShape

LOSSES = ("output", "normalised", "raw")  # what a profile measures, see losses.py; the first is the default
ADVICE = "get or make the file again."
RETRY = "Get or make the file again."
TOTAL = 1e-3  # by which float32 sums may differ from what they are sums of


def _shape(value: Any) -> ModelShape:
    sizes = {name: value[name] for name in ("num_layers", "kv_heads", "query_heads", "head_dim")}
    if len(value) != len(sizes) + 1:
        raise ValueError
    return ModelShape(**sizes, layers=strict_json.list_of(strict_json.size)(value["layers"]))


ORIGIN: Mapping[str, strict_json.Check] = {
    "shape": _shape,
    **dict.fromkeys(("model", "config_hash", "scorer", "calibration", "loss"), strict_json.text),
    "scorer_parameters": strict_json.mapping,
    **dict.fromkeys(("sink", "window"), strict_json.size),
}
ORIGIN_DEFAULTS = {
    **dict.fromkeys(("model", "config_hash", "scorer", "calibration", "loss"), ""),
    "scorer_parameters": {},
    "sink": 0,
    "window": 0,
}


def _shares(*shape: int | str) -> Numbers:
    return Numbers(shape=shape, low=0.0, high=1.0 + TOTAL)


BUDGET: Mapping[str, Numbers] = {
    "ratios": _shares("ratios"),
    "fractions": _shares("ratios", "layers", "kv_heads"),
}
HULL: Mapping[str, Numbers] = {
    "hull.protected": Numbers(shape=("heads", "protected")),
    "hull.width": _shares("heads", "steps"),
    "hull.slope": Numbers(shape=("heads", "steps")),
}
KIND_HULLS: Mapping[str, Mapping[str, Numbers]] = {
    kind: {
        f"{kind}.protected": Numbers(shape=("heads", "protected")),
        f"{kind}.width": _shares("heads", f"steps of {kind}"),
        f"{kind}.slope": Numbers(shape=("heads", f"steps of {kind}")),
    }
    for kind in KINDS
}
EVIDENCE: Mapping[str, Numbers] = {
    f"evidence.{name}": Numbers(shape=("layers", "kv_heads", "ranks")) for name in ("curve", "scorer", "ideal")
}
PROFILE: Mapping[str, strict_json.Check] = {
    "domains": strict_json.list_of(strict_json.text),
    "contexts": strict_json.list_of(strict_json.positive),
    "protection": strict_json.mapping_of(strict_json.list_of(strict_json.size)),
    "parameters": strict_json.mapping_of(strict_json.mapping),
    "settings": strict_json.mapping,
}


def profile_fields(metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Fields of a Profile that are no tensors. Raises BadInput."""
    where = f"{path}: the metadata is incomplete: it"
    fields = strict_json.checked(metadata, PROFILE, where, ADVICE)
    domains, protection = fields["domains"], fields["protection"]
    if not domains or len(set(domains)) < len(domains) or len(domains) != len(fields["contexts"]):
        raise BadInput(
            f"{where} has {len(domains)} domains for {len(fields['contexts'])} numbers of contexts; {ADVICE}"
        )
    if not protection or not protection.keys() <= fields["parameters"].keys():
        raise BadInput(f"{where} does not say sink, window and parameters of the same scorers; {ADVICE}")
    if any(len(pair) != 2 for pair in protection.values()):
        raise BadInput(f"{where} must say two numbers of every scorer's protection, sink and window; {ADVICE}")
    return fields


def profile_schema(fields: Mapping[str, Any], shape: ModelShape, headers: Mapping[str, Header]) -> Schema:
    """Every scorer has all curves; solutions of single questions are there for as many scorers as there are.

    So are curves of entries in fewer bits.
    """
    table: dict[str, Numbers] = {}
    for scorer in fields["protection"]:
        for loss in (*LOSSES, "ideal", *(kind for kind in KINDS if f"curve.{scorer}.{kind}" in headers)):
            table[f"curve.{scorer}.{loss}"] = Numbers(shape=("domains", "layers", "kv_heads", f"ranks of {scorer}"))
        if f"published.{scorer}" in headers:
            table[f"published.{scorer}"] = _shares("domains", 99, "layers", "kv_heads")
    sizes = {"domains": len(fields["domains"]), **sizes_of(shape)}
    for scorer, protected in fields["protection"].items():
        curve = headers.get(f"curve.{scorer}.{LOSSES[0]}")
        if curve is not None and curve.shape and curve.shape[-1] <= sum(protected):
            raise BadInput(f"a curve of {curve.shape[-1]} ranks is no longer than {sum(protected)} protected tokens.")
    return Schema(table=table, sizes=sizes)


def part_table(ranks: Mapping[str, int], curves: Sequence[str], published: bool) -> dict[str, Numbers]:
    """Of the curves of one context, by scorer: how many ranks they have."""
    table: dict[str, Numbers] = {}
    for scorer, number in ranks.items():
        table |= {f"{scorer}.{curve}": Numbers(shape=("layers", "kv_heads", number)) for curve in curves}
        if published:
            table[f"{scorer}.published"] = _shares(99, "layers", "kv_heads")
    return table


def budget_schema(names: Mapping[str, Any], shape: ModelShape, protected: int, advice: str = RETRY) -> Schema:
    """What a budget with tensors of these names must be, for heads with so many protected tokens.

    Hull, evidence and the hulls of every kind of bits are each there in full or not at all.
    """
    table = dict(BUDGET)
    kinds = [(group, f"{kind}.") for kind, group in KIND_HULLS.items()]
    for group, prefix in ((HULL, "hull."), (EVIDENCE, "evidence."), *kinds):
        if any(name.startswith(prefix) for name in names):
            table |= group
    sizes = {**sizes_of(shape), "protected": protected}
    return Schema(table=table, sizes=sizes, advice=advice)


def sizes_of(shape: ModelShape) -> dict[str, int]:
    """Names of sizes, as tables use them."""
    return {"layers": len(shape.layers), "kv_heads": shape.kv_heads, "heads": shape.num_heads}


def require_hull(width: Float[Tensor, "heads steps"], slope: Float[Tensor, "heads steps"]) -> None:
    """Raise BadInput unless a head's steps cover all of it, each less steep than the one before."""
    totals = width.double().sum(-1)
    if not ((totals - 1).abs() <= TOTAL).all():
        sums = f"{float(totals.min()):g} to {float(totals.max()):g}"
        raise BadInput(f"a hull's widths must sum to 1 in every head; found sums from {sums}.")
    used = width > 0
    if (used[:, 1:] & ~used[:, :-1]).any() or (used[:, 1:] & (slope.diff(dim=-1) > 0)).any():
        raise BadInput("a hull's slopes must not increase along a head, and unused steps must come last.")


def require_totals(curves: Float[Tensor, "domains layers kv_heads ranks"], place: str, *, least: float = 0.0) -> None:
    """Raise BadInput unless the curves of all heads sum to 1 (to less where some context had nothing to gain).

    Those of entries in fewer bits sum to less, to less than 0 where these are worse than no entries: then `least` is.
    """
    flat = curves.double().flatten(1)
    totals, room = flat.sum(-1), TOTAL * flat.abs().sum(-1).clamp(min=1)
    if not ((totals >= least - room) & (totals <= 1 + room)).all():
        raise BadInput(f"{place} sums to {totals.tolist()} over all heads; expected sums from {least:g} to 1. {RETRY}")
