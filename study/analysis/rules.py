"""What may be said of a statistic: the reading of one budget, and the verdict of two.

m is the margin, the smallest effect of interest, and [l, u] the 95 % interval (Student's t over n seeds), in the claimed
direction. A reading is *yes* where l > m, *opposite* where u < -m, *negligible* where [l, u] lies inside (-m, m), else *open*.

None of the three holds where a part may speak against it: no line and no stretch of batch sizes may contribute as much as
the margin in the other direction (any direction, for negligible), by its own 95 % limit. The tests are intersection-union
tests (Berger 1982), which need no correction for their number. Where a stretch is known to rise by the margin and another to
fall by it, corrected for the number of stretches (Bonferroni), the reading is *not monotone*.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from study.analysis.statistics import Estimate

LEVEL = 0.05
LEAST_SEEDS = 3  # below these everything is open
OPEN, YES, NEGLIGIBLE, OPPOSITE, TURNS = range(5)
DEFINITE = (YES, NEGLIGIBLE, OPPOSITE)
READINGS = {  # in the order of the codes
    "open": "anything else, fewer than three complete seeds, or a noise level or stretch that may speak against it",
    "yes": "l > m",
    "negligible": "[l, u] lies inside (-m, m)",
    "opposite": "u < -m",
    "not monotone": "a stretch of batch sizes is known to go up by m and another to go down by it",
}
VERDICTS = {
    "supported": "yes under both budgets",
    "negligible": "negligible under both budgets",
    "reversed": "opposite under both budgets",
    "depends on the budget": "two of yes, negligible and opposite, one under each budget",
    "not resolved": "anything else",
}


@functools.lru_cache(4096)
def t_quantile(p: float, df: int) -> float:
    """Student's t quantile."""
    return float(stdtrit(df, p))


class Moments(NamedTuple):
    """Mean and standard deviation over seeds, (..., columns) each."""

    mean: np.ndarray
    sd: np.ndarray

    def limits(self, n: int, tests: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper limits of the mean of `n` seeds, each at 2.5 % over `tests`; infinite below three seeds."""
        if n < LEAST_SEEDS:
            return np.full_like(self.mean, -np.inf), np.full_like(self.mean, np.inf)
        half = t_quantile(1 - LEVEL / 2 / max(tests, 1), n - 1) * self.sd / n**0.5
        return self.mean - half, self.mean + half


def moments(columns: np.ndarray) -> Moments:
    """Of (..., n, columns)."""
    n = columns.shape[-2]
    mean = columns.mean(-2)
    return Moments(mean, columns.std(-2, ddof=1) if n > 1 else np.full_like(mean, np.nan))


class Summary(NamedTuple):
    """The moments of an estimate in the claimed direction."""

    below: Moments
    above: Moments
    levels: Moments
    stretches: Moments
    tests: int


def summary(estimate: Estimate, direction: int = 1) -> Summary:
    """An estimate's moments over its seeds."""
    _, *columns, tests = estimate.turned(direction)
    return Summary(*(moments(part) for part in columns), tests)


def bounds(s: Summary, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The bounds [l, u] of what is estimated, (...)."""
    return s.below.limits(n, s.tests)[0].min(-1), s.above.limits(n, s.tests)[1].max(-1)


def read(s: Summary, n: int, margin: float, may_be_negligible: bool = True) -> np.ndarray:
    """The reading of one budget, (...) of codes."""
    low, high = bounds(s, n)
    parts = [part.limits(n) for part in (s.levels, s.stretches)]
    never_down = np.all([(of[0] > -margin).all(-1) for of in parts], 0)
    never_up = np.all([(of[1] < margin).all(-1) for of in parts], 0)
    claimed, refuted = low > margin, high < -margin
    falls, rises = (s.stretches.limits(n, s.stretches.mean.shape[-1])[k] for k in (1, 0))
    turns = (claimed | (rises > margin).any(-1)) & (refuted | (falls < -margin).any(-1))
    inside = (low > -margin) & (high < margin) & never_down & never_up & may_be_negligible
    cases = [claimed & never_down, refuted & never_up, inside, turns]
    return np.select(cases, [YES, OPPOSITE, NEGLIGIBLE, TURNS], OPEN)


def verdict(codes: Sequence[int]) -> str:
    """The verdict of the readings of two budgets, or of the one that runs without a schedule have."""
    if not set(codes) <= set(DEFINITE):
        return "not resolved"
    same = {YES: "supported", NEGLIGIBLE: "negligible", OPPOSITE: "reversed"}
    return same[codes[0]] if len(set(codes)) == 1 else "depends on the budget"


def seeds_needed(s: Summary, n: int, margin: float, may_be_negligible: bool = True, most: int = 1000) -> int | None:
    """The least number of seeds, `n` or more, whose reading is not *open* if means and deviations stay as they are; None beyond `most`."""
    settled = lambda k: bool(read(s, k, margin, may_be_negligible) != OPEN)  # noqa: E731
    if not np.isfinite(s.below.sd).all() or not settled(most):
        return None
    least = max(n, LEAST_SEEDS)
    return least + bisect.bisect_left(range(least, most + 1), True, key=settled)
