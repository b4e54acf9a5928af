"""Compile the Triton kernels for an H100, where there may be none: `compile_triton.py "bf16 128 masked int4"`."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headwise.kernels.quantised import ENTRIES
from headwise.kernels.triton_decode import (
    Tiles,
    _attend_chunks,
    _attend_quantised,
    _combine_chunks,
    quantised_constants,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PARTS = {"part_out": "*fp32", "part_lse": "*fp32"}
TABLES = {"chunk_segment": "*i32", "chunk_start": "*i64", "chunk_stop": "*i64", "reader_row": "*i32"}


def compiled(kernel, pointers, constants, **options):
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32", "cap": "fp32"} | pointers
    signature = {n: "constexpr" if n in constants else t for n, t in signature.items() if n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_all(dtype, dim, masked, entries):
    tiles, shape = Tiles.of(4, dim, DTYPES[dtype].itemsize), {"D": dim, "BLOCK_D": triton.next_power_of_2(dim)}
    states = dict.fromkeys(("query", "keys", "values", "tail_keys", "tail_values"), "*" + dtype) | {"seen": "*u8"}
    constants = {
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.tokens,
        "TAIL_CHUNK": 256,
        "MASKED": masked,
        "CAPPED": masked,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    yield compiled(_attend_chunks, states | TABLES | PARTS, shape | constants | {"UPCAST": False}, **options)
    pointers = PARTS | {
        "rows": "*i64",
        "reader_slot": "*i32",
        "chunk_first": "*i32",
        "out": "*" + dtype,
        "sinks": "*fp32",
    }
    pointers |= {"quantised_first": ("*i32",) * len(entries)}
    yield compiled(_combine_chunks, pointers, shape | {"BLOCK_C": 32, "SINKS": masked})
    pointers = {"query": "*" + dtype, "keys": "*u8", "values": "*u8", "spans": "*i64"} | TABLES | PARTS
    pointers |= {"key_scales": "*fp16", "value_scales": "*fp16"}
    for name in entries:
        constants = dict(quantised_constants(dim, ENTRIES[name], 4, DTYPES[dtype])) | {"CAPPED": masked}
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        yield compiled(_attend_quantised, pointers, constants, **options)


for words in sys.argv[1:]:
    name, width, mask, *kinds = words.split()
    for kernel in compile_all(name, int(width), mask == "masked", kinds):
        assert len(kernel.asm["cubin"]) > 1000
        assert kernel.metadata.shared <= 232448 // 2, "two programs must fit one H100 processor"
