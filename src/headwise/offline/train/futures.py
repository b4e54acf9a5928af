"""Measure how much attention every entry of a context gets from what comes after it. LKV-T learns this first.

A future is a series of tokens that the model reads after a context that it holds whole. Futures are the context once
more after an instruction (as in KVzip, arXiv 2505.23416), the text that really comes next, and questions with the
model's own answers. Repetition needs every entry; the text that follows needs recent ones. Each needs half of what the
other needs most.

An entry is worth as much as the head's output would change without it, squared and summed over the queries of all
futures. That grows with the square of its attention: sum over queries q of A[q, j]^2. Its logarithm is one quantity for
all heads of all layers. So the scores that are learned from it compare between heads, and a contest of all heads gives
budgets that follow the document.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.kernels.partial import capped
from headwise.models.families import given
from headwise.models.interface import Call
from headwise.offline.train.student import StudentLayer, student_cache

QUERIES = 128  # whose attention is made at a time


@torch.no_grad()
def attention_paid(
    model: PreTrainedModel, whole: RaggedCache, futures: Sequence[Int[Tensor, " _"]]
) -> Float[Tensor, "layers kv_heads context"]:
    """Return the squared attention that the queries of all futures pay to every entry of a full context, summed.

    It is float32, and zero if there is no future. Query heads of a group are averaged. Each future follows the context
    by itself.
    """
    shape, num_context = whole.view.shape, whole.get_seq_length()
    size = len(shape.layers), shape.kv_heads, num_context
    paid = torch.zeros(size, dtype=torch.float32, device=model.device)

    def layer(index: int, keys: Tensor, values: Tensor, num_context: int) -> StudentLayer:
        return _PaidLayer(keys, values, index, num_context, paid[index])

    for tokens in futures:
        positions = torch.arange(num_context, num_context + len(tokens), device=tokens.device, dtype=torch.int64)[None]
        cache = student_cache(whole, 1, layer)
        model(input_ids=tokens[None], position_ids=positions, **given(model, cache), logits_to_keep=1)
    return paid


class _PaidLayer(StudentLayer):
    """A layer that sums in `paid` [kv_heads, context] the attention that its entries get; one future at a time."""

    def __init__(self, keys: Tensor, values: Tensor, layer: int, num_context: int, paid: Tensor):
        super().__init__(keys, values, None, None, layer, num_context)
        self.paid = paid

    def attend(self, call: Call) -> Tensor:
        """Return the attention output [1, Hq, T, D] over context and new tokens, some queries at a time."""
        (_, _, new, dim), heads = call.query.shape, len(self.context_keys)
        keys = torch.cat([self.context_keys, self.own[0][0]], dim=1).float()
        values = torch.cat([self.context_values, self.own[1][0]], dim=1).float()
        grouped = (call.query[0].float() * call.scaling).unflatten(0, (heads, -1))  # [H, G, T, D]
        parts = [
            self._attend_some(grouped[:, :, start : start + QUERIES], keys, values, start, call)
            for start in range(0, new, QUERIES)
        ]
        return torch.cat(parts, dim=2).reshape(1, -1, new, dim).to(call.query.dtype)

    def _attend_some(self, query: Tensor, keys: Tensor, values: Tensor, start: int, call: Call) -> Tensor:
        heads, group, count, dim = query.shape
        stop = self.num_context + start + count
        logits = capped(query.flatten(1, 2) @ keys[:, :stop].transpose(-1, -2), call.softcap)  # [H, G * T, seen]
        later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1).repeat(group, 1)
        logits[..., stop - count :].masked_fill_(later, -torch.inf)
        if call.sinks is not None:
            sinks = call.sinks.float().view(heads, group, 1).expand(-1, -1, count).reshape(heads, -1, 1)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = logits.softmax(-1)[..., :stop]
        to_context = weights[..., : self.num_context]
        self.paid += torch.einsum("hqn,hqn->hn", to_context, to_context) / group
        return (weights @ values[:, :stop]).view(heads, group, count, dim)
