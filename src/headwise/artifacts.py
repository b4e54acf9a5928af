"""Files that outlive a run. One safetensors file each, its metadata JSON under the key "headwise"; never pickle.

    kind      class    made by                       used by
    profile   Profile  profile                       solve
    budget    Budget   solve, train, importers       allocate
    cache              ragged.store                  ragged.store

`write_tensors`, `read_tensors` and `describe` serve every kind; `fingerprint` and `config_hash` name what a file was
made from.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headwise.errors import ArtifactMismatch, BadInput, ShapeMismatch, WriteFailed
from headwise.shapes import ModelShape
from headwise.writing import replacing

METADATA_KEY = "headwise"
FORMAT_VERSIONS = {"budget": 2, "cache": 1, "profile": 2, "part": 2, "gates": 2, "training": 1}
LOSSES = ("output", "normalised", "raw")  # what a profile measures, see losses.py; the first is the default
_HEADER = ("kind", "format_version", "library_version")
# What of a configuration shapes keys, values and attention. Not the longest context: users raise it.
_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "sliding_window",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "hidden_act",
    "hidden_activation",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What an artifact was made for, and from what. Empty = not known."""

    shape: ModelShape
    model: str = ""  # id or path
    config_hash: str = ""  # of the model's configuration, by `config_hash`
    scorer: str = ""
    scorer_parameters: Mapping[str, Any] = field(default_factory=dict)
    sink: int = 0  # first tokens that are protected besides
    window: int = 0  # last tokens that are protected besides
    calibration: str = ""  # fingerprint of the data or file it was made from
    loss: str = ""  # of a profile: what a budget was solved for

    @classmethod
    def parse(cls, metadata: Mapping[str, Any], path: Path) -> "Origin":
        """From a file's metadata. Raises BadInput naming `path` if it is incomplete."""
        try:
            fields = dict(metadata["origin"])
            layers = tuple(fields["shape"]["layers"])
            return cls(**{**fields, "shape": ModelShape(**{**fields["shape"], "layers": layers})})
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{path}: the metadata is incomplete ({error}); get or make the file again.") from error


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Budget:
    """How much every KV head keeps: fractions of the context, in [0, 1], on a grid of retained ratios.

    `fractions[r]` are the fractions kept at a total retention of `ratios[r]`; ratios ascend, strictly between 0 (where
    nothing is kept) and 1 (where everything is). `hull` holds what solves any other ratio exactly: `protected` [heads,
    sink + window], the utility of each protected token, and `width` and `slope` [heads, steps], the hull of the others.
    `evidence` holds what it was solved from, for pictures: `curve`, `scorer` and `ideal` [layers, kv_heads, ranks], as
    in a Profile. Both may be empty.
    """

    ratios: Float[Tensor, " ratios"]
    fractions: Float[Tensor, "ratios layers kv_heads"]
    origin: Origin
    hull: Mapping[str, Tensor] = field(default_factory=dict)
    evidence: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.origin.shape
        expected = (len(self.ratios), len(shape.layers), shape.kv_heads)
        if tuple(self.fractions.shape) != expected:
            raise ShapeMismatch(
                f"fractions have shape {tuple(self.fractions.shape)}, but {len(self.ratios)} ratios and {shape} need "
                f"{expected}."
            )
        if not ((self.fractions >= 0) & (self.fractions <= 1)).all():
            raise BadInput("A budget's fractions must lie in [0, 1] (1 = the head is kept whole).")
        if not (self.closed()[0].diff() > 0).all():
            raise BadInput(f"A budget's ratios must ascend strictly within (0, 1), found {self.ratios.tolist()}.")

    def require(self, shape: ModelShape, config_hash: str = "") -> None:
        """Raise ArtifactMismatch, naming both sides, unless the budget was made for `shape` (and, if known, model)."""
        made_for = self.origin.model or "a model"
        if shape != self.origin.shape:
            raise ArtifactMismatch(
                f"The budget was made for {made_for} with {self.origin.shape}; this model has {shape}. Make one for it."
            )
        if config_hash and self.origin.config_hash and config_hash != self.origin.config_hash:
            raise ArtifactMismatch(
                f"The budget was made for {made_for} (configuration {self.origin.config_hash[:12]}); this model's is "
                f"{config_hash[:12]}. Make one for it."
            )

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
        groups = {"hull": self.hull, "evidence": self.evidence}
        extra = {f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}
        tensors = {"ratios": self.ratios, "fractions": self.fractions, **extra}
        write_tensors(path, "budget", tensors, {"origin": asdict(self.origin)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Budget":
        """Read what `save` wrote. Raises ArtifactMismatch on another kind or format, BadInput on a damaged file."""
        tensors, metadata = read_tensors(path, "budget")
        hull, evidence = _group(tensors, "hull"), _group(tensors, "evidence")
        if not {"ratios", "fractions"} <= tensors.keys():
            raise BadInput(f"{path} holds {sorted(tensors)} but no ratios and fractions; get or make the file again.")
        origin = Origin.parse(metadata, Path(path))
        return cls(
            ratios=tensors["ratios"], fractions=tensors["fractions"], origin=origin, hull=hull, evidence=evidence
        )

    @classmethod
    def from_kvpress(
        cls,
        path: str | os.PathLike[str],
        *,
        shape: ModelShape,
        model: str = "",
        scorer: str = "",
        scorer_parameters: Mapping[str, Any] | None = None,
    ) -> "Budget":
        """Import the LU-KV authors' and kvpress' table (arXiv 2602.08585): `.npy` `[99, num_layers, kv_heads]`.

        Its row i holds the fractions REMOVED when (i + 1)% of the cache is removed; values beyond [0, 1] are clipped,
        as kvpress does. Raises BadInput if it cannot be read, ArtifactMismatch if it is of another shape.
        """
        removed = _load_npy(Path(path))
        _require_table(removed.shape, (99, shape.num_layers, shape.kv_heads), path)
        kept = 1 - torch.from_numpy(removed).clamp(0, 1).flip(0)[:, list(shape.layers)]
        origin = Origin(
            shape=shape,
            model=model,
            scorer=scorer,
            scorer_parameters=scorer_parameters or {},
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
        alphas = _load_tsv(Path(path))
        _require_table(alphas.shape, (shape.num_layers, shape.kv_heads), path)
        alpha = torch.from_numpy(alphas).clamp(0, 1)[list(shape.layers)].flatten()
        rank = torch.argsort(torch.argsort(alpha, descending=True, stable=True))
        whole = torch.arange(1, shape.num_heads)
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Profile:
    """What every head gains, by how much it keeps, for one or more scorers (LU-KV, arXiv 2602.08585).

    `curves[scorer][loss]` are means over the contexts of each domain: the marginal utility by rank, best first; first
    the sink + window protected tokens one by one, then the others in equal shares. Over all heads a curve sums to 1.
    The losses are those of LOSSES; besides, "ideal" is the raw importance in the order of importance itself.
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
        share = torch.tensor(shares, dtype=torch.float64) / sum(shares)
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
        tensors, metadata = read_tensors(path, "profile")
        curves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _group(tensors, "curve").items():
            scorer, _, loss = name.rpartition(".")
            curves.setdefault(scorer, {})[loss] = tensor
        try:
            return cls(
                curves=curves,
                domains=tuple(metadata["domains"]),
                contexts=tuple(metadata["contexts"]),
                protection={name: (sink, window) for name, (sink, window) in metadata["protection"].items()},
                parameters=metadata["parameters"],
                settings=metadata["settings"],
                origin=Origin.parse(metadata, Path(path)),
                published=_group(tensors, "published"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{path}: the metadata is incomplete ({error}); get or make the file again.") from error


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a safetensors file of a kind of FORMAT_VERSIONS; a reader sees the old file or the new one, never half.

    `metadata` must be JSON and leave the names kind, format_version and library_version alone. Raises BadInput where no
    file can be written, WriteFailed where writing fails.
    """
    assert not set(_HEADER) & metadata.keys(), f"metadata may not hold {_HEADER}"
    header = dict(zip(_HEADER, (kind, FORMAT_VERSIONS[kind], _library_version()), strict=True))
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    text = {METADATA_KEY: json.dumps({**header, **metadata})}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, text)
    except SafetensorError as error:  # where the disk is full, too
        raise WriteFailed(f"cannot write {path}: {error}. What was there before is unchanged.") from error


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a file that `write_tensors` wrote.

    Raises BadInput if the file is missing or damaged, ArtifactMismatch if it is no headwise file or of another kind or
    format version.
    """
    with _open(Path(path)) as file:
        record = _record(file.metadata(), path)
        found = (record.get("kind"), record.get("format_version"))
        if found != (kind, FORMAT_VERSIONS[kind]):
            raise ArtifactMismatch(
                f"{path} is a {found[0]} of format {found[1]}, expected a {kind} of format {FORMAT_VERSIONS[kind]}; "
                f"it was written by headwise {record.get('library_version')}, this is {_library_version()}."
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors, {name: value for name, value in record.items() if name not in _HEADER}


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Kind, versions, metadata and tensor sizes of any headwise file, whatever its version, without reading tensors."""
    with _open(Path(path)) as file:
        record = _record(file.metadata(), path)
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        sizes = {name: {"dtype": part.get_dtype(), "shape": part.get_shape()} for name, part in slices.items()}
    return {**record, "tensors": sizes}


def fingerprint(*parts: Tensor | bytes | str) -> str:
    """SHA-256 (hex) of tensors with their dtype and shape, bytes or text, in this order; the same in every process."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            label, content = f"{part.dtype} {list(part.shape)}", part.detach().cpu().contiguous().reshape(-1)
            data = content.view(torch.uint8).numpy().data
        else:
            label, data = type(part).__name__, part.encode() if isinstance(part, str) else part
        digest.update(f"{label} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the architecture in a model's configuration (`config.to_dict()`).

    Looked at are kind, sizes, layer types, rotary embedding, norm and activation; token ids, dtype, quantization,
    generation settings and how the model was loaded do not matter.
    """
    known = {name: config[name] for name in _ARCHITECTURE if config.get(name) is not None}
    return fingerprint(json.dumps(_stable(known), sort_keys=True, default=str))


def _stable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _stable(item) for key, item in value.items() if not str(key).startswith("_")}
    return [_stable(item) for item in value] if isinstance(value, list | tuple) else value


def _library_version() -> str:
    try:
        return version("headwise")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise BadInput(f"{path} is not a file; check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is damaged or no safetensors file ({error}); get or make it again.") from error


def _record(metadata: Mapping[str, str] | None, path: str | os.PathLike[str]) -> dict[str, Any]:
    if METADATA_KEY not in (metadata or {}):
        raise ArtifactMismatch(f"{path} is a safetensors file, but headwise did not write it.")
    try:
        return dict(json.loads((metadata or {})[METADATA_KEY]))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: the metadata is damaged ({error}); get or make the file again.") from error


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """Tensors named "group.name", by name."""
    prefix = f"{group}."
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _percents() -> Float[Tensor, " 99"]:
    return torch.arange(1, 100, dtype=torch.float64) / 100


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path} cannot be read as a .npy table of numbers ({error}).") from error


def _load_tsv(path: Path) -> np.ndarray:
    try:
        return np.loadtxt(path, delimiter="\t", ndmin=2)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as a tab-separated table of numbers ({error}).") from error


def _require_table(found: tuple[int, ...], expected: tuple[int, ...], path: str | os.PathLike[str]) -> None:
    if found != expected:
        raise ArtifactMismatch(f"{path} holds a table of {found}; this model needs {expected}. Get the model's own.")
