"""Compare several methods, keeps and kinds of entries on one document and its questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from headwise.cache.compress import Progress
from headwise.errors import BadInput
from headwise.evals.answers import known_methods, require_possible
from headwise.evals.session import FULL_SETTING, Outcome, Session, Setting, every_setting
from headwise.kernels.quantised import NATIVE, require_entries
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.reading import EXACT
from headwise.methods.registry import FULL
from headwise.models.families import view
from headwise.tasks.document import Asked
from headwise.tasks.metrics import answers_found
from headwise.tasks.task import Question, Sample, require_protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One method at one keep, its entries stored in one way. Bytes are of keys and values in storage.

    `accuracy` is the mean share of known answers found, over the questions that have some; where none has, the share of
    answers that are the full cache's, or None if that was not measured: then `kl` and `agreement` are None too, and
    `full_kv_bytes` is what the full cache would take. `kl` (nats) and `agreement` (share of tokens with the same first
    choice) are of the full cache's own answers, token by token (fidelity.py). `prefill_seconds` is the time of
    the reading that served `prefill_shared_by` rows. `sliding_kv_bytes`, of sliding-window layers, are part of all
    the other bytes: these layers are left whole.
    """

    method: str
    keep: float | str
    entries: str
    protocol: str
    kv_bytes: int
    full_kv_bytes: int
    peak_kv_bytes: int
    sliding_kv_bytes: int
    accuracy: float | None
    kl: float | None
    agreement: float | None
    prefill_seconds: float
    prefill_shared_by: int
    decode_ms_per_token: float
    answers: tuple[str, ...]


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    context: str,
    asked: Sequence[Asked],
    *,
    methods: Sequence[str],
    keep: float | str | Keep | Sequence[float | str | Keep],
    entries: str | Sequence[str] = NATIVE,
    max_new_tokens: int = 32,
    protocol: str = "query-agnostic",
    prefill_chunk_size: int | None = None,
    reading: str = EXACT,
    split_special_tokens: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Comparison]:
    """Compress one document with every method at every keep, answer its questions, and measure.

    Methods share one reading of the document where they can (session.py), so the full cache stays in memory.

    Parameters
    ----------
    context
        The document.
    asked
        The questions, and their answers where they are known.
    methods
        Names of methods; "full" is transformers' own cache, which is always measured.
    keep
        One or more keeps: fractions, tokens ("1024tok") or bytes ("2GiB", "5%bytes").
    entries
        How kept entries are stored: "native", "int8", "k8v4", "int4" or "auto", one or more. The full cache is native.
    max_new_tokens
        Tokens of an answer, at most.
    protocol
        "query-agnostic" compresses before any question is seen. "query-aware" compresses each question with
        the document, and reads the document once per question.
    prefill_chunk_size
        Tokens that are read in one forward pass; None: all.
    reading
        See headwise.compress. Where it is not "exact", every row has a reading of its own, and "full" is measured only
        if it is among the methods: the full cache may not fit into memory.
    split_special_tokens
        See `tokenize`.
    progress
        Is called with (rows measured, rows in all).

    Returns
    -------
    list of Comparison
        One row per method, keep and entries, in the order given. What is named twice has one row.

    Raises
    ------
    BadInput
        If a method or a kind of entries is unknown, or the model has no room for the document.
    BudgetInfeasible, ArtifactMismatch, UnsupportedModel
        If one of the methods cannot run. All errors come before any work.
    """
    require_protocol(protocol)
    keeps, stored = _parse_keeps(keep), _parse_entries(entries)
    known_methods(methods)
    session = Session(
        model=model,
        tokenizer=tokenizer,
        query_aware=protocol == "query-aware",
        prefill_chunk_size=prefill_chunk_size,
        reading=reading,
        yardstick=reading == EXACT or FULL in methods,
        split_special_tokens=split_special_tokens,
    )
    sample = _sample(context, asked, max_new_tokens)
    for tokens in session.tokens(sample):
        require_possible(model, methods, keeps, tokens, entries=stored, reading=reading)
    settings = every_setting(methods, keeps, stored)
    outcomes = session.measure(sample, settings, timed=True, progress=progress)
    full, of_full = outcomes.get(FULL_SETTING), partial(_full_bytes, model)
    return [_row(setting, outcomes[setting], full, of_full, asked, protocol) for setting in settings]


def _sample(context: str, asked: Sequence[Asked], max_new_tokens: int) -> Sample:
    questions = tuple(Question(prompt=question.question, answers=question.answers) for question in asked)
    return Sample(context=context, questions=questions, max_new_tokens=max_new_tokens)


def _parse_keeps(keep: float | str | Keep | Sequence[float | str | Keep]) -> list[Keep]:
    keeps = [keep] if isinstance(keep, str | int | float | Keep) else list(keep)
    if not keeps:
        raise BadInput("no keep is given; give one, such as 0.15.")
    return [parse_keep(one) for one in keeps]


def _parse_entries(entries: str | Sequence[str]) -> list[str]:
    names = [entries] if isinstance(entries, str) else list(entries)
    if not names:
        raise BadInput(f"no entries are given; give one kind, such as {NATIVE!r}.")
    for name in names:
        require_entries(name)
    return names


def _full_bytes(model: PreTrainedModel, outcome: Outcome) -> int:
    """Return what the full cache of a context would take that was measured without it."""
    shape = view(model).shape
    entries = shape.num_heads * outcome.context_tokens
    return entries * shape.entry_bytes(model.dtype.itemsize) + outcome.sliding_kv_bytes


def _row(
    setting: Setting,
    outcome: Outcome,
    full: Outcome | None,
    full_bytes: Callable[[Outcome], int],
    asked: Sequence[Asked],
    protocol: str,
) -> Comparison:
    assert outcome.step_ms is not None
    return Comparison(
        method=setting.method,
        keep=setting.keep.value,
        entries=setting.entries,
        protocol=protocol,
        kv_bytes=outcome.kv_bytes,
        full_kv_bytes=full_bytes(outcome) if full is None else full.kv_bytes,
        peak_kv_bytes=outcome.peak_kv_bytes,
        sliding_kv_bytes=outcome.sliding_kv_bytes,
        accuracy=_accuracy(asked, outcome.predictions, None if full is None else full.predictions),
        kl=outcome.fidelity.kl,
        agreement=outcome.fidelity.agreement,
        prefill_seconds=outcome.prefill_seconds,
        prefill_shared_by=outcome.prefill_shared_by,
        decode_ms_per_token=outcome.step_ms,
        answers=outcome.predictions,
    )


def _accuracy(asked: Sequence[Asked], texts: Sequence[str], full_texts: Sequence[str] | None) -> float | None:
    judged = zip(asked, texts, strict=True)
    scores = [answers_found(text, question.answers) for question, text in judged if question.answers]
    if full_texts is None:
        return fmean(scores) if scores else None
    return fmean(scores or [answers_found(text, (full,)) for text, full in zip(texts, full_texts, strict=True)])
