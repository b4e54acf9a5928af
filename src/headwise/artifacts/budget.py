"""Budgets: how much every KV head keeps, for any scorer or for one."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.artifacts.contents import ADVICE, KINDS, budget_schema, require_hull
from headwise.artifacts.origin import Origin
from headwise.artifacts.tables import load_npy, load_tsv
from headwise.artifacts.tensors import fingerprint, group_of, opened, write_tensors
from headwise.errors import BadInput
from headwise.files.schema import extremes, headers
from headwise.files.writing import replacing
from headwise.shapes import ModelShape

_UNFIT = "the parts of a budget do not fit together"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Budget:
    """How much every KV head keeps: fractions of the context, in [0, 1], on a grid of retained ratios.

    `fractions[r]` are the fractions kept at a total retention of `ratios[r]`; ratios ascend, strictly between 0 (where
    nothing is kept) and 1 (where everything is). `hull` holds what solves any other ratio exactly: `protected` [heads,
    sink + window], the utility of each protected token, and `width` and `slope` [heads, steps], the hull of the others.
    `evidence` holds what it was solved from, for pictures: `curve`, `scorer` and `ideal` [layers, kv_heads, ranks], as
    in a Profile. Both may be empty. `kinds` holds hulls like `hull` for entries in fewer bits, by the kind of bits:
    `width` is a share of entries, utility is in the unit of `hull`. Empty unless the profile had curves of them.
    """

    ratios: Float[Tensor, " ratios"]
    fractions: Float[Tensor, "ratios layers kv_heads"]
    origin: Origin
    hull: Mapping[str, Tensor] = field(default_factory=dict)
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    source: str = ""  # where the file came from, if from the hub: hub:owner/name/file@commit

    def __post_init__(self) -> None:
        tensors = self._tensors()
        schema = budget_schema(tensors, self.origin.shape, self.origin.sink + self.origin.window, "Make it again.")
        sizes = schema.require(headers(tensors), _UNFIT)
        if sizes.get("ranks", sizes["protected"] + 1) <= sizes["protected"]:
            raise BadInput(
                f"A budget's curves of {sizes['ranks']} ranks hold {sizes['protected']} protected tokens only."
            )
        for name, numbers in (("fractions", self.fractions), ("ratios", self.ratios)):
            low, high = extremes(numbers)
            if not 0 <= low <= high <= 1:
                raise BadInput(f"A budget's {name} must lie in [0, 1] (1 = the head is kept whole).")
        if not (self.closed()[0].diff() > 0).all():
            raise BadInput(f"A budget's ratios must ascend strictly within (0, 1), found {self.ratios.tolist()}.")
        schema.require_values(tensors, _UNFIT)
        for hull in (self.hull, *self.kinds.values()):
            if hull:
                require_hull(hull["width"], hull["slope"])
        if self.kinds and not self.hull:
            raise BadInput("A budget with hulls of entries in fewer bits needs those of native entries, too.")

    def require(self, shape: ModelShape, config_hash: str = "") -> None:
        """Raise ArtifactMismatch, naming both sides, unless the budget was made for `shape` (and, if known, model)."""
        self.origin.require("budget was made", shape, config_hash, "Make one for it.")

    def provenance(self, fingerprint: str) -> dict[str, Any]:
        """What it was made for, where it came from, and a fingerprint of what is used of it."""
        return {**asdict(self.origin), "fingerprint": fingerprint, **({"source": self.source} if self.source else {})}

    def _tensors(self) -> dict[str, Tensor]:
        """As they are called in a file."""
        groups = {"hull": self.hull, "evidence": self.evidence, **self.kinds}
        extra = {f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}
        return {"ratios": self.ratios, "fractions": self.fractions, **extra}

    def closed(self) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows layers kv_heads"]]:
        """Ratios and fractions with the two ends every budget has: nothing kept at 0, everything at 1."""
        end = self.fractions.new_ones(1, *self.fractions.shape[1:])
        ratios = torch.cat([self.ratios.new_zeros(1), self.ratios, self.ratios.new_ones(1)])
        return ratios, torch.cat([0 * end, self.fractions, end])

    def at(self, ratios: Float[Tensor, " asked"]) -> Float[Tensor, "asked layers kv_heads"]:
        """Kept fractions at other ratios in [0, 1], by linear interpolation."""
        grid, rows = self.closed()
        above = torch.searchsorted(grid, ratios.to(grid), right=True).clamp(max=len(grid) - 1)
        weight = (ratios.to(grid) - grid[above - 1]) / (grid[above] - grid[above - 1])
        return torch.lerp(rows[above - 1], rows[above], weight.to(rows)[:, None, None])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, at once or not at all."""
        write_tensors(path, "budget", self._tensors(), {"origin": asdict(self.origin)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Budget":
        """Read what `save` wrote, half precision as float32.

        Raises ArtifactMismatch on another kind or format, BadInput on a damaged file.
        """
        with opened(path, "budget") as file:
            if not {"ratios", "fractions"} <= file.headers.keys():
                raise BadInput(f"{path} holds {shown(sorted(file.headers))} but no ratios and fractions; {ADVICE}")
            origin = Origin.parse(file.metadata, path)
            read = file.read(budget_schema(file.headers, origin.shape, origin.sink + origin.window))
        tensors = {name: tensor.float() if tensor.itemsize < 4 else tensor for name, tensor in read.items()}
        try:
            return cls(
                ratios=tensors["ratios"],
                fractions=tensors["fractions"],
                origin=origin,
                hull=group_of(tensors, "hull"),
                evidence=group_of(tensors, "evidence"),
                kinds={kind: hull for kind in KINDS if (hull := group_of(tensors, kind))},
            )
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error

    @classmethod
    def from_kvpress(
        cls,
        path: str | os.PathLike[str],
        *,
        shape: ModelShape,
        model: str = "",
        scorer: str = "",
        scorer_parameters: Mapping[str, Any] | None = None,
        sink: int = 0,
        window: int = 0,
    ) -> "Budget":
        """Import the LU-KV authors' and kvpress' table (arXiv 2602.08585): `.npy` `[99, num_layers, kv_heads]`.

        Its row i holds the fractions REMOVED when (i + 1)% of the cache is removed; values beyond [0, 1] are clipped,
        as kvpress does. `Fixed` protects `sink` first and `window` last tokens, or the scorer's own if they are more.
        Raises BadInput if it cannot be read, ArtifactMismatch if it is of another shape.
        """
        removed = load_npy(Path(path), (99, shape.num_layers, shape.kv_heads))
        kept = 1 - torch.from_numpy(removed).clamp(0, 1).flip(0)[:, list(shape.layers)]
        origin = Origin(
            shape=shape,
            model=model,
            scorer=scorer,
            scorer_parameters=scorer_parameters or {},
            sink=sink,
            window=window,
            calibration=fingerprint(Path(path).read_bytes()),
        )
        return cls(ratios=_percents(), fractions=kept, origin=origin)

    def to_kvpress(self, path: str | os.PathLike[str]) -> None:
        """Export to kvpress' table; layers that cannot be compressed have 0 removed."""
        shape = self.origin.shape
        removed = np.zeros((99, shape.num_layers, shape.kv_heads))
        removed[:, list(shape.layers)] = 1 - self.at(_percents()).flip(0).double().numpy()
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, removed, allow_pickle=False)

    @classmethod
    def from_duo_attention(
        cls, path: str | os.PathLike[str], *, shape: ModelShape, model: str = "", sink: int = 128, recent: int = 256
    ) -> "Budget":
        """Import `full_attention_heads.tsv` `[num_layers, kv_heads]` of DuoAttention (Xiao et al., arXiv 2410.10819).

        The authors keep whole the heads whose alpha is above a quantile, the others keep `sink` first and `recent` last
        tokens. Here row j keeps the j best heads whole and nothing of the others; `Fixed` protects `sink` and `recent`,
        and any budget is met by as many whole heads as fit, plus one in part.
        Ours differs: equal alphas are ordered by layer and head, where the authors add noise.
        Raises BadInput if the table cannot be read, ArtifactMismatch if it is of another shape.
        """
        alphas = load_tsv(Path(path), (shape.num_layers, shape.kv_heads))
        alpha = torch.from_numpy(alphas).clamp(0, 1)[list(shape.layers)].flatten()
        rank = torch.argsort(torch.argsort(alpha, descending=True, stable=True))
        whole = torch.arange(1, shape.num_heads, dtype=torch.int64, device="cpu")
        fractions = (rank < whole[:, None]).float().unflatten(1, (-1, shape.kv_heads))
        origin = Origin(
            shape=shape,
            model=model,
            scorer="streaming",
            sink=sink,
            window=recent,
            calibration=fingerprint(Path(path).read_bytes()),
        )
        return cls(ratios=whole.double() / shape.num_heads, fractions=fractions, origin=origin)


def _percents() -> Float[Tensor, " 99"]:
    return torch.arange(1, 100, dtype=torch.float64, device="cpu") / 100
