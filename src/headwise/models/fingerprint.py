"""Which model a file was made with: a name for the weights that take part in a forward pass.

Weights that a pass does not touch (adapters that are not active) do not count; those of an active adapter do.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from headwise.artifacts.tensors import fingerprint
from headwise.models.devices import at_hand
from headwise.models.families import ModelView, view

_SAMPLE = 64  # values looked at in each weight
_WRAPPED = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")  # where peft puts what it wraps
_PROBE = 2  # tokens of the pass in which weights are seen at work


def model_fingerprint(model: PreTrainedModel | ModelView) -> str:
    """Hash of the configuration and of a sample of every weight at work, the same in float32 and in bfloat16.

    The model reads two tokens for it. A model with adapters of which none is active is the model without them.
    """
    model_view = view(model)
    parts: list[str | Tensor] = [model_view.config_hash]
    for name, weight in _weights_at_work(model_view):
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight  # shared out among processes
        step = max(1, weight.numel() // _SAMPLE)
        sample = weight.detach().flatten()[::step][:_SAMPLE]
        parts += [_WRAPPED.sub("", name), sample.to("cpu", torch.bfloat16).float()]
    return fingerprint(*parts, *map(repr, _strengths(model_view)))


def _weights_at_work(model_view: ModelView) -> Iterator[tuple[str, Tensor]]:
    decoder: nn.Module = model_view.decoder
    state = decoder.state_dict(keep_vars=True)
    weights = {name: leaf for name, value in state.items() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
    if any(isinstance(weight, DTensor) for weight in weights.values()):  # what a pass touches are copies of theirs
        yield from weights.items()
        return
    watch = _Touched()
    ids = torch.arange(_PROBE, dtype=torch.int64, device=model_view.device)[None]
    # Autocast would give operations copies of the weights, which it made earlier.
    plain, called = torch.autocast(model_view.device.type, enabled=False), set[nn.Module]()
    handle = register_module_forward_pre_hook(lambda module, given: called.add(module))
    try:
        with torch.no_grad(), plain, model_view.unchanged(), watch:
            decoder(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    for name, weight in weights.items():
        # What is packed away in an object (torch's dynamic quantisation) is no argument of any operation.
        if id(weight) in watch.tensors or weight is not state[name]:
            yield name, weight
        # What waits out of the way was there for the pass only, as another tensor.
        elif weight.is_meta and decoder.get_submodule(name.rpartition(".")[0]) in called:
            yield name, at_hand(decoder, name, weight)


class _Touched(TorchDispatchMode):
    """Notes every tensor that an operation is given, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors |= {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def _strengths(model_view: ModelView) -> list[float]:
    """By what the adapters at work (peft's LoRA) are multiplied: numbers that are no weights."""
    decoder: nn.Module = model_view.decoder
    adapted: list[Any] = [m for m in decoder.modules() if isinstance(getattr(m, "scaling", None), dict)]
    return [
        float(module.scaling[name])
        for module in adapted
        if not (module.disable_adapters or module.merged)
        for name in module.active_adapters
        if name in module.scaling
    ]
