"""Compare entries in fewer bits with transformers' QuantizedCache, everything kept: nats and bits per number.

    pip install optimum-quanto hqq
    python recipes/compare_quantised.py MODEL --books BOOKS.txt.xz --samples 6 --out runs/MODEL/quantised.json

Prints a table. The file is for recipes/small_entries_tables.py.

Each passage of book text is read once: its first 768 tokens are the context, stored in each way, and the next 128 are
predicted. KL is in nats per token from the full cache. The passages are those of recipes/real_models.py, which no gates
were trained on. Bits are per number of the context: scales count, as float16, and so do the first 4 tokens, which ours
leaves as they are. QuantizedCache quantises everything that was read before the first answer, and makes numbers of all
of it again for every token; `kv_bytes` of ours are measured.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from real_models import books
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from headwise.cache.reading import Reading, read
from headwise.files.writing import write_bytes
from headwise.kernels.quantised import ENTRIES
from headwise.methods.scores import Streaming
from headwise.models.families import given
from headwise.models.loading import load

CONTEXT, FOLLOWING = 768, 128
THEIRS = {  # what is given to QuantizedCache, and bits per number: codes, and a float16 scale and zero for each group
    "quanto, 4 bits": ({"backend": "quanto", "nbits": 4}, 4 + 32 / 64),
    "hqq, 4 bits": ({"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}, 4 + 32 / 64),
    "hqq, 8 bits": ({"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1}, 8 + 32 / 64),
    "fp8": ({"backend": "fp8"}, 8.0),
}


def main() -> None:
    """Measure all on every passage, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--books", type=Path, required=True, help="text of many books (.txt.xz)")
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="file to write the figures to (.json)")
    asked = parser.parse_args()
    model, tokenizer = load(str(asked.model), dtype=asked.dtype, device="cpu")
    task = books(asked.books, tokenizer, CONTEXT + FOLLOWING, asked.samples)
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(asked.samples):
        continued = task.sample(number).continues
        assert continued is not None
        context, following = (torch.tensor(ids)[None] for ids in continued)
        for name, kl, bits in measured(model, context, following):
            found.setdefault(name, []).append((kl, bits))
    print(f"{asked.samples} passages, {CONTEXT} tokens read, everything kept\n\n| stored as | nats | bits per number |")
    print("|---|---|---|")
    for name, pairs in found.items():
        print(f"| {name} | {fmean(kl for kl, _ in pairs):.5f} | {fmean(bits for _, bits in pairs):.2f} |")
    if asked.out is not None:
        means = {name: [fmean(column) for column in zip(*pairs, strict=True)] for name, pairs in found.items()}
        figures = {name: {"kl": kl, "bits": bits} for name, (kl, bits) in means.items()}
        content = {"passages": asked.samples, "context": CONTEXT, "stored": figures}
        write_bytes(asked.out, json.dumps(content, indent=1).encode())


@torch.no_grad()
def measured(model: Any, context: Tensor, following: Tensor) -> Iterator[tuple[str, float, float]]:
    """Name, KL from the full cache, and bits per number of every way to store a context."""
    full = predictions(model, context, following, lambda: DynamicCache(config=model.config))
    reading = read(model, context, [Streaming()])
    numbers = reading.whole.nbytes / model.dtype.itemsize
    for name in ENTRIES:
        yield name, divergence(full, ours(model, reading, following, name)), 8 * stored(reading, name) / numbers
    for name, (options, bits) in THEIRS.items():
        found = predictions(model, context, following, lambda o=options: QuantizedCache(config=model.config, **o))
        yield f"QuantizedCache, {name}", divergence(full, found), bits


def stored(reading: Reading, entries: str) -> float:
    """Bytes of a context of which everything is kept, its native numbers counted as of 16 bits."""
    cache = reading.cut("streaming", 1.0, entries=entries)
    native = sum(s.keys.nbytes + s.values.nbytes for s in cache.kept.segments)
    return cache.nbytes - native * (1 - 2 / reading.whole.view.model.dtype.itemsize)


def ours(model: Any, reading: Reading, following: Tensor, entries: str) -> Tensor:
    """Log-probabilities after a context that is stored in few bits."""
    cache = reading.cut("streaming", 1.0, entries=entries)
    return after(model, cache, following, reading.first.keys.shape[2])


def predictions(model: Any, context: Tensor, following: Tensor, make: Callable[[], Cache]) -> Tensor:
    """Log-probabilities after a context in a cache of transformers."""
    cache = make()
    model(context, **given(model, cache), logits_to_keep=1)
    return after(model, cache, following, context.shape[1])


def after(model: Any, cache: Cache, following: Tensor, length: int) -> Tensor:
    """Of every token that follows but the first."""
    positions = torch.arange(length, length + following.shape[1])[None]
    return model(following, **given(model, cache), position_ids=positions).logits[0, :-1].float().log_softmax(-1)


def divergence(full: Tensor, found: Tensor) -> float:
    """KL from the full cache, in nats per token."""
    return float((full.exp() * (full - found)).sum(-1).mean())


if __name__ == "__main__":
    main()
