"""Models that place the tokens of an image on a grid (M-RoPE): three positions a token, and text after it starts lower.

Such a model works out positions by itself. What it must know of what came before, by how much positions are ahead of
the number of tokens, it keeps in itself (`rope_deltas`): that of the context it read last, which may be another one.
So our caches note where a context was read, tell the model before it needs to know, and look at what it makes of it.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headwise.errors import BadInput

_DELTAS = "rope_deltas"
_AXES = 3


def holder_of(model: nn.Module) -> Any:
    """The part of a model that keeps how far positions are ahead; None for a model that has one position a token."""
    return next((module for module in model.modules() if _DELTAS in vars(module)), None)


def tell(holder: Any, ahead: Int[Tensor, " batch"] | None) -> None:
    """Let a model know how far the positions of every row are ahead; None before the first tokens."""
    setattr(holder, _DELTAS, None if ahead is None else ahead[:, None])


def ahead_of(
    position_ids: Tensor | None, mask: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Int[Tensor, " batch"]:
    """By how much what follows these first tokens [batch, tokens] is ahead of their number (mostly negative).

    It goes on after the last one's largest position: padding is on the left, and the last token of a grid is its end.
    """
    rows, tokens = shape
    places = _places(position_ids, 0, shape, device)
    counts = torch.full((rows,), tokens, dtype=torch.int64, device=device) if mask is None else mask.long().sum(-1)
    return places[..., -1].amax(0) + 1 - counts


def on_grid(position_ids: Tensor | None) -> bool:
    """Whether some token has different positions."""
    return (
        position_ids is not None
        and position_ids.ndim == _AXES
        and bool((position_ids[-_AXES:] != position_ids[-1]).any())
    )


def require_placed(
    position_ids: Tensor | None,
    seen: int,
    expected: Int[Tensor, "batch new"],
    real: Bool[Tensor, "batch new"],
) -> None:
    """Raise BadInput unless new tokens, but for padding, are at the expected positions on all axes."""
    places = _places(position_ids, seen, (expected.shape[0], expected.shape[1]), expected.device)
    wrong = ((places != expected) & real).any(0)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise BadInput(
            f"new token {token} is at position {places[-1, row, token].item()}, but this cache goes on at "
            f"{expected[row, token].item()}: behind an image, positions are not the number of tokens. Leave "
            "position_ids out, or give generate() what cache.inputs() makes."
        )


def _places(position_ids: Tensor | None, seen: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Positions [axes, batch, tokens] as the decoder rotates by them: if it is given none, it counts on from `seen`."""
    if position_ids is None:
        position_ids = torch.arange(seen, seen + shape[1], dtype=torch.int64, device=device)[None]
    places = (
        position_ids[None] if position_ids.ndim < _AXES else position_ids[-_AXES:]
    )  # a fourth, the first, is for masks
    return places.expand(-1, *shape)
