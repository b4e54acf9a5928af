"""Our function of transformers' attention interface: who is served by it, and attention as a model's own layers do it.

For any cache but ours it is transformers' SDPA. A layer of ours tags the keys that it gives to the model (`tag`), by
which it is found when the attention over them is asked for. Soft caps and sinks, which SDPA does not know, are done
here, for every cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headwise.errors import UnsupportedModel
from headwise.kernels.partial import capped

NAME = "headwise"
SINKS = "s_aux"  # what transformers calls one more logit for every query head, of which no value comes
_BLOCK = 512  # queries whose logits are held at once
_TAG = "_headwise_layer"
# Arguments that are honoured, or that say nothing of what attention must be: masks and shapes say the same.
_HONOURED = frozenset({"dropout", "is_causal", "sliding_window", "position_ids", "softcap", SINKS})
_IDLE = frozenset(
    {
        *("use_cache", "cache_position", "logits_to_keep", "return_dict", "num_items_in_batch", "kwargs"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "labels", "token_type_ids"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Call:
    """One call of attention: what a layer of a model gives, and what it wants back."""

    module: nn.Module  # the model's attention layer
    query: Tensor  # [B, query_heads, T, D]
    key: Tensor  # [B, kv_heads, N, D], what the cache's layer has returned
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None  # logits are `softcap * tanh(logits / softcap)`
    sinks: Tensor | None  # [query_heads], logits beside those of the keys
    position_ids: Tensor | None
    exact: Callable[[], Tensor]  # makes the model's own attention, [B, T, query_heads, D]


@runtime_checkable
class AttentionLayer(Protocol):
    """What a cache layer must offer to be served here."""

    def attention(self, call: Call) -> Tensor:
        """Attention of new tokens, [B, query_heads, T, D] -> [B, T, query_heads, D]."""
        ...


def register() -> None:
    """Make the function known to transformers, under the name "headwise"."""
    AttentionInterface.register(NAME, headwise_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def tag(states: Tensor, layer: AttentionLayer) -> Tensor:
    """A view of `states` that tells the attention function which layer it came from.

    A fresh view, because the layer may hold `states` itself: the tag must not keep the layer's memory alive.
    """
    tagged = states.view_as(states)
    setattr(tagged, _TAG, layer)
    return tagged


def headwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function transformers calls for every attention layer."""
    layer: AttentionLayer | None = getattr(key, _TAG, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def exact() -> Tensor:
        return _exact(module, query, key, value, attention_mask, scale, kwargs)

    if layer is None:
        return exact(), None
    require_known(module, kwargs)
    call = Call(
        module=module,
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        scaling=scale,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get(SINKS),
        position_ids=kwargs.get("position_ids"),
        exact=exact,
    )
    return layer.attention(call), None


def require_known(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedModel, naming it, for an argument that would change attention in a way unknown here."""
    for name, value in arguments.items():
        if value is not None and name not in _HONOURED and name not in _IDLE:
            raise UnsupportedModel(
                f"{type(module).__name__} gives attention the argument {name!r}, which headwise does not know, so this "
                "model cannot be served."
            )


def _exact(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    kwargs: dict[str, Any],
) -> Tensor:
    """The model's own attention: SDPA, or where that cannot be, logits in blocks."""
    softcap, sinks = kwargs.get("softcap"), kwargs.get(SINKS)
    if softcap is None and sinks is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)[0]
    for name in ("position_bias", "block_indices"):
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"{type(module).__name__} gives attention {name!r} besides a soft cap or sinks.")
    if mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        tokens = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = tokens.tril(key.shape[2] - query.shape[2])[None, None]
    grouped = query.unflatten(1, (key.shape[1], -1))  # [B, H, G, T, D]
    outs = [
        _block(block, key, value, part, scaling, softcap, sinks)
        for block, part in zip(grouped.split(_BLOCK, dim=3), _rows(mask, query.shape[2]), strict=True)
    ]
    return torch.cat(outs, dim=3).flatten(1, 2).transpose(1, 2).contiguous()


def _rows(mask: Tensor | None, queries: int) -> list[Tensor | None]:
    """Of every block of queries."""
    blocks = -(-queries // _BLOCK)
    return [None] * blocks if mask is None else [part[:, :, None] for part in mask.split(_BLOCK, dim=2)]


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    logits = query @ key.unsqueeze(2).transpose(-1, -2) * scaling
    logits = capped(logits.float(), softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(query.dtype).min) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        own = sinks.float().view(key.shape[1], -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, own], dim=-1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value.unsqueeze(2)
