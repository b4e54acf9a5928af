"""The Triton kernel for a paged pool: in the interpreter, compiled for a GPU that need not be there, and refused.

Functions called `interpreted_...` are tests that run in a process of their own.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_paged import CASES, Case, assert_as_good_as_plain, exactly, make_arguments

from headwise.errors import BadInput
from headwise.kernels import paged

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
WIDE = Case((1, 3), ((20, 40), (3, 9)), 16, 20, 256)


def run(command, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.process
def test_in_the_interpreter():
    """It must be asked for before anything imports Triton."""
    run(["-m", "pytest", "-x", "-o", "python_functions=interpreted_*", __file__], TRITON_INTERPRET="1")


@pytest.mark.process
def test_compiles_for_a_gpu(tmp_path):
    from triton import knobs

    try:
        knobs.nvidia.ptxas  # noqa: B018
    except RuntimeError as error:
        pytest.skip(f"no assembler: {error}")
    run([__file__], TRITON_CACHE_DIR=str(tmp_path))


def test_tensors_on_the_cpu_are_refused():
    from headwise.kernels import triton_decode, triton_paged

    if triton_decode.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    with pytest.raises(BadInput, match="needs tensors on a GPU"):
        triton_paged.attend(*make_arguments(CASES[0], torch.float32))


@pytest.fixture
def attend(monkeypatch):
    """The kernel; memory that was never written must not be read."""
    from headwise.kernels import triton_paged

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    return triton_paged.attend


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*itertools.product(CASES, (torch.float32, torch.bfloat16)), (WIDE, torch.float16), (WIDE, torch.bfloat16)],
    ids=str,
)
def interpreted_error_is_at_most_twice_that_of_plain_attention(attend, case, dtype):
    assert_as_good_as_plain(attend, case, dtype, draws=1)  # each takes seconds in the interpreter


@pytest.mark.parametrize(("rows", "splits"), [(1 << 17, 7), (100, 2), (1, 1)])
def interpreted_parts_are_as_many_as_there_is_memory_for(attend, rows, splits, monkeypatch):
    from headwise.kernels import triton_paged

    monkeypatch.setattr(triton_paged, "MIN_PART", 16)
    monkeypatch.setattr(triton_paged, "MAX_PART_ROWS", rows)
    shapes = []
    combined = triton_paged._combined
    monkeypatch.setattr(triton_paged, "_combined", lambda out, lse: shapes.append(len(out)) or combined(out, lse))
    arguments = make_arguments(Case((20, 1), ((20,), (199,)), 16, 2, 96), torch.float32)
    torch.testing.assert_close(attend(*arguments).double(), exactly(*arguments), rtol=1e-5, atol=1e-5)
    assert shapes == ([] if splits == 1 else [splits])


@pytest.mark.parametrize(
    ("case", "dtype"), [(CASES[0], torch.float64), (Case((2,), ((9,),), 16, 1, 320), torch.float32)]
)
def interpreted_what_it_is_not_made_for_goes_to_paged(attend, case, dtype, monkeypatch):
    from headwise.kernels import triton_paged

    monkeypatch.setattr(triton_paged, "_launch", None)
    arguments = make_arguments(case, dtype)
    torch.testing.assert_close(attend(*arguments), paged.attend(*arguments))


def compile_for_a_gpu():
    """An H100. Prompts and decoding in every precision, with and without parts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from headwise.kernels.triton_paged import _attend_tiles, _shape

    names = _attend_tiles.arg_names
    for dtype, rows, dim, split in (("bf16", 64, 128, False), ("fp16", 4, 96, True), ("fp32", 64, 256, True)):
        tiles = _shape(rows, dim, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])
        types = dict.fromkeys(names, "i32") | {"query": "*" + dtype, "pool": "*" + dtype, "tables": "*i64"}
        types |= {"plan": "*i32", "out": "*fp32" if split else "*" + dtype, "lse": "*fp32", "scale": "fp32"}
        constants = {"D": dim, "BLOCK_D": triton.next_power_of_2(dim), "BLOCK_M": tiles.queries}
        constants |= {"BLOCK_N": tiles.tokens, "PAGE": 16, "SPLIT": split, "UPCAST": False}
        even = ("query", "pool", "out", "query_token", "query_head", "pool_page", "pool_entry")  # as a launch finds
        source = ASTSource(
            fn=_attend_tiles,
            signature=types | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
        )
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert len(kernel.asm["cubin"]) > 1000
        assert "cp.async.cg" in kernel.asm["ptx"], "pages must be read 16 bytes at a time, ahead of their use"
        assert kernel.metadata.shared <= 232448 // 2, "two programs must fit one H100 processor"


if __name__ == "__main__":
    compile_for_a_gpu()
