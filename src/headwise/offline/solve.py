"""The second half of LU-KV: solve a Budget from a Profile, and check how good it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.artifacts.budget import Budget
from headwise.artifacts.contents import LOSSES
from headwise.artifacts.hulls import Hulls, concave_hulls, share
from headwise.artifacts.origin import Origin
from headwise.artifacts.profile import Profile
from headwise.errors import BadInput

RATIOS = tuple(Fraction(n, 100) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90))
CHECK_STEPS = 64  # of a head, in the comparison with dynamic programming
BITS_WEIGHT = 0.1  # what bits lose counts so much of what eviction loses (docs/decisions.md: tuned on needles and text)
GRID = 2**16  # entries of a head from which fractions are read off; the hulls in the file are exact


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Share of the utility that each kind of budget retains at one ratio."""

    ratio: float
    lukv: float
    optimum: float
    uniform: float
    adakv: float

    @property
    def gap(self) -> float:
        """What the hulls lose against exact dynamic programming on the same curves, as a share."""
        return 1 - self.lukv / self.optimum if self.optimum > 0 else 0.0


def solve(
    profile: Profile,
    scorer: str,
    *,
    ratios: Sequence[float | Fraction] = RATIOS,
    domain_weights: Mapping[str, float] | None = None,
    loss: str = LOSSES[0],
    bits_weight: float = BITS_WEIGHT,
) -> Budget:
    """Solve the Budget of a scorer from its profile (LU-KV, arXiv 2602.08585).

    Parameters
    ----------
    profile
        Curves of the scorer, as `profile` measures them.
    scorer
        One of the profile's scorers.
    ratios
        Keeps in (0, 1) at which kept fractions are tabulated.
    domain_weights
        How much each domain counts; None: as many contexts as it has.
    loss
        The curve that is solved: "output", "normalised" or "raw".
    bits_weight
        How much of what fewer bits lose counts, 0 or more: with 1 as much as what eviction loses. For `entries="auto"`.

    Returns
    -------
    Budget
        It has hulls, which solve any keep exactly, and kept fractions [ratios, layers, kv_heads] of a long context, in
        which the protected tokens do not count. With the loss "output" it has hulls of entries in fewer bits, too, if
        the profile has curves of them: what `entries="auto"` needs.

    Raises
    ------
    BadInput
        If the scorer, the loss or a domain is unknown, a ratio is outside (0, 1), or the weight is below 0.
    """
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise BadInput(f"ratios {[float(ratio) for ratio in ratios]} must lie strictly between 0 and 1.")
    if not 0 <= bits_weight < float("inf"):
        raise BadInput(f"bits_weight={bits_weight}: choose a number from 0 on, such as {BITS_WEIGHT}.")
    _require_loss(loss)
    kinds = profile.kinds(scorer) if loss == LOSSES[0] else ()
    exact = sorted({Fraction(str(ratio)) for ratio in ratios})
    shape = profile.origin.shape
    native, protected = profile.curve(scorer, domain_weights, loss=loss), sum(profile.protection[scorer])
    solved = _hull(native, protected)
    few = {kind: profile.curve(scorer, domain_weights, loss=kind) for kind in kinds}
    hulls = Hulls(width=solved["width"], slope=solved["slope"])
    heads = len(hulls.width)
    rows = [share(hulls, entries=GRID, total=int(ratio * GRID * heads)) for ratio in exact]
    evidence = {"curve": loss, "scorer": "raw", "ideal": "ideal"}
    return Budget(
        ratios=torch.tensor([float(ratio) for ratio in exact], dtype=torch.float64, device="cpu"),
        fractions=torch.stack(rows).unflatten(1, (len(shape.layers), shape.kv_heads)).double() / GRID,
        origin=_origin(profile, scorer, loss),
        hull=solved,
        evidence={k: profile.curve(scorer, domain_weights, loss=v).float() for k, v in evidence.items()},
        kinds={kind: _hull(native.lerp(curve, bits_weight), protected) for kind, curve in few.items()},
    )


def _hull(curve: Float[Tensor, "layers kv_heads ranks"], protected: int) -> dict[str, Tensor]:
    """Return a hull as a Budget has it: of protected tokens what each is worth, of the others the hull."""
    first, rest = curve.flatten(0, 1).tensor_split([protected], dim=-1)
    hulls = concave_hulls(rest)
    return {"protected": first.contiguous(), "width": hulls.width, "slope": hulls.slope}


def published(profile: Profile, scorer: str, *, domain_weights: Mapping[str, float] | None = None) -> Budget:
    """Return the Budget that LU-KV's authors would make: fractions at 1% to 99%, solved per question and averaged.

    It has no hulls; use it as `scorer+fixed@FILE`. Raises BadInput if the profile was made without `published`.
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
    """Compare LU-KV's budgets with exact dynamic programming, uniform and AdaKV-like budgets on the same curves.

    Returns one Quality per ratio. Curves (without the protected tokens) are cut to 64 steps per head. "adakv" shares
    each layer's equal part greedily among its heads. Raises BadInput if the loss is unknown.
    """
    _require_loss(loss)
    coarse = _coarse(profile.curve(scorer, domain_weights, loss=loss)[..., sum(profile.protection[scorer]) :])
    layers, flat = len(coarse), coarse.flatten(0, 1)
    utility = torch.nn.functional.pad(flat.cumsum(-1), (1, 0))
    full_utility, best = float(utility[:, -1].sum()), _optimal_utilities(utility)

    def worth(counts: Tensor) -> float:
        return float(utility.gather(1, counts[:, None]).sum()) / full_utility if full_utility else 0.0

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
            optimum=float(best[total]) / full_utility if full_utility else 0.0,
            uniform=worth(even),
            adakv=worth(torch.cat(by_layer)),
        )

    return [quality(ratio) for ratio in ratios]


def _coarse(curve: Float[Tensor, "layers kv_heads ranks"]) -> Float[Tensor, "layers kv_heads steps"]:
    layers, heads, ranks = curve.shape
    if ranks % CHECK_STEPS:
        raise BadInput(f"curves of {ranks} ranks cannot be cut to {CHECK_STEPS} steps; profile the model again.")
    return curve.reshape(layers, heads, CHECK_STEPS, ranks // CHECK_STEPS).sum(-1)


def _optimal_utilities(utility: Float[Tensor, "heads counts"]) -> np.ndarray:
    """Return the exact optimum for every total: the (max, +) convolution of the heads' curves."""
    best = np.zeros(1)
    for curve in utility.numpy():
        longer = np.full(len(best) + len(curve) - 1, -np.inf)
        for count, gain in enumerate(curve):
            np.maximum(longer[count : count + len(best)], best + gain, out=longer[count : count + len(best)])
        best = longer
    return best
