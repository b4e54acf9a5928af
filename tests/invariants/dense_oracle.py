"""Dense attention masked to the entries a cache has kept: what decoding over a ragged cache must equal.

One forward pass over context and everything after it, without a cache, by PyTorch's own attention. Tokens of the
context see all that precedes them (prefill is exact); later tokens see, per layer and KV head, only the kept context.
Nothing of headwise takes part but the record of what was kept: `RaggedCache.positions`.
"""

import sys
from functools import cache

import torch
from families import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "masked_dense"


def attention(module, query, key, value, attention_mask, scaling, kept, **kwargs):
    """Registered with transformers; `kept` comes through the model's keyword arguments: {layer: [B, H, N]}."""
    group = query.shape[1] // key.shape[1]
    tokens = query.shape[2]
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril() if attention_mask is None else attention_mask
    visible = visible.expand(query.shape[0], query.shape[1], tokens, tokens).clone()
    if module.layer_idx in kept:
        chosen = kept[module.layer_idx]
        context = chosen.shape[2]
        visible[:, :, context:, :context] &= chosen.repeat_interleave(group, dim=1)[:, :, None]
    visible |= ~visible.any(-1, keepdim=True)  # padding sees nothing, and nobody sees padding: any finite value will do
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:  # as the model's own file does it
        hidden = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, torch.finfo(query.dtype).min)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, hidden, scaling=scaling, **kwargs)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(group, dim=1),
        value.repeat_interleave(group, dim=1),
        attn_mask=visible,
        scale=scaling,
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@cache
def model_of(family, dtype=torch.float32):
    """The tiny model that headwise works on."""
    return tiny_model(family, dtype)


@cache
def oracle_of(family, dtype=torch.float32, weights=torch.float32):
    """The same weights, rounded to `weights`, in a model of its own, routed to the attention above."""
    model = tiny_model(family, weights).to(dtype)
    model.set_attn_implementation(NAME)
    return model


def positions_of(mask):
    """Rotary positions: every row counts from its first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def kept_by(cache, mask):
    """{model layer: [B, H, N]}, for contexts with this attention mask (padding on the left)."""
    padding = mask.shape[1] - mask.sum(-1)
    heads, kept = cache.view.shape.kv_heads, {}
    for index, layer in enumerate(cache.view.shape.layers):
        kept[layer] = torch.zeros(len(mask), heads, mask.shape[1], dtype=torch.bool)
        for row in range(len(mask)):
            for head in range(heads):
                kept[layer][row, head, padding[row] + cache.positions(index, row, head)] = True
    return kept


@torch.no_grad()
def masked_dense(model, ids, mask, kept):
    """Logits of every token after the context, [B, T, vocabulary]."""
    context = next(iter(kept.values())).shape[2]
    out = model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False, kept=kept)
    return out.logits[:, context:]


@torch.no_grad()
def ragged(model, cache, ids, mask, pieces):
    """Logits of every token after the context, given to the cache in pieces of these sizes."""
    logits, start = [], ids.shape[1] - sum(pieces)
    for size in pieces:
        stop = start + size
        positions = positions_of(mask)[:, start:stop]
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, dim=1)


def distance(found, exact, mask=None):
    """Norm of the difference relative to the norm of the exact; padding (mask 0) left out."""
    difference, exact = found.double() - exact.double(), exact.double()
    if mask is not None:
        difference, exact = difference[mask.bool()], exact[mask.bool()]
    return (difference.norm() / exact.norm()).item()
