"""Ragged attention kernels, by name. All have the signature of `reference.attend`.

reference   one head at a time: the truth                    everywhere
pages       pure PyTorch                                     everywhere
native      C++, compiled at first use                       CPU, with a compiler
triton      Triton                                           GPU

For serving there are two more, over pools of pages: `paged_attention` picks one.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from headwise.errors import BadInput, KernelUnavailable
from headwise.kernels import native, paged, pages, reference

Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {"pages": pages.attend, "reference": reference.attend}  # those that run everywhere
ALL = (*KERNELS, "native", "triton")


def get_kernel(name: str) -> Kernel:
    """The kernel called `name`; "auto" is what `fastest` names. Raises BadInput, KernelUnavailable."""
    if name == "auto":
        return attend_auto
    if name == "triton":
        return _triton_kernel()
    if name == "native":
        native.load()
        return native.attend
    if name not in KERNELS:
        raise BadInput(f"kernel={name!r} does not exist; choose auto, {', '.join(ALL)}.")
    return KERNELS[name]


def attend_auto(query: Tensor, *arguments: Any) -> Tensor:
    """The fastest kernel for where the query is; see `reference.attend` for the arguments."""
    return _by_device(query.device.type)(query, *arguments)


def paged_attention(device: torch.device) -> Kernel:
    """Attention over a paged pool, for serving: the kernel for a device. See `paged.attend` for the arguments."""
    if device.type == "cuda" and _has_triton():
        from headwise.kernels import triton_paged

        return triton_paged.attend
    return paged.attend


def fastest(device: torch.device) -> str:
    """Name of the kernel that "auto" uses on a device."""
    if device.type == "cuda":
        return "triton" if _has_triton() else "pages"
    return "native" if device.type == "cpu" and why_not_native() is None else "pages"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A kernel on this machine. `used_on`: the kind of device on which "auto" takes it, if there is one here."""

    name: str
    usable: bool
    used_on: str | None
    about: str  # what it is, or why it cannot be used


def survey() -> list[Found]:
    """All kernels: which can be used here, and which "auto" takes. Compiles the C++ kernel if it was not yet."""
    missing = why_not_native()
    if missing is None:
        made = native.load()
        about_native = f"C++, {made.features}, {made.path}"
    else:
        about_native = missing
    gpu = torch.cuda.is_available()
    about_triton = "Triton is not installed" if not _has_triton() else "Triton" if gpu else "Triton; there is no GPU"
    kernels = (
        ("reference", True, "PyTorch, one head at a time: for tests"),
        ("pages", True, "PyTorch"),
        ("native", missing is None, about_native),
        ("triton", gpu and _has_triton(), about_triton),
    )
    used = {fastest(torch.device("cpu")): "cpu"} | ({fastest(torch.device("cuda")): "cuda"} if gpu else {})
    return [Found(name=n, usable=usable, used_on=used.get(n), about=about) for n, usable, about in kernels]


@cache
def why_not_native() -> str | None:
    """What keeps the C++ kernel from being used; None if nothing does. Compiles it if it was not yet."""
    try:
        native.load()
    except KernelUnavailable as error:
        return str(error)
    return None


@cache
def _by_device(kind: str) -> Kernel:
    name = fastest(torch.device(kind))
    if kind == "cpu" and name != "native":
        warnings.warn(f"decoding uses PyTorch's attention, which is slower: {why_not_native()}", stacklevel=2)
    return get_kernel(name)


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
