"""One compressible layer of a RaggedCache, in its two states.

FillingLayer   while the context is read: keys and values [B, H, N, D] of everything seen; attention is the model's own
FrozenLayer    after the cut: the kept entries (`segments`, shared by forks) and a tail [B, H, capacity, D] of the
               tokens that came after; attention is ours

`FillingLayer.cut` makes the one of the other, and the cache puts it in its place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from headwise.cache.kept import KeptLayer
from headwise.cache.listener import Listener
from headwise.cache.masks import tail_mask
from headwise.cache.meter import Meter
from headwise.cache.states import States, no_autocast, own, require_negative
from headwise.errors import BadInput, ShapeMismatch, UnsupportedGeneration, UnsupportedModel
from headwise.kernels import Kernel
from headwise.kernels import segments as layout
from headwise.kernels.quantised import Bits
from headwise.kernels.segments import Segments
from headwise.models.interface import Call, tag

TAIL_STEP = 64  # tokens; the tail then grows by half


class RaggedLayer(CacheLayerMixin, ABC):
    """What both states have in common: being given tokens, whose attention must then be asked for."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False
    frozen: bool
    tail_length: int  # tokens that came after the context

    def __init__(self, *, index: int, model_index: int, kernel: Kernel, meter: Meter):
        super().__init__()
        self.index = index  # among the compressible layers
        self.model_index = model_index
        self.kernel = kernel
        self.meter = meter
        self.listeners: tuple[Listener, ...] = ()
        self.seen = 0  # tokens, kept or not
        self.unattended = False  # whether tokens were taken whose attention has not been asked for

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values held."""

    @property
    @abstractmethod
    def index_nbytes(self) -> int:
        """Bytes of what describes what is held."""

    @abstractmethod
    def attention(self, call: Call) -> Tensor:
        """As `headwise.models.interface.AttentionLayer` has it."""

    @abstractmethod
    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens. Returns what the model's own attention needs (once frozen it is not asked)."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = value_states.dtype, key_states.device  # under autocast, keys come in float32
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens' keys and values [B, H, T, D]; return what attention needs, tagged with this layer."""
        if self.unattended:  # attention that does not come to us ignores what is frozen, and never cuts what is filling
            raise UnsupportedModel(
                "this cache was given tokens by a model whose attention does not go through headwise: another one than "
                "it was made for, or loaded anew. Make the cache with that model, or call headwise.enable(model) first."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Detached, or a caller who has gradients on would have the tail keep every step's graph alive.
        states = self.take(key_states.detach().to(self.dtype), value_states.detach().to(self.dtype))
        self.unattended = True
        return tag(states[0], self), states[1]

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Once frozen the mask covers the tail only: every kept entry is visible to every later token."""
        if query_length == 0:
            raise BadInput(
                f"there are no new tokens for this cache, which has seen {self.seen}: give generate() the ids of "
                "everything seen followed by the new ones, as for any cache of transformers."
            )
        past = self.tail_length if self.frozen else self.seen
        return past + query_length, self.seen - past

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def require_undoable(self, stood: int) -> None:
        """Nothing: what a pass has added lies in the tail."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; give minus their number. Raises what `require_croppable` does."""
        self.require_croppable(tokens_to_remove)
        self.tail_length += tokens_to_remove
        self.seen += tokens_to_remove

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Raise UnsupportedGeneration if to forget these tokens would reach into the context."""
        require_negative(tokens_to_remove)
        if -tokens_to_remove > self.tail_length:
            raise UnsupportedGeneration(
                f"cannot remove the last {-tokens_to_remove} tokens: only the {self.tail_length} that came after the "
                "compressed context can be taken back. Keep the cache you forked from instead."
            )

    def reset(self) -> None:
        raise UnsupportedGeneration("a RaggedCache cannot be reset: make a new one, or fork() before use.")

    def offload(self) -> None:
        raise UnsupportedGeneration("a RaggedCache cannot be offloaded: save() it instead.")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """As its cache, and for the same reason."""
        raise UnsupportedGeneration("a layer of a RaggedCache cannot be pickled: save() the cache.")

    def _report(self, *fresh: Tensor) -> None:
        """Tell the meter what is held, besides `fresh` states that are not stored yet."""
        self.meter.report(self.model_index, self.nbytes + sum(t.untyped_storage().nbytes() for t in fresh))


@runtime_checkable
class Observer(Protocol):
    """Told about every piece of prefill a layer sees."""

    def observe(self, layer: "FillingLayer", call: Call) -> None:
        """A piece of prefill has passed through `layer`, whose attention was asked for by `call`."""
        ...


class FillingLayer(RaggedLayer):
    """Everything seen, while the context is read."""

    frozen = False
    tail_length = 0

    def __init__(
        self, *, index: int, model_index: int, kernel: Kernel, meter: Meter, observer: Observer, shared: bool = False
    ):
        super().__init__(index=index, model_index=model_index, kernel=kernel, meter=meter)
        self.observer = observer
        self.shared = shared  # whether other layers of the model read what it returns, which stays until they have
        self.replaying = False  # whether tokens are looked at, and not stored
        self.held: list[Tensor] = []  # keys and values, once there are any

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, D] of everything seen."""
        keys, values = self.held
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(t.untyped_storage().nbytes() for t in self.held)

    @property
    def index_nbytes(self) -> int:
        """Nothing describes what is held whole."""
        return 0

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Join new tokens to those held; a replay's are shown to attention and forgotten."""
        if self.replaying:
            keys, values = (torch.cat(pair, dim=-2) for pair in zip(self.held, (key_states, value_states), strict=True))
            self._report(keys, values)
            return keys, values
        for at, new in enumerate((key_states, value_states)):
            joined = torch.cat([self.held[at], new], dim=-2) if len(self.held) > at else own(new)
            self._report(joined)  # until the past is let go of, both are held
            self.held[at : at + 1] = [joined]
        self.seen += key_states.shape[-2]
        self._report()
        return self.states

    @torch.no_grad()
    def attention(self, call: Call) -> Tensor:
        """The model's own attention; then this layer is told what has passed.

        What another layer, which shares this cache, asks of it later is no more than that layer's own attention.
        """
        out = call.exact()
        if self.unattended:
            self.observe(call)
        return out

    def observe(self, call: Call) -> None:
        """A piece of prefill has passed; when it was the last, the observer cuts this layer."""
        self.unattended = False
        with no_autocast(call.query):
            self.observer.observe(self, replace(call, query=call.query.to(self.dtype), key=call.key.detach()))
        if self.replaying:
            self._report()

    def picked(self, pick: Callable[[Tensor], Tensor]) -> NoReturn:
        raise UnsupportedGeneration("rows of a cache can be chosen only when its context has been compressed.")

    def cut(
        self,
        kept: Bool[Tensor, "batch kv_heads tokens"],
        positions: Int[Tensor, "batch tokens"],
        quantised: Sequence[tuple[Bits, Bool[Tensor, "batch kv_heads tokens"]]] = (),
    ) -> "FrozenLayer":
        """Copy the kept entries out, some of them in fewer bits, and let go of everything else."""
        keys, values = self.states
        self.meter.start_cutting()
        return self.frozen_as(layout.gather(keys, values, kept, positions, quantised))

    def frozen_as(self, segments: Segments) -> "FrozenLayer":
        """Let go of what is held: these entries are what is kept of it."""
        frozen = FrozenLayer(
            index=self.index,
            model_index=self.model_index,
            kernel=self.kernel,
            meter=self.meter,
            segments=segments,
            rows=torch.arange(segments.batch, device=segments.keys.device, dtype=torch.int64),
            seen=self.seen,
        )
        frozen.listeners = self.listeners
        self.meter.report(self.model_index, self.nbytes + frozen.nbytes)
        self.release()
        if not self.shared:
            frozen._report()
        return frozen

    def rest(self) -> None:
        """Its turn is over. Nothing follows from that where all layers stay in memory."""

    def release(self) -> None:
        """Let go of all keys and values."""
        self.held = []


class FrozenLayer(RaggedLayer):
    """What was kept of the context, and the tokens that came after it."""

    frozen = True

    def __init__(
        self,
        *,
        index: int,
        model_index: int,
        kernel: Kernel,
        meter: Meter,
        segments: Segments,
        rows: Int[Tensor, " batch"],
        seen: int,
        tail: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__(index=index, model_index=model_index, kernel=kernel, meter=meter)
        self.segments = segments
        self.rows = rows  # the frozen context that every row of the batch continues
        self.seen = seen
        empty = segments.keys.new_empty(len(rows), segments.kv_heads, 0, segments.keys.shape[-1])
        self.tail_keys, self.tail_values = tail or (empty, empty)
        self.tail_length = self.tail_keys.shape[2]
        self.lazy_initialization(segments.keys, segments.values)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held, tail capacity included."""
        tail = sum(t.untyped_storage().nbytes() for t in (self.tail_keys, self.tail_values))
        return self.segments.nbytes + tail

    @property
    def index_nbytes(self) -> int:
        """Bytes of what describes the frozen part."""
        return self.segments.index_nbytes + self.rows.nbytes

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] of what came after the context, views."""
        return self.tail_keys[:, :, : self.tail_length], self.tail_values[:, :, : self.tail_length]

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens to the tail."""
        if key_states.shape[0] != len(self.rows):
            raise ShapeMismatch(
                f"this cache holds {len(self.rows)} rows but the batch has {key_states.shape[0]}. For several "
                "continuations of one context (beams, sampled sequences, questions) use cache.fork(copies)."
            )
        stop = self.tail_length + key_states.shape[-2]
        if stop > self.tail_keys.shape[2]:
            capacity = -(-max(stop, self.tail_length * 3 // 2) // TAIL_STEP) * TAIL_STEP
            longer_keys = self._enlarged(self.tail_keys, capacity)
            longer_values = self._enlarged(self.tail_values, capacity, longer_keys)
            self.tail_keys, self.tail_values = longer_keys, longer_values  # both, or none if memory runs out
            self._report()
        self.tail_keys[:, :, self.tail_length : stop] = key_states
        self.tail_values[:, :, self.tail_length : stop] = value_states
        self.tail_length = stop
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def attention(self, call: Call) -> Tensor:
        """Ours, over what is kept and the tail."""
        options = {"softcap": call.softcap, "sinks": call.sinks}
        given = {name: value for name, value in options.items() if value is not None}
        return self.attend(call.query, call.mask, call.scaling, **given).transpose(1, 2).contiguous()

    @torch.no_grad()
    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, **options: Any) -> Tensor:
        """Attention [B, Hq, T, D] of new tokens over the kept entries and the tail; `options` as a kernel has them."""
        self.unattended = False
        batch, query_heads, num_queries, dim = query.shape
        heads = self.segments.kv_heads
        with no_autocast(query):
            grouped = query.to(self.dtype).reshape(batch, heads, query_heads // heads, num_queries, dim)
            visible = self._tail_mask(mask, num_queries)
            for listener in self.listeners:
                listener.attends(self.index, grouped, *self.tail, visible, scaling, **options)
            out = self.kernel(grouped, self.segments, self.rows, *self.tail, visible, scaling, **options)
        return out.reshape(batch, query_heads, num_queries, dim).to(query.dtype)

    def picked(self, pick: Callable[[Tensor], Tensor]) -> States:
        """Other rows of the batch, for `put`. Frozen contexts are shared, not copied."""
        return pick(self.rows), pick(self.tail_keys), pick(self.tail_values)

    def put(self, states: States) -> None:
        """Go on with these rows."""
        self.rows, self.tail_keys, self.tail_values = states

    def undo(self, stood: int) -> None:
        """Forget what came after the first `stood` tokens."""
        self.tail_length -= self.seen - stood
        self.seen, self.unattended = stood, False

    def value(self) -> KeptLayer:
        """What it holds; the tail is copied, because it grows."""
        keys, values = self.tail
        return KeptLayer(segments=self.segments, rows=self.rows, tail_keys=keys.clone(), tail_values=values.clone())

    def fork(self, meter: Meter) -> "FrozenLayer":
        """A layer that shares the frozen part and has its own tail."""
        twin = FrozenLayer(
            index=self.index,
            model_index=self.model_index,
            kernel=self.kernel,
            meter=meter,
            segments=self.segments,
            rows=self.rows,
            seen=self.seen,
            tail=(self.tail_keys.clone(), self.tail_values.clone()),
        )
        twin.tail_length = self.tail_length
        return twin

    def joined(self, others: Sequence["FrozenLayer"], meter: Meter) -> "FrozenLayer":
        """A layer whose batch is the rows of this one, then those of the others; none may have a tail."""
        rows, contexts = [], 0
        for part in (self, *others):
            rows.append(part.rows + contexts)
            contexts += part.segments.batch
        whole = FrozenLayer(
            index=self.index,
            model_index=self.model_index,
            kernel=self.kernel,
            meter=meter,
            segments=layout.join([part.segments for part in (self, *others)]),
            rows=torch.cat(rows),
            seen=self.seen,
        )
        whole._report()
        return whole

    def _tail_mask(self, mask: Tensor | None, num_queries: int) -> Tensor | None:
        """[B, T, tail], or None when all of the tail is visible to all queries."""
        if mask is not None:
            return tail_mask(mask, len(self.rows), num_queries, self.tail_length)
        if num_queries == 1:
            return None
        square = torch.ones(num_queries, self.tail_length, dtype=torch.bool, device=self.rows.device)
        return square.tril(self.tail_length - num_queries).expand(len(self.rows), -1, -1)

    def _enlarged(self, old: Tensor, capacity: int, *fresh: Tensor) -> Tensor:
        with torch.inference_mode(False):  # else it could be written to under inference_mode only
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[-1])
        new[:, :, : self.tail_length] = old[:, :, : self.tail_length]
        self._report(new, *fresh)
        return new
