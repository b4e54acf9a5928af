"""The Triton kernel: in the interpreter, compiled for a GPU that need not be there, and where it cannot run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import make_segments

from headwise import kernels
from headwise.errors import BadInput
from headwise.kernels import get_kernel
from headwise.kernels.quantised import ENTRIES
from headwise.kernels.segments import MIN_CHUNK, quantise, readers, split_into_chunks

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.process
def test_in_the_interpreter():
    """In a process of its own: the interpreter must be asked for before anything imports Triton."""
    command = [sys.executable, "-m", "pytest", "-x", str(HERE / "triton_cases.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_triton
@pytest.mark.process
def test_compiles_for_a_gpu(tmp_path):
    from triton import knobs

    try:
        knobs.nvidia.ptxas  # noqa: B018
    except RuntimeError as error:
        pytest.skip(f"no assembler: {error}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    cases = ["bf16 128 all int8 int4", "fp16 96 masked", "fp32 128 all k8v4"]
    command = [sys.executable, str(HERE / "compile_triton.py"), *cases]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_triton
def test_tensors_on_the_cpu_are_refused():
    from headwise.kernels import triton_decode

    if triton_decode.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    query, segments = torch.zeros(1, 1, 1, 1, 16), make_segments([3], torch.float32, heads=1)
    with pytest.raises(BadInput, match="needs tensors on a GPU"):
        get_kernel("triton")(query, segments, torch.tensor([0]), query[:, :, 0], query[:, :, 0], None, 1.0)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    with pytest.raises(BadInput, match="not installed"):
        get_kernel("triton")
    assert get_kernel("auto")


@pytest.mark.parametrize(("installed", "fastest"), [(True, "triton"), (False, "pages")])
def test_auto_takes_it_on_a_gpu_where_it_is_installed(installed, fastest, monkeypatch):
    monkeypatch.setattr(kernels, "_has_triton", lambda: installed)
    kernels.why_not.cache_clear()
    try:
        assert kernels.fastest(torch.device("cuda")) == fastest
        assert "native" not in kernels.usable("cuda")
        assert kernels.survey()[-1].usable == (installed and torch.cuda.is_available())
    finally:
        kernels.why_not.cache_clear()


@pytest.mark.parametrize("size", [1, 3, 128])
def test_chunks_cover_every_segment_in_order(size):
    lengths = (5, 0, 1, 300, 128)
    table = split_into_chunks(lengths, size, torch.device("cpu"))
    covered = [
        (int(s), row) for s, a, b in zip(table.segment, table.start, table.stop, strict=True) for row in range(a, b)
    ]
    owners = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)).tolist()
    assert covered == list(zip(owners, range(sum(lengths)), strict=True))
    assert (table.stop - table.start).max() <= size
    assert table.first.tolist() == [int((table.segment < s).sum()) for s in range(6)]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_chunks_of_quantised_entries_are_whole_blocks(kind):
    segments = make_segments([300, 0, 1, 700], torch.float32)
    part = quantise(segments, torch.ones(1001, dtype=torch.bool), ENTRIES[kind]).quantised[0]
    before = part.index_nbytes
    chunks = part.chunks
    assert part.index_nbytes == before + sum(
        t.nbytes for t in (chunks.segment, chunks.start, chunks.stop, chunks.first)
    )
    covered = [
        (int(segment), block)
        for segment, start, stop in zip(chunks.segment, chunks.start, chunks.stop, strict=True)
        for block in range(start, stop)
    ]
    assert covered == list(zip(part.blocks.segment.tolist(), range(part.first_blocks[-1]), strict=True))
    assert chunks.size * part.block == MIN_CHUNK == 128 and (chunks.stop - chunks.start).max() == chunks.size
    assert chunks.first.tolist() == [int((chunks.segment < s).sum()) for s in range(5)]


def test_readers():
    found = readers(torch.tensor([1, 0, 1, 1]), 3)
    assert found.row.tolist() == [[1, -1, -1], [0, 2, 3], [-1, -1, -1]]
    assert found.slot.tolist() == [0, 0, 1, 2]
