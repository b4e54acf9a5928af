"""Functions that all benchmarks share. Results are checked before a time counts: attention against float64, logits
against those of the full cache.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headwise.errors import BadInput, HeadwiseError
from headwise.kernels import reference
from headwise.kernels.segments import Segments

MOST = 2.0  # times PyTorch's own error
LOGITS = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # how far prefill's may be from the full cache's
# Every tensor of more than 64 KiB is given back to the system when it is freed: glibc otherwise keeps up to 32 MiB of
# each for later, and a process would seem to hold memory that nobody uses.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class WrongResult(HeadwiseError):
    """A candidate's result is too far from the exact one: its time would mean nothing."""


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return the relative error of all numbers together, computed in float64."""
    return float((result.double() - exact.double()).norm() / exact.double().norm())


def checked(kernel: Callable[..., Tensor], errors: list[tuple[float, float]]) -> Callable[..., Tensor]:
    """Return the kernel with a check: every call appends its error and PyTorch's, against float64."""

    def attend(
        query: Tensor,
        segments: Segments,
        rows: Tensor,
        tail_keys: Tensor,
        tail_values: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        result = kernel(query, segments, rows, tail_keys, tail_values, mask, scaling)
        exact, plain = exact_and_plain(query, segments, rows, tail_keys, tail_values, mask, scaling)
        errors.append((relative_error(result, exact), relative_error(plain, exact)))
        return result

    return attend


def exact_and_plain(
    query: Tensor,
    segments: Segments,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention in float64 and PyTorch's, over the numbers that quantised entries stand for."""
    plain = _by_pytorch(query, segments, rows, tail_keys, tail_values, mask, scaling)
    precise = replace(segments, keys=segments.keys.double(), values=segments.values.double())
    tail = tail_keys.double(), tail_values.double()
    return reference.attend(query.double(), precise, rows, *tail, mask, scaling), plain


def _by_pytorch(
    query: Tensor,
    segments: Segments,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Return the output of PyTorch's SDPA, one head at a time: a kernel of ours would be compared with itself."""
    out = torch.empty_like(query)
    for b, h in product(range(query.shape[0]), range(query.shape[1])):
        segment = int(rows[b]) * segments.kv_heads + h
        part, codes = segments.slice(segment), [x.segment(segment) for x in segments.quantised]
        keys = torch.cat([segments.keys[part], *(keys.to(query.dtype) for keys, _ in codes), tail_keys[b, h]])
        values = torch.cat([segments.values[part], *(values.to(query.dtype) for _, values in codes), tail_values[b, h]])
        seen = len(keys) - tail_keys.shape[2]
        visible = None if mask is None else functional.pad(mask[b], (seen, 0), value=True)
        pair = (states.expand(query.shape[2], -1, -1) for states in (keys, values))
        out[b, h] = functional.scaled_dot_product_attention(query[b, h], *pair, attn_mask=visible, scale=scaling)
    return out


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set the threads of PyTorch until the end of the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_worker(name: str, job: Mapping[str, Any], python: Path | None = None) -> dict[str, Any]:
    """Run worker.py in a process of its own, by `python` (ours by default), and return its result.

    Raises HeadwiseError, naming the candidate, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        worker = Path(__file__).with_name("worker.py")
        # -P: else modules beside worker.py would hide others of their names
        command = [str(python or sys.executable), "-P", str(worker), json.dumps(job), str(out)]
        process = subprocess.run(
            command,
            env=os.environ | ENVIRONMENT,
            stderr=subprocess.PIPE,
            stdout=sys.stderr,
            text=True,
            errors="replace",
        )
        if process.returncode != 0:
            raise HeadwiseError(f"{name} could not be measured: {_reason(process)}")
        return json.loads(out.read_text(encoding="utf-8"))


def require_kvpress(python: Path) -> None:
    """Raise BadInput unless it is a Python that can import kvpress."""
    try:
        command = [str(python), "-c", "import kvpress"]
        process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BadInput(f"{python} cannot be run: {error.strerror}.") from error
    if process.returncode != 0:
        raise BadInput(f"{python} has no kvpress: {_reason(process)}")


def _reason(process: subprocess.CompletedProcess[str]) -> str:
    if process.returncode < 0:
        killed = " (the system does so when memory runs out)" if process.returncode == -9 else ""
        return f"its process was killed by signal {-process.returncode}{killed}."
    return (process.stderr.strip().splitlines() or ["its process gave no reason"])[-1]
