"""What LKV learns (arXiv 2605.06676), and the file it is kept in: how much each KV head keeps, and which entries.

    HeadBudgets   LKV-H: from an embedding of every head, the keep, and what the context is like, to the fraction each
                  head retains
    EntryScores   LKV-T: from an entry's key, value and place to its score, for every head by itself

Known of the paper: both are trained jointly by distillation, budgets come from head embeddings, scores are
intrinsic (no queries, no attention). The rest is our design (docs/lkv.md).
"""

import json
import math
import os
from bisect import bisect
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from headwise.artifacts.contents import ADVICE, RETRY
from headwise.artifacts.origin import Origin
from headwise.artifacts.shipped import shipped
from headwise.artifacts.soft_topk import soft_topk
from headwise.artifacts.tensors import fingerprint, opened, write_tensors
from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.schema import Numbers, Schema
from headwise.interfaces import Rotary
from headwise.shapes import ModelShape

KNOTS = (0.02, 0.03, 0.045, 0.0625, 0.1, 0.15, 0.25, 0.5)  # keeps
LEAST = 1e-3  # of the context: the smallest fraction to start from
SAME = 1e-3  # differences between contexts that do not count
EMBEDDING, HIDDEN, TRAITS = 64, 64, 16
GOLDEN = 40503  # 2^16 over the golden ratio: multiples of it, modulo 2^16, stay as far apart as any can
PLACE_FEATURES = 3
LARGEST_WEIGHT = 1e6  # of a file: what is computed with such weights stays finite in float32
LEAST_SPREAD = 1e-6  # it is divided by; SAME is in every one that was trained


_FIELDS: Mapping[str, strict_json.Check] = {"settings": strict_json.mapping, "comparable": strict_json.flag}


class HeadBudgets(nn.Module):
    """LKV-H: retained fraction of every head as a function of keep and context. Their mean is the keep exactly.

    Log-odds of a head are those it started with (all alike, or LU-KV's, at a few keeps with straight lines between
    them in log(keep)), and what is learned, which is nothing to begin with: a network of the head's embedding and
    log(keep), and a weighted sum of a few traits of the context, which are read off its `context_summary` [width].
    """

    start: Float[Tensor, "heads knots"]
    usual: Float[Tensor, "2 width"]  # mean and spread of summaries

    def __init__(self, heads: int, width: int, *, device: str = "cpu"):
        super().__init__()
        self.register_buffer("start", torch.zeros(heads, len(KNOTS), dtype=torch.float32, device=device))
        usual = torch.zeros(width, dtype=torch.float32, device=device)
        self.register_buffer("usual", torch.stack([usual, usual + 1]))
        self.embedding = nn.Parameter(torch.randn(heads, EMBEDDING, dtype=torch.float32, device=device))
        self.hidden = nn.Linear(EMBEDDING + 1, HIDDEN, dtype=torch.float32, device=device)
        self.out = nn.Linear(HIDDEN, 1, dtype=torch.float32, device=device)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.traits = nn.Linear(width, TRAITS, bias=False, dtype=torch.float32, device=device)
        self.leaning = nn.Parameter(torch.zeros(heads, TRAITS, dtype=torch.float32, device=device))

    def forward(self, keep: float, summary: Float[Tensor, " width"] | None = None) -> Float[Tensor, " heads"]:
        """Fractions at one keep in (0, 1]; without a summary, those of a context with no traits."""
        heads = len(self.embedding)
        if not 0 < keep < 1:
            return self.embedding.new_full((heads,), keep)
        asked = self.embedding.new_full((heads, 1), math.log(keep))
        learned = self.out(functional.gelu(self.hidden(torch.cat([self.embedding, asked], -1))))[:, 0]
        if summary is not None:
            mean, spread = self.usual
            learned = learned + self.leaning @ torch.tanh(self.traits((summary - mean) / spread))
        return soft_topk(self._started(keep) + learned, self.embedding.new_tensor(heads * keep))

    @torch.no_grad()
    def start_from(self, fractions: Float[Tensor, "heads knots"]) -> None:
        """Begin with these fractions at KNOTS."""
        self.start.copy_(torch.logit(fractions.float().clamp(LEAST, 1 - LEAST)))

    @torch.no_grad()
    def get_used_to(self, summaries: Float[Tensor, "contexts width"]) -> None:
        """Take these contexts for usual: traits are what sets a context apart from them."""
        self.usual.copy_(torch.stack([summaries.mean(0), summaries.std(0, correction=0) + SAME]))

    def _started(self, keep: float) -> Float[Tensor, " heads"]:
        above = min(max(bisect(KNOTS, keep), 1), len(KNOTS) - 1)
        low, high = KNOTS[above - 1], KNOTS[above]
        share = min(max(math.log(keep / low) / math.log(high / low), 0.0), 1.0)
        return torch.lerp(self.start[:, above - 1], self.start[:, above], share)


class EntryScores(nn.Module):
    """LKV-T: one small network per KV head, on intrinsic features of an entry.

    Scores that predict attention (`Gates.comparable`) compare between heads; others within a head only.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, *, device: str = "cpu"):
        super().__init__()
        width = 2 * head_dim + 2 + PLACE_FEATURES
        self.weight_in = nn.Parameter(
            torch.randn(layers, kv_heads, width, HIDDEN, dtype=torch.float32, device=device) * width**-0.5
        )
        self.bias_in = nn.Parameter(torch.zeros(layers, kv_heads, 1, HIDDEN, dtype=torch.float32, device=device))
        self.weight_out = nn.Parameter(
            torch.randn(layers, kv_heads, HIDDEN, dtype=torch.float32, device=device) * HIDDEN**-0.5
        )
        self.bias_out = nn.Parameter(torch.zeros(layers, kv_heads, dtype=torch.float32, device=device))

    def forward(
        self, features: Float[Tensor, "batch kv_heads tokens width"], layer: int
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        """Scores of one layer, float32."""
        hidden = functional.gelu(features @ self.weight_in[layer] + self.bias_in[layer])
        return torch.einsum("bhnf,hf->bhn", hidden, self.weight_out[layer]) + self.bias_out[layer][:, None]

    def of_heads(self, heads: slice) -> "EntryScores":
        """The networks of these KV heads of every layer (copies)."""
        layers, kv_heads, width, _ = self.weight_in[:, heads].shape
        some = EntryScores(layers, kv_heads, (width - 2 - PLACE_FEATURES) // 2)
        some.load_state_dict({name: tensor[:, heads] for name, tensor in self.state_dict().items()})
        return some.requires_grad_(False)


def entry_features(
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens head_dim"],
    positions: Int[Tensor, "batch tokens"],
    rotary: Rotary,
    ends: Int[Tensor, "batch 2"] | None = None,
) -> Float[Tensor, "batch kv_heads tokens width"]:
    """What EntryScores sees of an entry, float32: key before rotation and value, both scaled to unit mean square, their
    norms, its distance to the first and the last token, and a number that is spread evenly over any stretch of tokens.

    `ends` are the positions of the first and the last token; None: those of `positions`.

    The last one lets a head keep an even sample of what is alike. Heads that average over a context (to know which
    words are frequent, say) need a fair part of it, and every choice by what an entry holds is unfair.
    """
    parts = []
    for states in (rotary.unrotate(keys, positions), values.float()):
        parts += [_unit(states), 0.5 * (states.square().mean(-1, keepdim=True) + 1e-12).log()]
    first, last = (positions[:, [0, -1]] if ends is None else ends).split(1, dim=-1)
    place = torch.stack([positions - first, last - positions], dim=-1).clamp(min=0).float().log1p() / 4
    even = ((positions - first + 1) * GOLDEN % 2**16).float()[..., None] / 2**15 - 1  # in [-1, 1)
    place = torch.cat([place, even * 3**0.5], dim=-1)
    return torch.cat([*parts, place[:, None].expand(-1, keys.shape[1], -1, -1)], dim=-1)


def context_summary(
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens head_dim"],
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"],
    rotary: Rotary,
) -> Float[Tensor, "batch width"]:
    """What a context is like, float32: the means over its tokens of key (before rotation) and value in every head of a
    layer, both scaled to unit mean square. In the first layer they say which tokens a context is made of.
    """
    share = (valid.float() / valid.sum(-1, keepdim=True))[:, None, :, None]
    states = rotary.unrotate(keys, positions), values.float()
    means = [(share * _unit(x).where(share > 0, 0)).sum(2).flatten(1) for x in states]  # padding may hold anything
    return torch.cat(means, dim=-1)


def summary_width(shape: ModelShape) -> int:
    """Of a `context_summary`."""
    return 2 * shape.kv_heads * shape.head_dim


def _unit(states: Tensor) -> Tensor:
    return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gates:
    """Trained budgets, scores, or both, with what they were made for and how."""

    origin: Origin
    budgets: HeadBudgets | None = None
    scores: EntryScores | None = None
    comparable: bool = False  # whether scores compare between heads, because all predict the same quantity
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""  # where the file came from, if from the hub: hub:owner/name/file@commit

    def require(self, shape: ModelShape, config_hash: str = "") -> None:
        """Raise ArtifactMismatch, naming both sides, unless the gates were trained for this model."""
        self.origin.require("gates were trained", shape, config_hash, "Train some for it.")

    @property
    def head_budgets(self) -> HeadBudgets:
        """What decides how much each head keeps. Raises BadInput where only scores were trained."""
        if self.budgets is None:
            raise BadInput("these gates hold scores only.")
        return self.budgets

    @property
    def entry_scores(self) -> EntryScores:
        """What decides which entries stay. Raises BadInput where only budgets were trained."""
        if self.scores is None:
            raise BadInput("these gates hold budgets only.")
        return self.scores

    def fractions(self, keep: float, summary: Float[Tensor, " width"] | None = None) -> Float[Tensor, " heads"]:
        """What every head keeps at a keep, of a context with this summary or of one without traits; on the CPU."""
        with torch.no_grad():
            budgets = self.head_budgets.cpu()
            return budgets(keep, None if summary is None else summary.cpu())

    def provenance(self) -> dict[str, Any]:
        """Origin, a fingerprint of the weights, and where they came from if from the hub."""
        parts = [
            t for module in (self.budgets, self.scores) if module is not None for t in module.state_dict().values()
        ]
        named = {"fingerprint": fingerprint(*(t.cpu() for t in parts))}
        source = {"source": self.source} if self.source else {}
        return {**json.loads(json.dumps(asdict(self.origin))), **named, **source}

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
        """Write one safetensors file, at once or not at all; `dtype` float16 halves it (shrink.py says what it costs).

        Files of any dtype are loaded as float32.
        """
        modules = {"budgets": self.budgets, "scores": self.scores}
        tensors = {
            f"{name}.{key}": tensor.to(dtype)
            for name, module in modules.items()
            if module is not None
            for key, tensor in module.state_dict().items()
        }
        fields = {"settings": dict(self.settings), "comparable": self.comparable}
        write_tensors(path, "gates", tensors, {"origin": asdict(self.origin), **fields})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Gates":
        """Read what `save` wrote. Raises ArtifactMismatch on another kind or format, BadInput on a damaged file."""
        with opened(path, "gates") as file:
            origin = Origin.parse(file.metadata, path)
            defaults = {"settings": {}, "comparable": False}
            fields = strict_json.checked({**defaults, **file.metadata}, _FIELDS, f"{path}: it", ADVICE)
            parts = {name.partition(".")[0] for name in file.headers}
            modules = {name: module for name, module in _empty(origin.shape).items() if name in parts}
            if not modules:
                raise BadInput(f"{path} holds neither budgets nor scores; get or make the file again.")
            older = {"scores.bias_out"} - file.headers.keys()  # files in which scores compare within a head only
            tensors = file.read(_schema(modules, older))
        for name, module in modules.items():
            own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            module.to_empty(device="cpu").requires_grad_(False).load_state_dict(own, strict=False)
            for missing in older & {f"{name}.bias_out"}:
                module.get_parameter(missing.partition(".")[2]).zero_()
        if "budgets" in modules and not (tensors["budgets.usual"][1] >= LEAST_SPREAD).all():
            raise BadInput(f"{path}: the spread of usual contexts, 'budgets.usual', must be above 0. {RETRY}")
        return cls(origin=origin, **fields, **modules)


def _empty(shape: ModelShape) -> dict[str, Any]:
    """Both parts for a model, without memory for any weight."""
    return {
        "budgets": HeadBudgets(shape.num_heads, summary_width(shape), device="meta"),
        "scores": EntryScores(len(shape.layers), shape.kv_heads, shape.head_dim, device="meta"),
    }


def _schema(modules: Mapping[str, nn.Module], older: Set[str] = frozenset()) -> Schema:
    """What the file of these parts must hold, but for what older files lack."""
    return Schema(
        table={
            f"{name}.{key}": Numbers(shape=tuple(tensor.shape), low=-LARGEST_WEIGHT, high=LARGEST_WEIGHT)
            for name, module in modules.items()
            for key, tensor in module.state_dict().items()
            if f"{name}.{key}" not in older
        }
    )


def load_gates(path: str | os.PathLike[str], source: str = "") -> Gates:
    """As `Gates.load`; the same file gives the same object, so that a scorer equals itself wherever it is named.

    `source` is where the file came from.
    """
    file = Path(path).resolve()
    if not file.is_file():
        return Gates.load(path)
    status = file.stat()
    return _loaded(file, (status.st_mtime_ns, status.st_ino, status.st_size), source)


@lru_cache(maxsize=8)
def _loaded(path: Path, version: tuple[int, int, int], source: str) -> Gates:
    return replace(Gates.load(path), source=source)


def shipped_gates(config_hash: str) -> Gates:
    """The gates that come with headwise for a model. Raises BadInput if there are none."""
    for file in shipped("gates", config_hash):
        return load_gates(file.path)
    raise BadInput("no gates are shipped for this model: make some with 'headwise train', then write lkv@FILE.")
