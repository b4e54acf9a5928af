"""What a model tells our caches about a forward pass: that it begins, which tokens it is given, that it has ended well.

A cache is handed to the model as an argument; from inside its layers it sees neither ids nor whether a pass came to its
end. So the model gets two hooks of PyTorch's, and `generate` shows a cache the whole prompt before it cuts off what the
cache has seen. A model that places images on a grid is told where a cache stands before it works out positions, and a
hook on its decoder shows what it has made of that. All of it does nothing for any cache but ours.
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
from headwise.models.given import decoder_of
from headwise.models.grids import holder_of
from headwise.models.images import brought


class PassAware(ABC):
    """A cache that must know when a forward pass begins and ends."""

    @abstractmethod
    def begin(self, ids: Tensor | None, mask: Tensor | None, num_tokens: int, images: Mapping[str, Any]) -> None:
        """A forward pass begins, with so many new tokens a row; `ids`, `mask` and `images` are what it was given."""

    @abstractmethod
    def place(self, position_ids: Tensor | None, mask: Tensor | None, shape: tuple[int, int]) -> None:
        """The decoder of a model with grids is about to read new tokens [batch, tokens] at these positions."""

    @abstractmethod
    def tell_positions(self, rows: int) -> None:
        """A model with grids is about to work out positions for so many rows: it shall know where this cache stands."""

    @abstractmethod
    def end(self) -> None:
        """The forward pass that began last is over: well, unless it has raised what is being handled now."""

    @abstractmethod
    def require_continued(self, ids: Tensor, mask: Tensor | None) -> None:
        """generate() is about to continue with the prompt `ids`: raise unless it begins with what the cache saw."""


def tell_caches(model: nn.Module) -> None:
    """Have this model tell our caches of its forward passes. A second call does nothing."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))  # peft wraps it
    if _begin not in inner._forward_pre_hooks.values():
        inner.register_forward_pre_hook(_begin, with_kwargs=True)
        inner.register_forward_hook(_end, with_kwargs=True, always_call=True)
    on_grids = holder_of(inner) is not None
    decoder: nn.Module = decoder_of(inner)
    if on_grids and _place not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_place, with_kwargs=True)
    if isinstance(inner, GenerationMixin):
        for kind in (_Shown, _Refused, _Placed) if on_grids else (_Shown, _Refused):
            kind.put_on(inner)


class _Instead:
    """Stands in for a method of one model, which it holds weakly: a cycle would keep a dropped model in memory."""

    name = ""  # of the method

    def __init__(self, model: nn.Module, own: Callable[..., Any] | None = None):
        self._model = ref(model)
        self._own = own  # the method that somebody else has put on this very model

    @property
    def model(self) -> Any:
        """The model. Raises BadInput where only a shallow copy of it is left."""
        model = self._model()
        if model is None:
            raise BadInput("this model is a copy.copy() of one that is gone: call headwise.enable(model) on it first.")
        return model

    @property
    def original(self) -> Callable[..., Any]:
        """The model's own method."""
        return self._own or getattr(type(self.model), self.name).__get__(self.model)

    @classmethod
    def put_on(cls, model: nn.Module) -> None:
        """Take the place of the method of this model, if it does not have it yet."""
        present = vars(model).get(cls.name)
        if not isinstance(present, cls):
            vars(model)[cls.name] = cls(model, present)
        elif present._model() is not model:  # of the model that this one is a shallow copy of
            vars(model)[cls.name] = cls(model, present._own)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Instead":
        return type(self)(memo.get(id(self.model), self.model), self._own)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self._own)


class _Shown(_Instead):
    """What generate() reads a prompt with: it cuts off what the cache has seen."""

    name = "_prefill"

    def __call__(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **options: Any) -> Any:
        cache, mask = _cache_in(model_kwargs), model_kwargs.get("attention_mask")
        if cache is not None:
            if not model_kwargs.get("use_cache", True):
                raise BadInput("generate() was given a cache and use_cache=False: leave out one of them.")
            covered = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
            if (
                covered == input_ids.shape[1] and model_kwargs.get("inputs_embeds") is None
            ):  # else they are new ids only
                cache.require_continued(input_ids, mask)
        return self.original(input_ids, generation_config, model_kwargs, **options)


class _Refused(_Instead):
    """Continuous batching knows no attention but transformers' own, and names no way out."""

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from headwise.models.attention import is_enabled  # which imports this module

        if is_enabled(self.model):
            raise BadInput(  # a ValueError, as without us
                "continuous batching (generate_batch) does not work while attention goes through headwise: call "
                "model.set_attn_implementation('sdpa') before it, and headwise.enable(model) before a cache of "
                "headwise is used again."
            )
        return self.original(*args, **kwargs)


class _Placed(_Instead):
    """Where generate() works out positions, which a model with grids does by what it knows of the cache."""

    name = "_prepare_position_ids_for_generation"

    def __call__(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        cache = _cache_in(model_kwargs)
        if cache is not None:
            cache.tell_positions(len(inputs_tensor))
        return self.original(inputs_tensor, model_kwargs)


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
    _be_last(module)
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    new = ids if ids is not None else given.get("inputs_embeds")
    if new is not None:
        cache.begin(ids, mask if isinstance(mask, Tensor) else None, new.shape[1], brought(module, given))


def _place(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Show a cache the positions of the new tokens. From a mask the model makes those of all that it covers."""
    given = _arguments(module, args, kwargs)
    cache, ids, positions = _cache_in(given), given.get("input_ids"), given.get("position_ids")
    if cache is None or torch.compiler.is_compiling():
        return None
    rows, tokens = (ids if ids is not None else given["inputs_embeds"]).shape[:2]
    new = None if positions is None else positions[..., -tokens:]
    cache.place(new, given.get("attention_mask"), (rows, tokens))
    return (), {**given, "position_ids": new}


def _end(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
    cache = _cache_in(_arguments(module, args, kwargs))
    if cache is not None and not torch.compiler.is_compiling():
        cache.end()


def _be_last(module: nn.Module) -> None:
    """A hook that a user has added later may still fail the pass, so ours comes after it."""
    hooks = module._forward_hooks
    if next(reversed(hooks.values())) is not _end:
        key = next(key for key, hook in hooks.items() if hook is _end)
        hooks[key] = hooks.pop(key)


def _arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    return dict(zip(_parameters(type(module)), args, strict=False)) | dict(kwargs) if args else kwargs


def _cache_in(given: Mapping[str, Any]) -> PassAware | None:
    cache = given.get("cache", given.get("past_key_values"))  # from transformers 5.24 on, and before
    return cache if isinstance(cache, PassAware) else None


@lru_cache(maxsize=64)
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(signature(kind.forward).parameters)[1:]
