"""Memory measured from outside: what an object holds, and which storages torch has made and not let go of."""

import gc
from collections.abc import Callable, Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FOREIGN = (type, ModuleType, FunctionType, BuiltinFunctionType, nn.Module)  # the model, and code


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
        self.after = after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.made[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.after()
        return out

    def alive(self, nbytes: int) -> int:
        """How many storages of exactly this size exist now."""
        return sum(size == nbytes and not reference.expired() for reference, size in self.made.values())
