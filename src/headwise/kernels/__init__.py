"""The kernels, by name: attention over what was kept. A new one is a file with an `attend`, and a line in KERNELS.

What a kernel is given and gives back: `Kernel`. For serving there are two more, over pools of pages: `paged_attention`
picks one.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.errors import BadInput, KernelUnavailable
from headwise.kernels import native, paged
from headwise.kernels.arguments import Kernel as Kernel
from headwise.kernels.segments import Segments

PagedKernel = Callable[[Tensor, Tensor, paged.Sequences, float], Tensor]  # as `paged.attend`


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of the table."""

    module: str  # of headwise.kernels, imported when it is used; its `attend` is the kernel
    summary: str
    device: Literal["cpu", "cuda"] | None = None  # the only kind of device that it runs on; None: any
    needs: Callable[[], str] = str  # says what it found of its needs (str: none); raises KernelUnavailable, BadInput
    quantised: bool = False  # whether it reads `Segments.quantised`
    softcap: bool = False  # whether it takes `softcap`, see `Kernel`
    sinks: bool = False  # whether it takes `sinks`

    def serves(self, needs: "Needs") -> bool:
        """Whether it can do what is needed of it."""
        return all(getattr(self, need) for need in needs.named)


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a kernel must do beside attention over native entries."""

    quantised: bool = False
    softcap: bool = False
    sinks: bool = False

    @property
    def named(self) -> list[str]:
        """What is needed, by its field in `Entry`."""
        return [name for name in _TOLD if getattr(self, name)]


_TOLD = {
    "quantised": "does not read quantised entries",
    "softcap": "does no soft-capped attention, which this model has",
    "sinks": "knows no attention sinks, which this model has",
}


def _library() -> str:
    made = native.load()
    return f"{made.features}, {made.path}"


def _triton() -> str:
    if not _has_triton():
        raise BadInput(
            "kernel='triton' needs Triton, which is not installed: pip install triton, or use kernel='auto'."
        )
    return ""


# Wherever a kernel runs, it is faster than those above it: "auto" takes the last one that can be used.
KERNELS: Mapping[str, Entry] = MappingProxyType(
    {
        "reference": Entry(module="reference", summary="PyTorch, for tests", quantised=True, softcap=True, sinks=True),
        "pages": Entry(module="pages", summary="PyTorch", quantised=True, softcap=True, sinks=True),
        "native": Entry(
            module="native", summary="C++", device="cpu", needs=_library, quantised=True, softcap=True, sinks=True
        ),
        "triton": Entry(
            module="triton_decode",
            summary="Triton",
            device="cuda",
            needs=_triton,
            quantised=True,
            softcap=True,
            sinks=True,
        ),
    }
)


def get_kernel(name: str, *, quantised: bool = False, softcap: bool = False, sinks: bool = False) -> Kernel:
    """The kernel called `name`; "auto" is what `fastest` names. Raises BadInput, KernelUnavailable.

    `quantised`: it must read quantised entries; `softcap`, `sinks`: it must do such attention.
    """
    needs = Needs(quantised=quantised, softcap=softcap, sinks=sinks)
    if name == "auto":
        return attend_auto
    if name not in KERNELS:
        raise BadInput(f"kernel={name!r} does not exist; choose auto, {', '.join(KERNELS)}.")
    entry = KERNELS[name]
    if not entry.serves(needs):
        why = next(_TOLD[need] for need in needs.named if not getattr(entry, need))
        able = ", ".join(name for name, other in KERNELS.items() if other.serves(needs))
        raise BadInput(f"kernel={name!r} {why}; choose auto, {able}.")
    entry.needs()
    return import_module(f"headwise.kernels.{entry.module}").attend


def require_options(kernel: Kernel, *, softcap: bool, sinks: bool) -> None:
    """Raise BadInput if a kernel, given as a function, takes no such argument."""
    taken = signature(kernel).parameters
    for name, needed in {"softcap": softcap, "sinks": sinks}.items():
        every = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values())
        if needed and not every and name not in taken:
            raise BadInput(f"this kernel takes no argument {name!r}: it {_TOLD[name]}. Use kernel='auto'.")


def attend_auto(query: Tensor, segments: Segments, *arguments: Any, **options: Any) -> Tensor:
    """The fastest kernel for where the query is; see `Kernel` for the arguments."""
    needs = Needs(quantised=bool(segments.quantised), softcap="softcap" in options, sinks="sinks" in options)
    return _by_device(query.device.type, needs)(query, segments, *arguments, **options)


def paged_attention(device: torch.device) -> PagedKernel:
    """Attention over a paged pool, for serving: the kernel for a device. See `paged.attend` for the arguments."""
    if device.type == "cuda" and _has_triton():
        from headwise.kernels import triton_paged

        return triton_paged.attend
    return paged.attend


def usable(kind: str) -> list[str]:
    """Names of the kernels that run on a kind of device, slowest first. Compiles the C++ kernel if it was not yet."""
    return [name for name, entry in KERNELS.items() if entry.device in (None, kind) and why_not(name) is None]


def fastest(device: torch.device) -> str:
    """Name of the kernel that "auto" uses on a device."""
    return usable(device.type)[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A kernel on this machine. `used_on`: the kind of device on which "auto" takes it, if there is one here."""

    name: str
    usable: bool
    used_on: str | None
    about: str  # what it is, or why it cannot be used


def survey() -> list[Found]:
    """All kernels: which can be used here, and which "auto" takes. Compiles the C++ kernel if it was not yet."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    used = {fastest(torch.device(kind)): kind for kind in kinds}
    found = []
    for name, entry in KERNELS.items():
        missing, has_device = why_not(name), entry.device in (None, *kinds)
        about = ", ".join(filter(None, [entry.summary, entry.needs()])) if missing is None else missing
        if missing is None and not has_device:
            about += "; there is no GPU"
        found.append(Found(name=name, usable=missing is None and has_device, used_on=used.get(name), about=about))
    return found


@cache
def why_not(name: str) -> str | None:
    """What a kernel needs and this machine lacks; None if nothing. Compiles the C++ kernel if it is asked about."""
    try:
        KERNELS[name].needs()
    except (BadInput, KernelUnavailable) as error:
        return str(error)
    return None


@cache
def _by_device(kind: str, needs: Needs) -> Kernel:
    name = [name for name in usable(kind) if KERNELS[name].serves(needs)][-1]
    if kind == "cpu" and name == "pages":
        warnings.warn(f"decoding uses PyTorch's attention, which is slower: {why_not('native')}", stacklevel=2)
    return get_kernel(name)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
