"""Attention over a part of the keys, and the merge of parts by their log-sum-exp.

softmax(q K^T) V over a union of key sets is the mean of the parts' outputs, weighted by exp(log-sum-exp of the part).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Part = tuple[Float[Tensor, "parts heads queries head_dim"], Float[Tensor, "parts heads queries"]]
OwnedPart = tuple[Float[Tensor, "_ queries head_dim"], Float[Tensor, "_ queries"], Int[Tensor, " _"]]


def attend_part(
    query: Float[Tensor, "parts heads queries head_dim"],
    keys: Float[Tensor, "parts heads keys head_dim"],
    values: Float[Tensor, "parts heads keys head_dim"],
    bias: Float[Tensor, "parts #heads #queries keys"] | None,  # noqa: F821
    scaling: float,
    softcap: float | None = None,
) -> Part:
    """Output and log-sum-exp (at least float32) of independent attentions. `bias` is added to the logits."""
    if query.device.type == "cpu" and softcap is None:
        if bias is not None:
            bias = bias.expand(-1, -1, query.shape[2], -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=bias, scale=scaling
        )
    return attend_unfused(query, keys, values, bias, scaling, softcap)


def attend_unfused(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float, softcap: float | None = None
) -> Part:
    """The same by two matrix products, with float32 logits: for devices without a fused kernel that returns the sum."""
    precise = torch.promote_types(query.dtype, torch.float32)
    logits = capped(query.to(precise) @ keys.to(precise).transpose(-1, -2) * scaling, softcap)
    if bias is not None:
        logits = logits + bias
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ values.to(precise), lse


def capped(logits: Float[Tensor, "*axes"], softcap: float | None) -> Float[Tensor, "*axes"]:
    """Logits between minus and plus `softcap`, where there is one."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def merge(parts: Sequence[OwnedPart], num_owners: int) -> Float[Tensor, "owners queries head_dim"]:
    """Merge the parts of each owner, at least in float32. Every owner needs a part in which it sees something."""
    outs, sums, owners = zip(*parts, strict=True)
    out, lse, owner = torch.cat(outs), torch.cat(sums), torch.cat(owners)
    top = lse.new_full((num_owners, lse.shape[1]), -torch.inf)
    top = top.scatter_reduce_(0, owner[:, None].expand_as(lse), lse, "amax")
    weight = (lse - top[owner]).exp_()[..., None]
    total = weight.new_zeros(*top.shape, 1).index_add_(0, owner, weight)
    return weight.new_zeros(*top.shape, out.shape[-1]).index_add_(0, owner, out * weight).div_(total)
