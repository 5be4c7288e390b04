"""The statistics behind the verdicts: t intervals, slopes, the top of a parabola, and how many seeds would do.

Quantiles are SciPy's: `scipy.special` holds the functions that `scipy.stats.t` calls, and takes a fraction of its time to import.
Parabolas are NumPy's. Slopes are the standard library's: `numpy.polyfit` takes ten times as long, and its rounding can show in
the fourth decimal of a table where a value ends in 5.
"""

import bisect
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

LEAST_SEEDS = 3  # below these every verdict is "not resolved"


class Incomplete(ValueError):
    """A statistic lacks cells; the message says which."""


def t_cdf(t: float, df: int) -> float:
    """Student's t distribution function for `df` degrees of freedom."""
    return float(stdtr(df, t))


@functools.lru_cache(4096)
def t_quantile(p: float, df: int) -> float:
    """The t with `t_cdf(t, df)` = p, 0.5 <= p < 1. Raises `ValueError` otherwise."""
    if not 0.5 <= p < 1 or df < 1:
        raise ValueError(f"no t quantile for p = {p} and {df} degrees of freedom")
    return float(stdtrit(df, p))


class Interval(NamedTuple):
    """Mean of `n` per-seed values, their standard deviation, and the confidence interval of the mean.

    With one seed there is neither deviation nor interval (NaN).
    """

    mean: float
    low: float
    high: float
    sd: float
    n: int


def interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """t interval, n - 1 degrees of freedom. Raises `ValueError` without values."""
    values = list(values)
    n = len(values)
    if not n:
        raise ValueError("an interval needs values")
    mean = statistics.fmean(values)
    if n == 1:
        return Interval(mean, math.nan, math.nan, math.nan, 1)
    sd = statistics.stdev(values)
    half = t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y on x. Raises `Incomplete` with fewer than two different x."""
    if len(set(x)) < 2:
        raise Incomplete("at least two batch sizes")
    return statistics.linear_regression(x, y).slope


def best_log2(B: Sequence[int], acc: Sequence[float]) -> float:
    """The log2 B at which a least-squares parabola through accuracy on log2 B is highest, within the tested range.

    Where the parabola opens upwards the better of the two ends. Raises `Incomplete` with fewer than three sizes.
    """
    if len(set(B)) < 3:
        raise Incomplete("at least three batch sizes")
    x = [math.log2(b) for b in B]
    middle = statistics.fmean(x)
    c, b, _ = np.polyfit([v - middle for v in x], acc, 2).tolist()
    if c < 0:
        return min(max(middle - b / (2 * c), min(x)), max(x))
    ends = [i for i in range(len(x)) if x[i] in (min(x), max(x))]
    return x[max(ends, key=lambda i: acc[i])]


def pooled_sd(groups: Iterable[list[float]]) -> float:
    """Standard deviation within groups, pooled over them; NaN where no group has two values."""
    groups = [g for g in groups if len(g) > 1]
    freedom = sum(len(g) - 1 for g in groups)
    return math.sqrt(sum(statistics.variance(g) * (len(g) - 1) for g in groups) / freedom) if freedom else math.nan


def seeds_needed(effect: float, sd: float, margin: float, most: int = 1000) -> int | None:
    """Seeds after which an interval around `effect` would exclude 0 or lie inside the margin; None beyond `most`.

    `sd` is that of one seed's statistic. An effect that stays as it is and a half-width t sd / sqrt(n) are assumed.
    """
    if not math.isfinite(sd):
        return None
    room = max(abs(effect), margin - abs(effect))

    def enough(n: int) -> bool:
        return t_quantile(0.975, n - 1) * sd / math.sqrt(n) < room

    if not enough(most):
        return None
    return LEAST_SEEDS + bisect.bisect_left(range(LEAST_SEEDS, most), True, key=enough)
