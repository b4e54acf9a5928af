"""Peak of keys and values while a long context is read, by the way it is read. No weights: a random model.

python benchmarks/bounded_reading.py evict 65536 2048 0.05 2
"""

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwise

reading, tokens, piece, keep, layers = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=layers,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=tokens,
)
model, ids = LlamaForCausalLM(config).eval(), torch.randint(3, 97, (1, tokens))
start = time.perf_counter()
cache = headwise.compress(model, ids, "knorm", keep=keep, prefill_chunk_size=piece, reading=reading)
full = 2 * tokens * layers * 32 * 4
margin, one_piece = cache.nbytes // 2, full * piece // tokens
print(f"{reading}: {time.perf_counter() - start:.0f} s; full {full:,}, kept {cache.nbytes:,}, margin {margin:,}, piece")
print(f"{one_piece:,} bytes; kept + margin + piece {cache.nbytes + margin + one_piece:,}, peak {cache.peak_nbytes:,}")
print(f"peak of full {cache.peak_nbytes / full:.1%}; positions kept {int(cache.positions(0, 0, 0).sum())}")
