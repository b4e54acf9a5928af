"""Make a file small enough to share: gates in half precision, budgets without the curves for pictures.

The effect is measured before anything is written: which entries would be kept, and how many.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headwise.artifacts.budget import Budget
from headwise.artifacts.gates import KNOTS, LEAST_SPREAD, EntryScores, Gates, HeadBudgets
from headwise.artifacts.hulls import Hulls
from headwise.artifacts.tensors import describe
from headwise.errors import ArtifactMismatch, BadInput
from headwise.methods.allocate.profiled import lukv_counts

MOST_CHANGED = 0.01  # of a context: how much more or less any head may keep
LEAST_SHARED = 0.97  # of what a head keeps: entries that stay the same
TOKENS, KEEP = 2048, 0.15  # of the context and the choice that are compared


@dataclass(frozen=True, kw_only=True, slots=True)
class Shrunk:
    """What was written. `changed`: most by which a head's share changes. `shared`: least share of equal entries."""

    kind: str
    bytes_before: int
    bytes_after: int
    changed: float
    shared: float


def shrink(path: Path, out: Path, *, model: str | None = None) -> Shrunk:
    """Write a small copy of gates or of a budget. `model` is the name of the model that the copy says it is for.

    Gates become float16. A budget becomes float32, because its slopes range over many orders of magnitude, and loses
    its curves. Raises BadInput if half precision cannot hold a number or changes what is kept, ArtifactMismatch if the
    file is of another kind.
    """
    kind = describe(path)["kind"]
    if kind not in ("gates", "budget"):
        raise ArtifactMismatch(f"{path} is a {kind:.40}: only gates and budgets are made smaller.")
    before = path.stat().st_size
    changed, shared = _gates(path, out, model) if kind == "gates" else (_budget(path, out, model), 1.0)
    return Shrunk(kind=kind, bytes_before=before, bytes_after=out.stat().st_size, changed=changed, shared=shared)


def _gates(path: Path, out: Path, model: str | None) -> tuple[float, float]:
    gates, changed, shared = Gates.load(path), 0.0, 1.0
    if gates.budgets is not None:
        changed = _changed_fractions(gates.budgets, _halve(gates.budgets, "budgets"))
    if gates.scores is not None:
        shared = _shared_entries(gates.scores, _halve(gates.scores, "scores"))
    if changed > MOST_CHANGED or shared < LEAST_SHARED:
        raise BadInput(
            f"{path}: in half precision a head would keep up to {changed:.4f} of the context more or less, and of its "
            f"entries only {shared:.4f} would stay. Share the file as it is."
        )
    origin = gates.origin if model is None else replace(gates.origin, model=model)
    replace(gates, origin=origin).save(out, dtype=torch.float16)
    return changed, shared


def _budget(path: Path, out: Path, model: str | None) -> float:
    budget = Budget.load(path)
    origin = budget.origin if model is None else replace(budget.origin, model=model)
    hull = _singles(budget.hull)
    kinds = {kind: _singles(tensors) for kind, tensors in budget.kinds.items()}
    small = replace(budget, origin=origin, fractions=budget.fractions.float(), hull=hull, kinds=kinds, evidence={})
    small.save(out)
    hulls = [(budget.hull, hull), *((budget.kinds[kind], kinds[kind]) for kind in kinds)] if hull else []
    return max((_changed_counts(budget, before, after) for before, after in hulls), default=0.0)


def _singles(hull: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in hull.items()}


def _halve(module: Any, part: str) -> Any:
    """Return the module as it will be loaded. Raises BadInput if float16 cannot hold a number."""
    half = deepcopy(module).half().float()
    for name, tensor in half.state_dict().items():
        if not tensor.isfinite().all():
            raise BadInput(
                f"'{part}.{name}' holds numbers beyond 65504, the largest in half precision: share it whole."
            )
    if isinstance(half, HeadBudgets) and not (half.usual[1] >= LEAST_SPREAD).all():
        raise BadInput("'budgets.usual' holds spreads too small for half precision: share the file as it is.")
    return half


@torch.no_grad()
def _changed_fractions(before: HeadBudgets, after: HeadBudgets) -> float:
    """Return the most by which a head's share changes, over keeps, without a summary and with random ones."""
    mean, spread = before.usual
    noise = torch.randn(8, len(mean), generator=_generator(), dtype=torch.float32, device="cpu")
    summaries = [None, *(mean + spread * noise)]
    return max(float((before(keep, s) - after(keep, s)).abs().max()) for keep in KNOTS for s in summaries)


@torch.no_grad()
def _shared_entries(before: EntryScores, after: EntryScores) -> float:
    """Return the least share of a head's best entries (KEEP of random ones) that both networks choose."""
    layers, kv_heads, width, _ = before.weight_in.shape
    generator, least, kept = _generator(), 1.0, round(KEEP * TOKENS)
    for layer in range(layers):
        size = (1, kv_heads, TOKENS, width)
        features = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        chosen = [
            torch.zeros(size[:3], dtype=torch.bool, device="cpu").scatter(
                2, network(features, layer).topk(kept).indices, True
            )
            for network in (before, after)
        ]
        least = min(least, float((chosen[0] & chosen[1]).sum(-1).min()) / kept)
    return least


def _changed_counts(budget: Budget, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    """Return the most by which a head's share of TOKENS changes, over the ratios of the table, between two hulls."""
    heads, protected, counts = budget.origin.shape.num_heads, before["protected"].shape[1], []
    totals = [round(ratio * heads * TOKENS) for ratio in budget.ratios.tolist()]
    for hull in (before, after):
        hulls = Hulls(width=hull["width"], slope=hull["slope"])
        counts.append([lukv_counts(hull["protected"], hulls, TOKENS, protected, total, 1) for total in totals])
    return max(float((a - b).abs().max()) / TOKENS for a, b in zip(*counts, strict=True))


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)
