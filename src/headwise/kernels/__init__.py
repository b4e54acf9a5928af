"""Ragged attention kernels, by name. All have the signature of `reference.attend`."""

from collections.abc import Callable

from torch import Tensor

from headwise.errors import BadInput
from headwise.kernels import pages, reference

Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {"pages": pages.attend, "reference": reference.attend}


def get_kernel(name: str) -> Kernel:
    """The kernel called `name`; "auto" is the fastest one that runs everywhere. Raises BadInput."""
    if name == "auto":
        return KERNELS["pages"]
    if name not in KERNELS:
        raise BadInput(f"kernel={name!r} does not exist; choose auto, {', '.join(KERNELS)}.")
    return KERNELS[name]
