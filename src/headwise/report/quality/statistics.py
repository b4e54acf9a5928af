"""Compute means of records and their intervals: every task counts the same, and few samples have wide intervals.

A setting is a method at a keep, with entries of one kind. Of one task its value is the mean over the samples; over
several tasks, the mean of the tasks' means. Intervals hold 95% of the means of reweighted samples, reweighted within
each task (Rubin's Bayesian bootstrap); in one task all settings see the same weights, so that ratios to the full cache
compare like with like.

Samples that all score the same have no spread, yet others may score differently. So a score or an agreement, which
lies between 0 and 1, is averaged with one imagined sample more, spread evenly over what it may be. Where scores are 0
or 1 the interval is Jeffreys' (Brown, Cai and DasGupta, "Interval Estimation for a Binomial Proportion", Statistical
Science 2001): two right answers of two give 0.33 to 1. What has no upper end, divergence and nats, is spread by
Student's t; of a single sample its interval is unknown. summary.py applies this to all there is of one model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, isnan
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import ndtri, stdtrit

from headwise.report.quality.records import FULL, NATIVE, Record

RESAMPLES, SEED = 2000, 0
PERCENTILES = (2.5, 97.5)
MEASURES = ("score", "nll", "kl", "agreement")
PAIRED = ("paired", "yardstick")  # scores of a setting, and of the full cache on the very same samples
# The imagined sample: a quarter of it at each of these, a setting's value and the full cache's.
IMAGINED = np.array([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
BOUNDED = {"score": 0, "agreement": 0, "paired": 0, "yardstick": 1}  # and their column in it


class Curve(NamedTuple):
    """A method with entries of one kind: its settings at all keeps are one line of a chart."""

    method: str
    entries: str = NATIVE

    @property
    def name(self) -> str:
        """As charts and tables show it."""
        return self.method if self.entries == NATIVE else f"{self.method}, {self.entries}"

    def at(self, keep: str) -> "Setting":
        """Return its setting at a keep."""
        return Setting(self.method, keep, self.entries)


class Setting(NamedTuple):
    """A method at a keep, and how its entries are stored."""

    method: str
    keep: str
    entries: str = NATIVE

    @classmethod
    def of(cls, record: Record) -> "Setting":
        """Return that of a record."""
        return cls(record.method, record.keep, record.entries)

    @property
    def curve(self) -> Curve:
        """What it is a point of."""
        return Curve(self.method, self.entries)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its interval, whose ends are None where it is unknown."""

    value: float
    low: float | None = None
    high: float | None = None

    def exp(self) -> "Estimate":
        """Return the perplexity of nats per token."""
        return self._each(exp)

    def times(self, factor: float) -> "Estimate":
        """Return the estimate in another unit."""
        return self._each(lambda value: factor * value)

    def _each(self, change: Callable[[float], float]) -> "Estimate":
        low, high = (None if end is None else change(end) for end in (self.low, self.high))
        return Estimate(value=change(self.value), low=low, high=high)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Means:
    """One measure of all settings: means, and those of every reweighting."""

    mean: Float[np.ndarray, " settings"]  # NaN where there are no samples
    resampled: Float[np.ndarray, "resamples settings"]

    @property
    def known(self) -> Bool[np.ndarray, " settings"]:
        """Whether each setting has the measure."""
        return ~np.isnan(self.mean)

    def estimates(self) -> list[Estimate | None]:
        """Return means with intervals; None for settings that lack the measure."""
        low, high = np.percentile(self.resampled, PERCENTILES, axis=0)
        return [_estimate(*numbers) for numbers in zip(self.mean, low, high, strict=True)]

    def over(self, reference: "Means") -> "Means":
        """Return the ratio to other means of the same samples."""
        with np.errstate(divide="ignore", invalid="ignore"):
            mean, resampled = self.mean / reference.mean, self.resampled / reference.resampled
        return Means(
            mean=np.where(np.isfinite(mean), mean, np.nan),
            resampled=np.where(np.isfinite(resampled), resampled, np.nan),
        )


def bootstrap(
    values: Mapping[str, Float[np.ndarray, "settings samples"]], generator: np.random.Generator
) -> dict[str, Means]:
    """Return the means of the measures of one task. All of them see the same weights; a missing value is NaN."""
    samples = next(iter(values.values())).shape[1]
    shares = np.append(np.ones(samples), np.full(len(IMAGINED), 1 / len(IMAGINED)))
    drawn = generator.standard_gamma(shares, size=(RESAMPLES, len(shares)))
    own, imagined = drawn[:, :samples], drawn[:, samples:]
    return {
        name: _bounded(array, own, imagined, BOUNDED[name]) if name in BOUNDED else _unbounded(array, own)
        for name, array in values.items()
    }


def interval(scores: Sequence[float]) -> Estimate | None:
    """Return the mean and interval of one setting's scores on one task; None without a score."""
    generator = np.random.default_rng(SEED)
    return bootstrap({"score": np.array([scores], dtype=float)}, generator)["score"].estimates()[0] if scores else None


def _bounded(
    values: Float[np.ndarray, "settings samples"],
    own: Float[np.ndarray, "resamples samples"],
    imagined: Float[np.ndarray, "resamples corners"],
    column: int,
) -> Means:
    mean, filled, present = _present(values)
    total = own @ filled.T + (imagined @ IMAGINED[:, column])[:, None]
    return Means(mean=mean, resampled=total / (own @ present.T + imagined.sum(1)[:, None]))


def _unbounded(values: Float[np.ndarray, "settings samples"], own: Float[np.ndarray, "resamples samples"]) -> Means:
    """Return means of a measure that has no upper end, resampled with the quantiles of Student's t, not below 0."""
    mean, filled, present = _present(values)
    number = present.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):  # no sample, or a single one
        wider = stdtrit(number - 1, PERCENTILES[1] / 100) / ndtri(PERCENTILES[1] / 100)
        wider = wider * np.sqrt((number + 1) / (number - 1))
        spread = (own @ filled.T) / (own @ present.T) - mean
        return Means(mean=mean, resampled=np.maximum(mean + wider * spread, 0.0))


def _present(values: Float[np.ndarray, "settings samples"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means, the values with 0 for missing ones, and 1 where there is a value."""
    present = ~np.isnan(values)
    filled = np.where(present, values, 0.0)
    with np.errstate(invalid="ignore"):  # no sample at all: 0 / 0
        return filled.sum(1) / present.sum(1), filled, present.astype(float)


def mean_of_tasks(tasks: Sequence[Means]) -> Means:
    """Return the mean over tasks, each counting the same; a setting that lacks one of them has no mean."""
    return Means(
        mean=np.mean([task.mean for task in tasks], axis=0),
        resampled=np.mean([task.resampled for task in tasks], axis=0),
    )


def _estimate(mean: float, low: float, high: float) -> Estimate | None:
    """Return an estimate whose interval holds the mean: the imagined sample could move it off an end of the scale."""
    if isnan(mean):
        return None
    if not (isfinite(low) and isfinite(high)):
        return Estimate(value=float(mean))
    return Estimate(value=float(mean), low=float(min(low, mean)), high=float(max(high, mean)))


def values_of(
    records: Iterable[Record], settings: Sequence[Setting]
) -> dict[str, Float[np.ndarray, "settings samples"]]:
    """Return the measures of one task's records by setting and sample, and two that compare with the full cache."""
    records = list(records)
    samples = sorted({(record.seed, record.index) for record in records})
    columns = {sample: index for index, sample in enumerate(samples)}
    rows = {setting: index for index, setting in enumerate(settings)}
    values = {name: np.full((len(rows), len(columns)), np.nan) for name in MEASURES}
    for record in records:
        row, column = rows[Setting.of(record)], columns[record.seed, record.index]
        for name, value in zip(MEASURES, (record.score, record.nll, record.kl, record.agreement), strict=True):
            values[name][row, column] = np.nan if value is None else value
    full = [row for setting, row in rows.items() if setting.method == FULL]
    yardstick = values["score"][full[0]] if full else np.full(len(columns), np.nan)
    score, full_score = np.broadcast_arrays(values["score"], yardstick)
    missing = np.isnan(score) | np.isnan(full_score)
    pair = zip(PAIRED, (score, full_score), strict=True)
    values |= {name: np.where(missing, np.nan, array) for name, array in pair}
    return values
