"""The main job: one document, its questions, several methods, one keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from headwise.evals.answers import FULL, answer, read_context, time_decoding
from headwise.evals.document import Asked, tokenize
from headwise.evals.metrics import answers_found
from headwise.keep import Keep, parse_keep
from headwise.method import Method


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One method's row. Bytes are of keys and values in storage; `accuracy` is the mean share of answers found."""

    method: str
    keep: float | str
    kv_bytes: int
    full_kv_bytes: int
    peak_kv_bytes: int
    accuracy: float
    decode_ms_per_token: float
    answers: tuple[str, ...]


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    context: str,
    asked: Sequence[Asked],
    *,
    methods: Sequence[str],
    keep: float | str | Keep,
    max_new_tokens: int = 32,
    prefill_chunk_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Comparison]:
    """Read `context` once per method, answer every question from what was kept, and measure.

    Query-agnostic: no question is seen before the context has been cut. Where a question has no known answers, the full
    cache's own answer stands in. "full" is transformers' own cache. Raises before any work if a method is unknown.
    """
    keep = parse_keep(keep)
    for method in methods:
        if method != FULL:
            Method.parse(method)
    tokens = tokenize(tokenizer, context, [a.question for a in asked], device=model.device)
    rows: list[Comparison] = []
    expected: list[tuple[str, ...]] = []
    full_bytes = 0
    order = [FULL, *(m for m in dict.fromkeys(methods) if m != FULL)]
    for done, method in enumerate(order):
        progress(done, len(order))
        memory = read_context(model, tokens.context, method, keep, prefill_chunk_size=prefill_chunk_size)
        kv_bytes, peak = memory.nbytes, memory.peak_nbytes
        texts = answer(model, tokenizer, memory, tokens, max_new_tokens=max_new_tokens)
        if method == FULL:
            expected = [a.answers or (text,) for a, text in zip(asked, texts, strict=True)]
            full_bytes = kv_bytes
        right = [answers_found(text, phrases) for text, phrases in zip(texts, expected, strict=True)]
        rows.append(
            Comparison(
                method=method,
                keep=1.0 if method == FULL else _json_keep(keep),
                kv_bytes=kv_bytes,
                full_kv_bytes=full_bytes,
                peak_kv_bytes=peak,
                accuracy=sum(right) / len(right),
                decode_ms_per_token=time_decoding(model, memory, tokens),
                answers=tuple(texts),
            )
        )
    progress(len(order), len(order))
    by_method = {row.method: row for row in rows}
    return [by_method[method] for method in methods]


def _json_keep(keep: Keep) -> float | str:
    return float(keep.amount) if keep.kind == "fraction" else str(keep)
