"""Which entries stay: protected tokens first, then the best scores of every head, exactly as many as its count."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import BadInput, NonFiniteValues, ShapeMismatch


def protected_mask(valid: Bool[Tensor, "batch tokens"], sink: int, window: int) -> Bool[Tensor, "batch tokens"]:
    """True at the first `sink` and the last `window` tokens of each row; padding (`valid` False) is not counted.

    Rows of `sink + window` tokens or fewer are protected whole. Raises BadInput on negative sizes.
    """
    if sink < 0 or window < 0:
        raise BadInput(f"sink={sink} and window={window} are numbers of tokens; give 0 or more.")
    rank = valid.cumsum(dim=-1)  # 1 at the first token of a row
    return valid & ((rank <= sink) | (rank > rank[:, -1:] - window))


def protection_order(valid: Bool[Tensor, "batch tokens"], sink: int, window: int) -> Int[Tensor, "batch tokens"]:
    """In which order a head keeps protected tokens if it cannot keep all: the first tokens, then the latest backwards.

    0 for the one that is kept first; other tokens come after all protected ones.
    """
    rank = valid.cumsum(dim=-1) - 1  # 0 at the first token of a row
    behind = rank[:, -1:] - rank  # 0 at the last
    return torch.where(rank < sink, rank, sink + behind).masked_fill(
        ~protected_mask(valid, sink, window), valid.shape[1]
    )


def select(
    scores: Float[Tensor, "batch kv_heads tokens"],
    counts: Int[Tensor, "batch kv_heads"],
    valid: Bool[Tensor, "batch tokens"],
    protected: Bool[Tensor, "batch tokens"],
    order: Int[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch kv_heads tokens"]:
    """Keep the protected tokens and the best-scored others of each head, `counts` in all, never padding.

    With `order` (of `protection_order`) a count may be smaller than the number of protected tokens.
    Ties go to the earlier position. Scores at padding and at protected tokens are not looked at.
    Raises ShapeMismatch on sizes that do not fit, BadInput on counts that cannot be met, NonFiniteValues on NaN.
    """
    _require_shapes(scores, counts, valid, protected)
    protected = protected & valid
    _require_values(scores, counts, valid, protected, floor=order is None)
    limit = torch.finfo(torch.float32).max
    # Clamped, so that no score ties with the infinities that stand for protected and padding.
    ranked = scores.float().clamp(-limit, limit)
    ranked = ranked.masked_fill(protected.unsqueeze(1), torch.inf).masked_fill(~valid.unsqueeze(1), -torch.inf)
    best = torch.argsort(ranked, dim=-1, descending=True, stable=True)
    winners = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int64) < counts.unsqueeze(-1)
    kept = torch.zeros_like(winners).scatter(-1, best, winners)
    if order is None:
        return kept
    return torch.where(protected.unsqueeze(1), order.unsqueeze(1) < counts.unsqueeze(-1), kept)


def _require_shapes(scores: Tensor, counts: Tensor, valid: Tensor, protected: Tensor) -> None:
    batch, heads, tokens = scores.shape
    expected = {"counts": (batch, heads), "valid": (batch, tokens), "protected": (batch, tokens)}
    for (name, shape), tensor in zip(expected.items(), (counts, valid, protected), strict=True):
        if tuple(tensor.shape) != shape:
            raise ShapeMismatch(
                f"{name} has shape {tuple(tensor.shape)}; scores {tuple(scores.shape)} need {name} of shape {shape}."
            )


def _require_values(scores: Tensor, counts: Tensor, valid: Tensor, protected: Tensor, floor: bool) -> None:
    least, most = protected.sum(dim=-1, keepdim=True) * floor, valid.sum(dim=-1, keepdim=True)
    nan = (scores.isnan() & (valid & ~protected).unsqueeze(1)).any()
    wrong = ((counts < least) | (counts > most)).any()
    has_nan, has_wrong = torch.stack([nan, wrong]).tolist()  # one wait for the device instead of two
    if has_nan:
        raise NonFiniteValues("Some scores are NaN: look for NaN in the model's keys, values or in the scorer.")
    if has_wrong:
        raise BadInput(
            f"counts {counts.tolist()} must lie between each row's protected tokens {least.flatten().tolist()} and "
            f"its tokens {most.flatten().tolist()}."
        )
