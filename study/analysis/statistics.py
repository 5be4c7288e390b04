"""The statistics of the report's claims: the cells of every seed in, one number for each seed out.

A seed's runs share noise, split and initialization, so the seed is the unit of every test and a statistic is computed from
one seed's runs alone; only *which* batch size is best is asked of the other seeds. Values are arrays (..., n, K): any axes
of planted sweeps, n seeds, K batch sizes in ascending order. A claim is about lines: one schedule and noise level each.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Line(NamedTuple):
    """One schedule and noise level: log2 B `x` (K,), the values `noisy` (..., n, K), and `clean`, the same without noise."""

    x: np.ndarray
    noisy: np.ndarray
    clean: np.ndarray | None = None


class Estimate(NamedTuple):
    """A statistic, all (..., n, columns) but for `value` (..., n), which is shown.

    What is estimated lies above the mean of some column of `below` and under that of some column of `above`: the smallest of
    the lower limits and the largest of the upper ones bound it. `levels`, `stretches`: what each line, and each change from one
    batch size to a larger one, contributes to the whole, in units of the statistic; none of it may outweigh a claim. `tests`: by
    what the error rate is divided, 2 where the other seeds choose the sizes: then the numbers of seeds depend on one another, and
    intervals at the full rate miss twice as often as they say.
    """

    value: np.ndarray
    below: np.ndarray
    above: np.ndarray
    levels: np.ndarray
    stretches: np.ndarray
    tests: int = 1

    def turned(self, direction: int) -> "Estimate":
        """With the claimed direction upwards."""
        if direction >= 0:
            return self
        return Estimate(-self.value, -self.above, -self.below, -self.levels, -self.stretches, self.tests)


Statistic = Callable[[list[Line]], Estimate]


def of_lines(levels: np.ndarray, stretches: np.ndarray | None = None) -> Estimate:
    """The estimate that is the mean over lines of `levels` (..., n, L)."""
    value = levels.mean(-1)
    stretches = levels[..., :0] if stretches is None else stretches
    return Estimate(value, value[..., None], value[..., None], levels / levels.shape[-1], stretches)


def mean_of_cells(lines: list[Line]) -> Estimate:
    """The mean over a line's cells."""
    return of_lines(np.stack([line.noisy.mean(-1) for line in lines], -1))


# ---------------------------------------------------------------------------------------------- slopes on log2 B


def others(y: np.ndarray) -> np.ndarray:
    """The mean over the other seeds, for each seed."""
    n = y.shape[-2]
    return (y.sum(-2, keepdims=True) - y) / (n - 1) if n > 1 else y


def slope_on(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of y (..., K) on x (K,)."""
    away = x - x.mean()
    return y @ (away / (away @ away))


def slope(lines: list[Line]) -> Estimate:
    """Change per doubling of the batch size: the slope on log2 B of every line.

    Stretches: the change from any size to any larger one, of the mean over lines at the sizes that all have, over the number of
    doublings of the whole range.
    """
    common = functools.reduce(np.intersect1d, [line.x for line in lines])
    curve = np.mean([line.noisy[..., np.isin(line.x, common)] for line in lines], 0)
    i, j = np.triu_indices(len(common), 1)
    stretches = (curve[..., j] - curve[..., i]) / (np.ptp(common) if len(common) > 1 else 1.0)
    return of_lines(np.stack([slope_on(line.x, line.noisy) for line in lines], -1), stretches)


def lost_slope(lines: list[Line]) -> Estimate:
    """Slope on log2 B of the accuracy that noise costs."""
    return slope([Line(line.x, line.clean - line.noisy) for line in lines])


def relative_slope(lines: list[Line]) -> Estimate:
    """Slope on log2 B in units of the mean over the line's sizes and the other seeds."""
    return slope([Line(line.x, line.noisy / others(line.noisy).mean(-1, keepdims=True)) for line in lines])


def ratio_gap(lines: list[Line]) -> Estimate:
    """Smallest minus largest batch of equal lr/B, with noise minus without."""
    gap = lambda y: y[..., 0] - y[..., -1]  # noqa: E731
    return of_lines(np.stack([gap(line.noisy) - gap(line.clean) for line in lines], -1))


# ------------------------------------------------------------------------------------------------ best batch size


def at(y: np.ndarray, index: np.ndarray) -> np.ndarray:
    """y (..., n, K) at the size `index` (..., n)."""
    return np.take_along_axis(y, index[..., None], -1)[..., 0]


def sums(parts: list[np.ndarray]) -> np.ndarray:
    """Every sum of one column of each part, (..., n, product of their columns)."""
    add = lambda a, b: (a[..., :, None] + b[..., None, :]).reshape(*a.shape[:-1], -1)  # noqa: E731
    return functools.reduce(add, parts)


def cost_of_largest(lines: list[Line]) -> Estimate:
    """What the largest batch costs under noise: accuracy of the best size minus that of the largest, with noise minus without.

    The best size is that of the mean of the other seeds. A wrong choice makes a cost too small: to say that noise adds to the
    cost, its cost without noise is bounded by every size in place of the best one, and the other way round.
    """
    noisy = [line.noisy - line.noisy[..., -1:] for line in lines]
    clean = [line.clean - line.clean[..., -1:] for line in lines]
    with_noise, without = ([at(y, others(y).argmax(-1)) for y in side] for side in (noisy, clean))
    levels = np.stack(with_noise, -1) - np.stack(without, -1)
    L = len(lines)
    below = np.mean(with_noise, 0)[..., None] - sums([y / L for y in clean])
    above = sums([y / L for y in noisy]) - np.mean(without, 0)[..., None]
    return of_lines(levels)._replace(below=below, above=above, tests=2)


def leads(line: Line) -> np.ndarray:
    """By how much the best size is smaller with noise, (..., n, K). The other seeds choose a cut between sizes and the best size
    on either side: the larger one's lead without noise over each size below the cut, the smaller one's lead with noise over
    each size above it."""
    upper, lower = others(line.clean), others(line.noisy)
    margins, columns = [], []
    for c in range(1, len(line.x)):
        (clean_below, clean_above), (noisy_below, noisy_above) = (np.split(y, [c], -1) for y in (upper, lower))
        margins.append(np.minimum(clean_above.max(-1) - clean_below.max(-1), noisy_below.max(-1) - noisy_above.max(-1)))
        large, small = clean_above.argmax(-1) + c, noisy_below.argmax(-1)
        without = at(line.clean, large)[..., None] - line.clean[..., :c]
        with_noise = at(line.noisy, small)[..., None] - line.noisy[..., c:]
        columns.append(np.concatenate([without, with_noise], -1))
    cut = np.stack(margins, -1).argmax(-1)
    return np.take_along_axis(np.stack(columns, -2), cut[..., None, None], -2)[..., 0, :]


def best_moves(lines: list[Line]) -> Estimate:
    """Whether the best size itself is smaller with noise: the smallest of its `leads`; above, the same for a larger one."""
    smaller, larger = (
        [leads(line) / len(lines) for line in way]
        for way in (lines, [Line(line.x, line.clean, line.noisy) for line in lines])
    )
    levels = np.stack([of.min(-1) for of in smaller], -1) * len(lines)
    return of_lines(levels)._replace(below=sums(smaller), above=-sums(larger), tests=2)
