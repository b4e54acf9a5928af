"""Check the tensors of a file against a table; every kind of file has one.

A table has the shape, dtypes and range of every tensor. Sizes in a shape are numbers or names. A name may have a known
size (from the model or the metadata); otherwise the first tensor sets its size for all. `require` needs names, dtypes
and shapes only, so that a file's header is enough; `require_values` looks at the numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr as shown

import torch
from torch import Tensor

from headwise.errors import BadInput, ShapeMismatch

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
INTEGERS = ("I64", "I32")
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
LARGEST = 1e30  # of numbers to compute with: their products and sums stay finite


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """Dtype and shape of a tensor, which are known without its values."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """The shape, dtypes and range that a tensor must have. Its numbers must be finite, too."""

    shape: tuple[int | str, ...]
    dtypes: tuple[str, ...] = FLOATS
    low: float = -LARGEST
    high: float = LARGEST


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """The tensors that a file must have. `advice` says what to do about a file that does not fit."""

    table: Mapping[str, Numbers]
    sizes: Mapping[str, int] = field(default_factory=dict)
    advice: str = "Get or make the file again."

    def require(self, headers: Mapping[str, Header], place: str) -> dict[str, int]:
        """Check names, dtypes and shapes, and return all sizes.

        `place` begins every message: which file, and that it is damaged. Raises BadInput or ShapeMismatch, naming the
        tensor.
        """
        missing, unknown = sorted(self.table.keys() - headers.keys()), sorted(headers.keys() - self.table.keys())
        if missing or unknown:
            problem = f"lacks {missing[0]!r}" if missing else f"holds an unknown tensor {shown(unknown[0])}"
            raise BadInput(f"{place}: it {problem}. {self.advice}")
        sizes = dict(self.sizes)
        for name, numbers in self.table.items():
            header = headers[name]
            if header.dtype not in numbers.dtypes:
                raise BadInput(
                    f"{place}: {name!r} is of dtype {header.dtype}; expected {' or '.join(numbers.dtypes)}. "
                    f"{self.advice}"
                )
            self._require_shape(name, numbers, header, sizes, place)
        return sizes

    def _require_shape(self, name: str, numbers: Numbers, header: Header, sizes: dict[str, int], place: str) -> None:
        if len(header.shape) == len(numbers.shape):
            for size, length in zip(numbers.shape, header.shape, strict=True):
                if isinstance(size, str):
                    sizes.setdefault(size, length)
        expected = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in numbers.shape)
        if header.shape != expected:
            named = any(isinstance(size, str) for size in numbers.shape)
            axes = f" ({', '.join(map(str, numbers.shape))})" if named else ""
            need = f"({', '.join(map(str, expected))}{',' * (len(expected) == 1)})"
            raise ShapeMismatch(
                f"{place}: {name!r} has shape {header.shape}, but its sizes{axes} need {need}. {self.advice}"
            )

    def require_values(self, tensors: Mapping[str, Tensor], place: str) -> None:
        """Raise BadInput, naming place and tensor, if a number is not finite or beyond its range."""
        for name, numbers in self.table.items():
            low, high = extremes(tensors[name])
            if not (numbers.low <= low <= high <= numbers.high and math.isfinite(low) and math.isfinite(high)):
                raise BadInput(
                    f"{place}: {name!r} holds numbers from {low:g} to {high:g}; expected finite ones from "
                    f"{numbers.low:g} to {numbers.high:g}. {self.advice}"
                )


def headers(tensors: Mapping[str, Tensor]) -> dict[str, Header]:
    """Return the headers of tensors in memory."""
    return {
        name: Header(dtype=_NAMES.get(tensor.dtype, str(tensor.dtype)), shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def extremes(tensor: Tensor) -> tuple[float, float]:
    """Return the least and the greatest number: both NaN if any is, 0 and 0 if there is none. Takes no memory."""
    if tensor.numel() == 0:
        return 0.0, 0.0
    low, high = tensor.detach().aminmax()
    return float(low), float(high)
