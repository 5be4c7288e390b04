"""The report on a single run: one picture, and tables of its final values and options.

The picture shows what most first runs are made for: cosines beside their nulls, and accuracy on the noisy examples.
"""

import math
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

import series
from series import SERIES
from study.analysis.runs import VALUES
from study.detection import write_detection
from study.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    X_LABEL,
    Look,
    alpha_of,
    bands_text,
    draw_line,
    drawable,
    footer,
    headline,
    log_axes,
    save_styled,
    short_number,
    with_x_scale,
)
from study.markup import literal
from study.page import Page
from study.runfolders import Run
from study.runvalues import null_tag
from study.settings import group_settings
from study.stopping import write_stopping

PAIRS = ("cos_clean_noisy", "cos_clean_all")
SMOOTHED_PAIRS = 100  # a cosine and its null are smoothed, both alike, from this many common steps on


def with_paired_nulls(run: Run) -> tuple[Run, dict[str, float]]:
    """The run with every raw cosine and its null at the steps that both have, and the smoothing {tag: alpha} of these.

    Nulls may be rarer: an average over the same number of points would reach back much further for one than for the other.
    """
    common, alphas = {}, {}
    for pair in PAIRS:
        raw, null = f"grad/{pair}", null_tag(run, pair)
        (steps, values), (rare, nulls) = (run.series.get(tag, ((), ())) for tag in (raw, null))
        both, i, j = np.intersect1d(steps, rare, return_indices=True)
        if len(both):
            common |= {raw: (both, values[i]), null: (both, nulls[j])}
            alphas |= dict.fromkeys((raw, null), series.BATCH if len(both) >= SMOOTHED_PAIRS else 1.0)
    return replace(run, series=run.series | common), alphas


def panels_of(run: Run) -> dict[str, list[tuple]]:
    """Panels {title: [(tag, colour, marker, line style), ...]}, the most important first."""
    noisy, clean, val, rest = (VERMILION, "s", "-"), (BLUE, "o", "-"), (GREEN, "^", "-"), (GREY, "D", "-")
    cosines = []
    for pair, how in zip(PAIRS, (noisy, clean), strict=True):
        cosines += [(f"grad/{pair}", *how), (null_tag(run, pair), *how[:2], "--")]
    return {
        "cosine of gradients": [*cosines, (series.CORRECTED_COS, PURPLE, "^", "-")],
        "accuracy": [(series.ACC_NOISY, *noisy), (series.ACC_CLEAN, *clean), (series.VAL_ACC, *val)],
        "probed noisy examples, share": [(series.MEMORIZED, *noisy), (series.RECOVERED, *val), (series.OTHER, *rest)],
        "loss": [(series.TRAIN_LOSS, *clean), (series.VAL_LOSS, *val)],
        "gradient norm": [(series.NORM_NOISY, *noisy), (series.NORM_CLEAN, *clean), (series.NORM_ALL, *rest)],
        SERIES[series.LR].label: [(series.LR, ORANGE, "o", "-")],
    }


def run_figure(run: Run, look: Look) -> Figure | None:
    """One run on a page: cosines with their nulls, accuracies, probes, losses, norms, learning rate; what the run has.

    None where it has nothing that can be drawn.
    """
    run, alphas = with_paired_nulls(run)
    groups = panels_of(run)
    here = {name: [row for row in rows if drawable(run, row[0], look)] for name, rows in groups.items()}
    here = {name: rows for name, rows in here.items() if rows}
    if not here:
        return None
    look = replace(look, tails=False)  # they would leave little room for the rest
    look = with_x_scale(look, [run], [tag for rows in here.values() for tag, *_ in rows])
    across = min(len(here), 3)
    down = math.ceil(len(here) / across)
    figure = Figure(figsize=(max(3.7 * across, 6), 3.1 * down), layout="constrained")
    headline(figure, run.name.replace("_", ", "))
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes[len(here) :]:
        axis.remove()
    for axis, (name, rows) in zip(axes, here.items(), strict=False):
        axis.set_title(name)
        axis.set_xlabel(X_LABEL[look.x])
        axis.xaxis.set_major_formatter(short_number)
        for tag, color, marker, style in rows:
            draw_line(axis, [run], tag, look, color, style, alphas.get(tag), marker)
            axis.plot([], [], c=color, ls=style, marker=marker * (style == "-"), ms=4, label=SERIES[tag].legend)
        classes = run.resolved.get("classes") or ()
        if name == "accuracy" and classes:
            axis.axhline(1 / len(classes), color=GREY, ls=":", lw=1, label=f"a random guess, 1/{len(classes)}")
        if look.log_x:
            log_axes([axis])
        axis.legend(fontsize=7)
    footer(figure, "; ".join(caption_parts(figure, run, here, alphas, look, groups)), [run])
    return figure


def caption_parts(figure: Figure, run: Run, here: dict, alphas: dict, look: Look, groups: dict) -> list[str]:
    """The line under the picture: smoothing, how to read a cosine, what the run has no series for."""
    drawn = [tag for rows in here.values() for tag, *_ in rows]
    averages = any(alphas.get(t, alpha_of(t, len(run.series[t][0]))) < 1 for t in drawn)
    parts = []
    if averages:
        parts.append("faint: raw values; lines: exponential average, alpha 0.05 (validation accuracy and loss 0.5)")
    parts += bands_text(figure, look, averages)
    if alphas:
        parts.append("a cosine means something only beside its null, dashed: below it, noisy gradients pull elsewhere")
        parts += ["both at the null's steps, neither smoothed"] * (set(alphas.values()) == {1.0})
    elif any(SERIES[tag].limits == series.COSINE for tag in drawn):
        parts.append("a raw cosine means something only beside its null, which this run did not measure")
    if run.options.get("loss", "ce") != "ce" and "loss" in here:
        parts.append(f"loss: {run.options['loss']} in training, cross-entropy in validation")
    absent = [name for name in groups if name not in here]
    if absent:
        parts.append(f"no values in this run for: {', '.join(absent)}")
    return parts


def one_page(page: Page, run: Run, look: Look, formats: tuple[str, ...] = ("png", "svg")) -> None:
    """The report on a single run: its picture, then its final values and options."""
    page.heading(1, run.name)
    if save_styled(run_figure, run, look, stem=page.out / "run", formats=formats):
        page.figure("run", run.name)
    else:
        page.text("Nothing to draw: the run has no values yet.")
    values = {name: (value, value.of(run)) for name, value in VALUES.items() if name not in ("val_acc", "test_acc")}
    rows = [
        [value.label, f"no {value.series}" if found is None else f"{found:+.4f}"] for value, found in values.values()
    ]
    page.table(["value", ""], rows)
    write_stopping(page, group_settings([run]))
    write_detection(page, group_settings([run]))
    shown = {k: f"{v:.4f}" if isinstance(v, float) else literal(v) for k, v in run.summary.items() if v is not None}
    rows = [[literal(k), v] for k, v in shown.items()]
    page.table(["summary", ""], rows or [["status", "no summary.json"]])
    with page.folded("Options"):
        page.table(["option", "value"], [[literal(k), literal(v)] for k, v in run.options.items()])
