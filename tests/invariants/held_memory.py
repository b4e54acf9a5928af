"""Memory measured from outside: what an object holds, and which storages torch has made and not let go of."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headwise.cache import layer

_FOREIGN = (type, ModuleType, FunctionType, BuiltinFunctionType, nn.Module)  # the model, and code

_COPIES = {torch.ops.aten.cat.default, torch.ops.aten.clone.default, torch.ops.aten.new_zeros.default}


def _within_an_update() -> bool:
    frame = sys._getframe()
    while frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) != (layer.__file__, "update"):
        frame = frame.f_back
    return frame is not None


def tensors_in(*roots: object, without: Sequence[object] = ()) -> Iterator[Tensor]:
    """Every tensor reachable from the objects, but through the model or through what is in `without`."""
    seen, waiting = {id(x) for x in without}, list(roots)
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, _FOREIGN):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        waiting.extend(gc.get_referents(found))


def storages_in(*roots: object, without: Sequence[object] = (), floating: bool = False) -> dict[int, int]:
    """Bytes of every distinct storage reachable, by address; `floating`: of floating-point tensors only."""
    tensors = tensors_in(*roots, without=without)
    found = [t.untyped_storage() for t in tensors if t.is_floating_point() or not floating]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class Allocations(TorchDispatchMode):
    """Follows every storage that torch makes, whoever holds it; calls `after` when an operation is done."""

    def __init__(self, after: Callable[[], None] = lambda: None):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.stored: dict[int, tuple[StorageWeakRef, int]] = {}
        self.after = after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.made[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        if func in _COPIES and out.is_floating_point() and _within_an_update():
            storage = out.untyped_storage()
            self.stored[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.after()
        return out

    def made_in_updates(self) -> dict[int, int]:
        """Bytes, by address, of what still exists of the states that a cache's layers made to store new tokens."""
        return {address: size for address, (reference, size) in self.stored.items() if not reference.expired()}

    def alive(self, nbytes: int) -> int:
        """How many storages of exactly this size exist now."""
        return sum(size == nbytes and not reference.expired() for reference, size in self.made.values())
