"""Layers that are left as they are: with a state that does not grow (linear attention, convolution), or empty."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from headwise.cache.kept import KeptState
from headwise.cache.meter import Meter
from headwise.cache.states import States, require_negative
from headwise.errors import UnsupportedGeneration

_Base: Any = getattr(
    import_module("transformers.cache_utils"), "LinearAttentionLayer", object
)  # transformers before 5.24 may have none
_TENSORS = ("conv_states", "recurrent_states")


class StateLayer(_Base):
    """transformers' layer of a state; only it can be forked, saved, and go back to before the latest pass."""

    def __init__(self, *, number_of_states: int, model_index: int, meter: Meter):
        super().__init__(number_of_states=number_of_states)
        self.model_index = model_index
        self.meter = meter
        self.before: dict[str, dict[int, Any]] | None = None  # what it was before a pass that has not ended

    @property
    def is_initialized(self) -> bool:
        """Whether there is a state."""
        return bool(self._tensors())

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers'."""
        self._remember()
        states = super().update_conv_state(*args, **kwargs)
        self.meter.report(self.model_index, self.nbytes)
        return states

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers'."""
        self._remember()
        states = super().update_recurrent_state(*args, **kwargs)
        self.meter.report(self.model_index, self.nbytes)
        return states

    def settle(self) -> None:
        """The pass has ended well."""
        self.before = None

    def undo(self, stood: int = 0) -> None:
        """Go back to before the pass that has not ended."""
        if self.before is not None:
            self.__dict__.update(self.before)
            self.before = None

    def require_undoable(self, stood: int) -> None:
        """Nothing: what it was before a pass is there."""

    def picked(self, pick: Callable[[Tensor], Tensor]) -> States:
        """Other rows of the batch, for `put`."""
        return tuple(pick(tensor) for tensor in self._tensors())

    def put(self, states: States) -> None:
        """Go on with these rows."""
        left = iter(states)
        for name in _TENSORS:
            self.__dict__[name] = {i: t if t is None else next(left) for i, t in getattr(self, name).items()}
        self.before = None

    def value(self) -> KeptState:
        """What it holds, copied: a state is written over."""
        named = {name: getattr(self, name) for name in _TENSORS}
        return KeptState(
            states={
                f"{name.removesuffix('_states')}_{chr(97 + i)}": tensor.clone()
                for name, tensors in named.items()
                for i, tensor in tensors.items()
                if tensor is not None
            }
        )

    def fill(self, kept: KeptState, seen: int) -> None:
        """Go on from this state."""
        for name, tensor in kept.states.items():
            kind, _, letter = name.partition("_")
            self.lazy_initialization(**{f"{kind}_states": tensor}, state_idx=ord(letter) - 97)
            getattr(self, f"{kind}_states")[ord(letter) - 97].copy_(tensor)
            self.has_previous_state[ord(letter) - 97] = True

    def joined(self, others: Sequence["StateLayer"], meter: Meter) -> "StateLayer":
        """A layer whose batch is the rows of this one, then those of the others."""
        whole = self.fork(meter)
        parts = zip(self._tensors(), *(other._tensors() for other in others), strict=True)
        whole.put(tuple(torch.cat(part) for part in parts))
        meter.report(self.model_index, whole.nbytes)
        return whole

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Raise UnsupportedGeneration: a state does not know what it was before its last tokens."""
        require_negative(tokens_to_remove)
        if tokens_to_remove:
            raise UnsupportedGeneration(
                f"cannot remove the last {-tokens_to_remove} tokens: this model has layers with a state, which cannot "
                "take back tokens. Keep the cache you forked from instead."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing but what `require_croppable` does."""
        self.require_croppable(tokens_to_remove)

    def fork(self, meter: Meter) -> "StateLayer":
        """A layer that goes on from here; a state is written over, so it is copied."""
        twin = StateLayer(number_of_states=self.number_of_states, model_index=self.model_index, meter=meter)
        twin.__dict__.update(_copied(self.__dict__))
        twin.meter, twin.before = meter, None
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of the state, and of what it was before a pass that has not ended."""
        before = [t for name in _TENSORS for t in (self.before or {}).get(name, {}).values() if t is not None]
        return sum(t.untyped_storage().nbytes() for t in (*self._tensors(), *before))

    def _tensors(self) -> list[Tensor]:
        return [t for name in _TENSORS for t in getattr(self, name).values() if t is not None]

    def _remember(self) -> None:
        if self.before is None:
            self.before = {name: value for name, value in _copied(self.__dict__).items() if isinstance(value, dict)}


class EmptyLayer:
    """The place of a layer that holds nothing: without attention, or one that reads another layer's cache."""

    is_initialized = False
    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    nbytes = 0
    keys = values = None

    def value(self) -> KeptState:
        """Nothing."""
        return KeptState(states={})

    def picked(self, pick: Callable[[Tensor], Tensor]) -> States:
        return ()

    def joined(self, others: Sequence["EmptyLayer"], meter: Meter) -> "EmptyLayer":
        return self

    def fork(self, meter: Meter) -> "EmptyLayer":
        return self

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """What there is to be done."""

    settle = undo = put = fill = crop = require_undoable = require_croppable = _nothing


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a state layer; dictionaries and the tensors in them are new."""
    return {
        name: {i: t.clone() if isinstance(t, Tensor) else t for i, t in value.items()}
        if isinstance(value, dict) and name != "before"
        else value
        for name, value in attributes.items()
    }
