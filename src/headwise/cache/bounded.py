"""A layer that evicts while the context is read (reading="evict"): what its heads kept, and the newest piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from headwise.cache.layer import FillingLayer, FrozenLayer
from headwise.cache.masks import tail_mask
from headwise.cache.states import no_autocast, own
from headwise.kernels.quantised import Bits
from headwise.kernels.segments import Segments, quantise
from headwise.models.interface import Call


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What one head of one row holds, in the order of the tokens. What is known of it is where the plan is."""

    keys: Float[Tensor, "held head_dim"]
    values: Float[Tensor, "held head_dim"]
    tokens: Int[Tensor, " held"]  # their places in the row, padding counted
    scores: Float[Tensor, " held"]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


class BoundedLayer(FillingLayer):
    """What is kept of everything seen, head by head, and all of the newest piece.

    Attention of a piece is SDPA over both, one KV head at a time: every head holds another number of entries.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.heads: list[Held] = []  # of the first row, then of the next ones; none before the first piece has passed

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return super().nbytes + sum(head.nbytes for head in self.heads)

    @property
    def index_nbytes(self) -> int:
        """Bytes of places and scores."""
        return sum(head.tokens.nbytes + head.scores.nbytes for head in self.heads)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers the newest piece only: what was kept before it is visible to all of it."""
        super().get_mask_sizes(query_length)  # refuses a piece of no tokens
        return query_length, self.seen

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Hold a new piece."""
        self.held = [own(key_states), own(value_states)]
        self.seen += key_states.shape[-2]
        self._report()
        return self.states

    @torch.no_grad()
    def attention(self, call: Call) -> Tensor:
        """The model's own attention for the first piece, then ours; then this layer is told what has passed."""
        out = self._attend(call.query, call.mask, call.scaling) if self.heads else call.exact()
        self.observe(call)
        return out

    def _attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention [B, T, Hq, D] of a piece over what is held and the piece itself."""
        (keys, values), out = self.states, torch.empty_like(query)
        heads, group = keys.shape[1], query.shape[1] // keys.shape[1]
        visible = _visible(mask, query)
        with no_autocast(query):
            for at, held in enumerate(self.heads):
                row, head = divmod(at, heads)
                queries = slice(head * group, (head + 1) * group)
                pairs = (held.keys, keys[row, head]), (held.values, values[row, head])
                out[row, queries] = functional.scaled_dot_product_attention(
                    query[row : row + 1, queries].to(self.dtype),
                    *(torch.cat(pair).expand(1, group, -1, -1) for pair in pairs),
                    attn_mask=functional.pad(visible[row], (len(held.keys), 0), value=True),
                    scale=scaling,
                )[0]
        return out.transpose(1, 2).contiguous()

    def candidates(self, at: int, fresh: Int[Tensor, " new"]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values [K, D] and places [K] of what head `at` holds and of the tokens `fresh` of the newest piece."""
        (keys, values), places = self.states, self.places(at, fresh)
        row, head = divmod(at, keys.shape[1])
        new = fresh.to(keys.device)
        keys, values = keys[row, head, new], values[row, head, new]
        if not self.heads:
            return keys, values, places
        held = self.heads[at]
        return torch.cat([held.keys, keys]), torch.cat([held.values, values]), places

    def places(self, at: int, fresh: Int[Tensor, " new"]) -> Int[Tensor, " candidates"]:
        """Places in the row of what head `at` holds and of the tokens `fresh` of the newest piece."""
        new = fresh + (self.seen - self.states[0].shape[2])
        return torch.cat([self.heads[at].tokens, new]) if self.heads else new

    def evict(
        self,
        kept: Sequence[Bool[Tensor, " _"]],
        scores: Sequence[Float[Tensor, " _"]],
        fresh: Sequence[Int[Tensor, " _"]],
    ) -> None:
        """Hold the kept candidates of every head, and let go of the piece; `fresh` are its tokens in every row."""
        keys, num_heads = self.states[0], self.states[0].shape[1]
        if not self.heads:
            nothing, places = keys.new_empty(0, keys.shape[3]), fresh[0][:0]
            empty = Held(keys=nothing, values=nothing, tokens=places, scores=scores[0][:0])
            self.heads = [empty] * len(kept)
        for at, (head_kept, head_scores) in enumerate(zip(kept, scores, strict=True)):
            held, (row, head), tokens = self.heads[at], divmod(at, num_heads), self.places(at, fresh[at // num_heads])
            old, new = head_kept.tensor_split([len(held.tokens)])
            parts = zip((held.keys, held.values), self.states, strict=True)
            keys, values = (_chosen(past, old, piece[row, head], fresh[row][new]) for past, piece in parts)
            self._report(keys, values)
            self.heads[at] = Held(keys=keys, values=values, tokens=tokens[head_kept], scores=head_scores[head_kept])
        self.held = []
        self._report()

    def freeze(
        self,
        positions: Int[Tensor, "batch tokens"],
        quantised: Sequence[tuple[Bits, Bool[Tensor, "batch kv_heads tokens"]]] = (),
    ) -> FrozenLayer:
        """Freeze what is held, some of it in fewer bits, of one kind at most."""
        self.meter.start_cutting()
        heads, num_heads = self.heads, len(self.heads) // len(positions)
        tokens, rows = [head.tokens for head in heads], [at // num_heads for at in range(len(heads))]
        keys, values = [head.keys for head in heads], [head.values for head in heads]
        del heads
        self.release()  # so that keys go before values are copied
        flat_keys = self._flat(keys, values)
        keys.clear()
        flat_values = self._flat(values, [flat_keys])
        values.clear()
        places = torch.cat([positions[row, own] for row, own in zip(rows, tokens, strict=True)])
        segments = Segments(
            keys=flat_keys,
            values=flat_values,
            positions=places.to(flat_keys.device, torch.int32),
            lengths=tuple(map(len, tokens)),
            kv_heads=num_heads,
        )
        for bits, chosen in quantised:
            few = torch.cat([chosen[row, at % num_heads, tokens[at]] for at, row in enumerate(rows)])
            native, segments = segments, quantise(segments, few.to(flat_keys.device), bits)
            self.meter.report(self.model_index, native.nbytes + segments.nbytes)
        return self.frozen_as(segments)

    def release(self) -> None:
        """Let go of all keys and values."""
        super().release()
        self.heads = []

    def _flat(self, parts: list[Tensor], others: list[Tensor]) -> Float[Tensor, "rows head_dim"]:
        """All heads' keys, or values, in one tensor; `others` are held meanwhile."""
        flat = torch.cat(parts)
        self._report(flat, *parts, *others)
        return flat


def _chosen(
    past: Float[Tensor, "held head_dim"],
    old: Bool[Tensor, " held"],
    piece: Float[Tensor, "tokens head_dim"],
    new: Int[Tensor, " new"],
) -> Float[Tensor, "kept head_dim"]:
    """Some entries of the past and some of the piece, copied once."""
    old_rows, new = old.nonzero()[:, 0].to(past.device), new.to(past.device)
    chosen = past.new_empty(len(old_rows) + len(new), past.shape[1])
    torch.index_select(past, 0, old_rows, out=chosen[: len(old_rows)])
    torch.index_select(piece, 0, new, out=chosen[len(old_rows) :])
    return chosen


def _visible(mask: Tensor | None, query: Tensor) -> Bool[Tensor, "batch queries queries"]:
    """Which tokens of its own piece a query sees. Padding may see anything, for a softmax over nothing is NaN."""
    batch, _, size, _ = query.shape
    if mask is None:
        return torch.ones(size, size, dtype=torch.bool, device=query.device).tril().expand(batch, -1, -1)
    visible = tail_mask(mask, batch, size, size)
    return visible | ~visible.any(-1, keepdim=True)
