"""Claim: while a context is read, a scope "layer" method never holds more than the compressed cache and one full layer.

A random Llama of 16 layers, 8k tokens, 15% kept. `reported` is the cache's own peak; `measured` follows every storage
that torch makes and lets go of, whoever holds it, and counts those that a cache layer took in or made from it. A scope
"model" method needs the scores of all layers before it cuts the first, so it peaks at the whole cache.

    python benchmarks/prefill_memory.py
    python benchmarks/prefill_memory.py --tokens 4096 --json memory.json
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

import headwise
from headwise import layout
from headwise.ragged.layer import RaggedLayer

LAYERS, KV_HEADS, HEAD_DIM = 16, 2, 16
METHODS = ("knorm+adakv", "snapkv", "expected+uniform", "knorm+global")


class Followed(TorchDispatchMode):
    """Bytes of the watched storages that still exist, looked at after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def watch(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            reference = StorageWeakRef(tensor.untyped_storage())
            self.watched[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.look()

    def look(self) -> None:
        self.watched = {key: (ref, size) for key, (ref, size) in self.watched.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.watched.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self.look()
        return out


def watched_run(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` returns, and the most bytes of keys and values that existed: those given to a cache, those cut out."""
    follow = Followed()
    update, gather, dense = RaggedLayer.update, layout.gather, DynamicCache.update

    def updated(layer: RaggedLayer, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> Any:
        follow.watch(keys, values)
        return update(layer, keys, values, *args, **kwargs)

    def updated_dense(cache: DynamicCache, *args: Any, **kwargs: Any) -> Any:
        states = dense(cache, *args, **kwargs)
        follow.watch(*states)
        return states

    def gathered(*args: Any, **kwargs: Any) -> layout.Segments:
        segments = gather(*args, **kwargs)
        follow.watch(segments.keys, segments.values)
        return segments

    RaggedLayer.update, layout.gather, DynamicCache.update = updated, gathered, updated_dense  # pyright: ignore
    try:
        with follow:
            return run(), follow.peak
    finally:
        RaggedLayer.update, layout.gather, DynamicCache.update = update, gather, dense


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, ids = make_model(arguments.tokens), torch.randint(0, 97, (1, arguments.tokens))
    full = 2 * LAYERS * KV_HEADS * arguments.tokens * HEAD_DIM * 4
    rows = [row_of_full(model, ids, full)]
    for method in METHODS:
        rows.append(row_of_method(model, ids, method, arguments.keep, full))
    record = {
        "machine": machine(),
        "config": {**vars(arguments), "layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "float32"},
        "full_bytes": full,
        "results": rows,
    }
    report(record)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(record, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--keep", default="0.15")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    return parser.parse_args()


def make_model(tokens: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=64 // HEAD_DIM,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=tokens,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def row_of_full(model: PreTrainedModel, ids: Tensor, full: int) -> dict[str, Any]:
    def run() -> Cache:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    _, peak = watched_run(run)
    return {
        "method": "full (DynamicCache)",
        "scope": "",
        "held": full,
        "reported": full,
        "measured": peak,
        "bound": None,
    }


def row_of_method(model: PreTrainedModel, ids: Tensor, method: str, keep: str, full: int) -> dict[str, Any]:
    cache, measured = watched_run(lambda: headwise.compress(model, ids, method, keep=keep))
    scope = cache.method.allocator.scope
    bound = cache.nbytes + 1.1 * full / LAYERS if scope == "layer" else cache.nbytes + full
    if max(measured, cache.peak_nbytes) > bound:
        raise SystemExit(f"{method}: {measured} bytes measured, {cache.peak_nbytes} reported, the claim is {bound:.0f}")
    return {
        "method": method,
        "scope": scope,
        "held": cache.nbytes,
        "reported": cache.peak_nbytes,
        "measured": measured,
        "bound": bound,
    }


def machine() -> dict[str, str]:
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "headwise": headwise.__version__,
    }


def report(record: dict[str, Any]) -> None:
    full = record["full_bytes"]
    for part in ("machine", "config"):
        print(", ".join(f"{name} {value}" for name, value in record[part].items()))
    print(f"full KV cache: {full / 2**20:.2f} MiB, one layer {full / LAYERS / 2**20:.2f} MiB; peaks in % of it:")
    print(f"{'':22}{'scope':>7}{'held':>8}{'reported':>10}{'measured':>10}{'bound':>8}")
    for row in record["results"]:
        bound = "" if row["bound"] is None else f"{row['bound'] / full:.1%}"
        numbers = f"{row['held'] / full:8.1%}{row['reported'] / full:10.1%}{row['measured'] / full:10.1%}{bound:>8}"
        print(f"{row['method']:22}{row['scope']:>7}{numbers}")


if __name__ == "__main__":
    main()
