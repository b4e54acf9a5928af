"""The quality and cost of a setting on one task or over several, and what every head keeps.

Made from records.py's records and statistics.py's means; summary.py puts them together.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median

import numpy as np
from jaxtyping import Float

from headwise.report.quality.records import Record
from headwise.report.quality.statistics import Estimate, Means, Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task at one length. `label` is the part of its name that no other task has."""

    name: str
    length: int
    label: str
    perplexity: bool  # nothing is answered: judged by its nats per token


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Bytes are means over the samples, times are medians."""

    kv_bytes: float
    full_kv_bytes: float
    sliding_kv_bytes: float
    peak_kv_bytes: float
    kv_fraction: float
    context_tokens: float
    prefill_seconds: float
    prefill_shared_by: float
    decode_seconds: float  # of one sequence: a batch's over its rows
    step_ms: float | None

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Cost":
        """Return what one setting costs in one task."""
        bytes_of = ("kv_bytes", "full_kv_bytes", "sliding_kv_bytes", "peak_kv_bytes", "context_tokens")
        return cls(
            **{name: fmean(getattr(record, name) for record in records) for name in bytes_of},
            kv_fraction=fmean(record.kv_bytes / record.full_kv_bytes for record in records),
            prefill_seconds=median(record.prefill_seconds for record in records),
            prefill_shared_by=fmean(record.prefill_shared_by for record in records),
            decode_seconds=median(record.decode_seconds / record.decode_rows for record in records),
            step_ms=_median([record.step_ms for record in records if record.step_ms is not None]),
        )

    @classmethod
    def mean(cls, costs: Sequence["Cost"]) -> "Cost":
        """Return the mean over tasks, each counting the same."""
        steps = [cost.step_ms for cost in costs if cost.step_ms is not None]
        names = [field.name for field in fields(cls) if field.name != "step_ms"]
        means = {name: fmean(getattr(cost, name) for cost in costs) for name in names}
        return cls(**means, step_ms=fmean(steps) if steps else None)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cell:
    """The results of a setting on one task."""

    samples: int
    quality: Estimate  # mean score, or perplexity
    kl: Estimate | None
    agreement: Estimate | None
    cost: Cost
    kept: Float[np.ndarray, "layers kv_heads"]  # fractions of the context


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Overall:
    """The results of a setting over all tasks; None where it lacks some of them."""

    score: Estimate | None
    of_full: Estimate | None  # the score as a fraction of the full cache's
    perplexity: Estimate | None
    kl: Estimate | None
    agreement: Estimate | None
    cost: Cost
    kept: Float[np.ndarray, "layers kv_heads"]


def cells_of(
    task: Task, records: Iterable[Record], settings: Sequence[Setting], means: Mapping[str, Means]
) -> dict[Setting, Cell]:
    """Return the results of the settings on one task; those without a record are left out."""
    grouped: dict[Setting, list[Record]] = defaultdict(list)
    for record in records:
        grouped[Setting.of(record)].append(record)
    estimates = {name: means[name].estimates() for name in ("nll" if task.perplexity else "score", "kl", "agreement")}
    cells = {}
    for index, setting in enumerate(settings):
        quality, kl, agreement = (by_setting[index] for by_setting in estimates.values())
        if quality is not None:
            cells[setting] = Cell(
                samples=len(grouped[setting]),
                quality=quality.exp() if task.perplexity else quality,
                kl=kl,
                agreement=agreement,
                cost=Cost.of(grouped[setting]),
                kept=mean_kept([record.kept / record.context_tokens for record in grouped[setting]]),
            )
    return cells


def mean_kept(maps: Sequence[Float[np.ndarray, "layers kv_heads"]]) -> Float[np.ndarray, "layers kv_heads"]:
    """Return the mean of the maps that are known, 0 if none is. Short records have a task's first map only."""
    known = [kept for kept in maps if not np.isnan(kept).any()]
    return np.mean(known, axis=0) if known else np.zeros_like(maps[0])


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
