"""Profiles: what every head gains by keeping more (LU-KV, arXiv 2602.08585)."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.artifacts.contents import KINDS, LOSSES, profile_fields, profile_schema, require_totals
from headwise.artifacts.origin import Origin
from headwise.artifacts.tensors import group_of, opened, write_tensors
from headwise.errors import BadInput
from headwise.files.schema import LARGEST


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Profile:
    """What every head gains, by how much it keeps, for one or more scorers (LU-KV, arXiv 2602.08585).

    `curves[scorer][loss]` are means over the contexts of each domain: the marginal utility by rank, best first; first
    the sink + window protected tokens one by one, then the others in equal shares. Over all heads a curve sums to 1.
    The losses are those of LOSSES; besides, "ideal" is the raw importance in the order of importance itself. Curves of
    KINDS, where they were asked for, are "output" with what is kept stored in fewer bits, in the unit of "output": they
    sum to less than 1.
    `published[scorer]` are kept fractions solved for every question by itself at 1% to 99% and averaged, as LU-KV's
    authors do; empty unless asked for.
    """

    curves: Mapping[str, Mapping[str, Float[Tensor, "domains layers kv_heads ranks"]]]
    domains: tuple[str, ...]
    contexts: tuple[int, ...]  # per domain
    protection: Mapping[str, tuple[int, int]]  # scorer -> sink, window
    parameters: Mapping[str, Mapping[str, Any]]  # scorer -> provenance
    settings: Mapping[str, Any]
    origin: Origin
    published: Mapping[str, Float[Tensor, "domains ratios layers kv_heads"]] = field(default_factory=dict)

    def curve(
        self, scorer: str, weights: Mapping[str, float] | None = None, *, loss: str = LOSSES[0]
    ) -> Float[Tensor, "layers kv_heads ranks"]:
        """Marginal utility of a scorer, domains weighted by their contexts or by `weights` (others 0). float64."""
        self._require(scorer)
        if loss not in self.curves[scorer]:
            raise BadInput(f"loss={loss!r}: choose {', '.join(LOSSES)}.")
        return self._mean(self.curves[scorer][loss], weights)

    def kinds(self, scorer: str) -> tuple[str, ...]:
        """Kinds of bits that a scorer has curves of."""
        self._require(scorer)
        return tuple(kind for kind in KINDS if kind in self.curves[scorer])

    def published_fractions(
        self, scorer: str, weights: Mapping[str, float] | None = None
    ) -> Float[Tensor, "ratios layers kv_heads"]:
        """Mean of the solutions of single questions. Raises BadInput if the profile has none."""
        self._require(scorer)
        if scorer not in self.published:
            raise BadInput(
                "this profile has no solutions of single questions: make it with 'headwise profile --published'."
            )
        return self._mean(self.published[scorer], weights)

    def _require(self, scorer: str) -> None:
        if scorer not in self.curves:
            raise BadInput(f"this profile is of {', '.join(self.curves)}; it has no scorer {scorer!r}.")

    def _mean(self, by_domain: Tensor, weights: Mapping[str, float] | None) -> Tensor:
        unknown = set(weights or {}) - set(self.domains)
        if unknown:
            raise BadInput(f"this profile has no domain {sorted(unknown)}; it has {', '.join(self.domains)}.")
        shares = [
            (weights or {}).get(d, 0.0) if weights else float(n)
            for d, n in zip(self.domains, self.contexts, strict=True)
        ]
        if not (min(shares) >= 0 and 0 < sum(shares) < float("inf")):
            raise BadInput(f"domain weights {dict(weights or {})} must be finite, at least 0, and not all of them 0.")
        share = torch.tensor(shares, dtype=torch.float64, device="cpu") / sum(shares)
        return torch.einsum("d,d...->...", share, by_domain.double())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, at once or not at all."""
        fields = ("domains", "contexts", "protection", "parameters", "settings")
        metadata = {**{name: getattr(self, name) for name in fields}, "origin": asdict(self.origin)}
        tensors = {f"curve.{s}.{loss}": t for s, losses in self.curves.items() for loss, t in losses.items()}
        published = {f"published.{scorer}": t for scorer, t in self.published.items()}
        write_tensors(path, "profile", {**tensors, **published}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read what `save` wrote. Raises ArtifactMismatch on another kind or format, BadInput on a damaged file."""
        with opened(path, "profile") as file:
            fields, origin = profile_fields(file.metadata, path), Origin.parse(file.metadata, path)
            tensors = file.read(profile_schema(fields, origin.shape, file.headers))
        curves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in group_of(tensors, "curve").items():
            scorer, _, loss = name.rpartition(".")
            least = -LARGEST if loss in KINDS else 0.0
            require_totals(tensor, f"{path} is damaged: 'curve.{name}'", least=least)
            curves.setdefault(scorer, {})[loss] = tensor
        return cls(**fields, origin=origin, curves=curves, published=group_of(tensors, "published"))
