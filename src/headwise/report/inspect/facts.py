"""What a file is, in plain values: its header, of budgets and gates what heads keep, of gates also their parts."""

import os
from typing import Any

from headwise.artifacts.budget import Budget
from headwise.artifacts.gates import Gates
from headwise.artifacts.tensors import FORMAT_VERSIONS, describe

KEEPS = (0.03, 0.0625, 0.15, 0.3)  # at which budgets are told


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As `describe`; of gates also `parts`, and of all that has budgets `budgets`: keep to fractions by layer and head.

    Raises ArtifactMismatch if headwise did not write the file, BadInput if it is missing or damaged.
    """
    found = describe(path)
    kind, version = found.get("kind"), found.get("format_version")
    if kind not in ("budget", "gates") or version != FORMAT_VERSIONS[kind]:
        return found
    if kind == "budget":
        budget = Budget.load(path)
        kept = {str(keep): budget.at(budget.ratios.new_tensor([keep]))[0].tolist() for keep in KEEPS}
        return {**found, "budgets": kept}
    gates = Gates.load(path)
    parts = {"budgets (LKV-H)": gates.budgets, "scores (LKV-T)": gates.scores}
    found = {"kind": "gates", "parts": [name for name, part in parts.items() if part is not None], **found}
    if gates.budgets is not None:
        heads = gates.origin.shape.kv_heads
        found["budgets"] = {str(keep): gates.fractions(keep).unflatten(0, (-1, heads)).tolist() for keep in KEEPS}
    return found
