"""Compile both Triton kernels for an H100, where there may be none: `compile_triton.py "bf16 128 masked"`."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headwise.kernels.triton_decode import Tiles, _attend_chunks, _combine_chunks


def compiled(kernel, pointers, constants, **options):
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32"} | pointers
    signature = {n: "constexpr" if n in constants else t for n, t in signature.items() if n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_both(dtype, dim, masked):
    tiles, shape = Tiles.of(4, dim, 4 if dtype == "fp32" else 2), {"D": dim, "BLOCK_D": triton.next_power_of_2(dim)}
    tables = {"seen": "*u8", "chunk_segment": "*i32", "chunk_start": "*i64", "chunk_stop": "*i64", "reader_row": "*i32"}
    parts = {"part_out": "*fp32", "part_lse": "*fp32"}
    states = dict.fromkeys(("query", "keys", "values", "tail_keys", "tail_values"), "*" + dtype)
    constants = {"BLOCK_M": tiles.queries, "BLOCK_N": tiles.tokens, "TAIL_CHUNK": 256, "MASKED": masked}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    yield compiled(_attend_chunks, states | tables | parts, shape | constants | {"UPCAST": False}, **options)
    pointers = parts | {"rows": "*i64", "reader_slot": "*i32", "chunk_first": "*i32", "out": "*" + dtype}
    yield compiled(_combine_chunks, pointers, shape | {"BLOCK_C": 32})


for words in sys.argv[1:]:
    name, width, mask = words.split()
    for kernel in compile_both(name, int(width), mask == "masked"):
        assert len(kernel.asm["cubin"]) > 1000
        assert kernel.metadata.shared <= 232448 // 2, "two programs must fit one H100 processor"
