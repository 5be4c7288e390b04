"""The report's section on what goes with memorization: over the cells of a setting, whether the cosine of clean and noisy
gradients or the ratio of their norms tells how many wrong labels a network has memorized in the end.
"""

import statistics
from collections.abc import Callable

import numpy as np
from scipy import stats

from study.markup import literal
from study.page import Page
from study.runfolders import Run
from study.runvalues import finding_values, mean_at_common_steps, mean_while_trained
from study.settings import Setting, group_by
from study.stats import LEAST_SEEDS, interval
from study.stopping import CELL_HEADER, cell_text, mean_text

LEAST_CELLS = 4  # of fewer, ranks agree by chance: three in one seed out of six


def norm_ratio(run: Run) -> float | None:
    """Geometric mean of |g_N| / |g_C| over the run, `while_trained`; None where a norm is 0 or none was measured."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = mean_at_common_steps(run, "grad/norm_noisy", "grad/norm_clean", lambda a, b: np.log(a / b))
    return float(np.exp(mean)) if mean is not None and np.isfinite(mean) else None


MEASURES: dict[str, Callable[[Run], float | None]] = {  # each a mean over the run
    "cos(clean, noisy) minus its null": lambda run: finding_values(run).get("cos_minus_null"),
    "cos(clean, all)": lambda run: mean_while_trained(run, "grad/cos_clean_all"),
    "norm, noisy / clean": norm_ratio,
}


def memorized(run: Run) -> float | None:
    """Share memorized at the end beyond chance; the share itself where chance is not known."""
    values = finding_values(run)
    return values.get("memorized_excess", values.get("memorized"))


def rank_correlation(pairs: list[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None for fewer than `LEAST_CELLS` pairs or a constant side."""
    a, b = np.array(pairs).reshape(-1, 2).T
    if len(a) < LEAST_CELLS or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.spearmanr(a, b).statistic)


def correlations(runs: list[Run], measure: Callable[[Run], float | None]) -> list[float]:
    """For each seed, the rank correlation over its cells of `measure` with the share memorized, averaged over noise levels."""
    by_seed = []
    for of_seed in group_by(runs, lambda r: r.seed).values():
        levels = []
        for of_level in group_by(of_seed, lambda r: r.cell.noise).values():
            pairs = [(measure(r), memorized(r)) for r in of_level]
            levels.append(rank_correlation([p for p in pairs if None not in p]))
        known = [rho for rho in levels if rho is not None]
        by_seed += [statistics.fmean(known)] if known else []
    return by_seed


def cell_rows(runs: list[Run]) -> list[list[str]]:
    """A row for each cell: the measures and the share memorized, mean and deviation over seeds."""
    rows = []
    place = lambda r: (r.budget, r.cell, r.options["wd"])  # noqa: E731
    for same in group_by(sorted(runs, key=place), place).values():
        columns = [[of(r) for r in same] for of in (*MEASURES.values(), memorized)]
        shown = [[v for v in column if v is not None] for column in columns]
        rows.append([*cell_text(same[0]), str(len(same)), *(mean_text(v, 3) if v else "" for v in shown)])
    return rows


def write_telltales(page: Page, settings: list[Setting]) -> None:
    """The section; nothing where no setting has a rank correlation."""
    tables = []
    for setting in settings:
        runs = [r for r in setting.ratio_runs if r.finished and not r.fake and r.cell.noise > 0]
        rows = []
        for name, measure in MEASURES.items():
            rho = correlations(runs, measure)
            if rho:
                i = interval(rho)
                bounds = f"[{max(i.low, -1):+.2f}, {min(i.high, 1):+.2f}]" if i.n >= LEAST_SEEDS else ""
                rows.append(
                    [name, str(len(rho)), f"{i.mean:+.2f} {bounds}".strip(), f"{min(rho):+.2f} to {max(rho):+.2f}"]
                )
        if rows:
            tables.append((setting.label, rows, cell_rows(runs)))
    if not tables:
        return
    page.heading(2, "What goes with memorization")
    for label, rows, cells in tables:
        page.text(literal(label))
        page.table(["mean over the run", "seeds", "rank correlation with memorized", "of single seeds"], rows)
        page.table([*CELL_HEADER, "seeds", *MEASURES, "memorized"], cells)
    page.text(
        "Spearman's rank correlation over the cells of one seed at one noise level (schedules, budgets, batch sizes, rates), averaged "
        "over noise levels; mean over seeds with its 95 % interval (t, cut at -1 and 1). A measure that tells how much a network memorizes is near 1 or "
        "-1 in every seed. Cells that differ in batch size differ in the noise of both gradients too, and so in every raw cosine: a "
        "correlation is no cause. Memorized: at the end, beyond chance where that was measured. ± one standard deviation over seeds."
    )
