"""What a file was made for, and from what; the hash of a model's configuration."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr as shown
from typing import Any

from headwise.artifacts.contents import (
    ADVICE,
    ORIGIN,
    ORIGIN_DEFAULTS,
)
from headwise.artifacts.tensors import fingerprint
from headwise.errors import ArtifactMismatch, BadInput
from headwise.files import strict_json
from headwise.shapes import ModelShape

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
