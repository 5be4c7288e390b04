"""The report's claims and how each is judged, as pure functions of one row per run.

The unit of every test is the seed, see contrasts.py; rules: rules.py, their error rates: `python benchmarks/planted.py`.

Letters: B batch size, m momentum, n seeds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from study.aaruns import aa_means, sizes_with_aa
from study.contrasts import (
    Estimate,
    Statistic,
    Unit,
    across,
    adjacent_sizes,
    best_shift,
    each_seed,
    has_schedule,
    lost_slope,
    mean_value,
    over_lines,
    ratio_gap,
)
from study.rules import LEVEL, RULES, Evidence, verdict, verdict_of_one_budget
from study.runfolders import Cell
from study.stats import LEAST_SEEDS, Incomplete, Interval, interval, pooled_sd, seeds_needed
from study.units import RunRow, poolings, tuned

BUDGETS = {"steps": "the report's step budget", "epochs": "matched epochs", "examples": "matched examples"}
RULED = ("steps", "epochs")  # what the rules ask for; examples are shown
MARGINS = {  # smallest effects of interest
    "acc": 0.01,  # share, and share per doubling of B
    "cos": 0.05,
    "difference": 0.1,  # of `grad/difference`: what a cosine of 0.95 between equally long means gives where the noise scale is B
    "dimension": 0.7,  # natural logarithm of a share of dimensions: a factor of 2
    "log2b": 0.5,  # doublings of B
}
SERIES_OF = {  # which series a value comes from, for saying what is missing
    "difference": "grad/difference (--measure full)",
    "difference_norm": "grad/difference_norm (--measure full)",
    "cos_minus_null": "grad/cos_clean_noisy with its null (--measure full)",
    "corrected_minus_1": "corrected/cos_clean_noisy (--measure full)",
    "log_dimension": "isotropy/dimension with its share of the parameters after step 0 (--measure full)",
    "participation_minus_1": "isotropy/participation with isotropy/isotropic after step 0 (--measure full)",
    "memorized": "probe/memorized",
    "memorized_excess": "probe/memorized_excess",
    "val_acc": "val/acc",
}


@dataclass(frozen=True, eq=False)
class Finding:
    """A claim and how it is tested.

    `needs`: the runs' values that `estimate` takes; `covers`: the cells it is about; `direction` of the claim, 0 for either;
    `margin`: a key of `MARGINS`; `null`: whether A/A runs are subtracted; `sized`: whether it compares batch sizes, so that
    the learning rate belongs to the claim; `gives`: verdicts that the statistic can give; `corners`: other cells at which the
    same statistic is shown; `beside`: values whose means are shown and not judged, {name: label}; `of_sgd`: of SGD alone.
    """

    id: str
    title: str
    claim: str
    statistic: str
    needs: tuple[str, ...]
    estimate: Statistic
    direction: int
    margin: str
    covers: Callable[[Cell], bool]
    null: bool = False
    sized: bool = False
    gives: tuple[str, ...] = tuple(RULES)
    corners: dict[str, Callable[[Cell], bool]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    of_sgd: bool = False


def corner(scheduled: bool, noisy: bool) -> Callable[[Cell], bool]:
    """The cells with or without a schedule, and with or without noise."""
    return lambda cell: has_schedule(cell) == scheduled and (cell.noise > 0) == noisy


scheduled_noisy = corner(True, True)
OTHER_CORNERS = {
    "a schedule, no noise": corner(True, False),
    "constant rate, noise": corner(False, True),
    "constant rate, no noise": corner(False, False),
}
PARTS = {
    "difference_norm": "its signed part from the norms",
    "corrected_minus_1": "corrected cosine minus 1, a biased selection",
}
RATIO = "accuracy of the smallest minus the largest batch of equal "

FINDINGS = (
    Finding("1a", "Noisy gradients drift", "label noise makes the mean gradient of noisy examples another than that of clean ones (section 1)",
            "grad/difference, mean over the run, minus that of A/A runs", ("difference",), each_seed("difference", mean_value), +1,
            "difference", scheduled_noisy, null=True, beside=PARTS),
    Finding("1a raw", "Noisy gradients drift, raw cosine", "label noise turns the mean gradient of noisy examples away from that of clean ones (section 1)",
            "cos(g_C, g_N) minus that of random masks of the same size, mean over the run, minus that of A/A runs",
            ("cos_minus_null",), each_seed("cos_minus_null", mean_value), -1, "cos", scheduled_noisy, null=True,
            gives=("supported", "not resolved")),
    Finding("1b", "The noise is not isotropic", "label noise induces non-isotropic noise in gradients (section 1)",
            "log(isotropy/dimension / parameters), mean over the run", ("log_dimension",), each_seed("log_dimension", mean_value), -1,
            "dimension", scheduled_noisy, beside={"participation_minus_1": "participation ratio over its isotropic value, minus 1"}),
    Finding("2", "Larger batches overfit noisy labels", "training with a larger batch size increases overfitting (section 1)",
            "probe/memorized_excess at the end, larger minus smaller of neighbouring batch sizes, per doubling",
            ("memorized_excess", "memorized"), adjacent_sizes, +1, "acc", scheduled_noisy, sized=True),
    Finding("3", "The best batch size shrinks with noise", "the optimal batch size can reduce with more label noise (section 1)",
            "best log2 B without noise minus best log2 B at the highest noise, of the mean over seeds", ("val_acc",), best_shift, +1,
            "log2b", has_schedule, sized=True),
    Finding("4", "lr/B does not predict generalization", "with noise and a schedule the ratio is not a good indicator (section 1)",
            RATIO + "lr/B", ("val_acc",), each_seed("val_acc", ratio_gap(False)), 0, "acc", scheduled_noisy, corners=OTHER_CORNERS),
    Finding("4m", "lr/(B(1-m)) does not predict generalization", "with noise and a schedule the ratio with momentum is not a good indicator",
            RATIO + "lr/(B(1-m))", ("val_acc",), each_seed("val_acc", ratio_gap(True)), 0, "acc", scheduled_noisy, corners=OTHER_CORNERS, of_sgd=True),
    Finding("5", "Larger batches mitigate noise, with a schedule", "with larger batches noise costs less accuracy (Rolnick et al. 2018; the report finds otherwise, 4.1)",
            "slope of the accuracy lost to noise on log2 B", ("val_acc",), each_seed("val_acc", lost_slope), -1, "acc",
            has_schedule, sized=True),
    Finding("5c", "Larger batches mitigate noise, constant rate", "with larger batches noise costs less accuracy (Rolnick et al. 2018; the report agrees, 4.1)",
            "slope of the accuracy lost to noise on log2 B", ("val_acc",), each_seed("val_acc", lost_slope), -1, "acc",
            lambda c: not has_schedule(c), sized=True),
)  # fmt: skip


@dataclass
class Result:
    """A finding's verdict, with the intervals and the missing runs that led to it.

    `difference`: steps minus epochs, seed by seed; `p`: of the verdict, None where it is *not resolved*; `one_budget`: no run
    has a schedule; `rate`: the learning rate of the comparison in words; `parts`, `corners`: {budget: {name: interval}}, parts
    with a correction for their number; `beside`: {label: interval over all budgets' runs}; `notes`: what else to know.
    """

    finding: Finding
    verdict: str
    intervals: dict[str, Interval | None]
    margin: float
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    difference: Interval | None = None
    p: float | None = None
    one_budget: bool = False
    rate: str = ""
    aa: dict[str, Interval] = field(default_factory=dict)
    parts: dict[str, dict[str, Interval]] = field(default_factory=dict)
    corners: dict[str, dict[str, Interval]] = field(default_factory=dict)
    beside: dict[str, Interval] = field(default_factory=dict)
    needed: int | None = None


@dataclass
class Gathered:
    """A finding's runs under one budget: `units` {seed: values} of the seeds that have every cell, their estimate, and what
    is missing from the others."""

    units: dict[str, Unit]
    missing: list[str]
    estimate: Estimate | None = None


# ------------------------------------------------------------------------------------------------------ evaluation


def cell_label(cell: Cell) -> str:
    """A cell in words."""
    return f"{cell.sched}, noise {cell.noise:g}, B {cell.B}, {f'lr {cell.lr:g}' if cell.lr else 'its tuned rate'}"


def rate_words(cells: set[Cell]) -> str:
    """The learning rate at which batch sizes are compared: one, one lr/B, or tuned (a rate of 0); nothing otherwise."""
    rates, ratios = {c.lr for c in cells}, {f"{c.lr / c.B:.6g}" for c in cells}
    if len(rates) == 1:
        return "at each cell's tuned rate" if rates == {0.0} else f"at lr {rates.pop():g}"
    return f"at lr/B {float(ratios.pop()):.3g}" if len(ratios) == 1 else ""


def gather(finding: Finding, rows: list[RunRow], cells: set[Cell], where: str) -> Gathered:
    """The rows of one budget by seed, and the finding's statistic; `where` begins what is said to be missing."""
    table: dict[str, Unit] = {}
    lacking = {}
    for row in rows:
        if row.cell in cells:  # the seed is expected to be complete, even if this run lacks the value
            unit = table.setdefault(row.seed, {name: {} for name in finding.needs})
            absent = [name for name in finding.needs if name not in row.values]
            if row.finished and absent:
                lacking[row.seed, row.cell] = absent[0]
            elif row.finished:
                for name in finding.needs:
                    unit[name][row.cell] = row.values[name]
    gathered = Gathered({}, [])
    for seed, unit in sorted(table.items()):
        for cell in sorted(cells - unit[finding.needs[0]].keys()):
            name = lacking.get((seed, cell))
            why = f"its run has no {SERIES_OF.get(name, name)}" if name else "no finished run"
            gathered.missing.append(f"{where}: {cell_label(cell)}, seed {seed}: {why}")
        if len(unit[finding.needs[0]]) == len(cells):
            gathered.units[seed] = unit
    if gathered.units:
        try:
            gathered.estimate = finding.estimate(list(gathered.units.values()))
        except Incomplete as e:
            gathered.missing.append(f"{where}: needs {e}")
    return gathered


def subtract_null(
    finding: Finding, gathered: Gathered, rows: list[RunRow], budget: str, sizes: set[int]
) -> Interval | None:
    """Subtract, seed by seed, the mean of the A/A runs at the tested sizes from the estimate; returns their interval.

    Those with a schedule count, of this budget where three seeds have them, else of any. Seeds without them are left out of the
    estimate, with a note, if at least three have them; otherwise they are missing.
    """
    name = finding.needs[0]
    aa = aa_means([r for r in rows if r.seed in gathered.units], name, sizes, budget)
    if len(aa) < LEAST_SEEDS:
        gathered.missing.append(
            f"{BUDGETS[budget]}: A/A runs (--fake-mask) with {SERIES_OF[name]} of three seeds at B {', '.join(map(str, sorted(sizes)))}, "
            f"there are those of {len(aa)}; nothing is subtracted"
        )
        return interval(aa.values()) if aa else None
    without = [s for s in gathered.units if s not in aa]
    if without:
        gathered.estimate.notes.append(f"seeds without A/A runs are left out: {', '.join(without)}")
    kept = zip(gathered.units, gathered.estimate.values, strict=True)
    gathered.estimate.values = [value - aa[seed] for seed, value in kept if seed in aa]
    gathered.units = {s: unit for s, unit in gathered.units.items() if s in aa}
    return interval(aa.values())


def part_intervals(estimate: Estimate) -> dict[str, Interval]:
    """Intervals of the parts of a statistic that hold for all of them at once (Bonferroni)."""
    return {name: interval(values, 1 - LEVEL / len(estimate.parts)) for name, values in estimate.parts.items()}


def evidence(gathered: Gathered | None, margin: float) -> Evidence:
    """What one budget says."""
    if gathered is None or gathered.estimate is None:
        return Evidence(None)
    e = gathered.estimate
    parts = [
        i
        for i in part_intervals(e).values()
        if i.n >= LEAST_SEEDS and len(e.parts) > 1 and not (-margin < i.low and i.high < margin)
    ]
    up, down = any(i.low > 0 for i in parts), any(i.high < 0 for i in parts)
    return Evidence(interval(e.values), e.at_least, e.at_most, up, down)


def paired_difference(a: Gathered | None, b: Gathered | None) -> list[float]:
    """The statistic under one budget minus the other, for each seed that has both, of the pieces that both have."""
    if a is None or b is None or a.estimate is None or b.estimate is None:
        return []
    sides = []
    common = a.estimate.pieces.keys() & b.estimate.pieces.keys()
    for gathered in (a, b):
        values = gathered.estimate.values
        if gathered.estimate.pieces:
            if not common:
                return []
            values = across(list(over_lines({k: gathered.estimate.pieces[k] for k in sorted(common)}).values()))
        sides.append(dict(zip(gathered.units, values, strict=True)))
    return [sides[0][s] - sides[1][s] for s in sides[0] if s in sides[1]]


def spread_of(finding: Finding, units: list[Unit]) -> float:
    """Standard deviation of one seed's statistic, from the standard deviation within cells pooled over them.

    Propagated through the statistic's derivatives at the cells' means, as if cells were independent within a seed.
    """
    name = finding.needs[0]
    cells = {cell: [u[name][cell] for u in units] for cell in units[0][name]}
    sd = pooled_sd(cells.values())
    if not math.isfinite(sd):
        return math.nan
    means = {n: {c: statistics.fmean(u[n][c] for u in units) for c in units[0][n]} for n in finding.needs}
    at = lambda values: finding.estimate([means | {name: values}]).values[0]  # noqa: E731
    h, base = 1e-4, at(means[name])
    return sd * math.sqrt(sum(((at(means[name] | {c: means[name][c] + h}) - base) / h) ** 2 for c in cells))


def needed_seeds(finding: Finding, tables: dict[str, Gathered], result: Result) -> int | None:
    """How many seeds would resolve every budget, if effects and spreads stay as they are; None where that is not known, and
    where more seeds would not do."""
    needed = []
    for gathered in (tables[b] for b in RULED if b in tables):
        i = interval(gathered.estimate.values)
        sd = i.sd if i.n >= LEAST_SEEDS else spread_of(finding, list(gathered.units.values()))
        needed.append(
            None if gathered.estimate.at_least or gathered.estimate.at_most else seeds_needed(i.mean, sd, result.margin)
        )
    there = min((len(tables[b].units) for b in RULED if b in tables), default=0)
    if result.difference and all(needed) and max(needed) <= there:  # both are resolved, but not that they differ
        needed.append(seeds_needed(result.difference.mean, result.difference.sd, 0.0))
    return max(needed) if needed and all(needed) and max(needed) > there else None


def show_beside(result: Result, real: list[RunRow], rows: list[RunRow]) -> None:
    """Values that are shown and not judged, and the same statistic at the other corners."""
    for name, label in result.finding.beside.items():
        by_seed: dict[str, list[float]] = defaultdict(list)
        for row in real:
            if name in row.values:
                by_seed[row.seed].append(row.values[name])
        if by_seed:
            result.beside[label] = interval(map(statistics.fmean, by_seed.values()))
    for name, covers in result.finding.corners.items():
        there = [r for r in rows if not r.fake and covers(r.cell)]
        for budget in RULED:
            under = [r for r in there if r.budget in (budget, "any")]
            gathered = gather(result.finding, under, {r.cell for r in under}, name)
            if gathered.estimate is not None:
                result.corners.setdefault(budget, {})[name] = interval(gathered.estimate.values)


def evaluate_finding(
    finding: Finding, rows: list[RunRow], margins: dict[str, float] = MARGINS, at_best: bool = False
) -> Result:
    """The verdict on a finding from all rows of one setting, under every budget that has runs.

    `at_best`: with each cell at its best rate and weight decay of the other seeds. Where the rows cross seeds, the verdict is one
    that every way of pooling them gives, and the intervals are the widest.
    """
    ways = [tuned(way) if at_best else way for way in poolings(rows)]
    results = [evaluate_units(finding, way, margins[finding.margin]) for way in ways]
    width = lambda r: max((i.high - i.low for i in r.intervals.values() if i is not None and i.n > 1), default=0.0)  # noqa: E731
    chosen = max(results, key=width)
    if len(results) > 1:
        counts = [len({row.seed for row in way}) for way in ways]
        each = " and ".join(f"{r.verdict} by {n} units" for r, n in zip(results, counts, strict=True))
        chosen.notes.append(
            f"the grid crosses seeds, which are pooled over one another: {each}; only what holds by all is given"
        )
        if len({r.verdict for r in results}) > 1:
            chosen.verdict, chosen.needed = "not resolved", None
        p = max((r.p for r in results if r.p is not None), default=None)
        chosen.p = None if chosen.verdict == "not resolved" else p
    return chosen


def evaluate_units(finding: Finding, rows: list[RunRow], margin: float) -> Result:
    """The verdict on a finding from rows of which each seed is independent of the others."""
    real = [r for r in rows if not r.fake and finding.covers(r.cell)]
    cells = {r.cell for r in real if r.budget in (*RULED, "any")}
    result = Result(
        finding, "not resolved", dict.fromkeys(BUDGETS), margin, rate=rate_words(cells) if finding.sized else ""
    )
    result.one_budget = bool(real) and all(r.budget == "any" for r in real)
    sizes = {c.B for c in cells}
    compared = sizes & sizes_with_aa(rows, finding.needs[0]) if finding.null else sizes
    if compared < sizes and 2 * len(compared) >= len(sizes):
        left_out = ", ".join(map(str, sorted(sizes - compared)))
        result.notes.append(f"batch sizes without A/A runs are left out: {left_out}")
        cells = {c for c in cells if c.B in compared}
        real = [r for r in real if r.cell.B in compared]
    tables: dict[str, Gathered] = {}
    for budget in BUDGETS:
        under = [r for r in real if r.budget in (budget, "any")]
        if not any(r.budget == budget for r in under) and not result.one_budget:
            if budget in RULED:
                result.missing.append(f"{BUDGETS[budget]}: no finished run that the claim speaks of")
            continue
        if result.one_budget and budget != "steps":
            continue
        gathered = tables[budget] = gather(finding, under, cells, BUDGETS[budget])
        if finding.null and gathered.estimate is not None:
            aa = subtract_null(finding, gathered, rows, budget, {c.B for c in cells})
            result.aa |= {budget: aa} if aa else {}
        if gathered.estimate is not None:
            result.intervals[budget] = interval(gathered.estimate.values)
            result.parts[budget] = part_intervals(gathered.estimate)
            result.notes += [f"{BUDGETS[budget]}: {note}" for note in gathered.estimate.notes]
        result.missing += gathered.missing if budget in RULED else []
    show_beside(result, real, rows)
    apart = paired_difference(tables.get("steps"), tables.get("epochs"))
    result.difference = interval(apart) if apart else None
    if not result.missing:
        decide(result, tables)
    return result


def decide(result: Result, tables: dict[str, Gathered]) -> None:
    """Enter the verdict, its p value and the seeds needed, where no run is missing."""
    finding, margin = result.finding, result.margin
    steps, epochs = (evidence(tables.get(budget), margin) for budget in RULED)
    if result.one_budget:
        judged = verdict_of_one_budget(steps, finding.direction, margin)
    else:
        judged = verdict(steps, epochs, result.difference, finding.direction, margin)
    if judged[0] in finding.gives:
        result.verdict, result.p = judged
    if result.verdict == "not resolved" and judged[0] == "not resolved":
        result.needed = needed_seeds(finding, tables, result)
