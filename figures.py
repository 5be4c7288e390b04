"""Figures 3 to 17 of the report, and the new ones, from runs read by results.py.

A batch size has one colour in every figure. Panels are noise levels, side by side. Thin faint lines are raw values;
strong lines are exponential averages, alpha 0.5 for validation accuracy and 0.05 for values of single batches, as the
report draws them; with several seeds, their mean, and a band of one standard deviation over seeds.
"""

import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

import findings
import stats
from results import Run, by, last, together

ALPHA = {"val/acc": 0.5, "val/loss": 0.5}  # the report's smoothing; 0.05 for everything that comes from one batch
BATCH_ALPHA = 0.05
UNSMOOTHED = ("probe/", "optim/", "corrected/")  # whole sets, no noise, averaged over batches already
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


def draw_line(axis, runs: list[Run], tag: str, look: Look, color, style: str = "-") -> bool:
    """One line: the runs of one cell, one for each seed. Returns whether there was anything to draw."""
    curves = []
    for run in runs:
        steps, values = run.series.get(tag, ((), ()))
        x = along(run, steps, look.x) if len(steps) else None
        if x is not None:
            mean, spread = smooth(values, alpha_of(tag))
            curves.append((x, values, mean, spread))
    if not curves:
        return False
    x = np.unique(np.concatenate([c[0] for c in curves]))
    x = x[x <= max(min(c[0][-1] for c in curves), x[0])]  # where every seed has got to
    at = lambda k: np.mean([np.interp(x, c[0], c[k]) for c in curves], axis=0)  # noqa: E731
    thin = np.unique(np.linspace(0, len(x) - 1, min(len(x), DRAWN)).astype(int))
    raw, middle = at(1), at(2)
    if style == "-" and alpha_of(tag) < 1:
        axis.plot(x[thin], raw[thin], color=color, lw=0.6, alpha=0.22, zorder=1)
    axis.plot(x[thin], middle[thin], color=color, lw=1.7 if style == "-" else 1.2, ls=style, zorder=3)
    spread = np.std([np.interp(x, c[0], c[2]) for c in curves], axis=0, ddof=1) if len(curves) > 1 else None
    if look.bands == "window":
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
    figure.suptitle(textwrap.fill(title, int(10.5 * figure.get_figwidth())), fontsize=11)


def short(x: float, _=None) -> str:
    """A number for an axis: 25k rather than 25000."""
    return f"{x / 1e6:g}M" if abs(x) >= 1e6 else f"{x / 1e3:g}k" if abs(x) >= 1e3 else f"{x:g}"


def conditions(runs: list[Run], tag: str, look: Look) -> str:
    """The line under a figure: seeds, unfinished runs, smoothing, bands."""
    seeds = len({r.seed for r in runs})
    parts = [f"{len(runs)} runs, {seeds} seed{'s' * (seeds > 1)}"]
    unfinished = sum(not r.finished for r in runs)
    parts += [f"{unfinished} not finished"] * bool(unfinished)
    if alpha_of(tag) < 1:
        parts.append(f"faint: raw values; lines: exponential average, alpha {alpha_of(tag):g}")
    if look.bands == "window":
        parts.append("bands: standard deviation within the average's window")
    elif seeds > 1:
        parts.append("bands: one standard deviation over seeds")
    if look.reference:
        parts.append("dashed: the report's own curve, one run")
    return "; ".join(parts)


def foot(figure: Figure, text: str) -> None:
    figure.supxlabel(textwrap.fill(text, int(17 * figure.get_figwidth())), fontsize=7, color="0.35")


def noise_title(noise: float) -> str:
    return f"{noise:.0%} label noise"


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
    rates = sorted({r.cell.lr for r in runs})
    shown = False
    for axis, noise in zip(axes[0], levels, strict=True):
        axis.set_title(noise_title(noise))
        here = [r for r in runs if r.cell.noise == noise]
        # without rates to tell apart a cell is its batch size: tuned runs of one cell may differ in rate from seed to seed
        for _, same in sorted(by(here, lambda r: (r.cell.B, r.cell.lr if by_lr else 0)).items()):
            cell = same[0].cell
            color = ratio_colour(cell, rates) if by_lr else colour(cell.B)
            draw_line(axis, same, tag, look, color)
            for reference in look.reference:
                if comparable(same[0], reference):
                    shown |= draw_line(axis, [reference], tag, look, color, "--")
        if look.log_x:
            axis.set_xscale("log")
    if by_lr:
        cells = sorted({(r.cell.B, r.cell.lr): r.cell for r in runs}.values(), key=lambda c: (c.B / c.lr, c.B))
        marks = [
            Line2D([], [], color=ratio_colour(c, rates), lw=2, label=f"B/lr = {c.B / c.lr:.0f}\n(B {c.B}, lr {c.lr:g})")
            for c in cells
        ]
    else:
        marks = [Line2D([], [], color=colour(B), lw=2, label=f"{B}") for B in sorted({r.cell.B for r in runs})]
    if shown:
        marks.append(Line2D([], [], color="0.3", lw=1.2, ls="--", label="the report"))
    figure.legend(handles=marks, title="batch / rate" if by_lr else "batch size", loc="outside right center")
    foot(figure, conditions(runs, tag, look if shown else Look(look.x, look.log_x, look.bands)))
    return figure


def comparable(ours: Run, reference: Run) -> bool:
    """Whether a curve of the report is of the same cell, data set, model, epochs and schedule length as our run."""
    same = all(ours.options.get(k) == reference.options.get(k) for k in ("dataset", "model", "epochs"))
    return same and ours.cell == reference.cell and (ours.budget, ours.length) == (reference.budget, reference.length)


def ratio_colour(cell, rates: list[float]):
    """Figures 13 and 14: warm and cold for the batch sizes, dark for the larger rate."""
    family = colormaps["Blues" if cell.B <= 64 else "Oranges"]
    return family(0.55 + 0.35 * (rates.index(cell.lr) + 1) / len(rates)) if cell.lr in rates else "k"


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
    tags = {"raw": f"grad/{pair}", "null": f"null/{pair}", "corrected": f"corrected/{pair}"}
    real = [r for r in runs if not r.fake and r.cell.noise > 0 and tags["raw"] in r.series]
    if not real or not any(tags["null"] in r.series or tags["corrected"] in r.series for r in real):
        return None
    fakes = [r for r in runs if r.fake and tags["raw"] in r.series]
    levels = sorted({r.cell.noise for r in real})
    figure, axes = panels(len(levels) + bool(fakes), title, "cosine, mean over the run", "batch size")
    looks = {"raw": ("#1f4e9c", "o", "-"), "null": ("0.45", "s", "--"), "corrected": ("#c8501e", "^", "-")}
    columns = [(noise_title(n), [r for r in real if r.cell.noise == n]) for n in levels]
    columns += [("A/A: clean labels, fake mask", fakes)] if fakes else []
    for axis, (name, here) in zip(axes[0], columns, strict=True):
        axis.set_title(name)
        for kind, tag in tags.items():
            points: dict[int, list[float]] = {}
            for run in here:  # raw and null at the same steps: a cosine changes as the run goes on
                mean = together(run, tag, tag if kind == "corrected" else tags["null"], lambda a, _: a)
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
    figure, axes = panels(len(levels), title, "", X_LABEL[look.x], rows=3, height=2.2)
    for row, (tag, name) in zip(axes, kinds.items(), strict=True):
        row[0].set_ylabel(f"share {name}")
        for axis, noise in zip(row, levels, strict=True):
            axis.set_ylim(0, 1)
            for cell, same in sorted(by([r for r in runs if r.cell.noise == noise], lambda r: r.cell).items()):
                draw_line(axis, same, tag, look, colour(cell.B))
            if look.log_x:
                axis.set_xscale("log")
    for axis, noise in zip(axes[0], levels, strict=True):
        axis.set_title(noise_title(noise))
    marks = [Line2D([], [], color=colour(B), lw=2, label=str(B)) for B in sorted({r.cell.B for r in runs})]
    figure.legend(handles=marks, title="batch size", loc="outside right center")
    foot(figure, conditions(runs, "probe/memorized", Look(look.x)))
    return figure


def by_ratio(title: str, runs: list[Run]) -> Figure | None:
    """Final validation accuracy against lr/B and against lr/(B(1-m)), every finished run a point."""
    runs = [r for r in runs if not r.fake and r.finished and last(r, "val/acc") is not None]
    if not runs:
        return None
    levels = sorted({r.cell.noise for r in runs})
    markers = {"onecycle": "o", "cosine": "^", "constant": "s"}
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
                    x = findings.ratio(r.cell, with_m)
                    axis.scatter(
                        x,
                        last(r, "val/acc"),
                        color=colour(r.cell.B),
                        marker=markers[r.cell.sched],
                        s=26,
                        alpha=0.8,
                        lw=0,
                    )
    marks = [Line2D([], [], color=colour(B), marker="o", ls="", label=str(B)) for B in sorted({r.cell.B for r in runs})]
    marks += [
        Line2D([], [], color="0.4", marker=markers[s], ls="", label=SCHED_NAMES[s])
        for s in REPORT_SCHEDS
        if s in {r.cell.sched for r in runs}
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
    for (sched, budget, noise, _), group in by(runs, lambda r: (r.cell.sched, r.budget, r.cell.noise, r.seed)).items():
        try:
            top = stats.best_log2([r.cell.B for r in group], [last(r, "val/acc") for r in group])
        except stats.Incomplete:
            continue
        found.setdefault((sched, budget, noise), []).append(top)
    scheds = [s for s in scheds if any(key[0] == s for key in found)]
    if not scheds:
        return None
    figure, axes = panels(len(scheds), title, "best batch size", "label noise (nominal)")
    looks = {"steps": ("#c8501e", "o"), "epochs": ("#1f4e9c", "s"), "examples": ("#2a8a57", "^"), "any": ("0.35", "D")}
    names = {**{k: f"schedule matched in {k}" for k in findings.BUDGETS}, "any": "no schedule"}
    for axis, sched in zip(axes[0], scheds, strict=True):
        axis.set_title(SCHED_NAMES[sched])
        for budget, (color, marker) in looks.items():
            levels = sorted(n for s, b, n in found if (s, b) == (sched, budget))
            if levels:
                groups = [found[sched, budget, n] for n in levels]
                spread = [np.std(g, ddof=1) if len(g) > 1 else 0 for g in groups]
                axis.errorbar(
                    levels,
                    [np.mean(g) for g in groups],
                    spread,
                    color=color,
                    marker=marker,
                    ms=5,
                    capsize=2,
                    label=names[budget],
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
    """One run on a page: losses, accuracies, cosines with their nulls, norms, probes, learning rate."""
    groups = {
        "loss": ("train/loss", "val/loss"),
        "accuracy": ("train/acc_clean", "train/acc_noisy", "val/acc"),
        "cosine": (
            "grad/cos_clean_all",
            "null/cos_clean_all",
            "grad/cos_clean_noisy",
            "null/cos_clean_noisy",
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
            if draw_line(axis, [run], tag, look, color):
                axis.plot([], [], color=color, label=tag)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
        else:
            axis.text(
                0.5, 0.5, f"no {tags[0]} in this run", ha="center", transform=axis.transAxes, color="0.4", fontsize=8
            )
    foot(figure, "faint: raw values; lines: exponential average, alpha 0.05 (validation accuracy 0.5)")
    return figure


def save(figure: Figure, stem: Path) -> None:
    """STEM.png and STEM.svg."""
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def styled(make: Callable[..., Figure | None], *args, stem: Path, **kwargs) -> bool:
    """Make a figure in the common style and save it; whether there was anything to draw."""
    with rc_context(STYLE):
        figure = make(*args, **kwargs)
        if figure is not None:
            save(figure, stem)
    return figure is not None
