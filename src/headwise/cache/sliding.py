"""A sliding-window layer, which is bounded already and left whole."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from headwise.cache.kept import KeptWindow
from headwise.cache.meter import Meter
from headwise.cache.states import States, own, require_negative
from headwise.errors import UnsupportedGeneration


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
            self.keys, self.values = own(self._states("keys")), own(self._states("values"))
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
        return tuple(pick(t) for t in (self.keys, self.values) if t is not None)

    def put(self, states: States) -> None:
        """Go on with these rows."""
        self.keys, self.values = states or (None, None)
        self.newest, self.dropped = 0, ()

    def value(self) -> KeptWindow:
        """What it holds; states are replaced when they grow, and never changed."""
        return KeptWindow(
            keys=self._states("keys"), values=self._states("values"), newest=self.newest, dropped=self.dropped
        )

    def fill(self, kept: KeptWindow, seen: int) -> None:
        """Go on from these states, after so many tokens."""
        self.lazy_initialization(kept.keys, kept.values)
        self.keys, self.values, self.cumulative_length = kept.keys, kept.values, seen
        self.newest, self.dropped = kept.newest, kept.dropped

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
        tensor = getattr(self, name)
        assert tensor is not None
        return tensor

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; give minus their number. Raises what `require_croppable` does."""
        self.require_croppable(tokens_to_remove)
        if tokens_to_remove:
            super().crop(tokens_to_remove)

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Raise UnsupportedGeneration if what left the window would have to come back."""
        require_negative(tokens_to_remove)
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
