"""Peak of keys and values while a long context is read, by the way it is read. No weights: a random model.

    python benchmarks/bounded_reading.py evict --tokens 65536 --keep 0.05 --layers 4
    python benchmarks/bounded_reading.py offload --tokens 16384 --keep 0.15 --layers 30 --kv-heads 3 --head-dim 64

The method is knorm, whose scores of an entry never change: what it keeps can be compared between readings ("kept").
"""

import argparse
import hashlib
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwise

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("reading", choices=("exact", "evict", "offload"))
parser.add_argument("--tokens", type=int, default=65536)
parser.add_argument("--piece", type=int, default=2048)
parser.add_argument("--keep", type=float, default=0.05)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--kv-heads", type=int, default=1)
parser.add_argument("--head-dim", type=int, default=32)
asked = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97,
    hidden_size=64 * asked.kv_heads,
    intermediate_size=64,
    num_hidden_layers=asked.layers,
    num_attention_heads=2 * asked.kv_heads,
    num_key_value_heads=asked.kv_heads,
    head_dim=asked.head_dim,
    max_position_embeddings=asked.tokens,
)
model, ids = LlamaForCausalLM(config).eval(), torch.randint(3, 97, (1, asked.tokens))
start = time.perf_counter()
options = {"keep": asked.keep, "prefill_chunk_size": asked.piece, "reading": asked.reading}
cache = headwise.compress(model, ids, "knorm", **options)
seconds = time.perf_counter() - start
full = 2 * asked.tokens * asked.layers * asked.kv_heads * asked.head_dim * 4
margin, piece = cache.nbytes // 2, full * asked.piece // asked.tokens
kept = hashlib.sha256()
for segments in cache.kept.segments:
    kept.update(segments.positions.numpy().tobytes())
print(f"{asked.reading}: {seconds:.0f} s, peak {cache.peak_nbytes:,} bytes, {cache.peak_nbytes / full:.1%} of {full:,}")
print(f"kept {cache.nbytes:,} + margin {margin:,} + piece {piece:,} = {cache.nbytes + margin + piece:,} bytes")
print(f"positions kept: {kept.hexdigest()[:16]}")
