"""The report's claims, their statistics and the verdict rules, as pure functions of one row per run.

The unit of every test is the seed: a statistic is computed for each seed from that seed's runs alone, which share
noise, split and initialization, and only then averaged. `python benchmarks/planted.py` prints the rules' error rates on planted
sweeps.

Letters: B batch size, m momentum, n seeds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from study.runfolders import Cell
from study.stats import LEAST_SEEDS, Incomplete, Interval, best_log2, interval, pooled_sd, seeds_needed, slope

BUDGETS = {"steps": "the report's step budget", "epochs": "matched epochs", "examples": "matched examples"}
MARGINS = {"acc": 0.01, "cos": 0.05, "log2b": 0.5}  # smallest effects of interest: share, cosine, doublings of B
PEAK_MOMENTUM = 0.85  # one-cycle's at its largest learning rate
SCHEDULED, CONSTANT = ("cosine", "onecycle"), ("constant",)


@dataclass(frozen=True)
class Row:
    """One run: its cell, its seed, the budget its schedule is matched in (`any` without a schedule), and what the findings
    need of it (`values`, without those that it lacks; none of one that did not finish). `fake`: an A/A run's share."""

    cell: Cell
    seed: str
    budget: str
    values: dict[str, float]
    name: str = ""
    fake: float = 0.0
    wd: float = 5e-4
    finished: bool = True


# --------------------------------------------------------------------------------------------------------- verdicts

RULES = {  # docs/findings.md, in this order: the first that applies
    "supported": "the 95 % interval excludes 0 in the claimed direction under the report's step budget and under matched epochs",
    "confounded": "it does under the step budget, but under matched epochs the interval lies inside the margin or on the other side",
    "not supported": "under the step budget the interval lies inside the margin or on the other side",
    "not resolved": "anything else, fewer than three seeds, or runs missing",
}


def verdict(steps: Interval | None, epochs: Interval | None, direction: int, margin: float) -> str:
    """One of `RULES` from the intervals under the two budgets (None: no runs). `direction` is +1 or -1."""

    def claimed(i: Interval) -> bool:
        return i.low > 0 if direction > 0 else i.high < 0

    def refuted(i: Interval) -> bool:
        return (-margin < i.low and i.high < margin) or (i.high < 0 if direction > 0 else i.low > 0)

    known = [i if i is not None and i.n >= LEAST_SEEDS else None for i in (steps, epochs)]
    if known[0] is None:
        return "not resolved"
    if known[1] is not None and claimed(known[0]):
        if claimed(known[1]):
            return "supported"
        if refuted(known[1]):
            return "confounded"
    return "not supported" if refuted(known[0]) else "not resolved"


# ------------------------------------------------------------------------------------------- the claims' statistics


Values = dict[Cell, float]  # one seed's value in every cell, under one budget


def mean_value(values: Values) -> float:
    """The mean over all cells."""
    return statistics.fmean(values.values())


def group_cells(values: Values, by: Callable[[Cell], tuple]) -> dict[tuple, Values]:
    """`values` in groups of cells with the same `by(cell)`."""
    grouped: dict[tuple, Values] = defaultdict(dict)
    for cell, value in values.items():
        grouped[by(cell)][cell] = value
    return grouped


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


def best_shift(values: Values) -> float:
    """Best log2 B without noise minus best log2 B at the highest noise level, averaged over schedules."""
    return statistics.fmean(clean - noisy for clean, noisy in best_log2_pairs(values))


def best_at_range_end(values: Values) -> str | None:
    """A warning where the best batch size is the smallest or largest tested one: the shift is a bound then, no estimate."""
    sizes = {math.log2(c.B): c.B for c in values}
    ends = {min(sizes): "below", max(sizes): "above"}
    try:
        pinned = sorted({best for pair in best_log2_pairs(values) for best in pair if best in ends})
    except Incomplete:
        return None
    return "the best batch size may lie " + " or ".join(f"{ends[b]} {sizes[b]}" for b in pinned) if pinned else None


def lr_batch_ratio(cell: Cell, with_momentum: bool) -> float:
    """lr / B, or lr / (B (1 - m)) with one-cycle's momentum at its largest learning rate."""
    m = PEAK_MOMENTUM if cell.sched == "onecycle" else cell.momentum
    return cell.lr / (cell.B * (1 - m)) if with_momentum else cell.lr / cell.B


def ratio_gap(with_momentum: bool) -> Callable[[Values], float]:
    """Accuracy of the smaller minus that of the larger batch at equal ratio: one-cycle with noise minus constant without."""

    def gap(values: Values) -> float:
        sides = defaultdict(list)
        by_ratio = group_cells(values, lambda c: (c.sched, c.noise, f"{lr_batch_ratio(c, with_momentum):.6g}"))
        for (sched, noise, _), same in by_ratio.items():
            side = {("onecycle", True): "noisy", ("constant", False): "clean"}.get((sched, noise > 0))
            if side and len({c.B for c in same}) > 1:
                cells = sorted(same, key=lambda c: c.B)
                sides[side].append(same[cells[0]] - same[cells[-1]])
        if len(sides) < 2:
            what = "lr/(B(1-m))" if with_momentum else "lr/B"
            raise Incomplete(f"pairs of equal {what}, one-cycle with noise and constant without")
        return statistics.fmean(sides["noisy"]) - statistics.fmean(sides["clean"])

    return gap


@dataclass(frozen=True)
class Finding:
    """A claim and how it is tested. `needs`: the run's value it is computed from; `covers`: the cells it is about; `direction` of
    the claim;
    `margin`: a key of `MARGINS`; `null`: whether the claim needs A/A runs, which must give 0; `limit`: what one seed's
    cells leave open, in words, if anything."""

    id: str
    title: str
    claim: str
    statistic: str
    needs: str
    contrast: Callable[[Values], float]
    direction: int
    margin: str
    covers: Callable[[Cell], bool]
    null: bool = False
    limit: Callable[[Values], str | None] | None = None


def scheduled_noisy(cell: Cell) -> bool:
    return cell.sched in SCHEDULED and cell.noise > 0


FINDINGS = (
    Finding("1a raw", "Noisy gradients drift", "label noise makes gradients drift away from the noise-free direction (section 1)",
            "cos(g_C, g_N) minus that of random masks of the same size, mean over the run", "cos_minus_null", mean_value, -1, "cos", scheduled_noisy, True),
    Finding("1a corrected", "Noisy gradients drift, noise-corrected", "the same",
            "corrected cos(g_C, g_N) minus 1, mean over the run", "corrected_minus_1", mean_value, -1, "cos", scheduled_noisy, True),
    Finding("1b", "The noise is not isotropic", "label noise induces non-isotropic noise in gradients (section 1)",
            "participation ratio over its isotropic value, minus 1", "participation_minus_1", mean_value, -1, "cos", scheduled_noisy),
    Finding("2", "Larger batches overfit noisy labels", "training with a larger batch size increases overfitting (section 1)",
            "slope of probe/memorized at the end on log2 B", "memorized", slope_on_log2, +1, "acc", scheduled_noisy),
    Finding("3", "The best batch size shrinks with noise", "the optimal batch size can reduce with more label noise (section 1)",
            "best log2 B without noise minus best log2 B at the highest noise", "val_acc", best_shift, +1, "log2b",
            lambda c: c.sched in SCHEDULED, limit=best_at_range_end),
    Finding("4", "lr/B does not predict generalization", "with noise and a schedule the ratio is not a good indicator (section 1)",
            "accuracy of the smaller minus the larger batch at equal lr/B, one-cycle with noise minus constant without",
            "val_acc", ratio_gap(False), +1, "acc",
            lambda c: (c.sched == "onecycle" and c.noise > 0) or (c.sched == "constant" and c.noise == 0)),
    Finding("4m", "lr/(B(1-m)) does not predict generalization", "the same with momentum in the ratio",
            "as 4, at equal lr/(B(1-m))", "val_acc", ratio_gap(True), +1, "acc",
            lambda c: (c.sched == "onecycle" and c.noise > 0) or (c.sched == "constant" and c.noise == 0)),
    Finding("5", "Larger batches mitigate noise, with a schedule", "Rolnick et al. 2018; the report finds otherwise (4.1)",
            "slope of the accuracy lost to noise on log2 B", "val_acc", lost_slope, -1, "acc", lambda c: c.sched in SCHEDULED),
    Finding("5c", "Larger batches mitigate noise, constant rate", "Rolnick et al. 2018; the report agrees (4.1)",
            "slope of the accuracy lost to noise on log2 B", "val_acc", lost_slope, -1, "acc", lambda c: c.sched in CONSTANT),
)  # fmt: skip


@dataclass
class Result:
    """A finding's verdict, with the intervals and the missing runs that led to it."""

    finding: Finding
    verdict: str
    intervals: dict[str, Interval | None]
    margin: float
    missing: list[str] = field(default_factory=list)
    aa: Interval | None = None
    needed: int | None = None


def cell_label(cell: Cell) -> str:
    """A cell in words."""
    return f"{cell.sched}, noise {cell.noise:g}, B {cell.B}, lr {cell.lr:g}"


def statistic(finding: Finding, rows: list[Row], budget: str, cells: set[Cell]) -> tuple[list[float], list[str], dict]:
    """(per-seed statistics, what is missing, {cell: values over seeds}) of a finding under one budget."""
    table: dict[str, Values] = defaultdict(dict)
    lacking, missing = set(), []
    for row in rows:
        if row.cell in cells:
            table[row.seed]  # the seed is expected to be complete, even if this run lacks the value
            if finding.needs in row.values:
                table[row.seed][row.cell] = row.values[finding.needs]
            elif row.finished:
                lacking.add((row.seed, row.cell))
    complete = []
    for seed, values in sorted(table.items()):
        absent = sorted(cells - values.keys())
        for cell in absent:
            why = (
                f"its run has no {SERIES_OF.get(finding.needs, finding.needs)}"
                if (seed, cell) in lacking
                else "no finished run"
            )
            missing.append(f"{BUDGETS[budget]}: {cell_label(cell)}, seed {seed}: {why}")
        if not absent:
            complete.append(values)
            limit = finding.limit(values) if finding.limit else None
            if limit:
                missing.append(f"{BUDGETS[budget]}, seed {seed}: {limit}")
    try:
        per_seed = [finding.contrast(values) for values in complete]
    except Incomplete as e:
        return [], [*missing, f"{BUDGETS[budget]}: needs {e}"], {}
    return per_seed, missing, {cell: [v[cell] for v in complete] for cell in cells} if complete else {}


SERIES_OF = {  # which series a value comes from, for saying what is missing
    "cos_minus_null": "grad/cos_clean_noisy with its null (--measure full)",
    "corrected_minus_1": "corrected/cos_clean_noisy (--measure full)",
    "participation_minus_1": "isotropy/participation with isotropy/isotropic after step 0 (--measure full)",
    "memorized": "probe/memorized",
    "val_acc": "val/acc",
}


def spread_of(finding: Finding, table: dict[Cell, list[float]]) -> float:
    """Standard deviation of one seed's statistic, from the standard deviation within cells pooled over them.

    Propagated through the statistic's derivatives at the cells' means, as if cells were independent within a seed.
    """
    sd = pooled_sd(table.values())
    means = {cell: statistics.fmean(v) for cell, v in table.items()}
    if not math.isfinite(sd) or not means:
        return math.nan
    h, base = 1e-4, finding.contrast(means)
    return sd * math.sqrt(sum(((finding.contrast(means | {c: means[c] + h}) - base) / h) ** 2 for c in means))


def evaluate_finding(finding: Finding, rows: list[Row], margins: dict[str, float] = MARGINS) -> Result:
    """The verdict on a finding from all rows of one setting, under every budget that has runs."""
    margin = margins[finding.margin]
    real = [r for r in rows if not r.fake and finding.covers(r.cell)]
    cells = {r.cell for r in real if r.budget in ("steps", "epochs", "any")}
    result = Result(finding, "not resolved", dict.fromkeys(BUDGETS), margin)
    tables = {}
    for budget in BUDGETS:
        under = [r for r in real if r.budget in (budget, "any")]
        if not cells or not any(r.budget == budget for r in under) and any(r.cell.sched != "constant" for r in real):
            if budget != "examples":  # examples are shown, the rule does not ask for them
                result.missing.append(f"{BUDGETS[budget]}: no finished run that the claim speaks of")
            continue
        per_seed, missing, tables[budget] = statistic(finding, under, budget, cells)
        result.intervals[budget] = interval(per_seed) if per_seed else None
        if budget != "examples":
            result.missing += missing
    if finding.null:
        aa = [r for r in rows if r.fake and finding.needs in r.values and r.cell.sched in SCHEDULED]
        by_seed = defaultdict(list)
        for row in aa:
            by_seed[row.seed].append(row.values[finding.needs])
        if by_seed:
            a = result.aa = interval([statistics.fmean(v) for v in by_seed.values()])
            if abs(a.mean) > margin:  # however wide the interval: a verdict needs A/A runs that give the null
                result.missing.append(f"A/A runs do not give the null ({a.mean:+.3f}): the estimator is biased here")
        else:
            result.missing.append("A/A runs (--fake-mask) with this series")
    steps, epochs = result.intervals["steps"], result.intervals["epochs"]
    if not result.missing:
        result.verdict = verdict(steps, epochs, finding.direction, margin)
    if result.verdict == "not resolved" and not result.missing and steps and epochs:  # nothing but seeds is lacking
        needed = []
        for budget in ("steps", "epochs"):
            i = result.intervals[budget]
            sd = i.sd if i.n >= LEAST_SEEDS else spread_of(finding, tables[budget])
            needed.append(seeds_needed(i.mean, sd, margin))
        result.needed = max(needed) if all(needed) else None
    return result


def tuned(rows: list[Row]) -> list[Row]:
    """One row for each cell, budget and seed: the learning rate and weight decay that did best on the *other* seeds.

    Best by mean validation accuracy. The cell keeps no trace of what was chosen, so that cells can be compared; seeds
    without any other seed to choose on are left out. Where no run of a cell finished, one that did not stands for it.
    """
    candidates: dict[tuple, dict[tuple, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if "val_acc" in row.values:
            where = (row.cell._replace(lr=0.0), row.budget, row.fake)
            candidates[where][(row.cell.lr, row.wd)][row.seed] = row
    chosen = []
    for row in rows:
        cell = row.cell._replace(lr=0.0)
        if not row.finished and (cell, row.budget, row.fake) not in candidates:
            chosen.append(replace(row, cell=cell))
    for (cell, _, _), choices in candidates.items():
        for seed in sorted({s for by_seed in choices.values() for s in by_seed}):
            scores = {}
            for value, by_seed in choices.items():
                others = [r.values["val_acc"] for s, r in by_seed.items() if s != seed]
                if others:
                    scores[value] = statistics.fmean(others)
            best = max(scores, key=scores.get, default=None)
            if best is not None and seed in choices[best]:
                row = choices[best][seed]
                chosen.append(Row(cell, seed, row.budget, row.values, row.name, row.fake))
    return chosen
