"""What LKV learns (arXiv 2605.06676), and the file it is kept in: how much each KV head keeps, and which entries.

    HeadBudgets   LKV-H: from an embedding of every head, and the keep, to the fraction each head retains
    EntryScores   LKV-T: from an entry's key, value and place to its score, for every head by itself

Known of the paper: both are trained jointly by distillation, budgets come from head embeddings, scores are
intrinsic (no queries, no attention). The rest is our design (docs/lkv.md).
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from headwise.artifacts import Origin, fingerprint, read_tensors, write_tensors
from headwise.errors import ArtifactMismatch, BadInput
from headwise.interfaces import Rotary
from headwise.shapes import ModelShape
from headwise.soft_topk import soft_topk

LEAST = 0.005  # of the context: what the budgets leave every head
MOST_HELD = 0.6  # of the budget: what that and the protected tokens may take together
EMBEDDING, HIDDEN = 64, 64
PLACE_FEATURES = 2


class HeadBudgets(nn.Module):
    """LKV-H: retained fraction of every head as a function of keep and context length. Their mean is the keep exactly.

    A head keeps an absolute number of the `protected` tokens (all of them to begin with, if the budget allows; heads
    learn to give them up), which does not grow with the context, and a share of everything else.
    """

    def __init__(self, heads: int, protected: int):
        super().__init__()
        self.protected = protected
        self.embedding = nn.Parameter(torch.randn(heads, EMBEDDING))
        self.hidden = nn.Linear(EMBEDDING + 1, HIDDEN)
        self.out = nn.Linear(HIDDEN, 2)  # share of everything, share of the protected tokens
        nn.init.zeros_(self.out.weight)  # all heads start alike
        nn.init.zeros_(self.out.bias)

    def forward(self, keep: float, tokens: int) -> Float[Tensor, " heads"]:
        """Fractions at one keep in (0, 1] of a context."""
        heads = len(self.embedding)
        if not 0 < keep < 1:
            return self.embedding.new_full((heads,), keep)
        asked = self.embedding.new_full((heads, 1), math.log(keep))
        z, held = self.out(functional.gelu(self.hidden(torch.cat([self.embedding, asked], -1)))).unbind(-1)
        base = LEAST + torch.sigmoid(held + 2.0) * min(1 - LEAST, self.protected / tokens)
        base = base * (keep * MOST_HELD / base.mean()).clamp(max=1)
        return base + (1 - base) * soft_topk(z, heads * keep - base.sum(), weights=1 - base)


class EntryScores(nn.Module):
    """LKV-T: one small network per KV head, on intrinsic features of an entry. Scores compare within a head only."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int):
        super().__init__()
        width = 2 * head_dim + 2 + PLACE_FEATURES
        self.weight_in = nn.Parameter(torch.randn(layers, kv_heads, width, HIDDEN) * width**-0.5)
        self.bias_in = nn.Parameter(torch.zeros(layers, kv_heads, 1, HIDDEN))
        self.weight_out = nn.Parameter(torch.randn(layers, kv_heads, HIDDEN) * HIDDEN**-0.5)

    def forward(
        self, features: Float[Tensor, "batch kv_heads tokens width"], layer: int
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        """Scores of one layer, float32."""
        hidden = functional.gelu(features @ self.weight_in[layer] + self.bias_in[layer])
        return torch.einsum("bhnf,hf->bhn", hidden, self.weight_out[layer])


def entry_features(
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens head_dim"],
    positions: Int[Tensor, "batch tokens"],
    rotary: Rotary,
) -> Float[Tensor, "batch kv_heads tokens width"]:
    """What EntryScores sees of an entry, float32: key before rotation and value, both scaled to unit mean square, their
    norms, its distance to the first and the last token.
    """
    parts = []
    for states in (rotary.unrotate(keys, positions), values.float()):
        square = states.square().mean(-1, keepdim=True)
        parts += [states * (square + 1e-6).rsqrt(), 0.5 * (square + 1e-12).log()]
    first, last = positions[:, :1], positions[:, -1:]
    place = torch.stack([positions - first, last - positions], dim=-1).clamp(min=0).float().log1p() / 4
    return torch.cat([*parts, place[:, None].expand(-1, keys.shape[1], -1, -1)], dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gates:
    """Trained budgets, scores, or both, with what they were made for and how."""

    origin: Origin
    budgets: HeadBudgets | None = None
    scores: EntryScores | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def require(self, shape: ModelShape, config_hash: str = "") -> None:
        """Raise ArtifactMismatch, naming both sides, unless the gates were trained for this model."""
        made_for = self.origin.model or "a model"
        if shape != self.origin.shape:
            raise ArtifactMismatch(
                f"The gates were trained for {made_for} with {self.origin.shape}; this model has {shape}."
            )
        if config_hash and self.origin.config_hash and config_hash != self.origin.config_hash:
            raise ArtifactMismatch(
                f"The gates were trained for {made_for} (configuration {self.origin.config_hash[:12]}); this model's "
                f"is {config_hash[:12]}. Train some for it."
            )

    def fractions(self, keep: float, tokens: int) -> Float[Tensor, " heads"]:
        """What every head keeps of a context at a keep."""
        assert self.budgets is not None
        with torch.no_grad():
            return self.budgets(keep, tokens)

    def provenance(self) -> dict[str, Any]:
        """Origin, and a fingerprint of the weights."""
        parts = [
            t for module in (self.budgets, self.scores) if module is not None for t in module.state_dict().values()
        ]
        return {**json.loads(json.dumps(asdict(self.origin))), "fingerprint": fingerprint(*(t.cpu() for t in parts))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, at once or not at all."""
        modules = {"budgets": self.budgets, "scores": self.scores}
        tensors = {
            f"{name}.{key}": tensor
            for name, module in modules.items()
            if module is not None
            for key, tensor in module.state_dict().items()
        }
        write_tensors(path, "gates", tensors, {"origin": asdict(self.origin), "settings": dict(self.settings)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Gates":
        """Read what `save` wrote. Raises ArtifactMismatch on another kind or format, BadInput on a damaged file."""
        tensors, metadata = read_tensors(path, "gates")
        origin = Origin.parse(metadata, Path(path))
        shape, settings = origin.shape, metadata.get("settings", {})
        modules: dict[str, nn.Module] = {
            "budgets": HeadBudgets(shape.num_heads, origin.sink + origin.window),
            "scores": EntryScores(len(shape.layers), shape.kv_heads, shape.head_dim),
        }
        for name in list(modules):
            own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            if not own:
                del modules[name]
                continue
            try:
                modules[name].load_state_dict(own)
            except RuntimeError as error:
                raise BadInput(f"{path}: the {name} are damaged ({error}); get or make the file again.") from error
            modules[name].requires_grad_(False)
        if not modules:
            raise BadInput(f"{path} holds neither budgets nor scores; get or make the file again.")
        return cls(origin=origin, settings=settings, **modules)  # pyright: ignore[reportArgumentType]


def load_gates(path: str | os.PathLike[str]) -> Gates:
    """As `Gates.load`; the same file gives the same object, so that a scorer equals itself wherever it is named."""
    file = Path(path).resolve()
    if not file.is_file():
        return Gates.load(path)
    seen = file.stat()
    return _loaded(file, (seen.st_mtime_ns, seen.st_ino, seen.st_size))


@lru_cache(maxsize=8)
def _loaded(path: Path, version: tuple[int, int, int]) -> Gates:
    return Gates.load(path)


def shipped_gates(config_hash: str) -> Gates:
    """The gates that come with headwise for a model. Raises BadInput if there are none."""
    for path in sorted((Path(str(files("headwise"))) / "reference" / "gates").glob("*.safetensors")):
        gates = load_gates(path)
        if gates.origin.config_hash == config_hash:
            return gates
    raise BadInput("no gates are shipped for this model: make some with 'headwise train', then write lkv@FILE.")
