"""The statistics behind the verdicts: t intervals, slopes, the top of a parabola, and how many seeds would do.

Standard library only. Checked in the tests against printed tables, numpy and, where it is installed, scipy.
"""

import bisect
import functools
import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

LEAST_SEEDS = 3  # below these every verdict is "not resolved"


class Incomplete(ValueError):
    """A statistic lacks cells; the message says which."""


def t_cdf(t: float, df: int) -> float:
    """Student's t distribution function for a whole number of degrees of freedom.

    The finite trigonometric series of Abramowitz & Stegun 26.7.3 and 26.7.4.
    """
    theta = math.atan2(t, math.sqrt(df))
    cos, sin = math.cos(theta), math.sin(theta)
    if df % 2:
        total, term = 0.0, cos
        for k in range(1, df - 1, 2):
            total += term
            term *= cos * cos * (k + 1) / (k + 2)
        inside = 2 / math.pi * (theta + sin * total)
    else:
        total, term = 0.0, 1.0
        for k in range(0, df - 1, 2):
            total += term
            term *= cos * cos * (k + 1) / (k + 2)
        inside = sin * total
    return 0.5 + inside / 2


@functools.lru_cache(4096)
def t_quantile(p: float, df: int) -> float:
    """The t with `t_cdf(t, df)` = p, 0.5 <= p < 1, by bisection to 1e-12 relative. Raises `ValueError` otherwise."""
    if not 0.5 <= p < 1 or df < 1:
        raise ValueError(f"no t quantile for p = {p} and {df} degrees of freedom")
    high = 1.0
    while t_cdf(high, df) < p:
        high *= 2
    low = 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


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


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of y on x. Raises `Incomplete` with fewer than two different x."""
    if len(set(x)) < 2:
        raise Incomplete("at least two batch sizes")
    middle = statistics.fmean(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def best_log2(B: list[int], acc: list[float]) -> float:
    """The log2 B at which a least-squares parabola through accuracy on log2 B is highest, within the tested range.

    Where the parabola opens upwards the better of the two ends. Raises `Incomplete` with fewer than three sizes.
    """
    if len(set(B)) < 3:
        raise Incomplete("at least three batch sizes")
    x = [math.log2(b) for b in B]
    middle = statistics.fmean(x)
    z = [v - middle for v in x]  # centred: the normal equations below are then well conditioned
    s2, s3, s4 = (sum(v**k for v in z) for k in (2, 3, 4))
    n, sy = len(z), sum(acc)
    sxy, sxxy = (sum(v**k * y for v, y in zip(z, acc, strict=True)) for k in (1, 2))
    # [n 0 s2; 0 s2 s3; s2 s3 s4] (a, b, c) = (sy, sxy, sxxy); eliminate a and b
    c = (sxxy - s2 * sy / n - s3 * sxy / s2) / (s4 - s2 * s2 / n - s3 * s3 / s2)
    b = (sxy - s3 * c) / s2
    if c < 0:
        return min(max(middle - b / (2 * c), min(x)), max(x))
    ends = [i for i in range(n) if x[i] in (min(x), max(x))]
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
