"""The model families headwise supports, and uniform access to what the flow needs from any of them.

To add a family: check that its attention (1) calls `update` of the cache on rotated keys, (2) goes through the
attention interface by name, (3) has `o_proj`, (4) uses neither soft-capping nor attention sinks; then add one line to
FAMILIES and one tiny configuration to tests/families.py, which runs every invariant on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from headwise.artifacts import config_hash
from headwise.errors import UnsupportedModel
from headwise.shapes import ModelShape


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
        """Longest sequence the model was made for."""
        return max_positions(self.model.config)

    @property
    def config_hash(self) -> str:
        """Names the architecture, as artifacts do."""
        return config_hash(self.model.config.get_text_config().to_dict())

    def output_weight(self, layer: int) -> Float[Tensor, "query_heads head_dim hidden"]:
        """W_O of a layer, one slice per query head (a view)."""
        weight = self._attention(layer).o_proj.weight  # [hidden, query_heads * D]
        return weight.view(-1, self.shape.query_heads, self.shape.head_dim).permute(1, 2, 0)

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
        eye = torch.eye(dim, device=cos.device)
        matrix = torch.eye(self.head_dim, device=cos.device).repeat(len(cos), 1, 1)
        matrix[:, :dim, :dim] = cos[:, :, None] * eye + sin[:, :, None] * _rotate_half(eye).T
        return matrix

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.frequencies.to(positions.device)
        angles = torch.cat([angles, angles], dim=-1)  # [B, N, rotary_dim]
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def given(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """A cache as the argument that the model's forward and generate take: `cache` from transformers 5.24 on."""
    return {_cache_argument(type(model)): cache}


@lru_cache(maxsize=64)
def _cache_argument(kind: type[PreTrainedModel]) -> str:
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"


def view(model: PreTrainedModel) -> ModelView:
    """Describe a model. Raises UnsupportedModel, naming what is supported."""
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
            "headwise/hf/families.py."
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModel(f"this {config.model_type} model soft-caps its attention logits, which no kernel does.")
    return family


def max_positions(config: PretrainedConfig) -> int:
    """Longest sequence a configuration was made for: what it says, or what its rope scaling stretches it to."""
    config = config.get_text_config()
    rope = config.rope_parameters or {}
    rope = rope.get("full_attention", rope)  # some families have one per type of layer
    written = config.max_position_embeddings
    original = rope.get("original_max_position_embeddings", written if rope.get("rope_type") == "dynamic" else 0)
    return max(written, int(original * (rope.get("factor") or 1.0)))


def _slides(config: PretrainedConfig, layer: int) -> bool:
    """Whether a layer forgets: a window as long as any sequence (Phi-4-mini's) is no window."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    kind = "sliding_attention" if types is None else types[layer]
    return kind != "full_attention" and window is not None and window < max_positions(config)


def _rotate_half(x: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) by a quarter turn."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
