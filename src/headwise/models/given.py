"""Handling a model: a cache under the name that it has for it, a forward pass that leaves no trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from typing import Any

from torch import nn
from transformers import Cache


def given(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """A cache as the argument that the model's forward and generate take: `cache` from transformers 5.24 on."""
    return {_cache_argument(type(model)): cache}


def decoder_of(model: Any) -> Any:
    """The part of a model that has the layers and takes positions."""
    found = model.get_decoder()
    return model.base_model if isinstance(found, nn.Linear) else found  # some call what makes logits a decoder


@lru_cache(maxsize=64)
def _cache_argument(kind: type[nn.Module]) -> str:
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"


@contextmanager
def unchanged(decoder: nn.Module) -> Iterator[None]:
    """Whatever the model reads inside, its rotary embeddings are afterwards what they were before.

    Dynamic and long scaling choose frequencies by the longest sequence of a pass, and some keep them.
    """
    modules = [m for m in decoder.modules() if m._buffers and next(m.parameters(), None) is None]
    fields = [dict(module.__dict__) for module in modules]
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        for module, before in zip(modules, fields, strict=True):
            module.__dict__.update(before)
        for module, name, buffer, before in buffers:  # some are replaced, some written to
            module._buffers[name] = buffer.copy_(before)
