"""Attention over a part of the keys, and the merge of parts by their log-sum-exp.

softmax(q K^T) V over a union of key sets is the mean of the parts' outputs, weighted by exp(log-sum-exp of the part).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MASKED = -1e30  # finite, so that a part in which a query sees nothing has weight 0, not NaN

Part = tuple[Float[Tensor, "parts queries head_dim"], Float[Tensor, "parts queries"]]


def attend_part(
    query: Float[Tensor, "parts queries head_dim"],
    keys: Float[Tensor, "parts keys head_dim"],
    values: Float[Tensor, "parts keys head_dim"],
    mask: Bool[Tensor, "parts #queries keys"] | None,
    scaling: float,
) -> Part:
    """Output and log-sum-exp (at least float32) of independent attentions. `mask` is False at keys a query does not see."""
    bias = None
    if mask is not None:
        masked = max(MASKED, torch.finfo(query.dtype).min / 2)
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, masked)
        bias = bias.expand(-1, query.shape[1], -1)
    if query.device.type == "cpu":
        return _attend_cpu(query, keys, values, bias, scaling)
    return attend_unfused(query, keys, values, bias, scaling)


def _attend_cpu(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float) -> Part:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, None],
        keys[:, None],
        values[:, None],
        attn_mask=None if bias is None else bias[:, None],
        scale=scaling,
    )
    return out[:, 0], lse.reshape(query.shape[:2])


def attend_unfused(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float) -> Part:
    """The same by two matrix products, with float32 logits: for devices without a fused kernel that returns the sum."""
    precise = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(precise) @ keys.to(precise).transpose(1, 2) * scaling
    if bias is not None:
        logits = logits + bias
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ values.to(precise), lse


def merge_by_owner(
    part: Part, owner: Int[Tensor, " parts"], num_owners: int
) -> tuple[Float[Tensor, "owners queries head_dim"], Float[Tensor, "owners queries"]]:
    """Merge the parts of each owner. An owner without parts gets log-sum-exp `MASKED`."""
    out, lse = part
    out = out.to(lse.dtype)
    index = owner[:, None].expand_as(lse)
    top = lse.new_full((num_owners, lse.shape[1]), MASKED).scatter_reduce(0, index, lse, "amax")
    weight = (lse - top[owner]).exp()
    total = lse.new_zeros(top.shape).index_add_(0, owner, weight)
    merged = out.new_zeros(*top.shape, out.shape[-1]).index_add_(0, owner, out * weight[..., None])
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    return merged / total[..., None], top + total.log()


def merge_pair(first: Part, second: Part) -> Float[Tensor, "parts queries head_dim"]:
    """Merge two parts with the same owners."""
    weight = torch.sigmoid(first[1] - second[1])[..., None]
    return first[0] * weight + second[0] * (1 - weight)
