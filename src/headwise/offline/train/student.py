"""The student: the model itself on a full context, of which every head sees only the entries that it keeps.

The student that keeps everything is the teacher. The context's keys and values are constants. The only gradient is that
of the choice what to keep, and a derivative would say little there: an entry that holds all of a head's attention has a
derivative of nearly zero, and so has every entry where the answer is right. So `Kept` gets the whole effect of the
other choice instead. With Z the sum of exponentials that a query sees, l the entry's logit, and o the output,

    keeping an evicted entry   o <- o + exp(l) / (Z + exp(l)) (v - o)
    evicting a kept entry      o <- o - exp(l) / (Z - exp(l)) (v - o)

and a loss follows as the gradient of the output times this change, plus a term of second order (see values.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from headwise.cache.cache import RaggedCache
from headwise.cache.whole import states_of
from headwise.kernels.partial import capped
from headwise.models.families import given
from headwise.models.interface import Call, tag

_LARGEST = 30.0  # of a logarithm before it is raised
_MIN_REMAINING = 1e-3  # of the attention: what is left when an entry is evicted that has all of it


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRecord:
    """Inputs and output of one layer's attention after the context; float32."""

    query: Float[Tensor, "questions kv_heads group new head_dim"]  # scaled
    keys: Float[Tensor, "questions kv_heads new head_dim"]
    values: Float[Tensor, "questions kv_heads new head_dim"]
    out: Float[Tensor, "questions kv_heads group new head_dim"]
    softcap: float | None
    sinks: Float[Tensor, " query_heads"] | None


@dataclass(kw_only=True)
class Kept:
    """What every head keeps of a context. The gradient of `mask` is the effect of the choices.

    It is the rise of the loss if the entry is kept rather than evicted, in first order. With `squared()` it is the
    square of that, question by question.
    """

    mask: Float[Tensor, "layers kv_heads context"]
    square: bool = False

    @classmethod
    def of(cls, choice: Bool[Tensor, "layers kv_heads context"]) -> "Kept":
        """Return a choice whose effects are the gradient of its mask."""
        return cls(mask=choice.float().requires_grad_())

    @contextmanager
    def squared(self) -> Iterator[None]:
        """Make gradients squared effects while this context lasts."""
        self.square = True
        try:
            yield
        finally:
            self.square = False


class StudentLayer(CacheLayerMixin):
    """A cache layer: a constant context of which some is kept, then the new tokens, through which gradients flow."""

    is_sliding = False
    is_compileable = False
    frozen = True

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        kept: Kept | None,
        records: list[AttentionRecord] | None,
        layer: int,
        num_context: int,
    ):
        super().__init__()
        self.context_keys, self.context_values, self.kept, self.records = keys, values, kept, records
        self.layer, self.num_context = layer, num_context
        self.own = keys.new_empty(0), values.new_empty(0)  # of the new tokens, once they have come
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens, all at once."""
        self.own = key_states, value_states
        return tag(key_states, self), value_states

    def get_seq_length(self) -> int:
        return self.num_context

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.num_context

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def attention(self, call: Call) -> Tensor:
        """Return the output of `attend`, as the model expects it."""
        return self.attend(call).transpose(1, 2).contiguous()

    def attend(self, call: Call) -> Tensor:
        """Return the attention output [B, Hq, T, D] over kept and new tokens; recomputed in the backward pass."""
        (batch, _, new, dim), dtype = call.query.shape, call.query.dtype
        heads = len(self.context_keys)
        mask = (
            self.context_keys.new_ones(self.context_keys.shape[:2]) if self.kept is None else self.kept.mask[self.layer]
        )
        query = call.query.float().reshape(batch, heads, -1, new, dim) * call.scaling
        own, special = (self.own[0].float(), self.own[1].float()), {"softcap": call.softcap, "sinks": call.sinks}
        out = kept_attention(query, (self.context_keys, self.context_values), own, mask, self.kept, **special)
        if self.records is not None:
            self.records.append(AttentionRecord(query=query, keys=own[0], values=own[1], out=out, **special))
        return out.reshape(batch, -1, new, dim).to(dtype)


def kept_attention(
    query: Float[Tensor, "questions kv_heads group new head_dim"],
    context: tuple[Float[Tensor, "kv_heads context head_dim"], Float[Tensor, "kv_heads context head_dim"]],
    own: tuple[Float[Tensor, "questions kv_heads new head_dim"], Float[Tensor, "questions kv_heads new head_dim"]],
    mask: Float[Tensor, "kv_heads context"],
    kept: Kept | None,
    *,
    softcap: float | None = None,
    sinks: Float[Tensor, " query_heads"] | None = None,
) -> Float[Tensor, "questions kv_heads group new head_dim"]:
    """Return softmax attention over kept context and new tokens. The mask's "gradient" is an effect, see `Kept`.

    A soft cap and sinks are what kernels know them as.
    """
    states = (*(state.float() for state in context), *own)
    own_logits = None if sinks is None else sinks.detach().float().view(len(mask), -1, 1, 1)
    out: Tensor = _KeptAttention.apply(  # pyright: ignore[reportAssignmentType]
        query, *states, mask.float(), kept, softcap, own_logits
    )
    return out


class _KeptAttention(torch.autograd.Function):
    """Softmax attention over kept context and own tokens; the "gradient" of the mask is an effect, see `Kept`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "batch kv_heads group new head_dim"],
        context_keys: Float[Tensor, "kv_heads context head_dim"],
        context_values: Float[Tensor, "kv_heads context head_dim"],
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
        mask: Float[Tensor, "kv_heads context"],
        kept: Kept | None,
        softcap: float | None,
        sinks: Float[Tensor, "kv_heads group 1 1"] | None,
    ) -> Tensor:
        context, own, total = _logits(query, context_keys, keys, mask, softcap, sinks)
        context, own = context - total, own - total
        out = torch.einsum("bhgtn,hnd->bhgtd", context.exp().where(_visible(mask), 0), context_values)
        out = out + torch.einsum("bhgts,bhsd->bhgtd", own.exp(), values)
        ctx.save_for_backward(query, context_keys, context_values, keys, values, mask, out)
        ctx.kept, ctx.softcap, ctx.sinks = kept, softcap, sinks
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, context_keys, context_values, keys, values, mask, out = ctx.saved_tensors
        (gradient,) = gradients
        context, own, total = _logits(query, context_keys, keys, mask, ctx.softcap, ctx.sinks)
        bend = [_bend(logits, ctx.softcap) for logits in (context, own)]
        share, own = (context - total).clamp(max=_LARGEST).exp(), (own - total).exp()  # exp(l) / Z, also of the unseen
        mean = (gradient * out).sum(-1, keepdim=True)
        pull = torch.einsum("bhgtd,hnd->bhgtn", gradient, context_values) - mean  # gradient . (v - o)
        remaining = torch.where(_visible(mask), (1 - share).clamp(min=_MIN_REMAINING), 1 + share)
        effect = (share / remaining * pull).sum((2, 3))
        effect = (effect.square() if ctx.kept is not None and ctx.kept.square else effect).sum(0)
        if not any(ctx.needs_input_grad[:5]):
            return None, None, None, None, None, effect, None, None, None
        by_context = torch.where(_visible(mask), share * pull, 0) * bend[0]
        by_own = own * (torch.einsum("bhgtd,bhsd->bhgts", gradient, values) - mean) * bend[1]
        towards_query = torch.einsum("bhgtn,hnd->bhgtd", by_context, context_keys)
        towards_query = towards_query + torch.einsum("bhgts,bhsd->bhgtd", by_own, keys)
        towards_keys = torch.einsum("bhgts,bhgtd->bhsd", by_own, query)
        towards_values = torch.einsum("bhgts,bhgtd->bhsd", own, gradient)
        return towards_query, None, None, towards_keys, towards_values, effect, None, None, None


def _bend(capped_logits: Tensor, softcap: float | None) -> Tensor | float:
    """Return how much capped logits rise with those that were capped; 0 where they are minus infinity."""
    return 1.0 if softcap is None else 1 - (capped_logits / softcap).square().clamp(max=1)


def _visible(mask: Tensor) -> Bool[Tensor, "kv_heads 1 1 context"]:
    return mask[:, None, None] > 0


def _logits(
    query: Tensor,
    context_keys: Tensor,
    keys: Tensor,
    mask: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits at all of the context and at the new tokens, and the log-sum-exp over what is visible."""
    context = capped(torch.einsum("bhgtd,hnd->bhgtn", query, context_keys), softcap)
    later = torch.ones(keys.shape[2], keys.shape[2], dtype=torch.bool, device=keys.device).triu(1)
    own = capped(torch.einsum("bhgtd,bhsd->bhgts", query, keys), softcap).masked_fill(later, -torch.inf)
    total = torch.cat([context.where(_visible(mask), -torch.inf), own], dim=-1).logsumexp(-1, keepdim=True)
    return context, own, total if sinks is None else torch.logaddexp(total, sinks)


def student_logits(
    model: PreTrainedModel,
    whole: RaggedCache,
    ids: Int[Tensor, "rows new"],
    kept: Kept | None,
    records: list[AttentionRecord] | None = None,
) -> Float[Tensor, "rows new vocabulary"]:
    """Return logits at every one of `ids`, which follow the context and are padded on the right.

    If `kept` is None, they are the teacher's. A record of every layer's attention is appended to `records`.
    """

    def layer(index: int, keys: Tensor, values: Tensor, num_context: int) -> StudentLayer:
        return StudentLayer(keys, values, kept, records, index, num_context)

    cache = student_cache(whole, len(ids), layer)
    num_context = whole.get_seq_length()
    stop = num_context + ids.shape[1]
    positions = torch.arange(num_context, stop, device=ids.device, dtype=torch.int64).expand(len(ids), -1)
    return model(input_ids=ids, position_ids=positions, **given(model, cache)).logits


def student_cache(whole: RaggedCache, rows: int, make: Callable[[int, Tensor, Tensor, int], StudentLayer]) -> Cache:
    """Return `whole.fork(rows)` with layers of `make`; sliding-window layers are transformers' own.

    `make` is given number, keys [kv_heads, context, head_dim], values and context length.
    """
    cache = whole.fork(copies=rows)
    ragged = iter(range(len(whole.ragged_layers)))
    num_context, compressible = whole.get_seq_length(), set(map(id, cache.ragged_layers))
    layers: list[Any] = []
    for layer in cache.layers:
        if id(layer) not in compressible:
            layers.append(layer)
            continue
        index = next(ragged)
        layers.append(make(index, *states_of(whole, index), num_context))
    return Cache(layers=layers)
