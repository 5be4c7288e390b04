"""The report's section on what goes with memorization: over the cells of one budget, whether the cosine of clean and noisy
gradients or the ratio of their norms tells how many wrong labels a network has memorized in the end.
"""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from study.analysis import runs
from study.analysis.judge import BUDGETS
from study.analysis.rules import LEAST_SEEDS
from study.markup import literal
from study.page import Page
from study.settings import Setting
from study.stopping import CELL_HEADER, mean_text

MEASURES = {  # columns of the table of runs, each a mean over the run
    "cos_minus_null": "cos(clean, noisy) minus its null",
    "cos_clean_all": "cos(clean, all)",
    "norm_ratio": "norm, noisy / clean",
}
LEAST_CELLS = 5  # at a noise level; from there on the bootstrap covers what it says (93 to 99 % on drawn cells)
DRAWS = 2000


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation over the last axis, ties at their mean rank; NaN where a side is constant."""
    a, b = (rankdata(y, axis=-1) - (y.shape[-1] + 1) / 2 for y in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def correlation(
    levels: list[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator
) -> tuple[float, float, float] | None:
    """Rank correlation of two values over the cells of a seed and level, each (n, cells), the mean over seeds and levels, with the
    95 % interval of a bootstrap that draws seeds and the cells of every level (percentiles). None where a side is constant."""
    mean = lambda seeds, cells: np.mean([  # noqa: E731
        rank_correlation(*(y[seeds[..., :, None], of[..., None, :]] for y in pair)).mean(-1) for pair, of in zip(levels, cells)
    ], 0)  # fmt: skip
    n = len(levels[0][0])
    whole = float(mean(np.arange(n), [np.arange(pair[0].shape[1]) for pair in levels]))
    if not np.isfinite(whole):
        return None
    drawn = mean(
        rng.integers(n, size=(DRAWS, n)),
        [rng.integers(pair[0].shape[1], size=(DRAWS, pair[0].shape[1])) for pair in levels],
    )
    return whole, *(float(p) for p in np.nanpercentile(drawn, [2.5, 97.5]))


def noisy_runs(setting: Setting) -> pd.DataFrame:
    """The table of runs with noise, `memorized` beyond chance where that was measured."""
    table = runs.table(setting.ratio_runs)
    table = table[(table["noise"] > 0) & (table["fake"] == 0) & (table["status"] == "finished")]
    return table.assign(memorized=table["memorized_excess"].fillna(table["memorized"]))


def matrices(table: pd.DataFrame, measure: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(the measure, what is memorized)] of every noise level with enough cells, seeds by cells; of the seeds that have all."""
    known = table.dropna(subset=[measure, "memorized"])
    cells = ["noise", "sched", "B", "lr", "momentum", "wd"]
    both = known.pivot_table(index=["seed", "noise_seed", "split_seed"], columns=cells, values=[measure, "memorized"])
    both = both.loc[:, 2 * both.notna().sum() >= len(both)].dropna()
    levels = (
        [(both[measure][noise], both["memorized"][noise]) for noise in known["noise"].unique()] if len(both) else []
    )
    return [tuple(side.to_numpy() for side in pair) for pair in levels if pair[0].shape[1] >= LEAST_CELLS]


def correlation_rows(table: pd.DataFrame) -> list[list[str]]:
    """A row for each budget and measure whose correlation has an interval."""
    rows = []
    for budget, label in BUDGETS.items():
        for measure, name in MEASURES.items():
            levels = matrices(table[table["budget"] == budget], measure)
            if not levels or len(levels[0][0]) < LEAST_SEEDS:
                continue
            found = correlation(levels, np.random.default_rng(0))
            if found:
                cells = ", ".join(str(pair[0].shape[1]) for pair in levels)
                rho, low, high = found
                rows.append([label, name, f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]", str(len(levels[0][0])), cells])
    return rows


def cell_rows(table: pd.DataFrame) -> list[list[str]]:
    """A row for each cell: the measures and the share memorized, mean and deviation over seeds."""
    rows = []
    for (sched, budget, length, noise, B, lr, *_), same in table.groupby(
        ["sched", "budget", "length", "noise", "B", "lr", "momentum", "wd"]
    ):
        known = [same[name].dropna().tolist() for name in (*MEASURES, "memorized")]
        if any(known):
            words = sched if budget == "any" else f"{sched}, {length} {budget}"
            rows.append(
                [
                    words,
                    f"{noise:.3g}",
                    str(B),
                    f"{lr:g}",
                    str(len(same)),
                    *(mean_text(v, 3) if v else "" for v in known),
                ]
            )
    return rows


def write_correlates(page: Page, settings: list[Setting]) -> None:
    """The section; nothing where no setting has measured both sides."""
    tables = [(s.label, noisy_runs(s)) for s in settings]
    shown = [
        (label, correlation_rows(table), cell_rows(table))
        for label, table in tables
        if table["memorized"].notna().any()
    ]
    if not any(cells for *_, cells in shown):
        return
    page.heading(2, "What goes with memorization")
    for label, rows, cells in shown:
        page.text(literal(label))
        if rows:
            page.table(
                ["budget", "mean over the run", "rank correlation with memorized", "seeds", "cells of a level"], rows
            )
        page.table([*CELL_HEADER, "seeds", *MEASURES.values(), "memorized"], cells)
    page.text(
        f"Spearman's rank correlation over the cells of one seed, budget and noise level (batch sizes and rates), averaged over levels and seeds, with the 95 % "
        f"interval of a bootstrap over seeds and cells. It is given where a level has {LEAST_CELLS} cells or more, of three seeds. A measure that tells how much a "
        "network memorizes is near 1 or -1 under every budget. Cells that differ in batch size differ in the noise of both gradients too, and so in every raw "
        "cosine: a correlation is no cause. Memorized: at the end, beyond chance where that was measured. ± one standard deviation over seeds."
    )
