"""The main job: one document, its questions, several methods, one keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from headwise.evals.answers import FULL, answer, read_context, require_possible, room_for_answers, time_decoding
from headwise.evals.document import Asked, tokenize
from headwise.evals.metrics import answers_found
from headwise.evals.room import require_room
from headwise.hf.families import view
from headwise.keep import Keep, parse_keep


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One method's row. Bytes are of keys and values in storage; `accuracy` is the mean share of answers found.

    `sliding_kv_bytes`, of sliding-window layers, are part of all the others: these layers are left whole.
    """

    method: str
    keep: float | str
    kv_bytes: int
    full_kv_bytes: int
    peak_kv_bytes: int
    sliding_kv_bytes: int
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
    split_special_tokens: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Comparison]:
    """Read `context` once per method, answer every question from what was kept, and measure.

    Query-agnostic: no question is seen before the context has been cut. Where a question has no known answers, the full
    cache's own answer stands in. "full" is transformers' own cache; it is always measured. One row per method, however
    often it is named. `split_special_tokens`: see `tokenize`. Before any work it raises BadInput if a method is unknown
    or the model has no room for the document, and BudgetInfeasible, ArtifactMismatch or UnsupportedModel if one of the
    methods could not run.
    """
    keep = parse_keep(keep)
    questions = [a.question for a in asked]
    require_room(tokenizer, context, view(model).max_positions)
    tokens = tokenize(tokenizer, context, questions, device=model.device, split_special_tokens=split_special_tokens)
    room_for_answers(model, tokens)
    require_possible(model, methods, [keep], tokens)
    others = [method for method in dict.fromkeys(methods) if method != FULL]

    def measure(method: str, full: Comparison | None) -> Comparison:
        progress(0 if full is None else 1 + others.index(method), 1 + len(others))
        memory = read_context(model, tokens.context, method, keep, prefill_chunk_size=prefill_chunk_size)
        kv_bytes, peak, sliding = memory.nbytes, memory.peak_nbytes, memory.sliding_nbytes
        texts = answer(model, tokenizer, memory, tokens, max_new_tokens=max_new_tokens)
        return Comparison(
            method=method,
            keep=1.0 if method == FULL else keep.value,
            kv_bytes=kv_bytes,
            full_kv_bytes=kv_bytes if full is None else full.kv_bytes,
            peak_kv_bytes=peak,
            sliding_kv_bytes=sliding,
            accuracy=_accuracy(asked, texts, texts if full is None else full.answers),
            decode_ms_per_token=time_decoding(model, memory, tokens),
            answers=tuple(texts),
        )

    full = measure(FULL, None)
    rows = {FULL: full, **{method: measure(method, full) for method in others}}
    progress(len(rows), len(rows))
    return [rows[method] for method in dict.fromkeys(methods)]


def _accuracy(asked: Sequence[Asked], texts: Sequence[str], full_texts: Sequence[str]) -> float:
    expected = [question.answers or (text,) for question, text in zip(asked, full_texts, strict=True)]
    return fmean(answers_found(text, phrases) for text, phrases in zip(texts, expected, strict=True))
