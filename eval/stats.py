"""Intervals over samples: paired bootstrap, percentile method, 95 %.

Every function resamples whole samples, so that what was measured on one sample stays together. The seed is
fixed: the same numbers give the same interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmcache_blend.errors import ConfigError

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A statistic of all samples and the 95 % interval around it; NaN in all three where it is undefined."""

    mean: float
    low: float
    high: float


def bootstrap(values: ArrayLike) -> Interval:
    """Mean of values [n]. Raises ConfigError where there are none.

    >>> bootstrap([2.0, 2.0, 2.0])
    Interval(mean=2.0, low=2.0, high=2.0)
    """
    (column,) = _columns(values)
    return _interval(float(column.mean()), column[_draws(len(column))].mean(axis=1))


def paired_difference(a: ArrayLike, b: ArrayLike) -> Interval:
    """Mean of a - b, each [n] over the same samples. Raises ConfigError where their lengths differ."""
    first, second = _columns(a, b)
    return bootstrap(first - second)


def normalised_quality(nll_none: ArrayLike, nll_method: ArrayLike, nll_full: ArrayLike) -> Interval:
    """How much of what the context brings survives: sum(none - method) / sum(none - full), each [n], nats.

    1 is full prefill, 0 is no context; a method may lie outside. A ratio of sums: the ratio of a single
    sample is unbounded where context brings it nothing. NaN where it brings nothing in all (see has_signal).
    """
    none, method, full = _columns(nll_none, nll_method, nll_full)
    draws = _draws(len(none))
    gained, possible = none - method, none - full
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(gained.sum() / possible.sum())
        ratios = gained[draws].sum(axis=1) / possible[draws].sum(axis=1)
    return _interval(ratio, ratios[np.isfinite(ratios)])


def has_signal(nll_none: ArrayLike, nll_full: ArrayLike) -> bool:
    """Whether context helps full prefill: the interval of the paired NLL difference lies above 0.

    One sample alone has no spread to judge by, so it never counts as signal.
    """
    gain = paired_difference(nll_none, nll_full)
    return len(np.atleast_1d(nll_none)) > 1 and gain.low > 0


def _columns(*columns: ArrayLike) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    sizes = [array.shape for array in arrays]
    if any(len(size) != 1 or size != sizes[0] for size in sizes):
        raise ConfigError(f"statistics need one number per sample, in equal rows; got shapes {sizes}")
    if sizes[0][0] == 0:
        raise ConfigError("statistics over 0 samples; measure at least 1")
    return arrays


def _draws(n: int) -> NDArray[np.int64]:
    """[RESAMPLES, n] indices of samples, drawn with replacement."""
    return np.random.default_rng(SEED).integers(0, n, size=(RESAMPLES, n))


def _interval(value: float, resampled: Sequence[float] | NDArray[np.float64]) -> Interval:
    if not np.isfinite(value) or len(resampled) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    # Rounding, and skew on a handful of samples, can leave the statistic itself just outside.
    return Interval(value, min(float(low), value), max(float(high), value))
