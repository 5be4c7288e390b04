"""The table of runs: one row each, what it is and what the claims need of it."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import bdtrc

from data import printable
from series import COS_CLEAN_ALL, COS_CLEAN_NOISY, MEMORIZED, NORM_CLEAN, NORM_NOISY, TEST_ACC, VAL_ACC
from study import runvalues
from study.runfolders import SEEDS, Cell, Run
from study.runvalues import last_value

AT_CHANCE = 0.001  # how improbable an accuracy has to be under guessing for the run to have learned
CELL = list(Cell._fields)  # sched, noise, B, lr, momentum
PEAK_MOMENTUM = 0.85  # one-cycle's at its largest learning rate


class Value(NamedTuple):
    """A column: what it is (with its unit), the series that it comes from, and its value for a run (None: not measured)."""

    label: str
    series: str
    of: Callable[[Run], float | None]


def over_schedule(run: Run, tag: str, of_epochs: bool = False) -> float | None:
    """Mean over equal shares of the schedule, while the run is trained: the area under the series (trapezoids) over its length.

    Runs that measure at other steps, or more often, have the same weights at the same share of the schedule.
    """
    if tag not in run.series:
        return None
    steps, values = run.series[tag]
    kept = runvalues.while_trained(run, steps, of_epochs)
    steps, values = steps[kept], values[kept]
    if len(steps) < 2:
        return float(values[0]) if len(steps) else None
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def difference_per_B(run: Run) -> float | None:
    mean = over_schedule(run, "grad/difference")
    return None if mean is None else mean / run.cell.B


def log_dimension_ratio(run: Run) -> float | None:
    how = lambda noisy, clean: np.log(noisy / clean)  # noqa: E731
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = runvalues.mean_at_common_steps(
            run, "isotropy/dimension", "isotropy/clean_dimension", how, of_epochs=True
        )
    return mean if mean is not None and np.isfinite(mean) else None


def norm_ratio(run: Run) -> float | None:
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = runvalues.mean_at_common_steps(run, NORM_NOISY, NORM_CLEAN, lambda a, b: np.log(a / b))
    return float(np.exp(mean)) if mean is not None and np.isfinite(mean) else None


def cosine_minus_null(run: Run) -> float | None:
    null = runvalues.null_tag(run, "cos_clean_noisy")
    return runvalues.mean_at_common_steps(run, COS_CLEAN_NOISY, null, np.subtract)


VALUES = {
    "val_acc": Value("accuracy on clean validation labels at the end, share", "val/acc", lambda r: last_value(r, VAL_ACC)),
    "test_acc": Value("accuracy on the test set at the end, share", "test/acc", lambda r: last_value(r, TEST_ACC)),
    "memorized": Value("wrong labels predicted at the end, share", "probe/memorized", lambda r: last_value(r, MEMORIZED)),
    "memorized_excess": Value("the same beyond chance", "probe/memorized_excess", lambda r: last_value(r, "probe/memorized_excess")),
    "difference_per_B": Value(
        "squared distance of the mean gradients of clean and noisy examples over the noise of one example, 1 / examples, mean over the schedule",
        "grad/difference (--measure full)", difference_per_B),
    "log_dimension_ratio": Value(
        "log of the effective dimension of label noise over that of clean sampling noise, mean over the run after step 0",
        "isotropy/dimension with isotropy/clean_dimension after step 0", log_dimension_ratio),
    "cos_minus_null": Value("cosine of clean and noisy minus its null, mean over the run",
                            "grad/cos_clean_noisy with its null (--measure full)", cosine_minus_null),
    "cos_clean_all": Value("cosine of clean and all, mean over the run", "grad/cos_clean_all",
                           lambda r: runvalues.mean_while_trained(r, COS_CLEAN_ALL)),
    "norm_ratio": Value("norm of the noisy over that of the clean gradient, geometric mean over the run",
                        "grad/norm_noisy with grad/norm_clean", norm_ratio),
}  # fmt: skip


def at_chance(run: Run) -> bool:
    """Whether a finished run's accuracy at its end is what guessing gives: as many correct validation labels, or more, would
    come with a probability of over `AT_CHANCE` if each were correct with 1 / classes.

    A network that predicts one class has that class's share, which in a validation set drawn from balanced classes lies that
    near. False where the number of images or classes is not known.
    """
    n, classes, accuracy = run.resolved.get("val_examples"), run.resolved.get("classes"), last_value(run, VAL_ACC)
    if not (run.finished and n and classes) or accuracy is None:
        return False
    return bool(bdtrc(round(accuracy * n) - 1, n, 1 / len(classes)) > AT_CHANCE)


def computation(run: Run) -> tuple:
    """What two runs have in common that are the same computation: a schedule of 16 epochs can be one of 192 steps."""
    lengths = [run.resolved.get(name) for name in ("sched_steps", "total_steps")]
    curve = run.series[VAL_ACC][1].tobytes() if VAL_ACC in run.series else run.name
    return (run.setting, run.cell, run.seed, run.options["wd"], run.fake, *lengths, curve)


def row(run: Run) -> dict:
    """A run's row of the table, but for `copies`."""
    columns = {"name": printable(run.name), "status": run.summary.get("status", "no summary"), **run.cell._asdict()}
    columns |= {"wd": float(run.options["wd"]), "fake": run.fake, "budget": run.budget, "length": run.length}
    columns |= {name: run.options.get(name, 0) for name in SEEDS} | {"at_chance": at_chance(run)}
    measured = {name: value.of(run) if run.finished else None for name, value in VALUES.items()}
    return columns | {name: np.nan if value is None else value for name, value in measured.items()}


def table(runs: Iterable[Run]) -> pd.DataFrame:
    """A row for each run.

    Columns: name; status; the cell (`CELL`), wd, fake (the share of an A/A run's fake mask, else 0); budget (in what the length
    of its schedule is given; `any` without one) and length; the three seeds; at_chance; `VALUES`, NaN where a run has not
    measured one or has not finished; and copies: the first run of the table that is the same computation, if it is another.
    """
    rows, seen = [], {}
    for run in runs:
        columns = row(run)
        first = seen.setdefault(computation(run), columns["name"]) if run.finished else columns["name"]
        rows.append(columns | {"copies": "" if first == columns["name"] else first})
    columns = ["name", "status", *CELL, "wd", "fake", "budget", "length", *SEEDS, "at_chance", *VALUES, "copies"]
    return pd.DataFrame(rows, columns=columns)


def lr_batch_ratio(cell: Cell, with_momentum: bool) -> float:
    """lr / B, or lr / (B (1 - m)) with the momentum at the largest learning rate."""
    momentum = PEAK_MOMENTUM if cell.sched == "onecycle" else cell.momentum
    return cell.lr / cell.B / (1 - momentum if with_momentum else 1)


def rates_tried(frame: pd.DataFrame) -> int:
    """The largest number of learning rates and weight decays of a cell."""
    pairs = frame.drop_duplicates([*CELL, "wd", "budget", "fake"])
    return int(pairs.groupby([c for c in CELL if c != "lr"] + ["budget", "fake"]).size().max()) if len(pairs) else 1


def tuned(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell, budget and seed: the learning rate and weight decay that did best on the *other* seeds.

    Best by mean validation accuracy; a seed without another to choose on is left out. The rate of the cell is then 0, so that
    cells can be compared. Where no run of a cell has finished, one that has not stands for it.
    """
    chosen = []
    for _, same in frame.groupby([c for c in CELL if c != "lr"] + ["budget", "fake"], sort=False):
        done = same[same["val_acc"].notna()]
        scores = done.pivot_table(index=list(SEEDS), columns=["lr", "wd"], values="val_acc")
        rest = scores.notna().sum() - scores.notna()
        others = ((scores.sum() - scores.fillna(0)) / rest.where(rest > 0)).dropna(how="all")
        best = others.idxmax(axis=1) if len(others) else {}
        at = [best.get(tuple(row)) for row in done[list(SEEDS)].itertuples(index=False)]
        is_best = [pair == choice for pair, choice in zip(zip(done["lr"], done["wd"]), at)]
        chosen.append(done[is_best] if len(done) else same.head(1))
    return pd.concat(chosen).assign(lr=0.0) if chosen else frame
