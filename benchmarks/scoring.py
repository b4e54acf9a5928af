"""Claim: LKV-T's scores cost at most 5% of the prefill of a layer of Llama-3.1-8B.

One decoder layer (hidden 4096, 32 query and 8 KV heads of 128, MLP 14336, random weights) reads a context with SDPA;
the scorer then scores the layer's keys and values, rotation undone, all heads in one grouped matrix product. First the
scores are checked against a loop over heads in float64.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py
    python benchmarks/scoring.py --tokens 2048,8192 --dtype bfloat16 --device cuda --json scoring.json
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from headwise.gates import EntryScores, entry_features
from headwise.hf.families import given, view

LIMIT = 0.05
REPEATS = 5


def one_layer(dtype: torch.dtype, device: str) -> Any:
    """A layer of Llama-3.1-8B with a vocabulary that costs nothing."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model.to(device, dtype).eval().requires_grad_(False)


def relative_error(scores: EntryScores, features: Tensor) -> float:
    """Against a float64 loop over heads."""
    found, worst = scores(features, 0).double(), 0.0
    for head in range(features.shape[1]):
        hidden = features[:, head].double() @ scores.weight_in[0, head].double() + scores.bias_in[0, head].double()
        expected = torch.nn.functional.gelu(hidden) @ scores.weight_out[0, head].double()
        worst = max(worst, float((found[:, head] - expected).norm() / expected.norm()))
    return worst


def clock(run: Callable[[], Any], device: str) -> float:
    """Median seconds of a call, after one to warm up."""
    run()
    times = []
    for _ in range(REPEATS):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


@torch.no_grad()
def measure(model: Any, tokens: int, device: str) -> dict[str, float]:
    """Seconds of the layer's prefill and of scoring it."""
    ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    cache = DynamicCache(config=model.config)
    model(ids, **given(model, cache), logits_to_keep=1)
    layer: Any = cache.layers[0]
    positions = torch.arange(tokens, device=device)[None]
    rotary, scores = view(model).rotary(0), EntryScores(1, 8, 128).to(device)
    error = relative_error(scores, entry_features(layer.keys, layer.values, positions, rotary))
    if error > 1e-5:
        raise SystemExit(f"scores are wrong: relative error {error:.1e}; nothing is timed.")
    prefill = clock(lambda: model(ids, use_cache=True, logits_to_keep=1), device)
    scoring = clock(lambda: scores(entry_features(layer.keys, layer.values, positions, rotary), 0), device)
    return {
        "tokens": tokens,
        "prefill_s": prefill,
        "scoring_s": scoring,
        "share_of_prefill": scoring / prefill,
        "rel_error": error,
    }


def main() -> None:
    """Measure and print; exit 1 beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1024,2048")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    model = one_layer(getattr(torch, options.dtype), options.device)
    rows = [measure(model, int(tokens), options.device) for tokens in options.tokens.split(",")]
    where = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": options.device,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(where))
    for row in rows:
        print(
            f"{row['tokens']:>7} tokens: prefill {row['prefill_s']:.3f} s, scoring {row['scoring_s']:.4f} s = "
            f"{row['share_of_prefill']:.2%} (error {row['rel_error']:.1e})"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({**where, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if any(row["share_of_prefill"] > LIMIT for row in rows):
        raise SystemExit(f"more than {LIMIT:.0%} of the prefill.")


if __name__ == "__main__":
    main()
