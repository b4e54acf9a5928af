"""What a configuration says of a model's layers: which attend to the whole context, which forget, which have a state.

It is read from the cache that transformers makes for the configuration, which needs no weights. What the layers of the
model really do is seen when it is used (anatomy.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from headwise.errors import UnsupportedModel
from headwise.shapes import ModelShape

# "whole": keys and values of all tokens, which can be cut. "window": those of the last tokens. "state": a state that
# does not grow with the tokens. "none": nothing, as of a layer without attention, or that reads another layer's.
Kind = Literal["whole", "window", "state", "none"]
# What transformers' layers without keys and values are called; versions before 5.24 know not all of them.
_OTHERS: Mapping[str, Kind] = MappingProxyType({"LinearAttentionLayer": "state", "DummyLayer": "none"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A layer's part of the cache: tokens of the window, the newest included, or the number of its states.

    `shared`: whether other layers read its keys and values, too, for which the model holds them to the end of a pass.
    """

    kind: Kind
    window: int = 0
    states: int = 0
    shared: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What cannot be derived for a model type. Functions are given the configuration of one layer."""

    kv_heads: Callable[[Any], int] | None = None
    query_heads: Callable[[Any], int] | None = None
    head_dim: Callable[[Any], int] | None = None
    refused: str = ""  # why it cannot be served


_OF_ANOTHER = Family(refused="it reads the cache of the model that it assists")
_FROM_PADDING = Family(refused="it counts positions from the id of its padding token, not from 0")
# A model type whose sizes are written under other names, or that must be refused, has a line here. Others have none.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt_bigcode": Family(kv_heads=lambda layer: 1 if layer.multi_query else layer.num_attention_heads),
        **dict.fromkeys(
            ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
            _FROM_PADDING,
        ),
        **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _OF_ANOTHER),
    }
)


def layers_of(config: PretrainedConfig) -> tuple[Layer, ...]:
    """Every layer of the model. Raises UnsupportedModel for a kind that cannot be served."""
    text = text_config(config)
    limit, modes = max_positions(text), getattr(text, "kv_sharing_modes", None) or []
    found = [_layer(text, layer, limit) for layer in _cache_layers(text)]
    for i, mode in enumerate(modes if "reuse" in modes else []):
        found[i] = replace(found[i], shared=mode == "store")
    return tuple(found)


def shape_of(config: PretrainedConfig) -> ModelShape:
    """Sizes of the KV cache of a configuration; needs no weights. Raises UnsupportedModel."""
    text = text_config(config)
    family = FAMILIES.get(text.model_type, Family())
    if family.refused:
        raise UnsupportedModel(f"model type {text.model_type!r} is not supported: {family.refused}.")
    layers = layers_of(text)
    whole = tuple(i for i, layer in enumerate(layers) if layer.kind == "whole")
    if not whole:
        _refuse_all(text, layers)
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModel(
            f"this {text.model_type} model keeps one latent for all heads of a layer (MLA): it cannot be cut by heads."
        )
    sizes = sorted({_sizes(text, family, i) for i in whole})
    if len(sizes) > 1:
        told = " and ".join(f"{kv} KV heads of {dim}" for kv, _, dim in sizes)
        raise UnsupportedModel(f"layers of this {text.model_type} model differ in their heads: {told}.")
    kv_heads, query_heads, head_dim = sizes[0]
    return ModelShape(
        num_layers=len(layers), layers=whole, kv_heads=kv_heads, query_heads=query_heads, head_dim=head_dim
    )


def heads_of(config: PretrainedConfig, layer: int) -> tuple[int, int]:
    """KV heads of any layer, and their size."""
    text = text_config(config)
    kv_heads, _, head_dim = _sizes(text, FAMILIES.get(text.model_type, Family()), layer)
    return kv_heads, head_dim


def text_config(config: PretrainedConfig) -> Any:
    """The part of a configuration that describes the decoder. Raises UnsupportedModel where there are several."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise UnsupportedModel(f"this {config.model_type} model has no single decoder of text.") from error


def max_positions(config: PretrainedConfig) -> int:
    """Longest sequence a configuration may be made for: what it says, or what its rope scaling stretches it to."""
    rope, written = rope_of(config), written_positions(config)
    stretched = rope.get("rope_type") in ("dynamic", "linear")
    original = rope.get("original_max_position_embeddings", written if stretched else 0)
    return max(written, int(original * (rope.get("factor") or 1.0)))


def written_positions(config: PretrainedConfig) -> int:
    """The longest sequence that a configuration names; as good as endless where it names none."""
    return getattr(text_config(config), "max_position_embeddings", None) or 2**31


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """How the rotary embedding of layers that are cut is scaled."""
    rope = getattr(text_config(config), "rope_parameters", None) or {}
    return rope.get("full_attention", rope) or {}  # some families have one per type of layer


def _cache_layers(text: Any) -> list[Any]:
    try:
        return DynamicCache(config=text).layers
    except Exception as error:  # transformers raises whatever the missing attribute raises
        raise UnsupportedModel(
            f"transformers makes no cache for model type {text.model_type!r} from its configuration ({error})."
        ) from error


def _layer(text: Any, layer: Any, limit: int) -> Layer:
    kind = type(layer)
    if kind is DynamicLayer:
        return Layer(kind="whole")
    if kind is DynamicSlidingWindowLayer:
        window = layer.sliding_window
        return Layer(kind="whole") if window >= limit else Layer(kind="window", window=window)
    if kind.__name__ in _OTHERS:
        return Layer(kind=_OTHERS[kind.__name__], states=getattr(layer, "number_of_states", 0))
    raise UnsupportedModel(
        f"model type {text.model_type!r} has layers whose cache is transformers' {kind.__name__}, which headwise does "
        "not know."
    )


def _refuse_all(text: Any, layers: tuple[Layer, ...]) -> None:
    windows = {layer.window for layer in layers if layer.window}
    if windows:
        raise UnsupportedModel(
            f"every layer of this {text.model_type} model attends to a sliding window of {max(windows)} "
            "tokens: its cache is bounded already and there is nothing to compress."
        )
    raise UnsupportedModel(
        f"no layer of this {text.model_type} model has keys and values: there is nothing to compress."
    )


def _sizes(text: Any, family: Family, index: int) -> tuple[int, int, int]:
    """KV heads, query heads and size of a head of one layer."""
    layer = _of_layer(text, index)
    if getattr(layer, "num_attention_heads", None) is None:
        raise UnsupportedModel(f"the configuration of this {text.model_type} model names no number of heads.")
    query_heads = family.query_heads(layer) if family.query_heads else layer.num_attention_heads
    kv_heads = family.kv_heads(layer) if family.kv_heads else _first(layer, "num_key_value_heads", query_heads)
    head_dim = family.head_dim(layer) if family.head_dim else _first(layer, "head_dim", None)
    return kv_heads, query_heads, head_dim or layer.hidden_size // query_heads


def _of_layer(text: Any, index: int) -> Any:
    """The configuration of one layer; transformers before 5.24 know one for all."""
    several = getattr(text, "per_layer_config", None)
    return text if several is None else several[index]


def _first(config: Any, name: str, default: Any) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value
