"""What all benchmarks share. Results are checked before a time counts: attention against float64, logits against those
of the full cache.
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
LOGITS = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # by how much prefill's may differ from the full cache's
# Every tensor of more than 64 KiB is given back to the system when it is let go of: glibc otherwise keeps up to 32 MiB
# of each for later, and a process would seem to hold what nobody uses.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class WrongResult(HeadwiseError):
    """A candidate's result is too far from the exact one: its time would mean nothing."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Of all numbers together, in float64."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def checked(kernel: Callable[..., Tensor], errors: list[tuple[float, float]]) -> Callable[..., Tensor]:
    """The kernel, which notes at every call how far its result is from float64's, and how far PyTorch's is."""

    def attend(
        query: Tensor,
        segments: Segments,
        rows: Tensor,
        tail_keys: Tensor,
        tail_values: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        found = kernel(query, segments, rows, tail_keys, tail_values, mask, scaling)
        plain = _by_pytorch(query, segments, rows, tail_keys, tail_values, mask, scaling)
        precise = replace(segments, keys=segments.keys.double(), values=segments.values.double())
        tail = tail_keys.double(), tail_values.double()
        exact = reference.attend(query.double(), precise, rows, *tail, mask, scaling)
        errors.append((relative_error(found, exact), relative_error(plain, exact)))
        return found

    return attend


def _by_pytorch(
    query: Tensor,
    segments: Segments,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """PyTorch's SDPA, one head at a time: no kernel of ours, or that one would be compared with itself."""
    out = torch.empty_like(query)
    for b, h in product(range(query.shape[0]), range(query.shape[1])):
        part = segments.slice(int(rows[b]) * segments.kv_heads + h)
        keys = torch.cat([segments.keys[part], tail_keys[b, h]])
        values = torch.cat([segments.values[part], tail_values[b, h]])
        seen = None if mask is None else functional.pad(mask[b], (part.stop - part.start, 0), value=True)
        pair = (states.expand(query.shape[2], -1, -1) for states in (keys, values))
        out[b, h] = functional.scaled_dot_product_attention(query[b, h], *pair, attn_mask=seen, scale=scaling)
    return out


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of PyTorch, as before for None, until the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_worker(name: str, job: Mapping[str, Any], python: Path | None = None) -> dict[str, Any]:
    """What worker.py finds in a process of its own, run by `python` (ours by default).

    Raises HeadwiseError, naming the candidate, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        worker = Path(__file__).with_name("worker.py")
        # -P: else modules beside worker.py would hide others of their names
        command = [str(python or sys.executable), "-P", str(worker), json.dumps(job), str(out)]
        done = subprocess.run(
            command,
            env=os.environ | ENVIRONMENT,
            stderr=subprocess.PIPE,
            stdout=sys.stderr,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            raise HeadwiseError(f"{name} could not be measured: {_reason(done)}")
        return json.loads(out.read_text(encoding="utf-8"))


def require_kvpress(python: Path) -> None:
    """Raise BadInput unless it is a Python that can import kvpress."""
    try:
        done = subprocess.run([str(python), "-c", "import kvpress"], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BadInput(f"{python} cannot be run: {error.strerror}.") from error
    if done.returncode != 0:
        raise BadInput(f"{python} has no kvpress: {_reason(done)}")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        killed = " (the system does so when memory runs out)" if done.returncode == -9 else ""
        return f"its process was killed by signal {-done.returncode}{killed}."
    return (done.stderr.strip().splitlines() or ["its process gave no reason"])[-1]
