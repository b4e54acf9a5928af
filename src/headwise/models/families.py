"""The model families headwise supports, and uniform access to what the flow needs from any of them.

To add a family: check that its attention (1) calls `update` of the cache on rotated keys, (2) goes through the
attention interface by name, (3) has `o_proj`, (4) uses neither soft-capping nor attention sinks; then add one line to
FAMILIES and one tiny configuration to tests/families.py, which runs every invariant on it.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from headwise.artifacts.origin import config_hash
from headwise.errors import BadInput, UnsupportedModel
from headwise.models.output import output_weight
from headwise.shapes import ModelShape

TOO_LONG = "Shorten the context, configure rope scaling on the model, or raise config.max_position_embeddings."


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A supported model family. `typed_rotary`: its rotary embedding wants the layer's type (Gemma3)."""

    name: str
    typed_rotary: bool = False


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(name="Llama"),
        "mistral": Family(name="Mistral"),
        "qwen2": Family(name="Qwen2"),
        "qwen3": Family(name="Qwen3"),
        "phi3": Family(name="Phi3"),
        "gemma3_text": Family(name="Gemma3 (text; sliding-window layers are left whole)", typed_rotary=True),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelView:
    """A supported model, seen alike whatever its family. Layers are counted among the compressible ones."""

    model: PreTrainedModel
    family: Family
    shape: ModelShape

    @property
    def max_positions(self) -> int:
        """Longest sequence the model may have been made for."""
        return max_positions(self.model.config)

    def require_positions(self, needed: int, what: str) -> None:
        """Raise BadInput if a context needs more positions than the model has; `what` says what it does or has."""
        if needed > self.max_positions:
            raise BadInput(f"the context {what}, but this model was made for {self.max_positions}. {TOO_LONG}")

    def warn_of_positions(self, needed: int) -> None:
        """Warn if it is not certain that the model has so many positions."""
        written = self.model.config.get_text_config().max_position_embeddings
        if needed > written and _stretches_linearly(self.model.config):
            warnings.warn(
                f"the context goes beyond the {written} positions that the model's configuration names. Its rope "
                "scaling is linear, and it does not say whether they are counted before or after scaling: if after, "
                "answers mean nothing.",
                UserWarning,
                stacklevel=2,
            )

    @property
    def name(self) -> str:
        """What it was loaded by: a hub id or a folder; empty where it was not loaded."""
        return self.model.config.name_or_path or ""

    @property
    def config_hash(self) -> str:
        """Names the architecture, as artifacts do."""
        return config_hash(self.model.config.get_text_config().to_dict())

    def output_weight(self, layer: int) -> Float[Tensor, "query_heads head_dim hidden"]:
        """W_O of a layer as the layer applies it, adapters and quantisation included. Raises UnsupportedModel."""
        return output_weight(self._attention(layer).o_proj, self.shape)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever the model reads inside, its rotary embedding is afterwards what it was before.

        Dynamic and long scaling choose frequencies by the longest sequence of a pass, and some keep them.
        """
        modules = [m for m in self._decoder.children() if next(m.parameters(), None) is None]
        fields = [dict(module.__dict__) for module in modules]
        buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
        try:
            yield
        finally:
            for module, before in zip(modules, fields, strict=True):
                module.__dict__.update(before)
            for module, name, buffer, before in buffers:  # some are replaced, some written to
                module._buffers[name] = buffer.copy_(before)

    def rotary(self, layer: int) -> "ModelRotary":
        """The rotary embedding that a layer's queries and keys went through in the latest forward pass.

        Its frequencies are copied: dynamic and long scaling choose them anew in every pass, and a later one may differ.
        """
        config, module = self.model.config.get_text_config(), self._decoder.rotary_emb
        prefix = f"{config.layer_types[self.shape.layers[layer]]}_" if self.family.typed_rotary else ""
        return ModelRotary(
            frequencies=getattr(module, f"{prefix}inv_freq").detach().float().clone(),
            attention_scaling=float(getattr(module, f"{prefix}attention_scaling")),
            head_dim=self.shape.head_dim,
        )

    def _attention(self, layer: int) -> Any:
        return self._decoder.layers[self.shape.layers[layer]].self_attn

    @property
    def _decoder(self) -> Any:
        return self.model.get_decoder()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRotary:
    """Implements `interfaces.Rotary` by the frequencies a forward pass has used, partial rotation included.

    The model's own module is not called: to be asked about other positions would change it (dynamic and long scaling).
    """

    frequencies: Float[Tensor, " pairs"]
    attention_scaling: float  # of cosines and sines (1 but for YaRN and the like)
    head_dim: int

    def unrotate(
        self, states: Float[Tensor, "batch heads tokens head_dim"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Undo the rotation of queries or keys; float32."""
        cos, sin = (x[:, None] for x in self._tables(positions))
        rotated, rest = states.float().split([cos.shape[-1], self.head_dim - cos.shape[-1]], dim=-1)
        return torch.cat([(rotated * cos - _rotate_half(rotated) * sin) / self.attention_scaling**2, rest], dim=-1)

    def mean_rotation(self, positions: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch head_dim head_dim"]:
        """The rotation matrix averaged over positions; float32."""
        cos, sin = (x.mean(1) for x in self._tables(positions))  # [B, rotary_dim]
        dim = cos.shape[-1]
        eye = torch.eye(dim, device=cos.device, dtype=torch.float32)
        matrix = torch.eye(self.head_dim, device=cos.device, dtype=torch.float32).repeat(len(cos), 1, 1)
        matrix[:, :dim, :dim] = cos[:, :, None] * eye + sin[:, :, None] * _rotate_half(eye).T
        return matrix

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.frequencies.to(positions.device)
        angles = torch.cat([angles, angles], dim=-1)  # [B, N, rotary_dim]
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def given(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """A cache as the argument that the model's forward and generate take: `cache` from transformers 5.24 on."""
    return {_cache_argument(type(model)): cache}


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids of the tokens that end an answer of generate()."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [ends] if isinstance(ends, int) else list(ends or [])


@lru_cache(maxsize=64)
def _cache_argument(kind: type[PreTrainedModel]) -> str:
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"


def view(model: Any) -> ModelView:
    """Describe a model; a description stays as it is, so that it is made once, where a model comes in.

    Raises BadInput for what is no model, UnsupportedModel, naming what is supported.
    """
    if isinstance(model, ModelView):
        return model
    model = _require_model(model)
    config = model.config.get_text_config()
    family, shape = _family(config), shape_of(config)
    devices = {weight.device for weight in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModel(
            f"the model is spread over {', '.join(sorted(map(str, devices)))}; headwise needs all of it on one device: "
            "load it without device_map, or with device_map={'': 0}."
        )
    return ModelView(model=model, family=family, shape=shape)


def shape_of(config: PretrainedConfig) -> ModelShape:
    """Sizes of the KV cache of a configuration; needs no weights. Raises UnsupportedModel."""
    config = config.get_text_config()
    _family(config)
    layers = tuple(i for i in range(config.num_hidden_layers) if not _slides(config, i))
    if not layers:
        raise UnsupportedModel(
            f"every layer of this {config.model_type} model attends to a sliding window of {config.sliding_window} "
            "tokens: its cache is bounded already and there is nothing to compress."
        )
    return ModelShape(
        num_layers=config.num_hidden_layers,
        layers=layers,
        kv_heads=config.num_key_value_heads,
        query_heads=config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )


def _family(config: PretrainedConfig) -> Family:
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(
            f"model type {config.model_type!r} is not supported. Supported: {known}. To add a family see the top of "
            "headwise/models/families.py."
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModel(f"this {config.model_type} model soft-caps its attention logits, which no kernel does.")
    return family


def max_positions(config: PretrainedConfig) -> int:
    """Longest sequence a configuration may be made for: what it says, or what its rope scaling stretches it to."""
    rope, written = _rope(config), config.get_text_config().max_position_embeddings
    stretched = rope.get("rope_type") in ("dynamic", "linear")
    original = rope.get("original_max_position_embeddings", written if stretched else 0)
    return max(written, int(original * (rope.get("factor") or 1.0)))


def _stretches_linearly(config: PretrainedConfig) -> bool:
    """Whether positions are scaled down and the configuration does not say how many there were before."""
    rope = _rope(config)
    return rope.get("rope_type") == "linear" and "original_max_position_embeddings" not in rope


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    rope = config.get_text_config().rope_parameters or {}
    return rope.get("full_attention", rope)  # some families have one per type of layer


def _require_model(model: Any) -> PreTrainedModel:
    """The model itself, where it was compiled. Raises BadInput for anything but a model of transformers."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper; dynamo cannot trace what a cache does
    if isinstance(model, nn.Module) and isinstance(getattr(model, "config", None), PretrainedConfig):
        return model  # pyright: ignore[reportReturnType]  # peft's wrappers are no PreTrainedModel
    if isinstance(model, str):
        raise BadInput(
            f"the model is the text {model!r}: load it with AutoModelForCausalLM.from_pretrained, and give that."
        )
    parts = {name: getattr(model, name, None) for name in ("module", "model")}  # DataParallel, a pipeline
    inner = next((f"its .{name}" for name, part in parts.items() if isinstance(part, PreTrainedModel)), None)
    advice = inner or "what AutoModelForCausalLM.from_pretrained returns"
    raise BadInput(f"a {type(model).__name__} is not a model of transformers: give {advice}.")


def _slides(config: PretrainedConfig, layer: int) -> bool:
    """Whether a layer forgets: a window as long as any sequence (Phi-4-mini's) is no window."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    kind = "sliding_attention" if types is None else types[layer]
    return kind != "full_attention" and window is not None and window < max_positions(config)


def _rotate_half(x: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) by a quarter turn."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
