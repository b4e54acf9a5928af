"""Files that outlive a run. One safetensors file each, its metadata JSON under the key "headwise"; never pickle.

    kind      class    made by                       used by
    profile   Profile  profile                       solve
    budget    Budget   solve, train, importers       allocate
    cache              ragged.store                  ragged.store

`write_tensors`, `opened` and `describe` serve every kind; `fingerprint` and `config_hash` name what a file was
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
from reprlib import repr as shown
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headwise import strict_json
from headwise.contents import (
    ADVICE,
    LOSSES,
    ORIGIN,
    ORIGIN_DEFAULTS,
    budget_schema,
    profile_fields,
    profile_schema,
    require_hull,
    require_totals,
)
from headwise.errors import ArtifactMismatch, BadInput, WriteFailed
from headwise.published_tables import load_npy, load_tsv
from headwise.schema import Header, Schema, extremes, headers
from headwise.shapes import ModelShape
from headwise.writing import replacing

METADATA_KEY = "headwise"
_UNFIT = "the parts of a budget do not fit together"
FORMAT_VERSIONS = {"budget": 2, "cache": 1, "profile": 2, "part": 2, "gates": 2, "training": 1}
_HEADER = ("kind", "format_version", "library_version")
_MAKERS = {
    "budget": "'headwise solve' makes one of a profile",
    "cache": "RaggedCache.save() writes one",
    "profile": "'headwise profile' makes one",
    "gates": "'headwise train' makes one",
}
_RECORD: Mapping[str, strict_json.Check] = {"kind": strict_json.text, "format_version": strict_json.whole}
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
    "attention_bias",
    "mlp_bias",
)
# Of these, the real numbers: one source writes 100000, another 100000.0.
_REAL = frozenset(
    {
        *("rms_norm_eps", "query_pre_attn_scalar", "partial_rotary_factor", "rope_theta", "factor", "attention_factor"),
        *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "beta_fast", "beta_slow"),
    }
)
_DIGITS = 6  # significant ones that float32 keeps of any number: GGUF files say 9.999999747378752e-06 for 1e-05


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
    def parse(cls, metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> "Origin":
        """From a file's metadata. Raises BadInput naming `path` if it is incomplete."""
        raw, where = metadata.get("origin"), f"{path}: the metadata is incomplete: the origin"
        if isinstance(raw, dict):
            unknown = raw.keys() - ORIGIN.keys()
            if unknown:
                raise BadInput(f"{where} has an unknown field {shown(min(unknown))}; {ADVICE}")
            raw = {**ORIGIN_DEFAULTS, **raw}
        return cls(**strict_json.checked(raw, ORIGIN, where, ADVICE))

    def require(self, what: str, shape: ModelShape, config_hash: str, advice: str) -> None:
        """Raise ArtifactMismatch, saying in words what differs, unless made for `shape` (and, if known, model)."""
        made_for = self.model or "a model"
        if shape != self.shape:
            raise ArtifactMismatch(
                f"The {what} for {made_for} with {self.shape.told_beside(shape)}; this model has "
                f"{shape.told_beside(self.shape)}. {advice}"
            )
        if config_hash and self.config_hash and config_hash != self.config_hash:
            raise ArtifactMismatch(
                f"The {what} for {made_for} (configuration {self.config_hash[:12]}); this model's is "
                f"{config_hash[:12]}. {advice}"
            )


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
        if self.hull:
            require_hull(self.hull["width"], self.hull["slope"])

    def require(self, shape: ModelShape, config_hash: str = "") -> None:
        """Raise ArtifactMismatch, naming both sides, unless the budget was made for `shape` (and, if known, model)."""
        self.origin.require("budget was made", shape, config_hash, "Make one for it.")

    def provenance(self, fingerprint: str) -> dict[str, Any]:
        """What it was made for, where it came from, and a fingerprint of what is used of it."""
        return {**asdict(self.origin), "fingerprint": fingerprint, **({"source": self.source} if self.source else {})}

    def _tensors(self) -> dict[str, Tensor]:
        """As they are called in a file."""
        groups = {"hull": self.hull, "evidence": self.evidence}
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
                hull=_group(tensors, "hull"),
                evidence=_group(tensors, "evidence"),
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
        for name, tensor in _group(tensors, "curve").items():
            require_totals(tensor, f"{path} is damaged: 'curve.{name}'")
            scorer, _, loss = name.rpartition(".")
            curves.setdefault(scorer, {})[loss] = tensor
        return cls(**fields, origin=origin, curves=curves, published=_group(tensors, "published"))


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Opened:
    """A file whose kind has been checked, of which no tensor has been read yet."""

    path: Path
    metadata: Mapping[str, Any]
    headers: Mapping[str, Header]
    file: Any

    def read(self, schema: Schema) -> dict[str, Tensor]:
        """Its tensors, on the CPU, if they are what they must be. Raises BadInput before any is read, if it can."""
        schema.require(self.headers, f"{self.path} is damaged")
        tensors = self.copies()
        schema.require_values(tensors, f"{self.path} is damaged")
        return tensors

    def copies(self) -> dict[str, Tensor]:
        """Its tensors, whatever they are: copies, because what safetensors gives changes when the file does."""
        return {name: self.file.get_tensor(name).clone() for name in self.headers}


@contextmanager
def opened(path: str | os.PathLike[str], kind: str) -> Iterator[Opened]:
    """A file that `write_tensors` wrote, to be looked at before it is read.

    Raises BadInput if the file is missing or damaged, ArtifactMismatch if it is no headwise file or of another kind or
    format version.
    """
    with _open(Path(path)) as file:
        record = _record(file.metadata(), path)
        _require_kind(record, kind, path)
        metadata = {name: value for name, value in record.items() if name not in _HEADER}
        yield Opened(path=Path(path), metadata=metadata, headers=_headers(file), file=file)


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors (on the CPU) and metadata, whatever they are. Raises as `opened`, which readers of a kind use."""
    with opened(path, kind) as file:
        return file.copies(), dict(file.metadata)


def _require_kind(record: Mapping[str, Any], kind: str, path: str | os.PathLike[str]) -> None:
    found = (record["kind"], record["format_version"])
    if found == (kind, FORMAT_VERSIONS[kind]):
        return
    message = f"{path} is a {found[0]:.40} of format {found[1]}, expected a {kind} of format {FORMAT_VERSIONS[kind]}"
    if found[0] != kind:
        raise ArtifactMismatch(f"{message}. Give a {kind}{': ' if kind in _MAKERS else ''}{_MAKERS.get(kind, '')}.")
    writer, reader = shown(record.get("library_version")).strip("'"), _library_version()
    told = "" if writer == reader else f" It was written by headwise {writer}, this is {reader}."
    raise ArtifactMismatch(f"{message}.{told} Use the headwise that wrote it, or make the file again.")


def _headers(file: Any) -> dict[str, Header]:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return {name: Header(dtype=part.get_dtype(), shape=tuple(part.get_shape())) for name, part in slices.items()}


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Kind, versions, metadata and tensor sizes of any headwise file, whatever its version, without reading tensors."""
    with _open(Path(path)) as file:
        record = _record(file.metadata(), path)
        sizes = {name: {"dtype": one.dtype, "shape": list(one.shape)} for name, one in _headers(file).items()}
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

    Looked at are kind, sizes, layer types, rotary embedding, norm and activation; token ids, dtype, quantization, tied
    embeddings, generation settings and how the model was loaded do not matter. Real numbers count with 6 significant
    digits, so that a configuration that went through float32 is the same. Models of one architecture share it, whatever
    their weights.
    """
    known = {name: config[name] for name in _ARCHITECTURE if config.get(name) is not None}
    # Whether output and input embeddings are one tensor shapes no key or value, and GGUF files write it twice. It was
    # looked at once: hashes of models that tie them stay as they were.
    known["tie_word_embeddings"] = True
    return fingerprint(json.dumps(_stable(known), sort_keys=True, default=str))


def _stable(value: Any, *, real: bool = False) -> Any:
    """Without private fields and without the noise of float32; `real`: a whole number is meant as a real one."""
    if isinstance(value, Mapping):
        public = {str(key): item for key, item in value.items() if not str(key).startswith("_")}
        return {key: _stable(item, real=key in _REAL) for key, item in public.items()}
    if isinstance(value, list | tuple):
        return [_stable(item, real=real) for item in value]
    if isinstance(value, float) or (real and type(value) is int):
        return float(f"{value:.{_DIGITS}g}")
    return value


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
        raise BadInput(f"{path} is damaged or no safetensors file ({error!s:.200}); get or make it again.") from error


def _record(metadata: Mapping[str, str] | None, path: str | os.PathLike[str]) -> dict[str, Any]:
    if METADATA_KEY not in (metadata or {}):
        raise ArtifactMismatch(f"{path} is a safetensors file, but headwise did not write it.")
    try:
        record = strict_json.loads((metadata or {})[METADATA_KEY])
    except ValueError as error:
        raise BadInput(f"{path}: the metadata is damaged ({error}); {ADVICE}") from error
    strict_json.checked(record, _RECORD, f"{path}: the metadata", ADVICE)
    return record


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """Tensors named "group.name", by name."""
    prefix = f"{group}."
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _percents() -> Float[Tensor, " 99"]:
    return torch.arange(1, 100, dtype=torch.float64, device="cpu") / 100
