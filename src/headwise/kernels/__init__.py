"""Ragged attention kernels, by name. All have the signature of `reference.attend`."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from headwise.errors import BadInput
from headwise.kernels import pages, reference

Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {"pages": pages.attend, "reference": reference.attend}  # those that run everywhere


def get_kernel(name: str) -> Kernel:
    """The kernel called `name`; "auto" is "triton" on GPUs where it is installed, else "pages". Raises BadInput."""
    if name == "auto":
        return attend_auto
    if name == "triton":
        return _triton_kernel()
    if name not in KERNELS:
        raise BadInput(f"kernel={name!r} does not exist; choose auto, {', '.join(KERNELS)}, triton.")
    return KERNELS[name]


def attend_auto(query: Tensor, *arguments: Any) -> Tensor:
    """The fastest kernel for where the query is; see `reference.attend` for the arguments."""
    kernel = _triton_kernel() if query.device.type == "cuda" and _has_triton() else pages.attend
    return kernel(query, *arguments)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _triton_kernel() -> Kernel:
    """Imported on first use: Triton is optional, and slow to import."""
    if not _has_triton():
        raise BadInput(
            "kernel='triton' needs Triton, which is not installed: pip install triton, or use kernel='auto'."
        )
    from headwise.kernels import triton_decode

    return triton_decode.attend
