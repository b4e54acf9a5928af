"""Causal attention for training on a CPU: blocks of queries, batched products, kept probabilities.

PyTorch's own CPU attention is fast forward and slow backward; at the lengths of the reference model (64 to 1024 tokens)
keeping the probabilities is several times faster and fits in memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "blocked_cpu"
QUERY_BLOCK = 128
HEADS_AT_ONCE = 16  # keeps one block of probabilities inside the cache of a core


class BlockedAttention(torch.autograd.Function):
    """softmax(Q K^T) V under the causal mask, for grouped heads; queries come already scaled.

    Shapes: queries [batch * kv_heads, group, tokens, dim], keys and values [batch * kv_heads, tokens, dim].
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        output = torch.empty_like(queries)
        probabilities = []
        for start, stop, heads in _blocks(queries):
            block = queries[heads, :, start:stop]
            scores = torch.bmm(block.flatten(1, 2), keys[heads, :stop].transpose(1, 2))
            grouped = scores.unflatten(1, (block.shape[1], stop - start))
            grouped[..., start:] += _causal_mask(stop - start, queries.dtype)
            weights = torch.softmax(scores, -1)
            output[heads, :, start:stop] = torch.bmm(weights, values[heads, :stop]).unflatten(1, block.shape[1:3])
            probabilities.append(weights)
        ctx.save_for_backward(queries, keys, values, output, *probabilities)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, output, *probabilities = ctx.saved_tensors
        grad_output = grad_outputs[0].contiguous()
        grad_queries = torch.empty_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        row_sums = (grad_output * output).sum(-1, keepdim=True)
        for weights, (start, stop, heads) in zip(probabilities, _blocks(queries), strict=True):
            block = queries[heads, :, start:stop]
            grad_block = grad_output[heads, :, start:stop].flatten(1, 2)
            grad_values[heads, :stop] += torch.bmm(weights.transpose(1, 2), grad_block)
            grad_scores = torch.bmm(grad_block, values[heads, :stop].transpose(1, 2))
            grad_scores.sub_(row_sums[heads, :, start:stop].flatten(1, 2)).mul_(weights)
            grad_queries[heads, :, start:stop] = torch.bmm(grad_scores, keys[heads, :stop]).unflatten(
                1, block.shape[1:3]
            )
            grad_keys[heads, :stop] += torch.bmm(grad_scores.transpose(1, 2), block.flatten(1, 2))
        return grad_queries, grad_keys, grad_values


def _blocks(queries: Tensor) -> list[tuple[int, int, slice]]:
    heads, _, tokens, _ = queries.shape
    return [
        (start, min(start + QUERY_BLOCK, tokens), slice(head, head + HEADS_AT_ONCE))
        for start in range(0, tokens, QUERY_BLOCK)
        for head in range(0, heads, HEADS_AT_ONCE)
    ]


def _causal_mask(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally, with the signature transformers calls; padding is not supported.

    Returns the output as [batch, tokens, heads, dim].
    """
    assert attention_mask is None
    batch, heads, tokens, dim = query.shape
    group = heads // key.shape[1]
    output = BlockedAttention.apply(
        (query * scaling).reshape(-1, group, tokens, dim),
        key.reshape(-1, tokens, dim),
        value.reshape(-1, tokens, dim),
    )
    assert isinstance(output, Tensor)
    return output.view(batch, heads, tokens, dim).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `attn_implementation=NAME` available to models built after this call."""
    AttentionInterface.register(NAME, blocked_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
