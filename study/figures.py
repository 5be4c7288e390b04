"""Figures 3 to 17 of the report, and the new ones.

Panels are noise levels, side by side. `drawing.py` documents what colours, markers, lines and bands mean.
"""

import itertools
import math
from collections import defaultdict

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from engine import roles
from schedules import entry
from series import LR, MEMORIZED, MOMENTUM, OTHER, RECOVERED, SERIES, VAL_ACC
from study.analysis.judge import BUDGETS
from study.analysis.runs import PEAK_MOMENTUM, lr_batch_ratio
from study.drawing import (
    BLUE,
    GREEN,
    GREY,
    INTERVALS,
    MARKER_FILLS,
    VERMILION,
    X_LABEL,
    Look,
    alpha_of,
    bands_text,
    batch_axis,
    colour,
    draw_line,
    drawable,
    finish_axes,
    footer,
    headline,
    interval_of_means,
    marker_of,
    named_momentum,
    noise_title,
    over_seeds,
    panels,
    shade,
    smoothed,
    smoothing_text,
    with_x_scale,
)
from study.runfolders import Run
from study.runvalues import last_value, mean_at_common_steps, null_tag
from study.settings import group_by

REPORT_BN = "eval"  # BatchNorm's mode in the report's cosines
# Options of a run's setting that change neither its training nor the three series that the report has, but for the
# cosines under another --measure-bn, which are labelled: a run may differ from the report in these.
TOLERATED_OPTIONS = roles.having(roles.TOLERATED)
REPORT_SCHEDS = ("onecycle", "cosine", "constant")  # figures 4, 5, 6 and so on


def scheds_of(runs: list[Run]) -> list[str]:
    """The schedules of `runs`, the report's first and in its order."""
    there = {r.cell.sched for r in runs}
    return [s for s in REPORT_SCHEDS if s in there] + sorted(there - set(REPORT_SCHEDS))


# -------------------------------------------------------------------------------------------------- lines over time


def conditions(figure: Figure, runs: list[Run], tag: str, look: Look, beside: bool = False) -> str:
    """The line under a figure: seeds, unfinished runs, smoothing, bands; `beside`: the report's curves are there."""
    seeds = len({r.seed for r in runs})
    parts = [f"{len(runs)} runs, {seeds} seed{'s' * (seeds > 1)}"]
    unfinished = sum(not r.finished for r in runs)
    parts += [f"{unfinished} not finished"] * bool(unfinished)
    if seeds > 1:
        parts.append("lines: mean over seeds, where all of them have values")
    if smoothed(runs, tag):
        parts.append(f"faint: raw values; {'strong' if seeds > 1 else 'lines'}: {smoothing_text(tag)}")
    parts += bands_text(figure, look, smoothed(runs, tag))
    if beside:
        modes = other_modes(runs, tag)
        parts.append("dashed: the report's own curve, one run")
        parts += [f"its cosines with BatchNorm in {REPORT_BN} mode, ours in {modes} mode"] * bool(modes)
    return "; ".join(parts)


def other_modes(runs: list[Run], tag: str) -> str:
    """BatchNorm modes of our measurements of `tag`, where they are not the report's; else nothing."""
    modes = {r.options["measure_bn"] for r in runs} - {REPORT_BN} if tag.startswith("grad/") else ()
    return " and ".join(sorted(modes))


def curves(title: str, runs: list[Run], tag: str, look: Look, by_lr: bool = False) -> Figure | None:
    """A figure of one series over time: a panel for each noise level, a line for each batch size (and rate).

    None where no run has the series. The report's own curves, where they are, lie beside it, dashed. What the grid of levels
    and lines lacks is named below the figure.
    """
    candidates = [r for r in runs if not r.fake and (not SERIES[tag].needs or r.cell.noise > 0)]
    runs = [r for r in candidates if drawable(r, tag, look)]
    if not runs:
        return None
    look = with_x_scale(look, runs, [tag])
    levels = sorted({r.cell.noise for r in runs})
    figure, axes = panels(len(levels), title, SERIES[tag].label, X_LABEL[look.x])
    # without rates to tell apart a cell is its batch size: tuned runs of one cell may differ in rate from seed to seed
    line = lambda r: (r.cell.B, (r.cell.lr if by_lr else 0, r.cell.momentum))  # noqa: E731
    variants = sorted({line(r)[1] for r in runs})
    tint = lambda B, variant: shade(colour(B), variants.index(variant), len(variants))  # noqa: E731
    filled = lambda variant: MARKER_FILLS[variants.index(variant) % len(MARKER_FILLS)]  # noqa: E731
    mark = lambda B, variant: {"marker": marker_of(B), "fill": filled(variant)}  # noqa: E731
    shown = []
    for axis, noise in zip(axes[0], levels, strict=True):
        axis.set_title(noise_title(noise))
        for key, same in sorted(group_by([r for r in runs if r.cell.noise == noise], line).items()):
            alpha = alpha_of(tag, max(len(r.series[tag][0]) for r in same))  # one for both, so that neither lags behind
            draw_line(axis, same, tag, look, tint(*key), alpha=alpha, **mark(*key))
            for reference in look.reference:
                if all(comparable(r, reference) for r in same) and draw_line(
                    axis, [reference], tag, look, tint(*key), "--", alpha, **mark(*key)
                ):
                    shown += same
    finish_axes(axes[0], look, f"no {tag}")
    marks = []
    for B, (lr, m) in sorted({line(r) for r in runs}, key=lambda k: (k[0] / k[1][0] if by_lr else 0, k)):
        with_m = named_momentum(m, runs)
        label = f"B/lr = {B / lr:.0f}\n(B {B}, lr {lr:g}{with_m})" if by_lr else f"{B}{with_m}"
        marks.append(legend_mark(tint(B, (lr, m)), label, **mark(B, (lr, m))))
    if shown:
        label = "the report" + f"\n({REPORT_BN} mode)" * bool(other_modes(shown, tag))
        marks.append(Line2D([], [], color="0.3", lw=1.2, ls="--", label=label))
    across = math.ceil(len(marks) / 8)  # more below one another do not fit
    figure.set_figwidth(figure.get_figwidth() + 1.8 * (across - 1))
    head = "batch / rate" if by_lr else "batch size"
    figure.legend(handles=marks, title=head, loc="outside right center", ncols=across)
    name = lambda key: f"batch {key[0]}" + f" at rate {key[1][0]:g}" * by_lr + named_momentum(key[1][1], runs)  # noqa: E731
    lacking = left_out(candidates, runs, levels, {line(r): name(line(r)) for r in candidates}, line, tag, look)
    notes = {k: v for r in look.reference for k, v in noted(r, runs).items()}
    for key, why in notes.items() if tag == VAL_ACC else ():
        if key in {f"{r.cell.noise:g}, {r.cell.B}" for r in runs}:
            noise, B = key.split(", ")
            lacking.append(f"no dashed curve at {noise_title(float(noise))} for batch {B} ({why})")
    footer(figure, "; ".join([conditions(figure, runs, tag, look, bool(shown)), *lacking]), runs)
    return figure


def legend_mark(color, label: str, marker: str, fill: str) -> Line2D:
    """A batch size's entry in a legend: its colour, marker and filling."""
    return Line2D([], [], color=color, lw=2, marker=marker, ms=5, fillstyle=fill, label=label)


def noted(curve: Run, runs: list[Run]) -> dict[str, str]:
    """Why curves are missing beside `curve` of the report, {"noise, batch size": why}, where `runs` have its schedule."""
    fits = curve.cell.sched in {r.cell.sched for r in runs}
    return (curve.resolved.get("left_out") or {}) if fits else {}


def left_out(
    candidates: list[Run], drawn: list[Run], levels: list[float], lines: dict, line, tag: str, look: Look
) -> list[str]:
    """What is missing from a grid of noise `levels` and `lines` {key: name}, with the reason, in words, by level.

    `candidates`: the runs asked for; `drawn`: those of them that are; `line(run)`: a run's key among `lines`.
    """
    there = {(r.cell.noise, line(r)) for r in drawn}
    known = {(r.cell.noise, line(r)): r for r in candidates}
    notes = {key: why for r in drawn for key, why in noted(r, drawn).items()}
    missing: dict[tuple, list[str]] = defaultdict(list)
    for noise in sorted({*levels, *(r.cell.noise for r in candidates)}):
        for key, name in sorted(lines.items()):
            if (noise, key) not in there:
                run = known.get((noise, key))
                if run is None:
                    why = notes.get(f"{noise:g}, {key[0]}", "no run")
                else:
                    why = f"no {tag}" if not len(run.series.get(tag, ((),))[0]) else f"{look.x} unknown"
                missing[noise, why].append(name)
    return [f"not drawn at {noise_title(noise)}: {', '.join(names)} ({why})" for (noise, why), names in missing.items()]


def comparable(ours: Run, reference: Run) -> bool:
    """Whether a run may lie beside a curve of the report: one cell, schedule and weight decay, no A/A run, and a setting
    that differs in nothing but `TOLERATED_OPTIONS`."""
    if ours.fake or ours.cell != reference.cell or (ours.budget, ours.length) != (reference.budget, reference.length):
        return False
    a, b = (
        {k: v for k, v in r.setting if k not in TOLERATED_OPTIONS} | {"wd": float(r.options["wd"])}
        for r in (ours, reference)
    )
    return a == b


def ratio_pairs(runs: list[Run]) -> bool:
    """Whether runs are what figures 13 and 14 show: two batch sizes and two rates, both the same factor apart."""
    sizes, rates = sorted({r.cell.B for r in runs}), sorted({r.cell.lr for r in runs})
    return len(sizes) == len(rates) == 2 and math.isclose(sizes[1] / sizes[0], rates[1] / rates[0])


def schedule_curves(runs: list[Run]) -> Figure | None:
    """Figure 3: learning rate and momentum over time, of one run for each schedule."""
    chosen = {}
    for run in runs:
        if {LR, MOMENTUM} <= run.series.keys() and run.budget in ("any", "steps"):
            have = chosen.get(run.cell.sched)
            if have is None or len(run.series[LR][0]) > len(have.series[LR][0]):
                chosen[run.cell.sched] = run
    if not chosen:
        return None
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    headline(figure, "Figure 3: schedules")
    axes = figure.subplots(1, 2)
    ends = [min(int(r.resolved.get("sched_steps") or 5000) * 1.2, r.series[LR][0][-1]) for r in chosen.values()]
    points = any(len(r.series[LR][0]) <= 3 for r in chosen.values())  # a line of one point cannot be seen
    for axis, tag in zip(axes, (LR, MOMENTUM), strict=True):
        axis.set_title(SERIES[tag].label)
        axis.set_xlabel(X_LABEL["steps"])
        for sched, run in chosen.items():
            steps, values = run.series[tag]
            look = entry(sched)
            axis.plot(steps, values, look.colour, ls=look.line, lw=2, marker="o" * points, label=look.label)
        axis.set_xlim(0, max(ends) or 1)
    axes[0].legend()
    names = "; ".join(r.name.replace("_", ", ") for r in chosen.values())
    footer(figure, f"one run for each schedule: {names}", chosen.values())
    return figure


# ------------------------------------------------------------------------------------------------------ new figures


def nulls(title: str, runs: list[Run], pair: str) -> Figure | None:
    """A run's mean raw cosine, its null and the corrected one against batch size; A/A runs beside them."""
    raw, corrected = f"grad/{pair}", f"corrected/{pair}"
    real = [r for r in runs if not r.fake and r.cell.noise > 0 and raw in r.series]
    if not real or not any(null_tag(r, pair) in r.series or corrected in r.series for r in real):
        return None
    fakes = [r for r in runs if r.fake and raw in r.series]
    # a column holds what differs in nothing but batch size and seed: its bars are deviations over seeds
    columns = []
    for (noise, m), here in sorted(group_by(real, lambda r: (r.cell.noise, r.cell.momentum)).items()):
        columns.append((noise_title(noise) + named_momentum(m, real), here))
    for (fake, m, budget), here in sorted(group_by(fakes, lambda r: (r.fake, r.cell.momentum, r.budget)).items()):
        other = f"\nschedule in {budget}" * (budget != "any" and {budget} != {r.budget for r in real + fakes})
        columns.append((f"A/A: clean labels, fake mask {fake:.0%}" + named_momentum(m, real + fakes) + other, here))
    figure, axes = panels(len(columns), title, "cosine, mean while the run is trained", "batch size")
    looks = {"raw": (BLUE, "o", "-"), "null": ("0.45", "s", "--"), "corrected": (VERMILION, "^", "-")}
    for axis, (name, here) in zip(axes[0], columns, strict=True):
        axis.set_title(name)
        for kind in looks:
            points: dict[int, list[float]] = {}
            for run in here:  # raw and null at the same steps: a cosine changes as the run goes on
                null = null_tag(run, pair)
                tag = {"raw": raw, "null": null, "corrected": corrected}[kind]
                mean = mean_at_common_steps(run, tag, tag if kind == "corrected" else null, lambda a, _: a)
                if mean is not None:
                    points.setdefault(run.cell.B, []).append(mean)
            if points:
                color, marker, style = looks[kind]
                over_seeds(axis, points, color, kind, marker, style)
                interval_of_means(axis, here, tag, color)
    for axis in axes[0]:  # they share it
        batch_axis(axis, {r.cell.B for r in real + fakes})
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    whiskers = f"; {INTERVALS}" * any(f"{corrected}_low" in r.series for r in real)
    counts = f"{len(real)} runs" + f" and {len(fakes)} A/A" * bool(fakes)
    words = f"{counts}; raw and null at the steps that have both; bars: one standard deviation over seeds{whiskers}; "
    footer(figure, words + "noisy gradients pull elsewhere where raw lies below its null", real + fakes)
    return figure


def probes(title: str, runs: list[Run], look: Look) -> Figure | None:
    """Share of the probed noisy examples predicted as their wrong label, as their true one, and as neither."""
    tags = MEMORIZED, RECOVERED, OTHER
    candidates = [r for r in runs if not r.fake and r.cell.noise > 0]
    runs = [r for r in candidates if any(drawable(r, tag, look) for tag in tags)]
    if not runs:
        return None
    look = with_x_scale(look, runs, tags)
    levels = sorted({r.cell.noise for r in runs})
    line = lambda r: (r.cell.B, r.cell.momentum)  # noqa: E731
    momenta = sorted({r.cell.momentum for r in runs})
    tint = lambda B, m: shade(colour(B), momenta.index(m), len(momenta))  # noqa: E731
    mark = lambda B, m: {"marker": marker_of(B), "fill": MARKER_FILLS[momenta.index(m) % len(MARKER_FILLS)]}  # noqa: E731
    figure, axes = panels(len(levels), title, "", X_LABEL[look.x], rows=3, height=2.2)
    for row, tag in zip(axes, tags, strict=True):
        row[0].set_ylabel(f"share {SERIES[tag].legend}")
        for axis, noise in zip(row, levels, strict=True):
            axis.set_ylim(0, 1)
            for key, same in sorted(group_by([r for r in runs if r.cell.noise == noise], line).items()):
                draw_line(axis, same, tag, look, tint(*key), **mark(*key))
        finish_axes(row, look, f"no {tag}")
    for axis, noise in zip(axes[0], levels, strict=True):
        axis.set_title(noise_title(noise))
    marks = [
        legend_mark(tint(B, m), f"{B}{named_momentum(m, runs)}", **mark(B, m))
        for B, m in sorted({line(r) for r in runs})
    ]
    figure.legend(handles=marks, title="batch size", loc="outside right center")
    names = {line(r): f"batch {r.cell.B}{named_momentum(r.cell.momentum, candidates)}" for r in candidates}
    lacking = left_out(candidates, runs, levels, names, line, MEMORIZED, look)
    footer(figure, "; ".join([conditions(figure, runs, MEMORIZED, look), *lacking]), runs)
    return figure


def by_ratio(title: str, runs: list[Run], of_sgd: bool = True) -> Figure | None:
    """Final validation accuracy against lr/B and, where the runs are `of_sgd`, against lr/(B(1-m)), every finished run a point.

    Colour: batch size; shape: schedule; filling: in what its length is given.
    """
    runs = [r for r in runs if not r.fake and r.finished and last_value(r, VAL_ACC) is not None]
    if not runs:
        return None
    levels = sorted({r.cell.noise for r in runs})
    fillings = {"any": "full", "steps": "full", "epochs": "none", "examples": "left"}
    names = ["lr / B", "lr / (B (1 - m))"][: 1 + of_sgd]
    figure = Figure(figsize=(max(3.4 * len(levels), 6) + 1.2, 3.0 * len(names) + 0.6), layout="constrained")
    axes = figure.subplots(len(names), len(levels), sharey=True, sharex="row", squeeze=False)
    headline(figure, title)
    for row, with_m, name in zip(axes, (False, True), names, strict=False):
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
                        lr_batch_ratio(r.cell, with_m),
                        last_value(r, VAL_ACC),
                        color=colour(r.cell.B),
                        marker=entry(r.cell.sched).marker,
                        fillstyle=fillings[r.budget],
                        ms=5,
                        alpha=0.8,
                    )
    marks = [Line2D([], [], color=colour(B), marker="o", ls="", label=str(B)) for B in sorted({r.cell.B for r in runs})]
    marks += [Line2D([], [], color="0.4", marker=entry(s).marker, ls="", label=entry(s).label) for s in scheds_of(runs)]
    budgets = [b for b in BUDGETS if b in {r.budget for r in runs}]
    marks += [
        Line2D([], [], color="0.4", marker="o", fillstyle=fillings[b], ls="", label=f"schedule in {b}")
        for b in budgets
        if len(budgets) > 1
    ]
    figure.legend(handles=marks, title="batch size", loc="outside right center")
    about = f"; m: the momentum, for one-cycle its {PEAK_MOMENTUM} at the largest rate" * of_sgd
    footer(figure, f"{len(runs)} finished runs{about}", runs)
    return figure


def best_batch_sizes(title: str, runs: list[Run]) -> Figure | None:
    """The tested batch size with the best final validation accuracy against noise, by budget: in the mean over seeds, and in single ones."""
    runs = [r for r in runs if not r.fake and r.finished and last_value(r, VAL_ACC) is not None]
    scheds = scheds_of(runs)
    tops: dict[
        tuple, tuple[float, float, float]
    ] = {}  # log2 of the best size in the mean over seeds; of single seeds, smallest and largest
    for key, group in group_by(runs, lambda r: (r.cell.sched, r.budget, r.cell.momentum, r.cell.noise)).items():
        sizes = sorted({r.cell.B for r in group})
        seeds = [{r.cell.B: last_value(r, VAL_ACC) for r in of} for of in group_by(group, lambda r: r.seed).values()]
        curves = [[of[B] for B in sizes] for of in seeds if len(of) == len(sizes)]
        if len(sizes) > 2 and curves:
            single = [math.log2(sizes[i]) for i in np.argmax(curves, 1)]
            tops[key] = (math.log2(sizes[int(np.mean(curves, 0).argmax())]), min(single), max(single))
    scheds = [s for s in scheds if any(key[0] == s for key in tops)]
    if not scheds:
        return None
    figure, axes = panels(len(scheds), title, "best batch size", "label noise (nominal)")
    looks = {"steps": (VERMILION, "o"), "epochs": (BLUE, "s"), "examples": (GREEN, "^"), "any": (GREY, "D")}
    names = {**{k: f"schedule matched in {k}" for k in BUDGETS}, "any": "no schedule"}
    for axis, sched in zip(axes[0], scheds, strict=True):
        axis.set_title(entry(sched).label)
        momenta = sorted({key[2] for key in tops})
        for budget, m in itertools.product(looks, momenta):
            levels = sorted(n for s, b, other, n in tops if (s, b, other) == (sched, budget, m))
            if levels:
                color, marker = looks[budget]
                best, low, high = np.transpose([tops[sched, budget, m, n] for n in levels])
                axis.errorbar(
                    levels,
                    best,
                    np.clip([best - low, high - best], 0, None),
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
    text = "the best of the tested sizes in the mean over seeds that have all; bars: from the smallest to the largest of single seeds"
    footer(figure, text, runs)
    return figure
