"""What a model tells our caches about a forward pass: that it begins, which tokens it is given, that it has ended well.

A cache is handed to the model as an argument; from inside its layers it sees neither ids nor whether a pass came to its
end. So the model gets two hooks of PyTorch's, and `generate` shows a cache the whole prompt before it cuts off what the
cache has seen. All three do nothing for any cache but ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from headwise.errors import BadInput, UnsupportedGeneration


class Listener(ABC):
    """A cache that wants to be told."""

    @abstractmethod
    def begin(self, ids: Tensor | None, mask: Tensor | None, num_tokens: int) -> None:
        """A forward pass begins, with so many new tokens a row; `ids` and `mask` are what it was given."""

    @abstractmethod
    def commit(self) -> None:
        """The forward pass that began last has ended well."""

    @abstractmethod
    def require_continued(self, ids: Tensor, mask: Tensor | None) -> None:
        """generate() is about to continue with the prompt `ids`: raise unless it begins with what the cache saw."""


def tell_caches(model: nn.Module) -> None:
    """Have this model tell our caches of its forward passes. A second call does nothing."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))  # peft wraps it
    if _begin in inner._forward_pre_hooks.values():
        return
    inner.register_forward_pre_hook(_begin, with_kwargs=True)
    inner.register_forward_hook(_commit, with_kwargs=True)
    for kind in (_Shown, _Refused) if isinstance(inner, GenerationMixin) else ():
        inner.__dict__[kind.name] = kind(inner)


class _Instead:
    """Stands in for a method of one model, which it holds weakly: a cycle would keep a dropped model in memory.

    It has the method's signature, which generate() looks at.
    """

    name = ""  # of the method

    def __init__(self, model: nn.Module):
        self._model = ref(model)
        self.__signature__ = signature(self.original)

    @property
    def original(self) -> Callable[..., Any]:
        """The model's own method."""
        return getattr(type(self.model), self.name).__get__(self.model)

    @property
    def model(self) -> Any:
        """The model, which is alive whenever its method is called."""
        return self._model()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Instead":
        return type(self)(memo.get(id(self.model), self.model))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)


class _Shown(_Instead):
    """The first call of a generate() gets the whole prompt."""

    name = "prepare_inputs_for_generation"

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cache = _cache_in(kwargs)
        # Without next_sequence_length the ids are new ones only, and with embeddings there are none.
        whole = kwargs.get("next_sequence_length") is not None and kwargs.get("inputs_embeds") is None
        if cache is not None and whole and kwargs.get("is_first_iteration"):
            cache.require_continued(input_ids, kwargs.get("attention_mask"))
        return self.original(input_ids, *args, **kwargs)


class _Refused(_Instead):
    """Continuous batching knows no attention but transformers' own, and names no way out."""

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from headwise.hf.attention import is_enabled  # which imports this module

        if is_enabled(self.model):
            raise BadInput(  # a ValueError, as without us
                "continuous batching (generate_batch) does not work while attention goes through headwise: call "
                "model.set_attn_implementation('sdpa') before it, and headwise.enable(model) before a cache of "
                "headwise is used again."
            )
        return self.original(*args, **kwargs)


def _begin(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    given = _arguments(module, args, kwargs)
    cache = _cache_in(given)
    if cache is None or torch.compiler.is_compiling():
        return
    if given.get("output_attentions"):
        raise UnsupportedGeneration(
            "attention weights (output_attentions) are never made with a RaggedCache: leave output_attentions out, or "
            "use another cache and model.set_attn_implementation('eager')."
        )
    ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
    new = ids if ids is not None else embedded
    if new is not None:
        cache.begin(ids, given.get("attention_mask"), new.shape[1])


def _commit(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
    cache = _cache_in(_arguments(module, args, kwargs))
    if cache is not None and not torch.compiler.is_compiling():
        cache.commit()


def _arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    return dict(zip(_parameters(type(module)), args, strict=False)) | dict(kwargs) if args else kwargs


def _cache_in(given: Mapping[str, Any]) -> Listener | None:
    cache = given.get("cache", given.get("past_key_values"))  # from transformers 5.24 on, and before
    return cache if isinstance(cache, Listener) else None


@lru_cache(maxsize=64)
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(signature(kind.forward).parameters)[1:]
