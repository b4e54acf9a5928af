"""What attention masks may say to a cache whose context is compressed: who is padding, and what the tail may see.

While the context is read, a mask must be causal with padding on the left, but for images whose tokens see one another
(Gemma 3); anything else (packed documents, hidden passages, preferences) would be read as something it is not, and is
refused. Later any mask over the tail is honoured, and all of the context must be visible.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise.errors import BadInput

BLOCK = 512  # queries looked at at a time
HIDDEN = -1e4  # added to a logit, this or less leaves nothing to see
ONLY = "A RaggedCache takes masks that are causal with padding on the left"


def tokens_of(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Bool[Tensor, "batch tokens"]:
    """Which of `length` tokens are no padding: those that the last query of a mask [batch, 1, queries, tokens] sees."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    return _visible(mask)[:, 0, -1, :length].expand(batch, -1).clone()


def require_causal(
    mask: Tensor | None, valid: Bool[Tensor, "batch tokens"], *, images: bool = False
) -> Int[Tensor, "batch queries"] | None:
    """Raise BadInput unless the newest queries see every valid token up to themselves, and nothing else.

    With `images` they may see further, as tokens of one image do. Returns the last token that each query sees; None
    where that is always itself.
    """
    if mask is None:
        return None
    require_left_padding(valid)
    length, num_queries = valid.shape[1], mask.shape[-2]
    visible, number = _visible(mask)[..., :length], torch.arange(length, dtype=torch.int64, device=valid.device)
    last: list[Tensor] = []
    for rows in number[length - num_queries :].split(BLOCK):
        part = visible[:, :, rows - (length - num_queries)]
        until = rows.expand(len(valid), -1)
        if images:
            until = until.maximum(torch.where(part & valid[:, rows, None][:, None], number, 0).amax((1, 3)))
        last.append(until)
        wrong = (part != ((number <= until[:, None, :, None]) & valid[:, None, None])).any(-1)
        mixed = part.any(-1) & ~part.all(-1)  # padding sees nothing, or all where a softmax over nothing would be NaN
        if bool(torch.where(valid[:, None, rows], wrong, mixed).any()):
            raise BadInput(
                f"the attention mask hides tokens that are not padding, or shows later ones. {ONLY}: compress packed "
                "documents one by one, and leave hidden passages out."
            )
    seen = torch.cat(last, dim=-1)
    return seen if images and bool((seen != number[length - num_queries :]).any()) else None


def require_left_padding(valid: Bool[Tensor, "batch tokens"]) -> None:
    """Raise BadInput if padding comes after a token."""
    if bool((valid[:, 1:] < valid[:, :-1]).any()):
        raise BadInput("padding must be on the left: set tokenizer.padding_side = 'left'.")


def tail_mask(mask: Tensor, batch: int, num_queries: int, tail: int) -> Bool[Tensor, "batch queries tail"]:
    """Which tokens of the tail the new queries see. Raises BadInput where the mask hides context or differs by head."""
    visible = _visible(mask)
    if visible.shape[1] != 1 and bool((visible != visible[:, :1]).any()):
        raise BadInput("the attention mask differs from head to head, which a RaggedCache does not do.")
    if visible.shape[-2] < num_queries or visible.shape[-1] < tail:
        raise BadInput(
            f"the attention mask {tuple(mask.shape)} is too small for {num_queries} queries of {tail} tokens."
        )
    visible = visible[:, 0, -num_queries:]
    if not bool(visible[..., : visible.shape[-1] - tail].all()):
        raise BadInput("the attention mask hides tokens of the compressed context, all of which are visible.")
    return visible[..., visible.shape[-1] - tail :].expand(batch, -1, -1)


def require_whole_context(mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"], tokens: Tensor) -> None:
    """Raise BadInput unless a mask shows the last `tokens` [batch] of every row's context and hides its padding."""
    number = torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device)
    if bool((mask.bool() != (number >= mask.shape[1] - tokens[:, None])).any()):
        raise BadInput(
            "attention_mask must be 0 at the padding of the compressed context and 1 at its other tokens: it was so "
            "when the context was read, and what is kept of it cannot be hidden."
        )


def _visible(mask: Tensor) -> Bool[Tensor, "batch heads queries tokens"]:
    """As booleans. Raises BadInput for one that prefers tokens instead of hiding them."""
    if mask.ndim != 4:
        raise BadInput(
            f"the attention mask of a layer has shape {tuple(mask.shape)}; expected [batch, 1, queries, tokens]."
        )
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point() or bool(((mask != 0) & (mask > HIDDEN)).any()):
        raise BadInput(
            f"the attention mask holds numbers other than 0 (seen) and -inf (hidden). {ONLY}, no biases such as ALiBi."
        )
    return mask == 0
