"""Where the parts of a model are: on one device, spread over several, or out of the way until they are at work.

Spreading and offloading is accelerate's work (`device_map`). Its hooks move what a layer is given to where the layer
computes. Weights that wait on the CPU or on a disk are on PyTorch's device `meta` between passes, without numbers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import UnsupportedModel


def device_of(model: Any) -> torch.device:
    """Where a model takes its token ids. Raises UnsupportedModel if it has no weights yet."""
    if model.device.type != "meta":
        return model.device
    require_numbers(model)
    return next(_computing(model))


def is_spread(model: nn.Module) -> bool:
    """Whether parts of the model are, or compute, on several devices."""
    return len({device for device in placement_of(model) if device.type != "meta"} | {*_computing(model)}) > 1


def placement_of(model: nn.Module) -> tuple[torch.device, ...]:
    """Where each weight is; another one after the model, or a part of it, was moved."""
    return tuple(weight.device for weight in model.parameters())


def at_hand(within: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight of this name, or its copy that waits out of the way. Raises UnsupportedModel where there is none."""
    if not weight.is_meta:
        return weight
    module, parts = within, name.split(".")
    for at in range(len(parts)):
        for hook in _hooks(module):
            found = (getattr(hook, "weights_map", None) or {}).get(".".join(parts[at:]))
            if found is not None:
                return found
        module = getattr(module, parts[at])
    raise UnsupportedModel(f"the weight {name} of this model is on the device 'meta', without numbers: load it.")


def require_numbers(model: nn.Module) -> None:
    """Raise UnsupportedModel if weights have no numbers, and nothing fetches them when they are needed."""
    if not has_numbers(model):
        raise UnsupportedModel("weights of this model are on the device 'meta', without numbers: load them.")


def has_numbers(module: nn.Module) -> bool:
    """Whether a module finds its weights when it is called: they are there, or are fetched for it or for its parts."""
    fetching = [hook for hook in _hooks(module) if getattr(hook, "weights_map", None) is not None]
    if any(hook.place_submodules for hook in fetching):
        return True
    own = bool(fetching) or not any(weight.is_meta for weight in module.parameters(recurse=False))
    return own and all(map(has_numbers, module.children()))


def _computing(model: nn.Module) -> Iterator[torch.device]:
    """Where hooks send what modules are given."""
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                yield torch.device(hook.execution_device)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's, of one module."""
    hook = vars(module).get("_hf_hook")
    yield from getattr(hook, "hooks", (hook,))  # some are several in a row
