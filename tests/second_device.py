"""Two more devices on a machine that has a CPU only: tensors that say they are elsewhere, and compute on the CPU.

Inside `more_devices()` tensors can be made on FIRST and SECOND, and moved there. An operation on tensors of several
devices fails, as on GPUs. What is allowed is what PyTorch allows: copies, and single numbers and indices of the CPU.
"""

from contextlib import contextmanager
from types import ModuleType

import torch
from accelerate import dispatch_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyDeviceGuard

FIRST, SECOND = torch.device("privateuseone", 0), torch.device("privateuseone", 1)
CPU, KIND = torch.device("cpu"), FIRST.type
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


@contextmanager
def more_devices():
    """Inside there are two more devices."""
    if not hasattr(torch, KIND):
        torch._register_device_module(KIND, _Module(KIND))
        torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor() asks no mode where it puts its numbers
    try:
        with _Factories():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def spread(model, devices=(FIRST, SECOND), main=None):
    """The model by accelerate's hooks: its layers on these devices in turn, everything else on the first.

    Layers on the "cpu" wait there, and compute on the device `main`, the first if it is not named.
    """
    others = [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
    places = dict.fromkeys([*others, "lm_head"], str(devices[0]))
    places |= {f"model.layers.{i}": str(devices[i % len(devices)]) for i in range(len(model.model.layers))}
    return dispatch_model(
        model, places, main_device=str(main or devices[0]), skip_keys=model._skip_keys_device_placement
    )


class Elsewhere(torch.Tensor):
    """A tensor of another device; `own` has its numbers."""

    @staticmethod
    def __new__(cls, own, device=None, requires_grad=False):
        if device is None:  # accelerate makes a parameter anew by the class that it had
            return torch.nn.Parameter(own, requires_grad)
        layout = {"strides": own.stride(), "storage_offset": own.storage_offset(), "dtype": own.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, own.size(), **layout, device=device)

    def __init__(self, own, device=None, requires_grad=False):
        self.own = own.own if isinstance(own, Elsewhere) else own

    def untyped_storage(self):
        """What is measured. Views share it, as those of any tensor do."""
        return self.own.untyped_storage()

    def tolist(self):
        """As any tensor's."""
        return self.own.tolist()

    def __repr__(self):
        return f"Elsewhere({self.own}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:  # a device has its own; PyTorch would take it apart here
            return _computed(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees operations on no tensors or on those of the CPU, too: their results may be on another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


class _Module(ModuleType):
    """What PyTorch asks of a kind of device. It is no accelerator, so nobody takes it for the default."""

    def __getattr__(self, name):
        answers = {"is_available": False, "_is_in_bad_fork": False, "get_amp_supported_dtype": [torch.bfloat16]}
        if name not in ("_lazy_init", "manual_seed_all", *answers):
            raise AttributeError(name)
        return lambda *given: answers.get(name)


def _computed(func, args, kwargs):
    """The operation, done on the CPU; its result is where it would be."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    device = _device_of(func, tensors)
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": CPU if device.type == KIND else device}
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.own, (args, kwargs))
    out = func(*args, **kwargs)
    if device is None or device.type != KIND:
        return out
    given = {id(tensor.own): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}  # what is changed in place
    return tree_map_only(torch.Tensor, lambda own: given[id(own)] if id(own) in given else Elsewhere(own, device), out)


def _device_of(func, tensors):
    """Where an operation computes; None if it is given no tensors. Raises RuntimeError as PyTorch does."""
    if func in COPIES:
        return tensors[0].device
    if func in INDEXED:
        tensors = [tensor for at, tensor in enumerate(tensors) if at == 0 or tensor.device != CPU]
    several = [tensor for tensor in tensors if tensor.ndim or tensor.device != CPU] or tensors
    devices = {tensor.device for tensor in several}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given {devices}")
    return devices.pop() if devices else None
