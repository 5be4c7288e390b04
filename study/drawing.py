"""What every figure is drawn with: colours, markers, smoothing, one line over time, axes, captions, saving.

A batch size has one colour and one marker in every figure: a ramp whose lightness grows with the size, so that the order can be
seen without colour vision and in print, and the marker as a second cue. Categories use the colours of Okabe and Ito. Thin faint lines
are raw values; strong lines are exponential averages, alpha 0.5 for validation accuracy and 0.05 for values of single
batches, as the report draws them, of series that have enough points for one; with several seeds, their mean, and a band
of one standard deviation over seeds.
"""

import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from data import printable
from series import BATCH, SERIES
from study.runfolders import Run

INTERVALS = "whiskers: 95 % intervals of corrected estimates, by the jackknife"
LEAST_POINTS = 20  # a series of fewer points is drawn as it is: an average of a few would hide its last value
SLIVER = 12  # how many times longer than the shortest line the longest may be before the x axis becomes logarithmic
TAIL = (
    "_tail"  # label, which no legend shows, of a line's flat end: what a run would show that went on after its schedule
)
DRAWN = 1500  # most points of one line; more than a figure can show and it makes an SVG slow
MARKED = 7  # markers along a line of many points
X_LABEL = {"steps": "optimizer steps", "epochs": "epochs", "examples": "training examples"}
FORMATS = ("png", "svg", "pdf")
STYLE = {
    **{"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False},
    **{"axes.spines.right": False, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "figures"},
}
# Okabe and Ito's palette (Color Universal Design, 2008): told apart with every common colour vision deficiency.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.35"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # of batch sizes 16, 32, ... 1024, then again from the first
MARKER_FILLS = ("full", "none", "left", "bottom")  # of markers, by rate or momentum


def colour(B: int):
    """The colour of a batch size, dark at 16 to light at 1024, the same in every figure."""
    return colormaps["plasma"](0.86 * min(max((math.log2(B) - 4) / 6, 0), 1))[:3]


def marker_of(B: int) -> str:
    """The marker of a batch size, the same in every figure."""
    return MARKERS[round(math.log2(B) - 4) % len(MARKERS)]


def shade(color: tuple, i: int, n: int) -> tuple:
    """The i-th of n shades of a colour, light to dark; the colour itself where there is only one."""
    t = 2 * i / (n - 1) - 1 if n > 1 else 0
    return tuple(c + 0.5 * abs(t) * ((t < 0) - c) for c in color)


# -------------------------------------------------------------------------------------------------------- smoothing


def smooth(values: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Exponential average of a series and the standard deviation within its window, both (n,).

    Weights (1 - alpha)^i over the values so far, normalised to sum 1, so that it starts unbiased at the first value
    (pandas' `ewm(alpha)`, whose `mean()` and `std(bias=True)` these are). The report's drawn lines and bands.
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


def alpha_of(tag: str, points: int = LEAST_POINTS) -> float:
    """How much the newest value counts when a series of `points` values of `tag` is smoothed; 1 is no smoothing."""
    return 1.0 if points < LEAST_POINTS else SERIES[tag].smoothing


# --------------------------------------------------------------------------------------------------- lines over time


@dataclass(kw_only=True)
class Look:
    """How curves are drawn: `x` in steps, epochs or examples; `log_x` (None: where a line would be a sliver otherwise);
    `bands`: seeds or window (the report's); `tails`: whether the line of a run that has ended with its schedule goes on,
    flat and dashed, to where its epochs would have ended."""

    x: str = "steps"
    log_x: bool | None = None
    bands: str = "seeds"
    tails: bool = True
    reference: list[Run] = field(default_factory=list)


def x_values(run: Run, steps: np.ndarray, x: str) -> np.ndarray | None:
    """Steps as steps, epochs or examples; None where the run does not say how many steps an epoch has."""
    if x == "steps":
        return steps.astype(float)
    if not run.steps_per_epoch:
        return None
    epochs = steps / run.steps_per_epoch
    return (
        epochs if x == "epochs" else epochs * (run.resolved.get("train_examples") or run.steps_per_epoch * run.cell.B)
    )


def drawable(run: Run, tag: str, look: Look) -> bool:
    """Whether a run has values of `tag` and an x to draw them at."""
    return bool(len(run.series.get(tag, ((), ()))[0])) and (look.x == "steps" or bool(run.steps_per_epoch))


def last_x(run: Run, tag: str, look: Look) -> float:
    """Where the line of a series ends, its tail with it. Only for what is `drawable`."""
    end = run.series[tag][0][-1]
    if look.tails and run.left_out:
        end = max(end, run.resolved["whole_steps"])
    return float(x_values(run, np.array([end]), look.x)[0])


def with_x_scale(look: Look, runs: list[Run], tags: Iterable[str]) -> Look:
    """`look` with its x axis chosen: logarithmic where the batch sizes' lines differ in length by more than `SLIVER`."""
    if look.log_x is not None:
        return look
    ends: dict[int, float] = {}
    for run in runs:
        for tag in tags:
            if drawable(run, tag, look):
                ends[run.cell.B] = max(ends.get(run.cell.B, 0.0), last_x(run, tag, look))
    lengths = [end for end in ends.values() if end > 0]
    return replace(look, log_x=bool(lengths) and max(lengths) > SLIVER * min(lengths))


def marker_points(x: np.ndarray, log_x: bool, offset: float) -> list[int]:
    """The points of a line that carry a marker: all of a few, else `MARKED` evenly over the axis, from `offset` (0 to 1) of
    their distance on, so that the markers of several lines do not lie on each other."""
    if len(x) <= MARKED:
        return list(range(len(x)))
    at = np.log(np.maximum(x, x[1])) if log_x else x
    wanted = at[0] + (at[-1] - at[0]) * (np.arange(MARKED) + offset) / MARKED
    return np.unique(np.searchsorted(at, wanted)).tolist()


def draw_line(
    axis,
    runs: list[Run],
    tag: str,
    look: Look,
    color,
    style: str = "-",
    alpha: float | None = None,
    marker: str = "o",
    fill: str = "full",
) -> bool:
    """One line: the runs of one cell, one for each seed. Returns whether there was anything to draw.

    Only over the x that every seed has reached and none has yet to reach; seeds without any in common are drawn apart.
    `alpha` in place of the tag's own. A line that is not a reference ("--") carries markers; so does one of a few points.
    """
    if alpha is None:
        alpha = alpha_of(tag, max((len(r.series[tag][0]) for r in runs if tag in r.series), default=0))
    runs = [run for run in runs if drawable(run, tag, look)]
    smoothings = [(run.series[tag][1], *smooth(run.series[tag][1], alpha)) for run in runs]
    curves = [(x_values(r, r.series[tag][0], look.x), *values) for r, values in zip(runs, smoothings, strict=True)]
    if not curves:
        return False
    x = np.unique(np.concatenate([c[0] for c in curves]))
    x = x[(x >= max(c[0][0] for c in curves)) & (x <= min(c[0][-1] for c in curves))]
    if not len(x):
        return any([draw_line(axis, [run], tag, look, color, style, alpha, marker, fill) for run in runs])
    at = lambda k: np.mean([np.interp(x, c[0], c[k]) for c in curves], axis=0)  # noqa: E731
    thin = np.unique(np.linspace(0, len(x) - 1, min(len(x), DRAWN)).astype(int))
    raw, middle = at(1), at(2)
    if style == "-" and alpha < 1:
        axis.plot(x[thin], raw[thin], color=color, lw=0.6, alpha=0.22, zorder=1)
    points = {"marker": marker, "ms": 4, "fillstyle": fill}
    points["markevery"] = marker_points(x[thin], bool(look.log_x), MARKERS.index(marker) / len(MARKERS))
    if style != "-" and len(x) > MARKED:
        points = {}
    axis.plot(x[thin], middle[thin], color=color, lw=1.7 if style == "-" else 1.2, ls=style, zorder=3, **points)
    tail = min(last_x(run, tag, look) for run in runs)
    if any(run.left_out for run in runs) and tail > x[-1]:
        # Where an average would come to: that of single batches lags behind their last values.
        level = raw[-max(len(raw) // 10, 1) :].mean() if alpha <= BATCH else raw[-1]
        axis.plot([x[-1], tail], [level] * 2, color=color, lw=1.0, ls=(0, (5, 3)), zorder=3, label=TAIL)
    spread = np.std([np.interp(x, c[0], c[2]) for c in curves], axis=0, ddof=1) if len(curves) > 1 else None
    if look.bands == "window" and alpha < 1:  # what is not smoothed has no window
        spread = at(3)
    if spread is not None and style == "-":
        low, high = (np.clip(middle + sign * spread, *SERIES[tag].limits)[thin] for sign in (-1, 1))
        axis.fill_between(x[thin], low, high, color=color, alpha=0.15, lw=0, zorder=2)
    for run in runs:
        steps, _, low, high = with_interval(run, tag)
        if len(steps) and drawable(run, tag, look):
            axis.vlines(x_values(run, steps, look.x), low, high, color=color, lw=0.9, alpha=0.7, zorder=2)
    return True


def with_interval(run: Run, tag: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, values, low, high), each (n,), of a series whose values have intervals, TAG_low and TAG_high; n is 0 for others."""
    series = [run.series.get(name, (np.empty(0, int), np.empty(0))) for name in (tag, f"{tag}_low", f"{tag}_high")]
    steps = sorted(set.intersection(*(set(np.asarray(at).tolist()) for at, _ in series)))
    values = (np.asarray(v, float)[np.searchsorted(at, steps)] for at, v in series)
    return np.array(steps), *values


def interval_of_means(axis, runs: list[Run], tag: str, color) -> None:
    """Against batch size, a whisker at the mean over runs and time of a series with intervals: 95 %, of independent values."""
    by_size: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        _, values, low, high = with_interval(run, tag)
        if len(values):
            half = math.sqrt(float(np.square((high - low) / 2).sum())) / len(values)
            by_size.setdefault(run.cell.B, []).append((float(values.mean()), half))
    for B, moments in by_size.items():
        middle, half = np.mean([m for m, _ in moments]), math.hypot(*(h for _, h in moments)) / len(moments)
        axis.vlines(B, middle - half, middle + half, color=color, lw=3, alpha=0.35, zorder=2)


# -------------------------------------------------------------------------------------------------- axes and words


def panels(
    n: int, title: str, ylabel: str, xlabel: str, rows: int = 1, height: float = 3.3
) -> tuple[Figure, np.ndarray]:
    """A figure of `rows` x `n` panels with shared axes."""
    figure = Figure(figsize=(max(3.4 * n, 6.0) + 1.2, height * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, n, sharey="row", sharex=True, squeeze=False)
    headline(figure, title)
    for row in axes:
        row[0].set_ylabel(textwrap.fill(ylabel, int(9 * height)))
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
        axis.xaxis.set_major_formatter(FuncFormatter(short_number))
    return figure, axes


def log_axes(axes: list) -> None:
    """Logarithmic x axes, one scale for all of them, that keep step 0: linear from 0 to the smallest positive x drawn."""
    drawn = [np.asarray(line.get_xdata(), float) for axis in axes for line in axis.get_lines()]
    xs = np.unique(np.concatenate(drawn or [np.zeros(0)]))
    positive = xs[xs > 0]
    if not len(positive):
        return
    least, most = float(positive[0]), float(positive[-1])
    decades = math.log10(most / least)
    within = (1,) if decades > 2.5 else (1, 3) if decades > 1 else (1, 2, 5)
    first, end = math.floor(math.log10(least)), math.ceil(math.log10(most))
    ticks = [k * 10.0**e for e in range(first, end + 1) for k in within]
    ticks = [t for t in ticks if 1.5 * least < t <= 1.2 * most]  # what lies closer to 0 would be written over it
    for axis in axes:
        axis.set_xscale("symlog", linthresh=least, linscale=0.3)
        axis.xaxis.set_major_locator(FixedLocator([xs[0] if xs[0] > 0 else 0.0, *ticks]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(short_number))
        axis.set_xlim(0.95 * xs[0], 1.15 * most)


def finish_axes(axes: Iterable, look: Look, absent: str) -> None:
    """Scale the x axes of panels that are drawn; a panel without a line says what is `absent`."""
    axes = list(axes)
    if look.log_x:
        log_axes(axes)
    for axis in axes:
        if not axis.get_lines():
            axis.text(0.5, 0.5, absent, ha="center", transform=axis.transAxes, color="0.4", fontsize=8)


def headline(figure: Figure, title: str) -> None:
    """A title over the whole figure, in as many lines as its width asks for."""
    lines = wrapped(printable(title), int(10.5 * figure.get_figwidth()))
    figure.suptitle(lines, fontsize=11, parse_math=False)  # a name may hold a $


def wrapped(title: str, width: int) -> str:
    """A title or caption in lines of at most `width` characters, not broken inside an option: neither at a hyphen nor between its name
    and its value, which are the short parts between commas."""
    parts = re.split(r"(?<=[,;:(])", title)
    bound = [part[:1] + part[1:].replace(" ", "\N{NO-BREAK SPACE}") if len(part) <= 32 else part for part in parts]
    lines = textwrap.fill("".join(bound), width, break_on_hyphens=False, break_long_words=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def short_number(x: float, _=None) -> str:
    """A number for an axis: 25k rather than 25000."""
    return f"{x / 1e6:g}M" if abs(x) >= 1e6 else f"{x / 1e3:g}k" if abs(x) >= 1e3 else f"{x:g}"


def smoothed(runs: list[Run], tag: str) -> bool:
    """Whether a figure of `tag` holds an exponential average."""
    return any(alpha_of(tag, len(r.series[tag][0])) < 1 for r in runs if tag in r.series)


def smoothing_text(tag: str) -> str:
    return f"exponential average, alpha {alpha_of(tag):g}"


def bands_text(figure: Figure, look: Look, smoothed: bool) -> list[str]:
    """What the bands and whiskers of a figure are, in words; nothing where none is drawn."""
    drawn = [collection for axis in figure.axes for collection in axis.collections]
    parts = [INTERVALS] * any(isinstance(c, LineCollection) for c in drawn)
    if not any(isinstance(c, PolyCollection) for c in drawn):
        return parts
    if look.bands == "window" and smoothed:
        return [*parts, "bands: standard deviation within the average's window"]
    return [
        *parts,
        "bands: one standard deviation over seeds" + ", nothing is smoothed here" * (look.bands == "window"),
    ]


def footer(figure: Figure, text: str, runs: Iterable[Run] = ()) -> None:
    """The lines under a figure, with how many of its `runs` have ended with their schedule."""
    ended = sum(run.left_out > 0 for run in runs)
    if ended:
        text += f"; {ended} run{'s' * (ended > 1)} ended with {'their' if ended > 1 else 'its'} schedule"
        tails = any(line.get_label() == TAIL for axis in figure.axes for line in axis.get_lines())
        text += ", flat dashes: as they would have gone on" * tails
    lines = wrapped(printable(text), int(17 * figure.get_figwidth()))
    figure.supxlabel(lines, fontsize=7, color="0.35", parse_math=False)


def noise_title(noise: float) -> str:
    return f"{noise:.0%} label noise"


def named_momentum(m: float, runs: list[Run]) -> str:
    """A momentum as the end of a label, where there are several among `runs`."""
    return f", m {m:g}" if len({r.cell.momentum for r in runs}) > 1 else ""


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


# ----------------------------------------------------------------------------------------------------------- files


def formats_of(text: str) -> tuple[str, ...]:
    """The formats named in a comma-separated list, each once. Raises `ValueError` naming what is none of `FORMATS`."""
    named = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    wrong = [name for name in named if name not in FORMATS]
    if wrong:
        raise ValueError(f"'{wrong[0]}' is not one of {', '.join(FORMATS)}")
    return named if {"png", "svg"} & set(named) else ("png", *named)  # the pages show a PNG or an SVG


def save_figure(figure: Figure, stem: Path, formats: Iterable[str] = ("png", "svg")) -> None:
    """STEM.png, STEM.svg and so on. The same figure gives the same bytes: no file holds the time."""
    for name in formats:
        date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(name)
        figure.savefig(stem.with_name(f"{stem.name}.{name}"), dpi=150, metadata=date)
        figure.set_layout_engine("none")  # every format has the first one's layout, which takes a third of the time


def save_styled(
    make: Callable[..., Figure | None], *args, stem: Path, formats: Iterable[str] = ("png", "svg"), **kwargs
) -> bool:
    """Make a figure in the common style, whatever the user's own is, and save it; whether there was anything to draw."""
    with context(STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a name in a script that the font lacks
        figure = make(*args, **kwargs)
        if figure is not None:
            save_figure(figure, stem, formats)
    return figure is not None
