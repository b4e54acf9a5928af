"""Means of records, and how sure they are: every task counts the same, intervals come from a bootstrap of the samples.

A setting is a method at a keep. Of one task its value is the mean over the samples; over several tasks, the mean of
the tasks' means. Intervals hold 95% of the means of resampled samples, resampled within each task; in one task all
settings see the same resamples, so that ratios to the full cache compare like with like. Of a single sample no
interval is known. summary.py applies this to all there is of one model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, isnan
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from headwise.report.records import FULL, Record

RESAMPLES, SEED = 2000, 0
PERCENTILES = (2.5, 97.5)
MEASURES = ("score", "nll", "kl", "agreement")
PAIRED = ("paired", "yardstick")  # scores of a setting, and of the full cache on the very same samples


class Setting(NamedTuple):
    """A method at a keep."""

    method: str
    keep: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its interval, whose ends are None where it is unknown."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def exp(self) -> "Estimate":
        """A perplexity, from nats per token."""
        return self._each(exp)

    def times(self, factor: float) -> "Estimate":
        """In another unit."""
        return self._each(lambda value: factor * value)

    def _each(self, change: Callable[[float], float]) -> "Estimate":
        low, high = (None if end is None else change(end) for end in (self.low, self.high))
        return Estimate(value=change(self.value), low=low, high=high)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Means:
    """One measure of all settings: means, those of every resample, and the fewest samples of any task."""

    mean: Float[np.ndarray, " settings"]  # not a number where there are no samples
    resampled: Float[np.ndarray, "resamples settings"]
    samples: Float[np.ndarray, " settings"]

    @property
    def known(self) -> Bool[np.ndarray, " settings"]:
        """Which settings have the measure at all."""
        return ~np.isnan(self.mean)

    def estimates(self) -> list[Estimate | None]:
        """With intervals; None for settings that lack the measure."""
        low, high = _percentiles(self.resampled)
        return [_estimate(*found) for found in zip(self.mean, low, high, self.samples, strict=True)]

    def over(self, other: "Means") -> "Means":
        """The ratio to other means of the same samples."""
        with np.errstate(divide="ignore", invalid="ignore"):
            mean, resampled = self.mean / other.mean, self.resampled / other.resampled
        return Means(
            mean=np.where(np.isfinite(mean), mean, np.nan),
            resampled=np.where(np.isfinite(resampled), resampled, np.nan),
            samples=self.samples,
        )


def bootstrap(
    values: Mapping[str, Float[np.ndarray, "settings samples"]], generator: np.random.Generator
) -> dict[str, Means]:
    """Means of the measures of one task. All of them see the same resamples; a missing value is not a number."""
    samples = next(iter(values.values())).shape[1]
    drawn = generator.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES).astype(float)
    return {name: _means(found, drawn) for name, found in values.items()}


def _means(values: Float[np.ndarray, "settings samples"], drawn: Float[np.ndarray, "resamples samples"]) -> Means:
    present = ~np.isnan(values)
    filled, number = np.where(present, values, 0.0), present.sum(1).astype(float)
    with np.errstate(invalid="ignore"):  # no sample at all: 0 / 0
        return Means(
            mean=filled.sum(1) / number,
            resampled=(drawn @ filled.T) / (drawn @ present.T.astype(float)),
            samples=number,
        )


def mean_of_tasks(tasks: Sequence[Means]) -> Means:
    """Every task counts the same; a setting that lacks one of them has no mean."""
    return Means(
        mean=np.mean([task.mean for task in tasks], axis=0),
        resampled=np.mean([task.resampled for task in tasks], axis=0),
        samples=np.min([task.samples for task in tasks], axis=0),
    )


def _percentiles(resampled: Float[np.ndarray, "resamples settings"]) -> Float[np.ndarray, "ends settings"]:
    """Of the resamples that are numbers: one of few samples may hold none of those that a setting has."""
    bad = np.isnan(resampled)
    if not bad.any():
        return np.percentile(resampled, PERCENTILES, axis=0)
    columns = [column[~missing] for column, missing in zip(resampled.T, bad.T, strict=True)]
    nothing = np.full(len(PERCENTILES), np.nan)
    return np.stack([np.percentile(column, PERCENTILES) if len(column) else nothing for column in columns], axis=1)


def _estimate(mean: float, low: float, high: float, samples: float) -> Estimate | None:
    if isnan(mean):
        return None
    if samples < 2 or not (isfinite(low) and isfinite(high)):
        return Estimate(value=float(mean))
    return Estimate(value=float(mean), low=float(low), high=float(high))


def values_of(
    records: Iterable[Record], settings: Sequence[Setting]
) -> dict[str, Float[np.ndarray, "settings samples"]]:
    """Measures of one task's records by setting and sample, and the two that compare with the full cache."""
    records = list(records)
    columns = {sample: at for at, sample in enumerate(sorted({(record.seed, record.index) for record in records}))}
    rows = {setting: at for at, setting in enumerate(settings)}
    values = {name: np.full((len(rows), len(columns)), np.nan) for name in MEASURES}
    for record in records:
        row, column = rows[Setting(record.method, record.keep)], columns[record.seed, record.index]
        for name, value in zip(MEASURES, (record.score, record.nll, record.kl, record.agreement), strict=True):
            values[name][row, column] = np.nan if value is None else value
    full = [row for setting, row in rows.items() if setting.method == FULL]
    yardstick = values["score"][full[0]] if full else np.full(len(columns), np.nan)
    score, whole = np.broadcast_arrays(values["score"], yardstick)
    missing = np.isnan(score) | np.isnan(whole)
    values |= {name: np.where(missing, np.nan, of) for name, of in zip(PAIRED, (score, whole), strict=True)}
    return values
