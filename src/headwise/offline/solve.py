"""LU-KV, second half, as a verb: from a Profile to a Budget, and how good the Budget is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.artifacts.budget import Budget
from headwise.artifacts.contents import LOSSES
from headwise.artifacts.hulls import concave_hulls, share
from headwise.artifacts.origin import Origin
from headwise.artifacts.profile import Profile
from headwise.errors import BadInput

RATIOS = tuple(Fraction(n, 100) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90))
CHECK_STEPS = 64  # of a head, in the comparison with dynamic programming
GRID = 2**16  # entries of a head from which fractions are read off; the hulls in the file are exact


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Share of the utility that is retained at one ratio. `gap` is what the hulls lose against the exact optimum."""

    ratio: float
    lukv: float
    optimum: float
    uniform: float
    adakv: float

    @property
    def gap(self) -> float:
        """Relative loss against exact dynamic programming on the same curves."""
        return 1 - self.lukv / self.optimum if self.optimum > 0 else 0.0


def solve(
    profile: Profile,
    scorer: str,
    *,
    ratios: Sequence[float | Fraction] = RATIOS,
    domain_weights: Mapping[str, float] | None = None,
    loss: str = LOSSES[0],
) -> Budget:
    """The Budget of a scorer: the hulls that solve any ratio exactly, and kept fractions at `ratios`.

    The fractions are those of a long context, in which the protected tokens do not count. Raises BadInput for an
    unknown scorer, loss or domain, or ratios outside (0, 1).
    """
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise BadInput(f"ratios {[float(ratio) for ratio in ratios]} must lie strictly between 0 and 1.")
    _require_loss(loss)
    exact = sorted({Fraction(str(ratio)) for ratio in ratios})
    curve, shape = profile.curve(scorer, domain_weights, loss=loss), profile.origin.shape
    protected, rest = curve.flatten(0, 1).tensor_split([sum(profile.protection[scorer])], dim=-1)
    hulls = concave_hulls(rest)
    heads = len(hulls.width)
    rows = [share(hulls, entries=GRID, total=int(ratio * GRID * heads)) for ratio in exact]
    evidence = {"curve": loss, "scorer": "raw", "ideal": "ideal"}
    return Budget(
        ratios=torch.tensor([float(ratio) for ratio in exact], dtype=torch.float64, device="cpu"),
        fractions=torch.stack(rows).unflatten(1, (len(shape.layers), shape.kv_heads)).double() / GRID,
        origin=_origin(profile, scorer, loss),
        hull={"protected": protected.contiguous(), "width": hulls.width, "slope": hulls.slope},
        evidence={k: profile.curve(scorer, domain_weights, loss=v).float() for k, v in evidence.items()},
    )


def published(profile: Profile, scorer: str, *, domain_weights: Mapping[str, float] | None = None) -> Budget:
    """LU-KV as its authors do it: kept fractions at 1% to 99%, solved question by question and averaged.

    Has no hulls; use it as `scorer+fixed@FILE`. Raises BadInput if the profile was made without `published`.
    """
    return Budget(
        ratios=torch.arange(1, 100, dtype=torch.float64, device="cpu") / 100,
        fractions=profile.published_fractions(scorer, domain_weights),
        origin=_origin(profile, scorer, "published"),
    )


def _origin(profile: Profile, scorer: str, loss: str) -> Origin:
    sink, window = profile.protection[scorer]
    made_for = {"scorer": scorer, "scorer_parameters": profile.parameters[scorer], "sink": sink, "window": window}
    return replace(profile.origin, **made_for, loss=loss)


def _require_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise BadInput(f"loss={loss!r}: choose {', '.join(LOSSES)} or published.")


def check(
    profile: Profile,
    scorer: str,
    ratios: Sequence[float],
    *,
    domain_weights: Mapping[str, float] | None = None,
    loss: str = LOSSES[0],
) -> list[Quality]:
    """Compare the greedy on hulls with exact dynamic programming, uniform and AdaKV-like budgets on the same curves.

    Curves (without the protected tokens) are cut to 64 steps per head for it. "adakv" shares each layer's equal part
    greedily among its heads.
    """
    _require_loss(loss)
    coarse = _coarse(profile.curve(scorer, domain_weights, loss=loss)[..., sum(profile.protection[scorer]) :])
    layers, flat = len(coarse), coarse.flatten(0, 1)
    gained = torch.nn.functional.pad(flat.cumsum(-1), (1, 0))
    whole, best = float(gained[:, -1].sum()), _best_totals(gained)

    def worth(counts: Tensor) -> float:
        return float(gained.gather(1, counts[:, None]).sum()) / whole if whole else 0.0

    def quality(ratio: float) -> Quality:
        total = round(ratio * len(flat) * CHECK_STEPS)
        by_layer = [
            share(concave_hulls(layer), entries=CHECK_STEPS, total=total * (i + 1) // layers - total * i // layers)
            for i, layer in enumerate(coarse)
        ]
        even = torch.full((len(flat),), total // len(flat), dtype=torch.int64, device="cpu")
        even[: total % len(flat)] += 1
        return Quality(
            ratio=ratio,
            lukv=worth(share(concave_hulls(flat), entries=CHECK_STEPS, total=total)),
            optimum=float(best[total]) / whole if whole else 0.0,
            uniform=worth(even),
            adakv=worth(torch.cat(by_layer)),
        )

    return [quality(ratio) for ratio in ratios]


def _coarse(curve: Float[Tensor, "layers kv_heads ranks"]) -> Float[Tensor, "layers kv_heads steps"]:
    layers, heads, ranks = curve.shape
    if ranks % CHECK_STEPS:
        raise BadInput(f"curves of {ranks} ranks cannot be cut to {CHECK_STEPS} steps; profile the model again.")
    return curve.reshape(layers, heads, CHECK_STEPS, ranks // CHECK_STEPS).sum(-1)


def _best_totals(gained: Float[Tensor, "heads counts"]) -> np.ndarray:
    """Exact optimum for every total: (max, +) convolution of the heads' curves."""
    best = np.zeros(1)
    for curve in gained.numpy():
        longer = np.full(len(best) + len(curve) - 1, -np.inf)
        for count, gain in enumerate(curve):
            np.maximum(longer[count : count + len(best)], best + gain, out=longer[count : count + len(best)])
        best = longer
    return best
