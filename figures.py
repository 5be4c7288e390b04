"""Figures 3 to 17 of the report, and the new ones, from runs read by results.py.

A batch size has one colour in every figure, in shades where rates or momenta tell lines apart. Panels are noise
levels, side by side. Thin faint lines are raw values; strong lines are exponential averages, alpha 0.5 for validation
accuracy and 0.05 for values of single batches, as the report draws them; with several seeds, their mean, and a band of
one standard deviation over seeds.
"""

import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

import findings
import stats
from markup import printable
from results import Run, by, last, null_of, together

ALPHA = {"val/acc": 0.5, "val/loss": 0.5}  # the report's smoothing; 0.05 for everything that comes from one batch
BATCH_ALPHA = 0.05
UNSMOOTHED = ("probe/", "optim/", "corrected/", "null/")  # whole sets, no noise, averaged over batches, few points
REPORT_BN = "eval"  # BatchNorm's mode in the report's cosines
# Options of a run's setting that change neither its training nor the three series that the report has, but for the
# cosines under another --measure-bn, which are labelled: a run may differ from the report in these.
TOLERATED = {"sync_bn", "measure_bn", "stratify", "chunks", "window"}
DRAWN = 1500  # most points of one line; more than a figure can show and it makes an SVG slow
SCHED_NAMES = {"onecycle": "one-cycle", "cosine": "cosine annealing", "constant": "constant learning rate"}
REPORT_SCHEDS = ("onecycle", "cosine", "constant")  # figures 4, 5, 6 and so on
X_LABEL = {"steps": "optimizer steps", "epochs": "epochs", "examples": "training examples"}
STYLE = {
    **{"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False},
    **{"axes.spines.right": False, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "figures"},
}


def colour(B: int):
    """The colour of a batch size, blue at 16 to red at 1024, the same in every figure."""
    r, g, b, _ = colormaps["turbo"](0.08 + 0.84 * min(max((math.log2(B) - 4) / 6, 0), 1))
    return (0.86 * r, 0.82 * g, 0.86 * b)  # darker, for yellow and green to be seen on white


def shade(color: tuple, i: int, n: int) -> tuple:
    """The i-th of n shades of a colour, light to dark; the colour itself where there is only one."""
    t = 2 * i / (n - 1) - 1 if n > 1 else 0
    return tuple(c + 0.5 * abs(t) * ((t < 0) - c) for c in color)


# -------------------------------------------------------------------------------------------------------- smoothing


def smooth(values: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Exponential average of a series and the standard deviation within its window, both (n,).

    Weights (1 - alpha)^i over the values so far, normalised to sum 1 (pandas' `ewm(alpha)`, whose `mean()` and
    `std(bias=True)` these are). The report's drawn lines and bands.
    """
    mean, spread = np.empty(len(values)), np.empty(len(values))
    total = first = second = 0.0
    for i, value in enumerate(values):
        total = total * (1 - alpha) + 1
        first = first * (1 - alpha) + value
        second = second * (1 - alpha) + value * value
        mean[i] = first / total
        spread[i] = math.sqrt(max(second / total - mean[i] ** 2, 0))
    return mean, spread


def alpha_of(tag: str) -> float:
    """How much the newest value counts when `tag` is smoothed; 1 is no smoothing."""
    return 1.0 if tag.startswith(UNSMOOTHED) else ALPHA.get(tag, BATCH_ALPHA)


# --------------------------------------------------------------------------------------------------- lines over time


@dataclass
class Look:
    """How curves are drawn: `x` in steps, epochs or examples; `log_x`; `bands`: seeds or window (the report's)."""

    x: str = "steps"
    log_x: bool = False
    bands: str = "seeds"
    reference: list[Run] = field(default_factory=list)


def along(run: Run, steps: np.ndarray, x: str) -> np.ndarray | None:
    """Steps as steps, epochs or examples; None where the run does not say how many steps an epoch has."""
    if x == "steps":
        return steps.astype(float)
    if not run.steps_per_epoch:
        return None
    epochs = steps / run.steps_per_epoch
    return (
        epochs if x == "epochs" else epochs * (run.resolved.get("train_examples") or run.steps_per_epoch * run.cell.B)
    )


def draw_line(axis, runs: list[Run], tag: str, look: Look, color, style: str = "-", alpha: float | None = None) -> bool:
    """One line: the runs of one cell, one for each seed. Returns whether there was anything to draw.

    Only over the x that every seed has reached and none has yet to reach; seeds without any in common are drawn apart.
    `alpha` in place of the tag's own.
    """
    alpha = alpha_of(tag) if alpha is None else alpha
    curves = []
    for run in runs:
        steps, values = run.series.get(tag, ((), ()))
        x = along(run, steps, look.x) if len(steps) else None
        if x is not None:
            mean, spread = smooth(values, alpha)
            curves.append((x, values, mean, spread))
    if not curves:
        return False
    x = np.unique(np.concatenate([c[0] for c in curves]))
    x = x[(x >= max(c[0][0] for c in curves)) & (x <= min(c[0][-1] for c in curves))]
    if not len(x):
        return any([draw_line(axis, [run], tag, look, color, style, alpha) for run in runs])
    at = lambda k: np.mean([np.interp(x, c[0], c[k]) for c in curves], axis=0)  # noqa: E731
    thin = np.unique(np.linspace(0, len(x) - 1, min(len(x), DRAWN)).astype(int))
    raw, middle = at(1), at(2)
    if style == "-" and alpha < 1:
        axis.plot(x[thin], raw[thin], color=color, lw=0.6, alpha=0.22, zorder=1)
    axis.plot(x[thin], middle[thin], color=color, lw=1.7 if style == "-" else 1.2, ls=style, zorder=3)
    spread = np.std([np.interp(x, c[0], c[2]) for c in curves], axis=0, ddof=1) if len(curves) > 1 else None
    if look.bands == "window" and alpha < 1:  # what is not smoothed has no window
        spread = at(3)
    if spread is not None and style == "-":
        axis.fill_between(
            x[thin], (middle - spread)[thin], (middle + spread)[thin], color=color, alpha=0.15, lw=0, zorder=2
        )
    return True


def panels(
    n: int, title: str, ylabel: str, xlabel: str, rows: int = 1, height: float = 3.3
) -> tuple[Figure, np.ndarray]:
    """A figure of `rows` x `n` panels with shared axes."""
    figure = Figure(figsize=(max(3.4 * n, 6.0) + 1.2, height * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, n, sharey="row", sharex=True, squeeze=False)
    headline(figure, title)
    for row in axes:
        row[0].set_ylabel(ylabel)
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
        axis.xaxis.set_major_formatter(FuncFormatter(short))
    return figure, axes


def headline(figure: Figure, title: str) -> None:
    """A title over the whole figure, in as many lines as its width asks for."""
    lines = textwrap.fill(printable(title), int(10.5 * figure.get_figwidth()))
    figure.suptitle(lines, fontsize=11, parse_math=False)  # a name may hold a $


def short(x: float, _=None) -> str:
    """A number for an axis: 25k rather than 25000."""
    return f"{x / 1e6:g}M" if abs(x) >= 1e6 else f"{x / 1e3:g}k" if abs(x) >= 1e3 else f"{x:g}"


def conditions(figure: Figure, runs: list[Run], tag: str, look: Look, beside: bool = False) -> str:
    """The line under a figure: seeds, unfinished runs, smoothing, bands; `beside`: the report's curves are there."""
    seeds = len({r.seed for r in runs})
    parts = [f"{len(runs)} runs, {seeds} seed{'s' * (seeds > 1)}"]
    unfinished = sum(not r.finished for r in runs)
    parts += [f"{unfinished} not finished"] * bool(unfinished)
    if seeds > 1:
        parts.append("lines: mean over seeds, where all of them have values")
    if alpha_of(tag) < 1:
        parts.append(f"faint: raw values; {'strong' if seeds > 1 else 'lines'}: {averaged(tag)}")
    parts += bands(figure, look, alpha_of(tag) < 1)
    if beside:
        modes = other_modes(runs, tag)
        parts.append("dashed: the report's own curve, one run")
        parts += [f"its cosines with BatchNorm in {REPORT_BN} mode, ours in {modes} mode"] * bool(modes)
    return "; ".join(parts)


def averaged(tag: str) -> str:
    return f"exponential average, alpha {alpha_of(tag):g}"


def bands(figure: Figure, look: Look, smoothed: bool) -> list[str]:
    """What the bands of a figure are, in words; nothing where none is drawn."""
    if not any(axis.collections for axis in figure.axes):
        return []
    if look.bands == "window" and smoothed:
        return ["bands: standard deviation within the average's window"]
    return ["bands: one standard deviation over seeds" + ", nothing is smoothed here" * (look.bands == "window")]


def other_modes(runs: list[Run], tag: str) -> str:
    """BatchNorm modes of our measurements of `tag`, where they are not the report's; else nothing."""
    modes = {r.options["measure_bn"] for r in runs} - {REPORT_BN} if tag.startswith("grad/") else ()
    return " and ".join(sorted(modes))


def foot(figure: Figure, text: str) -> None:
    lines = textwrap.fill(printable(text), int(17 * figure.get_figwidth()))
    figure.supxlabel(lines, fontsize=7, color="0.35", parse_math=False)


def noise_title(noise: float) -> str:
    return f"{noise:.0%} label noise"


def named_momentum(m: float, runs: list[Run]) -> str:
    """A momentum as the end of a label, where there are several among `runs`."""
    return f", m {m:g}" if len({r.cell.momentum for r in runs}) > 1 else ""


def curves(
    title: str, ylabel: str, runs: list[Run], tag: str, look: Look, with_clean: bool, by_lr: bool = False
) -> Figure | None:
    """A figure of one series over time: a panel for each noise level, a line for each batch size (and rate).

    None where no run has the series. The report's own curves, where they are, lie beside it, dashed.
    """
    runs = [r for r in runs if tag in r.series and not r.fake and (with_clean or r.cell.noise > 0)]
    if not runs:
        return None
    levels = sorted({r.cell.noise for r in runs})
    figure, axes = panels(len(levels), title, ylabel, X_LABEL[look.x])
    # without rates to tell apart a cell is its batch size: tuned runs of one cell may differ in rate from seed to seed
    line = lambda r: (r.cell.B, (r.cell.lr if by_lr else 0, r.cell.momentum))  # noqa: E731
    variants = sorted({line(r)[1] for r in runs})
    tint = lambda B, variant: shade(colour(B), variants.index(variant), len(variants))  # noqa: E731
    shown = []
    for axis, noise in zip(axes[0], levels, strict=True):
        axis.set_title(noise_title(noise))
        for key, same in sorted(by([r for r in runs if r.cell.noise == noise], line).items()):
            draw_line(axis, same, tag, look, tint(*key))
            for reference in look.reference:
                if all(comparable(r, reference) for r in same) and draw_line(
                    axis, [reference], tag, look, tint(*key), "--"
                ):
                    shown += same
        if look.log_x:
            axis.set_xscale("log")
    marks = []
    for B, (lr, m) in sorted({line(r) for r in runs}, key=lambda k: (k[0] / k[1][0] if by_lr else 0, k)):
        with_m = named_momentum(m, runs)
        label = f"B/lr = {B / lr:.0f}\n(B {B}, lr {lr:g}{with_m})" if by_lr else f"{B}{with_m}"
        marks.append(Line2D([], [], color=tint(B, (lr, m)), lw=2, label=label))
    if shown:
        label = "the report" + f"\n({REPORT_BN} mode)" * bool(other_modes(shown, tag))
        marks.append(Line2D([], [], color="0.3", lw=1.2, ls="--", label=label))
    across = math.ceil(len(marks) / 8)  # more below one another do not fit
    figure.set_figwidth(figure.get_figwidth() + 1.8 * (across - 1))
    head = "batch / rate" if by_lr else "batch size"
    figure.legend(handles=marks, title=head, loc="outside right center", ncols=across)
    foot(figure, conditions(figure, runs, tag, look, bool(shown)))
    return figure


def comparable(ours: Run, reference: Run) -> bool:
    """Whether a run may lie beside a curve of the report: one cell, schedule and weight decay, no A/A run, and a setting
    that differs in nothing but `TOLERATED`."""
    if ours.fake or ours.cell != reference.cell or (ours.budget, ours.length) != (reference.budget, reference.length):
        return False
    a, b = (
        {k: v for k, v in r.setting if k not in TOLERATED} | {"wd": float(r.options["wd"])} for r in (ours, reference)
    )
    return a == b


def ratio_pairs(runs: list[Run]) -> bool:
    """Whether runs are what figures 13 and 14 show: two batch sizes and two rates, both the same factor apart."""
    sizes, rates = sorted({r.cell.B for r in runs}), sorted({r.cell.lr for r in runs})
    return len(sizes) == len(rates) == 2 and math.isclose(sizes[1] / sizes[0], rates[1] / rates[0])


def schedules(runs: list[Run]) -> Figure | None:
    """Figure 3: learning rate and momentum over time, of one run for each schedule."""
    chosen = {}
    for run in runs:
        if {"optim/lr", "optim/momentum"} <= run.series.keys() and run.budget in ("any", "steps"):
            have = chosen.get(run.cell.sched)
            if have is None or len(run.series["optim/lr"][0]) > len(have.series["optim/lr"][0]):
                chosen[run.cell.sched] = run
    if not chosen:
        return None
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    headline(figure, "Figure 3: schedules")
    axes = figure.subplots(1, 2)
    styles = dict(zip(REPORT_SCHEDS, ("-", "--", ":"), strict=True))
    ends = [min(int(r.resolved.get("sched_steps") or 5000) * 1.2, r.series["optim/lr"][0][-1]) for r in chosen.values()]
    for axis, tag, name in zip(axes, ("optim/lr", "optim/momentum"), ("learning rate", "momentum"), strict=True):
        axis.set_title(name)
        axis.set_xlabel(X_LABEL["steps"])
        for sched, run in chosen.items():
            steps, values = run.series[tag]
            axis.plot(steps, values, ls=styles[sched], lw=2, label=SCHED_NAMES[sched])
        axis.set_xlim(0, max(ends) or 1)
    axes[0].legend()
    foot(figure, "one run for each schedule: " + ", ".join(r.name for r in chosen.values()))
    return figure


# ------------------------------------------------------------------------------------------------------ new figures


def over_seeds(axis, points: dict[int, list[float]], color, label: str, marker: str, style: str = "-") -> None:
    """Mean and standard deviation over seeds against batch size."""
    sizes = sorted(points)
    means = [np.mean(points[B]) for B in sizes]
    spread = [np.std(points[B], ddof=1) if len(points[B]) > 1 else 0 for B in sizes]
    axis.errorbar(sizes, means, spread, color=color, marker=marker, ms=4, ls=style, lw=1.5, capsize=2, label=label)


def batch_axis(axis, sizes: Iterable[int]) -> None:
    sizes = sorted(set(sizes))
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(B) for B in sizes])
    axis.minorticks_off()


def nulls(title: str, runs: list[Run], pair: str) -> Figure | None:
    """A run's mean raw cosine, its null and the corrected one against batch size; A/A runs beside them."""
    raw, corrected = f"grad/{pair}", f"corrected/{pair}"
    real = [r for r in runs if not r.fake and r.cell.noise > 0 and raw in r.series]
    if not real or not any(null_of(r, pair) in r.series or corrected in r.series for r in real):
        return None
    fakes = [r for r in runs if r.fake and raw in r.series]
    # a column holds what differs in nothing but batch size and seed: its bars are deviations over seeds
    columns = []
    for (noise, m), here in sorted(by(real, lambda r: (r.cell.noise, r.cell.momentum)).items()):
        columns.append((noise_title(noise) + named_momentum(m, real), here))
    for (fake, m, budget), here in sorted(by(fakes, lambda r: (r.fake, r.cell.momentum, r.budget)).items()):
        other = f"\nschedule in {budget}" * (budget != "any" and {budget} != {r.budget for r in real + fakes})
        columns.append((f"A/A: clean labels, fake mask {fake:.0%}" + named_momentum(m, real + fakes) + other, here))
    figure, axes = panels(len(columns), title, "cosine, mean over the run", "batch size")
    looks = {"raw": ("#1f4e9c", "o", "-"), "null": ("0.45", "s", "--"), "corrected": ("#c8501e", "^", "-")}
    for axis, (name, here) in zip(axes[0], columns, strict=True):
        axis.set_title(name)
        for kind in looks:
            points: dict[int, list[float]] = {}
            for run in here:  # raw and null at the same steps: a cosine changes as the run goes on
                null = null_of(run, pair)
                tag = {"raw": raw, "null": null, "corrected": corrected}[kind]
                mean = together(run, tag, tag if kind == "corrected" else null, lambda a, _: a)
                if mean is not None:
                    points.setdefault(run.cell.B, []).append(mean)
            if points:
                color, marker, style = looks[kind]
                over_seeds(axis, points, color, kind, marker, style)
    for axis in axes[0]:  # they share it
        batch_axis(axis, {r.cell.B for r in real + fakes})
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    foot(
        figure,
        f"{len(real)} runs; raw and null at the steps that have both; bars: one standard deviation over seeds; "
        "noisy gradients pull elsewhere where raw lies below its null",
    )
    return figure


def probes(title: str, runs: list[Run], look: Look) -> Figure | None:
    """Share of the probed noisy examples predicted as their wrong label, as their true one, and as neither."""
    kinds = {"probe/memorized": "memorized", "probe/recovered": "recovered", "probe/other": "other"}
    runs = [r for r in runs if not r.fake and r.cell.noise > 0 and any(k in r.series for k in kinds)]
    if not runs:
        return None
    levels = sorted({r.cell.noise for r in runs})
    line = lambda r: (r.cell.B, r.cell.momentum)  # noqa: E731
    momenta = sorted({r.cell.momentum for r in runs})
    tint = lambda B, m: shade(colour(B), momenta.index(m), len(momenta))  # noqa: E731
    figure, axes = panels(len(levels), title, "", X_LABEL[look.x], rows=3, height=2.2)
    for row, (tag, name) in zip(axes, kinds.items(), strict=True):
        row[0].set_ylabel(f"share {name}")
        for axis, noise in zip(row, levels, strict=True):
            axis.set_ylim(0, 1)
            for key, same in sorted(by([r for r in runs if r.cell.noise == noise], line).items()):
                draw_line(axis, same, tag, look, tint(*key))
            if look.log_x:
                axis.set_xscale("log")
    for axis, noise in zip(axes[0], levels, strict=True):
        axis.set_title(noise_title(noise))
    marks = [
        Line2D([], [], color=tint(B, m), lw=2, label=f"{B}{named_momentum(m, runs)}")
        for B, m in sorted({line(r) for r in runs})
    ]
    figure.legend(handles=marks, title="batch size", loc="outside right center")
    foot(figure, conditions(figure, runs, "probe/memorized", look))
    return figure


def by_ratio(title: str, runs: list[Run]) -> Figure | None:
    """Final validation accuracy against lr/B and against lr/(B(1-m)), every finished run a point.

    Colour: batch size; shape: schedule; filling: in what its length is given.
    """
    runs = [r for r in runs if not r.fake and r.finished and last(r, "val/acc") is not None]
    if not runs:
        return None
    levels = sorted({r.cell.noise for r in runs})
    markers = {"onecycle": "o", "cosine": "^", "constant": "s"}
    fillings = {"any": "full", "steps": "full", "epochs": "none", "examples": "left"}
    figure = Figure(figsize=(max(3.4 * len(levels), 6) + 1.2, 6.6), layout="constrained")
    axes = figure.subplots(2, len(levels), sharey=True, sharex="row", squeeze=False)
    headline(figure, title)
    for row, with_m, name in zip(axes, (False, True), ("lr / B", "lr / (B (1 - m))"), strict=True):
        row[0].set_ylabel("final validation accuracy")
        for axis, noise in zip(row, levels, strict=True):
            axis.set_title(noise_title(noise))
            axis.set_xlabel(name)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e-0", "e-")))
            axis.minorticks_off()
            for r in runs:
                if r.cell.noise == noise:
                    axis.plot(
                        findings.ratio(r.cell, with_m),
                        last(r, "val/acc"),
                        color=colour(r.cell.B),
                        marker=markers[r.cell.sched],
                        fillstyle=fillings[r.budget],
                        ms=5,
                        alpha=0.8,
                    )
    marks = [Line2D([], [], color=colour(B), marker="o", ls="", label=str(B)) for B in sorted({r.cell.B for r in runs})]
    marks += [
        Line2D([], [], color="0.4", marker=markers[s], ls="", label=SCHED_NAMES[s])
        for s in REPORT_SCHEDS
        if s in {r.cell.sched for r in runs}
    ]
    budgets = [b for b in findings.BUDGETS if b in {r.budget for r in runs}]
    marks += [
        Line2D([], [], color="0.4", marker="o", fillstyle=fillings[b], ls="", label=f"schedule in {b}")
        for b in budgets
        if len(budgets) > 1
    ]
    figure.legend(handles=marks, title="batch size", loc="outside right center")
    foot(
        figure,
        f"{len(runs)} finished runs; m: the momentum, for one-cycle its {findings.PEAK_MOMENTUM} at the largest rate",
    )
    return figure


def best_sizes(title: str, runs: list[Run]) -> Figure | None:
    """The best batch size (top of a parabola through final validation accuracy on log2 B) against noise, by budget."""
    runs = [r for r in runs if not r.fake and r.finished and last(r, "val/acc") is not None]
    scheds = [s for s in REPORT_SCHEDS if s in {r.cell.sched for r in runs}]
    found: dict[tuple, list[float]] = {}
    parts = by(runs, lambda r: (r.cell.sched, r.budget, r.cell.momentum, r.cell.noise, r.seed))
    for (*key, _), group in parts.items():
        try:
            top = stats.best_log2([r.cell.B for r in group], [last(r, "val/acc") for r in group])
        except stats.Incomplete:
            continue
        found.setdefault(tuple(key), []).append(top)
    scheds = [s for s in scheds if any(key[0] == s for key in found)]
    if not scheds:
        return None
    figure, axes = panels(len(scheds), title, "best batch size", "label noise (nominal)")
    looks = {"steps": ("#c8501e", "o"), "epochs": ("#1f4e9c", "s"), "examples": ("#2a8a57", "^"), "any": ("0.35", "D")}
    names = {**{k: f"schedule matched in {k}" for k in findings.BUDGETS}, "any": "no schedule"}
    for axis, sched in zip(axes[0], scheds, strict=True):
        axis.set_title(SCHED_NAMES[sched])
        momenta = sorted({key[2] for key in found})
        for budget, m in itertools.product(looks, momenta):
            levels = sorted(n for s, b, other, n in found if (s, b, other) == (sched, budget, m))
            if levels:
                color, marker = looks[budget]
                groups = [found[sched, budget, m, n] for n in levels]
                spread = [np.std(g, ddof=1) if len(g) > 1 else 0 for g in groups]
                axis.errorbar(
                    levels,
                    [np.mean(g) for g in groups],
                    spread,
                    color=shade(to_rgb(color), momenta.index(m), len(momenta)),
                    marker=marker,
                    ms=5,
                    capsize=2,
                    label=names[budget] + named_momentum(m, runs),
                )
    sizes = sorted({r.cell.B for r in runs})
    axes[0][0].set_yticks([math.log2(B) for B in sizes], [str(B) for B in sizes])
    handles = {label: h for a in axes[0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right center")
    foot(
        figure, "top of a parabola through final validation accuracy on log2 B; bars: one standard deviation over seeds"
    )
    return figure


def single(run: Run, look: Look) -> Figure:
    """One run on a page: losses, accuracies, cosines with their nulls, norms, probes, learning rate.

    A cosine is drawn at the steps of its null, which are rarer, neither of them smoothed: an average over the same number
    of points would reach back much further for one than for the other.
    """
    paired = {}
    for pair in ("cos_clean_all", "cos_clean_noisy"):
        (steps, values), (rare, _) = (run.series.get(tag, ((), ())) for tag in (f"grad/{pair}", null_of(run, pair)))
        both, at, _ = np.intersect1d(steps, rare, return_indices=True)
        if len(both):
            paired[f"grad/{pair}"] = (both, values[at])
    run = replace(run, series=run.series | paired)
    groups = {
        "loss": ("train/loss", "val/loss"),
        "accuracy": ("train/acc_clean", "train/acc_noisy", "val/acc"),
        "cosine": (
            "grad/cos_clean_all",
            null_of(run, "cos_clean_all"),
            "grad/cos_clean_noisy",
            null_of(run, "cos_clean_noisy"),
            "corrected/cos_clean_noisy",
        ),
        "gradient norm": ("grad/norm_clean", "grad/norm_noisy", "grad/norm_all"),
        "share of probed noisy examples": ("probe/memorized", "probe/recovered", "probe/other"),
        "learning rate": ("optim/lr",),
    }
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    headline(figure, run.name.replace("_", " "))
    for axis, (name, tags) in zip(figure.subplots(2, 3).flat, groups.items(), strict=True):
        axis.set_title(name)
        axis.set_xlabel(X_LABEL[look.x])
        for color, tag in zip(("#1f4e9c", "#c8501e", "#2a8a57", "#8a4fa8", "0.3"), tags, strict=False):
            if draw_line(axis, [run], tag, look, color, alpha=1.0 if tag in paired else None):
                axis.plot([], [], color=color, label=tag)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
        else:
            axis.text(
                0.5, 0.5, f"no {tags[0]} in this run", ha="center", transform=axis.transAxes, color="0.4", fontsize=8
            )
    parts = ["faint: raw values; lines: exponential average, alpha 0.05 (validation accuracy and loss 0.5)"]
    parts += ["cosines with a null: at the null's steps, neither smoothed"] * bool(paired)
    foot(figure, "; ".join(parts + bands(figure, look, True)))
    return figure


def save(figure: Figure, stem: Path) -> None:
    """STEM.png and STEM.svg."""
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def styled(make: Callable[..., Figure | None], *args, stem: Path, **kwargs) -> bool:
    """Make a figure in the common style and save it; whether there was anything to draw."""
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a name in a script that the font lacks
        figure = make(*args, **kwargs)
        if figure is not None:
            save(figure, stem)
    return figure is not None
