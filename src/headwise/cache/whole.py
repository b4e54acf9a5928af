"""What lies in a cache that holds one context, all of it."""

from jaxtyping import Float
from torch import Tensor

from headwise.cache.cache import RaggedCache
from headwise.errors import BadInput


def require_whole(whole: RaggedCache) -> None:
    """Raise BadInput unless the cache holds one context, all of it."""
    layers = [layer.segments for layer in whole.frozen_layers]
    single = len(layers) == len(whole.ragged_layers) and all(segments.batch == 1 for segments in layers)
    if not single or any(len(set(segments.lengths)) > 1 or segments.quantised for segments in layers):
        raise BadInput("the importance of entries is measured on one context at a time, read and kept whole, natively.")


def states_of(
    whole: RaggedCache, layer: int
) -> tuple[Float[Tensor, "kv_heads tokens head_dim"], Float[Tensor, "kv_heads tokens head_dim"]]:
    """Keys and values of a layer of a wholly kept context, views."""
    segments = whole.frozen_layers[layer].segments
    return by_head(segments.keys, segments.kv_heads), by_head(segments.values, segments.kv_heads)


def by_head(states: Tensor, heads: int) -> Tensor:
    """Flat storage of one wholly kept context as [H, N, D]."""
    return states.view(heads, -1, states.shape[-1])
