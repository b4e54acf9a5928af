"""One layer of a RaggedCache: dense while the context is read, then frozen segments plus a dense tail.

filling   keys, values [B, H, N, D] of everything seen; attention is the model's own
frozen    the kept entries (`segments`, shared by forks) and a tail [B, H, capacity, D] of the tokens that came after
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from headwise.cache.masks import tail_mask
from headwise.errors import BadInput, ShapeMismatch, UnsupportedGeneration, UnsupportedModel
from headwise.kernels import Kernel
from headwise.kernels import segments as layout
from headwise.kernels.segments import Segments
from headwise.models.attention import tag

TAIL_STEP = 64  # tokens; the tail then grows by half
States = tuple[Tensor | None, ...]


@runtime_checkable
class Observer(Protocol):
    """Told about every piece of prefill a layer sees."""

    def observe(
        self, layer: "RaggedLayer", query: Tensor, mask: Tensor | None, scaling: float, position_ids: Tensor | None
    ) -> None:
        """A piece of prefill has passed through `layer`; `mask` and `position_ids` are what its attention was given."""
        ...

    def expect(self, layer: "RaggedLayer", num_tokens: int) -> None:
        """So many new tokens are about to enter the first layer; raises if the cache cannot serve them."""
        ...


class Meter:
    """The most bytes that the layers of a cache have held at once. Layers tell it; it does not hold on to them."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.peak = 0
        self.uncut_peak = 0  # before anything was cut

    def report(self, layer: int, nbytes: int) -> None:
        """A layer (by its index in the model) now holds so many bytes."""
        self.held[layer] = nbytes
        self.peak = max(self.peak, sum(self.held.values()))

    def start_cutting(self) -> None:
        """A layer is about to be cut."""
        self.uncut_peak = self.uncut_peak or self.peak

    def fork(self) -> "Meter":
        """For a cache that goes on from here."""
        twin = Meter()
        twin.held, twin.peak, twin.uncut_peak = dict(self.held), self.peak, self.uncut_peak
        return twin


class RaggedLayer(CacheLayerMixin):
    """Storage and attention of one compressible layer. See the module's docstring for its two states."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, *, index: int, model_index: int, kernel: Kernel, observer: Observer, meter: Meter):
        super().__init__()
        self.index = index  # among the compressible layers
        self.model_index = model_index
        self.kernel = kernel
        self.observer = observer
        self.meter = meter
        self.seen = 0
        self.unattended = False  # whether tokens were taken whose attention has not been asked for
        self.untouched = False  # whether the context was cut here and nothing has come after it yet
        self.replaying = False
        self.replayed_keys: Tensor | None = None
        self.segments: Segments | None = None
        self.rows: Int[Tensor, " batch"] | None = None  # the frozen context every row of the batch continues
        self.tail_keys: Tensor | None = None
        self.tail_values: Tensor | None = None
        self.tail_length = 0

    @property
    def frozen(self) -> bool:
        """Whether the context has been cut."""
        return self.segments is not None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held, tail capacity included."""
        held = [self.keys, self.values, self.replayed_keys, self.tail_keys, self.tail_values]
        return sum(t.untyped_storage().nbytes() for t in held if t is not None) + (
            self.segments.nbytes if self.segments is not None else 0
        )

    @property
    def index_nbytes(self) -> int:
        """Bytes of what describes the frozen part."""
        return 0 if self.segments is None or self.rows is None else self.segments.index_nbytes + self.rows.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = value_states.dtype, key_states.device  # under autocast, keys come in float32
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens' keys and values [B, H, T, D]; return what attention needs, tagged with this layer."""
        self._require_service(key_states.shape[-2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Detached, or a caller who has gradients on would have the tail keep every step's graph alive.
        states = self._take(key_states.detach().to(self.dtype), value_states.detach().to(self.dtype))
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

    def picked(self, pick: Callable[[Tensor], Tensor]) -> States:
        """Other rows of the batch, for `put`. Frozen contexts are shared, not copied."""
        if self.rows is None:
            raise UnsupportedGeneration("rows of a cache can be chosen only when its context has been compressed.")
        return tuple(None if t is None else pick(t) for t in (self.rows, self.tail_keys, self.tail_values))

    def put(self, states: States) -> None:
        """Go on with these rows."""
        self.rows, self.tail_keys, self.tail_values = states

    def undo(self, stood: int) -> None:
        """Forget what came after the first `stood` tokens."""
        self.tail_length -= self.seen - stood
        self.seen, self.unattended = stood, False

    def require_undoable(self, stood: int) -> None:
        """Nothing: what a pass has added lies in the tail."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; give minus their number. Raises what `require_croppable` does."""
        self.require_croppable(tokens_to_remove)
        self.tail_length += tokens_to_remove
        self.seen += tokens_to_remove

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Raise UnsupportedGeneration if to forget these tokens would reach into the compressed context."""
        _require_negative(tokens_to_remove)
        if -tokens_to_remove > self.tail_length:
            raise UnsupportedGeneration(
                f"cannot remove the last {-tokens_to_remove} tokens: only the {self.tail_length} that came after the "
                "compressed context can be taken back. Keep the cache you forked from instead."
            )

    def reset(self) -> None:
        raise UnsupportedGeneration("a RaggedCache cannot be reset: make a new one, or fork() before use.")

    def offload(self) -> None:
        raise UnsupportedGeneration("a RaggedCache cannot be offloaded: save() it instead.")

    def observe(self, query: Tensor, mask: Tensor | None, scaling: float, position_ids: Tensor | None) -> None:
        """A piece of prefill has passed; when it was the last, the observer freezes this layer."""
        self.unattended = False
        with _no_autocast(query):
            self.observer.observe(self, query.to(self.dtype), mask, scaling, position_ids)
        if self.replayed_keys is not None:
            self.replayed_keys = None
            self._report()

    @torch.no_grad()
    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention [B, Hq, T, D] of new tokens over the kept entries and the tail."""
        self.unattended = False
        assert self.segments is not None and self.tail_keys is not None and self.tail_values is not None
        batch, query_heads, num_queries, dim = query.shape
        heads = self.segments.kv_heads
        with _no_autocast(query):
            out = self.kernel(
                query.to(self.dtype).reshape(batch, heads, query_heads // heads, num_queries, dim),
                self.segments,
                self.rows,
                self.tail_keys[:, :, : self.tail_length],
                self.tail_values[:, :, : self.tail_length],
                self._tail_mask(mask, num_queries),
                scaling,
            )
        return out.reshape(batch, query_heads, num_queries, dim).to(query.dtype)

    def freeze(self, kept: Bool[Tensor, "batch kv_heads tokens"], positions: Int[Tensor, "batch tokens"]) -> None:
        """Copy the kept entries out and let go of everything else."""
        assert self.keys is not None and self.values is not None
        self.meter.start_cutting()
        self.segments = layout.gather(self.keys, self.values, kept, positions)
        self.rows = torch.arange(kept.shape[0], device=kept.device, dtype=torch.int64)
        self._report()
        self.keys = self.values = None
        self.untouched = True
        self._report()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """As its cache, and for the same reason."""
        raise UnsupportedGeneration("a layer of a RaggedCache cannot be pickled: save() the cache.")

    def fork(self, meter: Meter) -> "RaggedLayer":
        """A layer that shares the frozen part and has its own tail."""
        twin = RaggedLayer(
            index=self.index, model_index=self.model_index, kernel=self.kernel, observer=self.observer, meter=meter
        )
        twin.dtype, twin.device, twin.is_initialized = self.dtype, self.device, True
        twin.segments, twin.rows, twin.seen = self.segments, self.rows, self.seen
        twin.tail_length = self.tail_length
        if self.tail_keys is not None and self.tail_values is not None:
            twin.tail_keys, twin.tail_values = self.tail_keys.clone(), self.tail_values.clone()
        return twin

    def joined(self, others: Sequence["RaggedLayer"], meter: Meter) -> "RaggedLayer":
        """A layer whose batch is the rows of this one, then those of the others; none may have a tail."""
        whole = self.fork(meter)
        segments, rows, contexts = [], [], 0
        for part in (self, *others):
            assert part.segments is not None and part.rows is not None
            segments.append(part.segments)
            rows.append(part.rows + contexts)
            contexts += part.segments.batch
        whole.segments, whole.rows = layout.join(segments), torch.cat(rows)
        whole._report()
        return whole

    def _report(self, *fresh: Tensor) -> None:
        """Tell the meter what is held, besides `fresh` states that are not stored yet."""
        self.meter.report(self.model_index, self.nbytes + sum(t.untyped_storage().nbytes() for t in fresh))

    def _require_service(self, num_tokens: int) -> None:
        """Attention that does not come to us ignores the frozen part, and never cuts one that is filling."""
        if self.index == 0:  # once per step will do
            self.observer.expect(self, num_tokens)
        if self.unattended:
            raise UnsupportedModel(
                "this cache was given tokens by a model whose attention does not go through headwise: another one than "
                "it was made for, or loaded anew. Make the cache with that model, or call headwise.enable(model) first."
            )

    def _take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens. Returns what the model's own attention needs (once frozen it is not asked)."""
        if self.frozen:
            self._grow_tail(key_states, value_states)
            self.untouched = False
            self.seen += key_states.shape[-2]
            return key_states, value_states
        if self.replaying:
            self.replayed_keys = self._joined(self.keys, key_states)
            return self.replayed_keys, self._joined(self.values, value_states)
        self.keys = self._joined(self.keys, key_states)
        self.values = self._joined(self.values, value_states)
        self.seen += key_states.shape[-2]
        self._report()
        return self.keys, self.values

    def _joined(self, past: Tensor | None, new: Tensor) -> Tensor:
        """Past and new states in storage of their own; until the past is let go of, both are held."""
        states = _own(new) if past is None else torch.cat([past, new], dim=-2)
        self._report(states)
        return states

    def _tail_mask(self, mask: Tensor | None, num_queries: int) -> Tensor | None:
        """[B, T, tail], or None when all of the tail is visible to all queries."""
        assert self.rows is not None
        if mask is not None:
            return tail_mask(mask, len(self.rows), num_queries, self.tail_length)
        if num_queries == 1:
            return None
        square = torch.ones(num_queries, self.tail_length, dtype=torch.bool, device=self.rows.device)
        return square.tril(self.tail_length - num_queries).expand(len(self.rows), -1, -1)

    def _grow_tail(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self.rows is not None
        if key_states.shape[0] != len(self.rows):
            raise ShapeMismatch(
                f"this cache holds {len(self.rows)} rows but the batch has {key_states.shape[0]}. For several "
                "continuations of one context (beams, sampled sequences, questions) use cache.fork(copies)."
            )
        stop = self.tail_length + key_states.shape[-2]
        if self.tail_keys is None or self.tail_values is None or stop > self.tail_keys.shape[2]:
            capacity = -(-max(stop, self.tail_length * 3 // 2) // TAIL_STEP) * TAIL_STEP
            longer_keys = self._enlarged(self.tail_keys, key_states, capacity)
            longer_values = self._enlarged(self.tail_values, value_states, capacity, longer_keys)
            self.tail_keys, self.tail_values = longer_keys, longer_values  # both, or none if memory runs out
            self._report()
        self.tail_keys[:, :, self.tail_length : stop] = key_states
        self.tail_values[:, :, self.tail_length : stop] = value_states
        self.tail_length = stop

    def _enlarged(self, old: Tensor | None, like: Tensor, capacity: int, *fresh: Tensor) -> Tensor:
        with torch.inference_mode(False):  # else it could be written to under inference_mode only
            new = like.new_zeros(*like.shape[:2], capacity, like.shape[-1])
        if old is not None:
            new[:, :, : self.tail_length] = old[:, :, : self.tail_length]
        self._report(new, *fresh)
        return new


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' sliding-window layer, which is left whole; only it does not keep what left the window alive."""

    def __init__(self, *, sliding_window: int, model_index: int, meter: Meter):
        super().__init__(sliding_window=sliding_window)
        self.model_index = model_index
        self.meter = meter
        self.newest = 0  # tokens of the latest update
        self.dropped: tuple[Tensor, ...] = ()  # keys and values that left the window then

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers'; what stays is copied out of the full states it was cut from. All of it, or nothing."""
        before = dict(vars(self))
        try:
            states = super().update(key_states, value_states, *args, **kwargs)
            self.keys, self.values = _own(self.keys), _own(self.values)
            self._note_dropped(before["keys"], before["values"], key_states.shape[-2])
        except BaseException:
            vars(self).update(before)
            raise
        self.meter.report(self.model_index, self.nbytes)
        return states

    def _note_dropped(self, old_keys: Tensor | None, old_values: Tensor | None, num_new: int) -> None:
        """Remember what left the window, until the next update, so that this one can be undone."""
        self.newest, self.dropped = num_new, ()
        if old_keys is not None and old_values is not None and old_keys.numel():
            count = old_keys.shape[-2] - max(0, self._states("keys").shape[-2] - num_new)
            self.dropped = (old_keys[:, :, :count].clone(), old_values[:, :, :count].clone())

    def require_undoable(self, stood: int) -> None:
        """Raise UnsupportedGeneration if more than the latest update would have to be taken back."""
        if self.cumulative_length - stood not in (0, self.newest):
            raise UnsupportedGeneration(
                f"a forward pass failed after {self.cumulative_length - stood} tokens had entered a sliding window, of "
                f"which only {self.newest} can be taken back: make the cache anew, or fork() before what may fail."
            )

    def undo(self, stood: int) -> None:
        """Take back the latest update, so that `stood` tokens have been seen."""
        if self.cumulative_length > stood:
            stay = max(0, self._states("keys").shape[-2] - self.newest)
            kept = self._states("keys")[:, :, :stay], self._states("values")[:, :, :stay]
            if self.dropped:
                kept = tuple(torch.cat(parts, dim=-2) for parts in zip(self.dropped, kept, strict=True))
            self.keys, self.values = kept
            self.cumulative_length, self.newest, self.dropped = stood, 0, ()

    def picked(self, pick: Callable[[Tensor], Tensor]) -> States:
        """Other rows of the batch, for `put`."""
        return tuple(None if t is None else pick(t) for t in (self.keys, self.values))

    def put(self, states: States) -> None:
        """Go on with these rows."""
        self.keys, self.values = states
        self.newest, self.dropped = 0, ()

    def joined(self, others: Sequence["SlidingLayer"], meter: Meter) -> "SlidingLayer":
        """A layer whose batch is the rows of this one, then those of the others."""
        whole = self.fork(meter)
        whole.keys, whole.values = (
            torch.cat([self._states(name), *(other._states(name) for other in others)]) for name in ("keys", "values")
        )
        whole.newest, whole.dropped = 0, ()
        meter.report(self.model_index, whole.nbytes)
        return whole

    def _states(self, name: str) -> Tensor:
        found = getattr(self, name)
        assert found is not None
        return found

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; give minus their number. Raises what `require_croppable` does."""
        self.require_croppable(tokens_to_remove)
        if tokens_to_remove:
            super().crop(tokens_to_remove)

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Raise UnsupportedGeneration if what left the window would have to come back."""
        _require_negative(tokens_to_remove)
        if tokens_to_remove and self.cumulative_length >= self.sliding_window:
            raise UnsupportedGeneration(
                f"cannot remove the last {-tokens_to_remove} tokens: {self.cumulative_length} were seen, and what left "
                f"the sliding window of {self.sliding_window} is gone. Keep the cache you forked from instead."
            )

    def fork(self, meter: Meter) -> "SlidingLayer":
        """A layer that goes on from here; states are replaced when they grow, so they can be shared until then."""
        twin = copy.copy(self)
        twin.meter = meter
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held, of those too that left the window in the latest pass."""
        held = (self.keys, self.values, *self.dropped)
        return sum(t.untyped_storage().nbytes() for t in held if t is not None)


def _no_autocast(states: Tensor) -> AbstractContextManager[Any]:
    """Scorers and kernels choose their own precision, and expect that of the cache everywhere."""
    kind = states.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _require_negative(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise UnsupportedGeneration(
            f"crop({tokens_to_remove}) asks to keep the first tokens, of which a compressed context has evicted some: "
            "give minus the number of last tokens to forget, or keep the cache you forked from."
        )


def _own(states: Tensor | None) -> Tensor:
    """`states` in storage of their own size: a view would keep all it was cut from alive."""
    assert states is not None
    return states if states.untyped_storage().nbytes() == states.nbytes else states.clone()
