"""The report's section on stopping: at which epoch each signal that needs no clean label would have stopped, and what that
costs against the epoch of the best accuracy on clean validation labels.
"""

import statistics
from dataclasses import dataclass

import numpy as np

from series import VAL_ACC
from study.markup import literal
from study.page import Page
from study.runfolders import Run
from study.settings import Setting, group_by


@dataclass(frozen=True)
class Signal:
    """A stopping rule: the epoch of the smallest (`sign` 1) or largest (-1) value before `patience` epochs without a better
    one. The values are first averaged over the last `average` ones, over all up to then with 0."""

    label: str
    tag: str
    sign: int
    average: int
    patience: int


SIGNALS = (
    # Yuan, Feng & Liu 2024 (2502.07551): the first local minimum of the moving average.
    Signal("Label Wave", "train/prediction_changes", 1, 3, 1),
    Signal("noisy validation accuracy", "val/acc_noisy", -1, 1, 10),
    # Forouzesh & Thiran 2021 (2107.06665) stop after five increases.
    Signal("gradient disparity", "probe/disparity", 1, 1, 5),
    # Forouzesh et al. 2023 (2212.04461): the mean up to the epoch; they choose models by it and give no rule for when to stop.
    Signal("susceptibility", "probe/susceptibility", 1, 0, 5),
)


@dataclass(frozen=True)
class Stop:
    """Where a rule stops a run: the epoch it chooses, the accuracy there, and how far that is below the best epoch's."""

    epoch: float
    accuracy: float
    lost: float


def averaged(values: np.ndarray, over: int) -> np.ndarray:
    """Means of the last `over` values, of fewer at the start; of all up to each with 0."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - over, 0) if over else np.zeros_like(end)
    return (total[end] - total[start]) / (end - start)


def chosen(values: np.ndarray, patience: int) -> int:
    """The position of the smallest value before `patience` positions without a smaller one."""
    best = 0
    for at, value in enumerate(values):
        if value < values[best]:
            best = at
        elif at - best >= patience:
            break
    return best


def epochs_of(run: Run, tag: str) -> dict[int, float]:
    """{epoch: value} of a series at the ends of whole epochs, without the untrained network."""
    per_epoch = run.steps_per_epoch
    if not per_epoch or tag not in run.series:
        return {}
    return {
        s // per_epoch: v
        for s, v in zip(*map(np.ndarray.tolist, run.series[tag]), strict=True)
        if s and s % per_epoch == 0
    }


def stops(run: Run) -> dict[str, Stop]:
    """{rule: where it stops}, with the oracle and the last epoch; empty where the run has no series of a signal."""
    accuracy = epochs_of(run, VAL_ACC)
    signals = {s: {e: v for e, v in epochs_of(run, s.tag).items() if e in accuracy} for s in SIGNALS}
    if not accuracy or not any(signals.values()):
        return {}
    best = max(accuracy, key=accuracy.__getitem__)
    epochs = {"best epoch by clean labels": best, "last epoch": max(accuracy)}
    for signal, points in signals.items():
        if points:
            values = averaged(signal.sign * np.array(list(points.values())), signal.average)
            epochs[signal.label] = list(points)[chosen(values, signal.patience)]
    return {rule: Stop(e, accuracy[e], accuracy[best] - accuracy[e]) for rule, e in epochs.items()}


def cell_text(run: Run) -> list[str]:
    """Schedule, noise, batch size and rate of a run, as cells of a table."""
    cell = run.cell
    noise = f"{cell.noise:.3g}" + (f" (A/A {run.fake:g})" if run.fake else "")
    sched = cell.sched if run.budget == "any" else f"{cell.sched}, {run.length} {run.budget}"
    return [sched, noise, str(cell.B), f"{cell.lr:g}"]


CELL_HEADER = ["schedule", "noise (nominal)", "B", "lr"]


def mean_text(values: list[float], digits: int = 4) -> str:
    """Mean ± one standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def write_stopping(page: Page, settings: list[Setting]) -> None:
    """The race of the signals in every cell; nothing where no run has a signal's series."""
    tables, lacking = [], set()
    for setting in settings:
        rows = []
        runs = [r for r in setting.ratio_runs if r.finished and not r.fake]
        for same in group_by(sorted(runs, key=lambda r: (r.budget, r.cell)), lambda r: (r.budget, r.cell)).values():
            by_rule: dict[str, list[Stop]] = {}
            for run in same:
                for rule, stop in stops(run).items():
                    by_rule.setdefault(rule, []).append(stop)
            lacking |= {s.label for s in SIGNALS if by_rule and s.label not in by_rule}
            for rule, there in by_rule.items():
                numbers = [
                    mean_text([getattr(s, name) for s in there], d)
                    for name, d in (("epoch", 1), ("accuracy", 4), ("lost", 4))
                ]
                rows.append([*cell_text(same[0]), rule, str(len(there)), *numbers])
        if rows:
            tables.append((setting.label, rows))
    if not tables:
        return
    page.heading(2, "Stopping")
    for label, rows in tables:
        page.text(literal(label))
        page.table([*CELL_HEADER, "rule", "runs", "epoch chosen", f"{VAL_ACC} there", "lost"], rows)
    text = (
        f"Lost: {VAL_ACC} (clean labels) at the best epoch minus that at the chosen one; the best is the largest of many noisy "
        "values, so that even a perfect rule loses a little. Each rule takes its best value before so many epochs without a better "
        "one: "
    )
    text += "; ".join(f"{s.label}, {'smallest' if s.sign > 0 else 'largest'}, {s.patience}" for s in SIGNALS)
    text += ". Label Wave is averaged over three epochs, susceptibility over all up to then. Signals measured every few epochs "
    text += "count these as theirs. ± one standard deviation over runs."
    if lacking:
        text += f" Some of these cells have no series of: {', '.join(s.label for s in SIGNALS if s.label in lacking)}."
    page.text(text)
