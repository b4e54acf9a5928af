"""Our attention, registered with transformers under the name "headwise", and nothing else changed.

For any cache but ours it is transformers' SDPA. With a RaggedCache it is SDPA during prefill, so that prefill is exact,
after which the layer is told what passed; once a layer is frozen, its own kernel does the attention.
"""

import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headwise.models.families import ModelView, view
from headwise.models.passes import tell_caches

NAME = "headwise"
_TAG = "_headwise_layer"


@runtime_checkable
class AttentionLayer(Protocol):
    """What a cache layer must offer to be served here."""

    def attention(
        self,
        exact: Callable[[], Tensor],
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
        position_ids: Tensor | None,
    ) -> Tensor:
        """Attention of new tokens, [B, query_heads, T, D] -> [B, T, query_heads, D]; `exact` makes SDPA's."""
        ...


def enable(model: PreTrainedModel | ModelView) -> None:
    """Route the model's attention through headwise. Only our caches notice: for every other cache it is SDPA.

    Making a RaggedCache does this. Call it yourself after another attention implementation was set. The model also
    tells our caches of its forward passes from then on (passes.py).

    Raises
    ------
    BadInput, UnsupportedModel
        The model is none that can be served.

    Warns
    -----
    UserWarning
        Attention was neither SDPA nor headwise before: results and speed change.
    """
    model = view(model).model
    before = model.config.get_text_config()._attn_implementation
    if before not in (NAME, "sdpa"):
        warnings.warn(
            f"this model's attention was {before!r}; with headwise it goes through SDPA from now on, whatever the "
            f"cache. Call model.set_attn_implementation({before!r}) when you are done with headwise's caches.",
            UserWarning,
            stacklevel=2,
        )
    AttentionInterface.register(NAME, headwise_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if not is_enabled(model):
        model.set_attn_implementation(NAME)
    tell_caches(model)


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through headwise."""
    return model.config.get_text_config()._attn_implementation == NAME


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
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def exact() -> Tensor:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scale, **kwargs)[0]

    return layer.attention(exact, query, key, attention_mask, scale, kwargs.get("position_ids")), None
