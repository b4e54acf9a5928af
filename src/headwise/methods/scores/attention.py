"""The attention of given queries over a layer's keys, for the scorers that look at attention weights.

Weights come grouped, [B, H, G, T, N]: the G query heads that share a KV head lie side by side, so the keys are never
repeated. Everything is float32 whatever the model's precision. Padding keys get weight 0, and so does every key of a
padding query: sums over queries need no further mask, means must divide by the number of valid queries.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.interfaces import Chunk, Observation
from headwise.kernels.partial import capped


def token_ranks(valid: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Return how many valid tokens of its row come before each token: its index in the row without padding."""
    return valid.long().cumsum(-1) - valid.long()


def causal_mask(
    valid: Bool[Tensor, "batch tokens"],
    *,
    offset: int,
    num_queries: int,
    until: Int[Tensor, "batch queries"] | None = None,
) -> Bool[Tensor, "batch queries tokens"]:
    """Return what query token `offset + t` may see: what comes before the end of `until`, padding excluded.

    That is itself if `until` is None. A padding query sees nothing.
    """
    tokens = torch.arange(valid.shape[1], device=valid.device, dtype=torch.int64)
    rows = tokens[offset : offset + num_queries]
    causal = tokens <= (rows if until is None else until).unsqueeze(-1)
    return causal & valid.unsqueeze(1) & valid[:, rows].unsqueeze(-1)


def attention(
    queries: Float[Tensor, "batch query_heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    visible: Bool[Tensor, "batch queries tokens"],
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " query_heads"] | None = None,
) -> Float[Tensor, "batch kv_heads group queries tokens"]:
    """Return the float32 attention weights over the visible keys; a query that sees nothing gets all zeros.

    Memory is one float32 (and its softmax) per query head, query and key: callers cut long queries into blocks.
    """
    batch, kv_heads, tokens, _ = keys.shape
    num_queries = queries.shape[2]
    folded = (queries.float() * scaling).reshape(batch, kv_heads, -1, queries.shape[3])  # [B, H, G * T, D]
    logits = folded @ keys.float().transpose(-1, -2)
    logits = capped(logits.view(batch, kv_heads, -1, num_queries, tokens), softcap)
    hidden = ~visible[:, None, None]
    logits = logits.masked_fill_(hidden, -torch.inf)
    if sinks is not None:
        own = sinks.float().view(kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, own], dim=-1)
    return logits.softmax(-1)[..., :tokens].masked_fill_(hidden, 0.0)


def weighting(seen: Chunk | Observation) -> dict[str, Any]:
    """How a layer makes weights of logits, for `attention`."""
    return {"scaling": seen.scaling, "softcap": seen.softcap, "sinks": seen.sinks}


def window_attention(observation: Observation) -> Float[Tensor, "batch kv_heads group window tokens"]:
    """Return the weights of the last queries of the context, those in `observation.queries`."""
    num_queries = observation.queries.shape[2]
    offset = observation.keys.shape[2] - num_queries
    visible = causal_mask(observation.valid, offset=offset, num_queries=num_queries, until=observation.until)
    return attention(observation.queries, observation.keys, visible, **weighting(observation))
