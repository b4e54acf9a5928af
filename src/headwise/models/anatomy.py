"""What a model's attention is made of, seen in one forward pass of a few tokens and proven there.

Every row of the pass is one and the same token, at a position of its own. A lone token attends to itself, so all rows
have the same states in every layer, but for what positions do to them: how keys and queries are turned is there to be
read. The last row's attention is doubled on its way to the output projection, which shows that projection; it is halved
again before it gets there.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from headwise.errors import HeadwiseError, UnsupportedModel
from headwise.models.devices import device_of, is_spread, placement_of, require_numbers
from headwise.models.given import decoder_of, given, unchanged
from headwise.models.interface import NAME, Call, register, tag
from headwise.models.layout import layers_of, text_config
from headwise.models.rotation import Rotation, find
from headwise.shapes import ModelShape

_POSITIONS = (0, 1, 2, 7, 40, 300, 0)  # the last row is the one that is doubled
_TOKEN = 5
_GATE = 1e-2  # by which a doubled gate may differ, relative


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A layer that can be cut: names within the decoder. Of what is not known: an empty name, None."""

    attention: str
    projection: str
    rotation: Rotation | None
    turns_queries: bool  # whether queries are turned as keys are


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """The layers of a model that can be cut, in their order. `special`: whether attention has soft caps or sinks."""

    parts: tuple[Part, ...]
    softcap: bool
    sinks: bool
    windows: Mapping[int, tuple[int, int]]  # KV heads and their size of layers with a sliding window
    devices: tuple[torch.device, ...]  # where every layer of the model computes
    placement: tuple[torch.device, ...]  # where its weights were

    @property
    def special(self) -> bool:
        """Whether SDPA does not know its attention."""
        return self.softcap or self.sinks


_known: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def anatomy_of(model: Any, shape: ModelShape) -> Anatomy:
    """What the model is made of; looked at once. Raises UnsupportedModel for what cannot be served."""
    known = _known.get(model)
    if known is None:
        known = _known[model] = _examine(model, shape)
    return known


def forget_moved(model: Any) -> None:
    """Look again at a model of which a part was moved to another device: what is known says where its layers are.

    Not at one whose weights were shared out among processes meanwhile: they would have to look at the same time.
    """
    known = _known.get(model)
    if known is None or known.placement == placement_of(model):
        return
    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        del _known[model]


@dataclass(kw_only=True, eq=False)
class _Seen:
    """What passed through one layer."""

    index: int  # in the model
    call: Call | None = None
    out: Tensor | None = None  # what attention made, as it was handed on
    projection: str = ""


class _SeeingLayer(CacheLayerMixin):
    """A cache layer that notes what its attention is given."""

    is_sliding = False
    is_compileable = False

    def __init__(self, seen: _Seen, watch: "_Watch"):
        super().__init__()
        self.seen, self.watch, self.length = seen, watch, 0
        self.states: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.states, self.length = (key_states, value_states), key_states.shape[-2]
        return tag(key_states, self), value_states

    def attention(self, call: Call) -> Tensor:
        """The model's own; the last row is doubled until it comes to the projection."""
        out = call.exact()
        if self.seen.call is None:  # layers that share this cache come later
            factor = out.new_ones(len(out), 1, 1, 1)
            factor[-1] = 2
            out = out * factor
            self.seen.call, self.seen.out, self.watch.latest = call, out, self.seen
        return out

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


@dataclass(kw_only=True, eq=False)
class _Watch:
    """Looks at every module that is called after attention, until one takes what attention has made."""

    names: dict[nn.Module, str]
    latest: _Seen | None = None

    def __call__(self, module: nn.Module, arguments: Any) -> Any:
        seen, given = self.latest, arguments[0] if arguments else None
        if seen is None or seen.out is None or not isinstance(given, Tensor) or module not in self.names:
            return None
        if len(arguments) > 1:  # it does more than to project
            return None
        width = seen.out.shape[-1] * seen.out.shape[-2]
        if given.numel() != seen.out.numel() or given.shape[-1] != width or len(given) != len(seen.out):
            return None
        rows = given.flatten(1)
        if not _is_doubled(rows):
            return None
        seen.projection, self.latest = self.names[module], None
        halved = given.clone()
        halved[-1] = given[-1] / 2
        return (halved,)


def _is_doubled(rows: Tensor) -> bool:
    """Whether the last row is twice the first: linear in what attention has made, gates of the hidden state or not."""
    first, last = rows[0].float(), rows[-1].float()
    return bool(first.norm() > 0) and bool((last - 2 * first).norm() <= _GATE * last.norm())


@torch.no_grad()
def _examine(model: Any, shape: ModelShape) -> Anatomy:
    decoder: nn.Module = decoder_of(model)
    config = text_config(model.config)
    require_numbers(decoder)
    if "position_ids" not in signature(type(decoder).forward).parameters:
        raise UnsupportedModel(
            f"{type(decoder).__name__} takes no position_ids, so it counts padding as tokens and cannot be served."
        )
    # transformers 5.4 does not say which layers share, only how many.
    shared = any(layer.shared for layer in layers_of(config)) or bool(getattr(config, "num_kv_shared_layers", 0))
    if shared and is_spread(model):
        raise UnsupportedModel(
            "layers of this model read the keys of other layers, which it moves from device to device past the cache: "
            "load all of it onto one device."
        )
    layers: list[Any] = DynamicCache(config=config).layers
    names = {module: name for name, module in decoder.named_modules()}
    watch, placement = _Watch(names=names), placement_of(model)
    seen = {index: _Seen(index=index) for index in shape.layers}
    for index, noted in seen.items():
        layers[index] = _SeeingLayer(noted, watch)
    with unchanged(decoder):  # frequencies of the pass must still be there when rotations are looked for
        positions = _run(model, decoder, config, layers, watch)
        parts = [_part(decoder, layers[index], noted, shape, names, positions) for index, noted in seen.items()]
    calls = [noted.call for noted in seen.values() if noted.call is not None]
    return Anatomy(
        parts=tuple(parts),
        softcap=any(call.softcap is not None for call in calls),
        sinks=any(call.sinks is not None for call in calls),
        windows={i: layer.keys.shape[1::2] for i, layer in enumerate(layers) if _is_window(layer)},
        devices=tuple(_device(layer, positions.device) for layer in layers),
        placement=placement,
    )


def _device(layer: Any, otherwise: torch.device) -> torch.device:
    """Where a cache's layer has what it was given; one that holds nothing is anywhere."""
    return next((held.device for held in tree_leaves(vars(layer)) if isinstance(held, Tensor)), otherwise)


def _is_window(layer: Any) -> bool:
    return isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None


def _run(model: Any, decoder: nn.Module, config: Any, layers: list[Any], watch: _Watch) -> Tensor:
    """The forward pass; returns the positions of its rows."""
    device = device_of(model)
    longest = (getattr(config, "max_position_embeddings", None) or 2**31) - 1
    positions = torch.tensor([[min(p, longest)] for p in _POSITIONS], dtype=torch.int64, device=device)
    ids = torch.full_like(positions, min(_TOKEN, config.vocab_size - 1))
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    handle = register_module_forward_pre_hook(watch)
    plain = torch.autocast(device.type, enabled=False)
    try:
        with routed(model), plain:
            decoder(input_ids=ids, position_ids=positions, use_cache=True, **given(decoder, cache))
    except (HeadwiseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{type(decoder).__name__} cannot read with a cache of headwise: {type(error).__name__}: {error}"
        ) from error
    finally:
        handle.remove()
    return positions


@contextmanager
def routed(model: Any) -> Iterator[None]:
    """Send the model's attention through ours, and then again where it went before."""
    register()
    before = text_config(model.config)._attn_implementation
    if before != NAME:
        model.set_attn_implementation(NAME)
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
        if before not in (None, NAME):
            model.set_attn_implementation(before)


def _part(
    decoder: nn.Module,
    layer: _SeeingLayer,
    seen: _Seen,
    shape: ModelShape,
    names: dict[nn.Module, str],
    positions: Tensor,
) -> Part:
    """What a layer's pass has shown. Raises UnsupportedModel."""
    call, where = seen.call, f"layer {seen.index} of this model"
    if layer.states is None:
        raise UnsupportedModel(f"{where} puts no keys and values into the cache that it is given.")
    if call is None:
        raise UnsupportedModel(
            f"{where} does not give its attention, through transformers' attention interface, the keys that the cache "
            "has returned."
        )
    keys, values = layer.states
    same = call.value.shape == values.shape and torch.equal(call.value.nan_to_num(), values.nan_to_num())
    if not same:
        raise UnsupportedModel(f"{where} does not give its attention the values that the cache has returned.")
    if not getattr(call.module, "is_causal", True):
        raise UnsupportedModel(f"{where} attends to later tokens, too: this model is no decoder.")
    rows = len(keys)
    found = tuple(keys.shape), tuple(values.shape), tuple(call.query.shape)
    stored = (rows, shape.kv_heads, 1, shape.head_dim)
    if found != (stored, stored, (rows, shape.query_heads, 1, shape.head_dim)):
        raise UnsupportedModel(
            f"{where} has keys {found[0][1:]}, values {found[1][1:]} and queries {found[2][1:]} [heads, tokens, size]; "
            f"its configuration says {shape.kv_heads} KV heads and {shape.query_heads} query heads of "
            f"{shape.head_dim}, for keys and values alike."
        )
    keys, queries, at = keys[:-1], call.query[:-1], positions[:-1].to(keys.device)
    rotation = find(decoder, keys, at)
    turned = rotation is not None and find(decoder, queries, at) == rotation
    return Part(
        attention=names.get(call.module, ""), projection=seen.projection, rotation=rotation, turns_queries=turned
    )
