"""Tables of kept fractions that other projects publish: kvpress' .npy and DuoAttention's .tsv, read and checked."""

import os
import warnings
from pathlib import Path

import numpy as np

from headwise.errors import ArtifactMismatch, BadInput

CELL_BYTES = 64  # of a number in a table of text, at most


def load_npy(path: Path, expected: tuple[int, ...]) -> np.ndarray:
    """A .npy table of this shape, float64. Raises BadInput, ArtifactMismatch.

    The shape is looked at before any memory is taken: a few bytes can claim any.
    """
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # whatever Python's own parser says of the header
        raise BadInput(f"{path} cannot be read as a .npy table of numbers ({error}).") from error
    _require_table(mapped.shape, expected, path)
    if mapped.dtype.kind not in "fiu":
        raise BadInput(f"{path} cannot be read as a .npy table of numbers (it holds {mapped.dtype}).")
    return _finite(np.array(mapped, dtype=np.float64), path)


def load_tsv(path: Path, expected: tuple[int, int]) -> np.ndarray:
    """A tab-separated table of this shape, float64. Raises BadInput, ArtifactMismatch."""
    try:
        if path.stat().st_size > CELL_BYTES * (expected[0] * expected[1] + 1):
            raise ValueError(f"the file is too large for {expected[0]} x {expected[1]} numbers")
        with warnings.catch_warnings(action="error"):  # of a table without numbers
            table = np.loadtxt(path, delimiter="\t", ndmin=2)
    except (OSError, ValueError, UserWarning) as error:
        raise BadInput(f"{path} cannot be read as a tab-separated table of numbers ({error}).") from error
    _require_table(table.shape, expected, path)
    return _finite(table, path)


def _require_table(found: tuple[int, ...], expected: tuple[int, ...], path: str | os.PathLike[str]) -> None:
    if found != expected:
        raise ArtifactMismatch(f"{path} holds a table of {found}; this model needs {expected}. Get the model's own.")


def _finite(table: np.ndarray, path: Path) -> np.ndarray:
    if not np.isfinite(table).all():
        raise BadInput(f"{path} holds NaN or infinity, expected finite numbers only. Get the model's own table again.")
    return table
