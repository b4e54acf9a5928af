"""The student: the model itself on a wholly kept context whose entries are weighted, differentiably.

An entry with share m in [0, 1] counts m times in the softmax, for the tokens after the context only. m = 1 everywhere
is the teacher, m = 0 an evicted entry. The context's keys and values are constants; gradients reach the shares and
nothing else that is trained.

Where shares are a hard choice the gradient of an evicted entry's share is that of a finite step, the whole effect of
keeping it: exp(l) / (Z + exp(l)) (v - o). The plain derivative, exp(l) / Z (v - o), may be a million times that in a
sharp head. Soft shares and kept entries have the plain derivative.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from headwise.hf.attention import tag
from headwise.hf.families import given
from headwise.oracle import states_of
from headwise.ragged.cache import RaggedCache


class _WeightedLayer(CacheLayerMixin):
    """One layer: a constant context with weights, then the new tokens, whose graph is kept."""

    is_sliding = False
    is_compileable = False
    frozen = True

    def __init__(self, keys: Tensor, values: Tensor, shares: Tensor | None, seen: int):
        super().__init__()
        self.context_keys, self.context_values, self.shares, self.seen = keys, values, shares, seen
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens, all at once."""
        self.keys, self.values = key_states, value_states
        return tag(key_states, self), value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def observe(self, query: Tensor, mask: Tensor | None, scaling: float, position_ids: Tensor | None) -> None:
        raise AssertionError("a student's context has been read")

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention [B, Hq, T, D] over weighted context and new tokens; recomputed in the backward pass."""
        assert self.keys is not None and self.values is not None
        batch, _, new, dim = query.shape
        heads = len(self.context_keys)
        shares = query.new_ones(self.context_keys.shape[:2]) if self.shares is None else self.shares
        out: Tensor = _WeightedAttention.apply(  # pyright: ignore[reportAssignmentType]
            query.float().reshape(batch, heads, -1, new, dim) * scaling,
            self.context_keys.float(),
            self.context_values.float(),
            self.keys.float(),
            self.values.float(),
            shares.float(),
        )
        return out.reshape(batch, -1, new, dim).to(query.dtype)


class _WeightedAttention(torch.autograd.Function):
    """softmax over [m exp(context logits), exp(own logits)]; see the module's docstring for the gradient of m."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "batch kv_heads group new head_dim"],
        context_keys: Float[Tensor, "kv_heads context head_dim"],
        context_values: Float[Tensor, "kv_heads context head_dim"],
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
        shares: Float[Tensor, "kv_heads context"],
    ) -> Tensor:
        context, own, whole = _logits(query, context_keys, keys, shares)
        weighted = context + shares.log()[:, None, None]  # not exp() times 0: the exp may be infinite
        out = torch.einsum("bhgtn,hnd->bhgtd", (weighted - whole).exp(), context_values)
        out = out + torch.einsum("bhgts,bhsd->bhgtd", (own - whole).exp(), values)
        ctx.save_for_backward(query, context_keys, context_values, keys, values, shares, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, context_keys, context_values, keys, values, shares, out = ctx.saved_tensors
        (gradient,) = gradients
        context, own, whole = _logits(query, context_keys, keys, shares)
        mean = (gradient * out).sum(-1, keepdim=True)
        pull = torch.einsum("bhgtd,hnd->bhgtn", gradient, context_values) - mean  # G (v - o)
        m = shares[:, None, None]
        towards_shares = (pull / ((whole - context).exp() + (m == 0))).sum((0, 2, 3))
        by_context = (context + m.log() - whole).exp() * pull
        weights = (own - whole).exp()
        by_own = weights * (torch.einsum("bhgtd,bhsd->bhgts", gradient, values) - mean)
        towards_query = torch.einsum("bhgtn,hnd->bhgtd", by_context, context_keys)
        towards_query = towards_query + torch.einsum("bhgts,bhsd->bhgtd", by_own, keys)
        towards_keys = torch.einsum("bhgts,bhgtd->bhsd", by_own, query)
        towards_values = torch.einsum("bhgts,bhgtd->bhsd", weights, gradient)
        return towards_query, None, None, towards_keys, towards_values, towards_shares


def _logits(query: Tensor, context_keys: Tensor, keys: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the context and at the new tokens, and the logarithm of the sum, in which shares count."""
    context = torch.einsum("bhgtd,hnd->bhgtn", query, context_keys)
    later = torch.ones(keys.shape[2], keys.shape[2], dtype=torch.bool, device=keys.device).triu(1)
    own = torch.einsum("bhgtd,bhsd->bhgts", query, keys).masked_fill(later, -torch.inf)
    weighted = context + shares.log()[:, None, None]
    return context, own, torch.cat([weighted, own], dim=-1).logsumexp(-1, keepdim=True)


def student_logits(
    model: PreTrainedModel,
    whole: RaggedCache,
    ids: Int[Tensor, "rows new"],
    shares: Float[Tensor, "layers kv_heads context"] | None,
) -> Float[Tensor, "rows new vocabulary"]:
    """Logits at every one of `ids` [rows, new] that follow the context, padded on the right; None: the teacher's."""
    cache = _student_cache(whole, len(ids), shares)
    seen = whole.get_seq_length()
    positions = torch.arange(seen, seen + ids.shape[1], device=ids.device).expand(len(ids), -1)
    return model(input_ids=ids, position_ids=positions, **given(model, cache)).logits


def _student_cache(whole: RaggedCache, rows: int, shares: Tensor | None) -> Cache:
    """As `whole.fork(rows)`, but with weighted layers; sliding-window layers are transformers' own."""
    cache = whole.fork(copies=rows)
    ragged = iter(range(len(whole.ragged_layers)))
    seen, compressible = whole.get_seq_length(), set(map(id, cache.ragged_layers))
    layers: list[Any] = []
    for layer in cache.layers:
        if id(layer) not in compressible:
            layers.append(layer)
            continue
        at = next(ragged)
        keys, values = states_of(whole, at)
        layers.append(_WeightedLayer(keys, values, None if shares is None else shares[at], seen))
    return Cache(layers=layers)
