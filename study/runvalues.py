"""What tables, figures and the table of runs need of a run, computed from its series."""

import numpy as np

import schedules
from study.runfolders import Run


def schedule_shares(run: Run) -> tuple[float, float] | None:
    """(fraction of the schedule that the run sees, share of the run that stands at the schedule's last value); None for a
    constant rate, or where it is not known."""
    seen = run.resolved.get("schedule")
    if (
        seen is None and {"sched_steps", "total_steps", "steps_per_epoch"} <= run.resolved.keys()
    ):  # a run of an older version
        lengths = (run.resolved[name] for name in ("sched_steps", "total_steps", "steps_per_epoch"))
        seen = schedules.span(run.options["sched"], *lengths)
    return (
        (seen["fraction_seen"], seen["share_at_end"])
        if seen and {"fraction_seen", "share_at_end"} <= seen.keys()
        else None
    )


def last_value(run: Run, tag: str) -> float | None:
    """The last value of a series; None where the run has none."""
    return float(run.series[tag][1][-1]) if tag in run.series and len(run.series[tag][1]) else None


def while_trained(run: Run, steps: np.ndarray, of_epochs: bool = False) -> np.ndarray:
    """Which of a series' ascending `steps` (n,) count in a mean over a run, (n,) bool: those before its schedule's end, after
    which the weights stand still; all where there is none before. So a run that goes on after its schedule has the means
    of one that ends with it (`--end schedule`).

    `of_epochs`: measured after epochs; without the untrained network's, with the first of the weights at the end.
    """
    end = run.resolved.get("sched_steps") if schedule_shares(run) else None
    if of_epochs:
        return (steps > 0) & (end is None or np.arange(len(steps)) <= np.searchsorted(steps, end))
    early = steps < (end or np.inf)
    return early if early.any() else ~early


def mean_at_common_steps(run: Run, a: str, b: str, how, of_epochs: bool = False) -> float | None:
    """Mean of how(a, b) at the steps that both series have, `while_trained`."""
    if a not in run.series or b not in run.series:
        return None
    (sa, va), (sb, vb) = run.series[a], run.series[b]
    steps, ia, ib = np.intersect1d(sa, sb, return_indices=True)
    kept = while_trained(run, steps, of_epochs)
    return float(np.mean(how(va[ia[kept]], vb[ib[kept]]))) if kept.any() else None


def null_tag(run: Run, pair: str) -> str:
    """The series that a raw cosine, `cos_clean_noisy` or `cos_clean_all`, is to be set beside: that of random masks, which
    are exchangeable with the real one where there is no effect; else that of the closed form, a ratio of means."""
    masks = f"null/permuted_{pair}"
    return masks if masks in run.series else f"null/{pair}"


def mean_while_trained(run: Run, tag: str) -> float | None:
    """Mean of a series, `while_trained`."""
    return mean_at_common_steps(run, tag, tag, lambda a, _: a)
