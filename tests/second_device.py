"""Two more devices on a machine that has a CPU only: tensors that say they are elsewhere, and compute on the CPU.

Inside `more_devices()` a tensor can be moved to FIRST and SECOND. An operation on tensors of several devices fails, as on
GPUs; the exceptions are PyTorch's own: copies, single numbers of the CPU, and indices of the CPU.
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
CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # by indices that may be on the CPU


class Elsewhere(torch.Tensor):
    """A tensor of another device; `own` holds its numbers."""

    @staticmethod
    def __new__(cls, own, device):
        size, stride, start = own.size(), own.stride(), own.storage_offset()
        return torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, storage_offset=start, dtype=own.dtype, device=device, requires_grad=False
        )

    def __init__(self, own, device):
        self.own = own

    def untyped_storage(self):
        """What is measured: views share it, as those of any tensor do."""
        return self.own.untyped_storage()

    def tolist(self):
        """As any tensor's."""
        return self.own.tolist()

    def __repr__(self):
        return f"Elsewhere({self.own}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:  # which PyTorch would take apart, and only here
            return _computed(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sends here what is made on one of these devices, or copied to it, of no tensor or of one on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


class _Module(ModuleType):
    """What PyTorch asks of a kind of devices; no accelerator, so that nobody takes it for the default."""

    def __getattr__(self, name):
        answers = {"is_available": False, "_is_in_bad_fork": False, "get_amp_supported_dtype": [torch.bfloat16]}
        if name not in ("_lazy_init", "manual_seed_all", *answers):
            raise AttributeError(name)
        return lambda *given: answers.get(name)


def spread(model, first=FIRST, then=SECOND):
    """The model by accelerate's hooks: embedding, first layer and logits on one device, the other layers on another."""
    names = [name for name, _ in model.model.named_children() if name != "layers"]
    places = dict.fromkeys([f"model.{name}" for name in names] + ["lm_head", "model.layers.0"], str(first))
    later = [f"model.layers.{i}" for i in range(1, len(model.model.layers))]
    places |= dict.fromkeys(later, str(then))
    return dispatch_model(model, places, main_device=str(first), skip_keys=model._skip_keys_device_placement)


@contextmanager
def more_devices():
    """Inside there are two more devices."""
    if not hasattr(torch, FIRST.type):
        torch._register_device_module(FIRST.type, _Module(FIRST.type))
        torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor() asks no mode where it puts numbers
    try:
        with _Factories():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def _device_of(func, tensors):
    """Where an operation computes: None if it is given no tensors. Raises RuntimeError as PyTorch does."""
    if func in INDEXED:
        tensors = [t for t in tensors[:1]] + [t for t in tensors[1:] if t.device != CPU]
    devices = {t.device for t in tensors if t.ndim or t.device != CPU} or {t.device for t in tensors}
    if len(devices) > 1 and func not in COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} was given {devices}")
    return tensors[0].device if func in COPIES else next(iter(devices), None)


def _own(value):
    return tree_map_only(Elsewhere, lambda tensor: tensor.own, value)


def _computed(func, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    device = _device_of(func, tensors)
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": CPU if device.type == FIRST.type else device}
    out = func(*_own(args), **_own(kwargs))
    if device is None or device.type != FIRST.type:
        return out
    changed = {id(tensor.own): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}
    return tree_map_only(torch.Tensor, lambda own: changed[id(own)] if id(own) in changed else Elsewhere(own, device), out)
