"""Read what a file is, in plain values: its header, what heads keep, and which parts gates have."""

import os
from typing import Any

from headwise.artifacts.budget import Budget
from headwise.artifacts.gates import Gates
from headwise.artifacts.tensors import FORMAT_VERSIONS, describe
from headwise.kernels.quantised import NATIVE

KEEPS = (0.03, 0.0625, 0.15, 0.3)  # at which budgets are shown


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `describe` says of a file, the `parts` of gates, and `budgets`: keep to fractions [layers, kv_heads].

    Raises ArtifactMismatch if headwise did not write the file, BadInput if it is missing or damaged.
    """
    header = describe(path)
    kind, version = header.get("kind"), header.get("format_version")
    if kind == "cache":
        return {**header, "entries": header.get("entries", NATIVE)}  # earlier versions named none
    if kind not in ("budget", "gates") or version != FORMAT_VERSIONS[kind]:
        return header
    if kind == "budget":
        budget = Budget.load(path)
        kept = {str(keep): budget.at(budget.ratios.new_tensor([keep]))[0].tolist() for keep in KEEPS}
        return {**header, "budgets": kept}
    gates = Gates.load(path)
    parts = {"budgets (LKV-H)": gates.budgets, "scores (LKV-T)": gates.scores}
    header = {"kind": "gates", "parts": [name for name, part in parts.items() if part is not None], **header}
    if gates.budgets is not None:
        heads = gates.origin.shape.kv_heads
        header["budgets"] = {str(keep): gates.fractions(keep).unflatten(0, (-1, heads)).tolist() for keep in KEEPS}
    return header
