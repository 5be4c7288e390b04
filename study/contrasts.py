"""The statistics of the report's claims: cells of every seed in, one number for each seed out.

A seed's runs share noise, split and initialization. A statistic is computed from each seed's runs alone and only then averaged;
one that is not linear in the runs (the best batch size) is computed from the mean over seeds, and its jackknife pseudo-values
stand for the seeds.

Letters: B batch size, m momentum.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import schedules
from study.runfolders import Cell
from study.stats import Incomplete, best_log2, jackknife, slope

PEAK_MOMENTUM = 0.85  # one-cycle's at its largest learning rate
CEILING, BASE_LINE = (
    0.95,
    0.02,
)  # of the share memorized, and of its excess over chance: beyond, an effect would not show

Values = dict[Cell, float]  # one seed's value in every cell, under one budget
Unit = dict[str, Values]  # the same for each name of `Finding.needs`


@dataclass
class Estimate:
    """A statistic under one budget.

    `values`: one for each seed. `parts`: {name: one for each seed} of what it is the mean of, where the claim is about each.
    `pieces`: the same for single lines, by which two budgets are compared on what both have. `at_least`, `at_most`: what is
    estimated may be larger, smaller than the statistic. `notes`: what was left out, and why.
    """

    values: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)
    pieces: dict[tuple, list[float]] = field(default_factory=dict)
    at_least: bool = False
    at_most: bool = False
    notes: list[str] = field(default_factory=list)


Statistic = Callable[[list[Unit]], Estimate]


def has_schedule(cell: Cell) -> bool:
    """Whether the learning rate of a cell's runs moves, so that its schedule has a length."""
    return bool(schedules.entry(cell.sched).moves)


def group_cells(values: Values, by: Callable[[Cell], tuple]) -> dict[tuple, Values]:
    """`values` in groups of cells with the same `by(cell)`."""
    grouped: dict[tuple, Values] = defaultdict(dict)
    for cell, value in values.items():
        grouped[by(cell)][cell] = value
    return grouped


def mean_cells(units: Sequence[Values]) -> Values:
    """The mean over seeds in every cell that the first of them has."""
    return {cell: statistics.fmean(u[cell] for u in units) for cell in units[0]}


def each_seed(name: str, contrast: Callable[[Values], float]) -> Statistic:
    """A contrast of the cells of one seed, for each seed."""
    return lambda units: Estimate([contrast(u[name]) for u in units])


def mean_value(values: Values) -> float:
    """The mean over all cells."""
    return statistics.fmean(values.values())


# ------------------------------------------------------------------------------------------------- along batch sizes


def slope_on_log2(values: Values) -> float:
    """Slope on log2 B (per doubling) in each schedule and noise level, averaged."""
    lines = group_cells(values, lambda c: (c.sched, c.noise))
    return statistics.fmean(slope([math.log2(c.B) for c in line], list(line.values())) for line in lines.values())


def lost_to_noise(values: Values) -> Values:
    """Accuracy without noise minus accuracy with, for every cell with noise. Raises `Incomplete`."""
    lost = {}
    for cell, value in values.items():
        if cell.noise > 0:
            if cell._replace(noise=0.0) not in values:
                raise Incomplete(f"noise 0 at {cell.sched}, B {cell.B}")
            lost[cell] = values[cell._replace(noise=0.0)] - value
    if not lost:
        raise Incomplete("a noise level above 0")
    return lost


def lost_slope(values: Values) -> float:
    """Slope on log2 B of the accuracy that noise costs, averaged over schedules and noise levels."""
    return slope_on_log2(lost_to_noise(values))


def saturated(memorized: Values, excess: Values, a: Cell, b: Cell) -> str | None:
    """Why a difference between two cells says nothing: both stand at the ceiling, or both at the base line."""
    if min(memorized[a], memorized[b]) > CEILING:
        return f"over {CEILING:g}"
    return "at the base line" if max(abs(excess[a]), abs(excess[b])) < BASE_LINE else None


def adjacent_sizes(units: list[Unit]) -> Estimate:
    """Change of `probe/memorized_excess` per doubling between neighbouring batch sizes, averaged over schedules and noise
    levels and then over the pairs of sizes.

    A pair of cells that are both saturated in the mean over seeds is left out, with a note. Raises `Incomplete` with fewer
    than two batch sizes, and where every pair is saturated.
    """
    excess = [u["memorized_excess"] for u in units]
    memorized, means = mean_cells([u["memorized"] for u in units]), mean_cells(excess)
    pieces: dict[tuple, list[float]] = {}
    left_out: dict[str, list[str]] = defaultdict(list)
    for line, cells in group_cells(means, lambda c: (c.sched, c.noise, c.momentum)).items():
        ordered = sorted(cells, key=lambda c: c.B)
        for a, b in zip(ordered, ordered[1:], strict=False):
            if b.B == a.B:
                raise Incomplete("one learning rate for each batch size")
            why = saturated(memorized, means, a, b)
            if why:
                left_out[why].append(f"{a.sched}, noise {a.noise:g}, B {a.B} to {b.B}")
            else:
                doublings = math.log2(b.B / a.B)
                pieces[*line, a.B, b.B] = [(v[b] - v[a]) / doublings for v in excess]
    notes = [f"not informative ({why}): {'; '.join(where)}" for why, where in left_out.items()]
    if not pieces:
        raise Incomplete(f"sizes that are not saturated ({'; '.join(notes)})" if notes else "at least two batch sizes")
    parts = {f"B {a} to {b}": values for (a, b), values in over_lines(pieces).items()}
    return Estimate(across(list(parts.values())), parts, pieces, notes=notes)


def over_lines(pieces: dict[tuple, list[float]]) -> dict[tuple, list[float]]:
    """{(smaller B, larger B): mean over the lines that have the pair, for each seed}, by size."""
    grouped: dict[tuple, list[list[float]]] = defaultdict(list)
    for (*_, a, b), values in pieces.items():
        grouped[a, b].append(values)
    return {pair: across(grouped[pair]) for pair in sorted(grouped)}


def across(lists: list[list[float]]) -> list[float]:
    """The mean over lists, for each seed."""
    return [statistics.fmean(values) for values in zip(*lists, strict=True)]


# ------------------------------------------------------------------------------------------------ best batch size


def best_log2_pairs(values: Values) -> list[tuple[float, float]]:
    """The best log2 B without noise and at the highest noise level, for each schedule. Raises `Incomplete`."""
    pairs = []
    for by_sched in group_cells(values, lambda c: (c.sched,)).values():
        levels = group_cells(by_sched, lambda c: (c.noise,))
        if (0.0,) not in levels or len(levels) < 2:
            raise Incomplete("noise 0 and a higher level")
        ends = (levels[(0.0,)], levels[max(levels)])
        pairs.append(tuple(best_log2([c.B for c in end], list(end.values())) for end in ends))
    return pairs


def best_shift(units: list[Unit]) -> Estimate:
    """Best log2 B without noise minus best log2 B at the highest noise, averaged over schedules: the tops of parabolas through
    the mean over seeds, with the jackknife's pseudo-values. Raises `Incomplete`.

    A top at an end of the tested sizes is a bound. A best size without noise that may lie above the largest, or one with noise
    that may lie below the smallest, make the true shift at least the estimated one; the other two, at most.
    """
    curves = [u["val_acc"] for u in units]
    pairs = best_log2_pairs(mean_cells(curves))
    sizes = {math.log2(c.B): c.B for c in curves[0]}
    low, high = min(sizes), max(sizes)
    shift = lambda some: statistics.fmean(a - b for a, b in best_log2_pairs(mean_cells(some)))  # noqa: E731
    estimate = Estimate(jackknife(curves, shift))
    estimate.at_least = any(clean == high or noisy == low for clean, noisy in pairs)
    estimate.at_most = any(clean == low or noisy == high for clean, noisy in pairs)
    if (estimate.at_least or estimate.at_most) and len(
        set(estimate.values)
    ) == 1:  # an end in every curve: no spread to judge by
        estimate.at_least = estimate.at_most = True
    ends = sorted({best for pair in pairs for best in pair if best in (low, high)})
    if ends:
        where = " or ".join(f"{'below' if best == low else 'above'} {sizes[best]}" for best in ends)
        both = estimate.at_least and estimate.at_most
        bound = "no estimate" if both else f"{'at least' if estimate.at_least else 'at most'} what is estimated"
        estimate.notes.append(f"the best batch size may lie {where}: the shift is {bound}")
    return estimate


# ------------------------------------------------------------------------------------------------------------ lr/B


def momentum_at_peak(cell: Cell) -> float:
    """The momentum of a cell's runs at their largest learning rate."""
    return PEAK_MOMENTUM if cell.sched == "onecycle" else cell.momentum


def lr_batch_ratio(cell: Cell, with_momentum: bool) -> float:
    """lr / B, or lr / (B (1 - m)) with the momentum at the largest learning rate."""
    return cell.lr / (cell.B * (1 - momentum_at_peak(cell))) if with_momentum else cell.lr / cell.B


def has_one_momentum(cells: Iterable[Cell]) -> bool:
    """Whether every schedule has one momentum, so that lr / (B (1 - m)) is equal where lr / B is."""
    pairs = {(cell.sched, momentum_at_peak(cell)) for cell in cells}
    return len(pairs) == len({sched for sched, _ in pairs})


def ratio_gap(with_momentum: bool) -> Callable[[Values], float]:
    """Accuracy of the smallest minus that of the largest batch of equal ratio, averaged over ratios, schedules, noise levels."""

    def gap(values: Values) -> float:
        by_ratio = group_cells(values, lambda c: (c.sched, c.noise, f"{lr_batch_ratio(c, with_momentum):.6g}"))
        gaps = []
        for same in by_ratio.values():
            cells = sorted(same, key=lambda c: c.B)
            if cells[0].B < cells[-1].B:
                gaps.append(same[cells[0]] - same[cells[-1]])
        if not gaps:
            raise Incomplete(f"batch sizes of equal {'lr/(B(1-m))' if with_momentum else 'lr/B'}")
        return statistics.fmean(gaps)

    return gap
