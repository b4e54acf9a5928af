"""The truth every other kernel is tested against: one head at a time, plain matrix products, at least float32."""

import torch
from torch import Tensor

from headwise.kernels.partial import capped
from headwise.kernels.segments import Segments


def attend(
    query: Tensor,
    segments: Segments,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over frozen segments and tail; see `Kernel`."""
    batch, heads, _, num_queries, _ = query.shape
    out = torch.empty_like(query)
    if mask is None:
        mask = torch.ones(batch, num_queries, tail_keys.shape[2], dtype=torch.bool, device=query.device)
    precise = torch.promote_types(query.dtype, torch.float32)
    for b in range(batch):
        for h in range(heads):
            part = segments.slice(int(rows[b]) * heads + h)
            keys, values = [segments.keys[part]], [segments.values[part]]
            for quantised in segments.quantised:
                part_keys, part_values = quantised.segment(int(rows[b]) * heads + h)
                keys.append(part_keys)
                values.append(part_values)
            keys = torch.cat([*keys, tail_keys[b, h]]).to(precise)
            values = torch.cat([*values, tail_values[b, h]]).to(precise)
            visible = torch.cat([mask.new_ones(num_queries, len(keys) - mask.shape[2]), mask[b]], dim=-1)
            logits = capped(query[b, h].to(precise) @ keys.T * scaling, softcap)  # [G, T, K]
            logits = logits.masked_fill(~visible, -torch.inf)
            if sinks is not None:
                own = sinks.to(precise).view(heads, -1)[h, :, None, None].expand(-1, num_queries, 1)
                logits = torch.cat([logits, own], dim=-1)
            weights = logits.softmax(-1)[..., : len(keys)]
            out[b, h] = (weights @ values).to(query.dtype)
    return out
