"""The statistics behind the verdicts: t intervals and their p values, the jackknife, Holm's correction, slopes, the top of a
parabola, and how many seeds would do.

Quantiles are SciPy's: `scipy.special` holds the functions that `scipy.stats.t` calls, and takes a fraction of its time to import.
Parabolas are NumPy's. Slopes are the standard library's: `numpy.polyfit` takes ten times as long, and its rounding can show in
the fourth decimal of a table where a value ends in 5.
"""

import bisect
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
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


def p_zero(i: Interval) -> float:
    """Two-sided p of a mean of 0: at most 0.05 where the 95 % interval excludes 0. 1 below two values."""
    return _two_sided(abs(i.mean), i)


def p_inside(i: Interval, margin: float) -> float:
    """Twice the p of the two one-sided tests of |mean| >= `margin` (Schuirmann 1987): at most 0.05 where the 95 % interval
    lies inside the margin. 1 below two values."""
    return _two_sided(margin - abs(i.mean), i)


def _two_sided(distance: float, i: Interval) -> float:
    if i.n < 2 or distance <= 0:
        return 1.0
    return 0.0 if i.sd == 0 else 2 * t_cdf(-distance / (i.sd / math.sqrt(i.n)), i.n - 1)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values in the order given: at most `a` for those that a test at family-wise level `a` rejects (Holm 1979)."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, k in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min((len(p) - rank) * p[k], 1.0))
        adjusted[k] = largest
    return adjusted


def jackknife(units: Sequence, statistic: Callable[[Sequence], float]) -> list[float]:
    """Pseudo-values n s - (n - 1) s_i of a statistic of n units, s_i without unit i (Tukey 1958); [s] of a single unit.

    `interval` of them is the jackknife's; of a mean they are the units' own values.
    """
    whole, n = statistic(units), len(units)
    if n == 1:
        return [whole]
    return [n * whole - (n - 1) * statistic([*units[:i], *units[i + 1 :]]) for i in range(n)]


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
