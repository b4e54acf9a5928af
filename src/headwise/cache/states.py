"""Keys and values as tensors [batch, kv_heads, tokens, head_dim], and what may be taken back of them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from headwise.errors import UnsupportedGeneration

States = tuple[Tensor, ...]  # of other rows: see `picked`


def own(states: Tensor) -> Tensor:
    """`states` in storage of their own size: a view would keep all it was cut from alive."""
    return states if states.untyped_storage().nbytes() == states.nbytes else states.clone()


def held_by(layer: Any) -> list[Tensor]:
    """Keys and values, or states, of a layer of transformers' cache."""
    held: list[Tensor] = []
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        found = getattr(layer, name, None)
        held += [t for t in (found.values() if isinstance(found, dict) else (found,)) if t is not None]
    return held


def require_negative(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise UnsupportedGeneration(
            f"crop({tokens_to_remove}) asks to keep the first tokens, of which a compressed context has evicted some: "
            "give minus the number of last tokens to forget, or keep the cache you forked from."
        )


def no_autocast(states: Tensor) -> AbstractContextManager[Any]:
    """Scorers and kernels choose their own precision, and expect that of the cache everywhere."""
    kind = states.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
