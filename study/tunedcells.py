"""The tuned cells' part of a report: what was searched and chosen, the value against each tuned option, and the findings about
batch sizes at each cell's own best values."""

import statistics
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from study.drawing import Look, colour, footer, headline, marker_of, noise_title, short_number
from study.gallery import Gallery, add_figures
from study.markup import literal
from study.page import Page
from study.runfolders import Run
from study.runvalues import last_value
from study.searches import CellSearch, Searches
from study.settings import Setting, group_by, group_settings
from study.verdicts import Judged, judge_settings, write_findings


def write_tuned(
    page: Page, searched: Searches, look: Look, formats: tuple[str, ...], margins: dict[str, float]
) -> Judged:
    """Everything that a report says of tuned cells; returns the verdicts. Nothing where there is no search."""
    if not searched.cells:
        return []
    page.heading(2, "Tuned cells")
    for i, (_, cells) in enumerate(group_by(searched.cells, lambda s: s.key).items()):
        write_search(page, cells, searched, formats, f"-{i + 1}" if i else "")
    if searched.earlier:
        page.text(
            f"{len(searched.earlier)} runs are left out: they are at values that a search has chosen before it had more trials, or "
            "before a newer search of the same cell."
        )
    settings, real = tuned_settings(searched)
    if not settings:
        page.text("No search is complete and has its best values run at the judged seeds yet.")
        return []
    page.heading(2, "Figures at tuned cells")
    drawn = []
    for s in settings:
        runs = [real[id(run)] for run in s.runs]
        drawn.append(replace(s, runs=runs, ratio_runs=runs, all_runs=runs))
    add_figures(page, drawn, look, formats, "-tuned-cells")
    page.heading(2, "Findings at tuned cells")
    page.text(
        "Batch sizes are compared each at its own best values (Shallue et al. 2019), which were chosen by runs of other seeds than "
        "these. The rules are those of the findings at one learning rate. The bounds are over the judged seeds; that another "
        "search would have chosen other values is not in them."
    )
    judged = judge_settings(settings, margins, "searched")
    write_findings(page, judged)
    return judged


def tuned_settings(searched: Searches) -> tuple[list[Setting], dict[int, Run]]:
    """Runs at tuned values in groups that may be compared, without a trace of the values; {id of such a run: the run itself}."""
    made, real = [], {}
    for pairs in group_by(searched.tuned, lambda pair: pair[1].key).values():
        words = pairs[0][1].words
        neutral = [search.neutral(run) for run, search in pairs]
        real |= {id(plain): run for plain, (run, _) in zip(neutral, pairs, strict=True)}
        made += [replace(s, label=f"{s.label}, {words}", ratio=False, scaled=[]) for s in group_settings(neutral)]
    return made, real


# ------------------------------------------------------------------------------------------------------------- table


def write_search(
    page: Page, cells: list[CellSearch], searched: Searches, formats: tuple[str, ...], suffix: str
) -> None:
    """The table and the figures of the cells that were searched alike."""
    first = cells[0]
    space = ", ".join(f"{name} over {spec}" for name, spec in first.space.items())
    page.text(
        f"{literal(space)}; {first.metric} at the end {first.direction}d, trained with seed {', '.join(first.seeds)}. "
        "Drawn by TPE, ended early by Hyperband (Optuna). Diverged: a loss or weight was not finite."
    )
    names = list(first.space)
    header = [*LABELS, "trials", "ended early", "diverged", f"best {first.metric}", *names, "near an end"]
    header += ["judged seeds", "val/acc", "test/acc"]
    rows = []
    for search in sorted(cells, key=lambda s: (s.cell.setting, place(s))):
        runs = [run for run, of in searched.tuned if of is search and run.finished]
        best = search.best
        state = f"{len(search.trials)} of {search.most}" if not search.complete else str(len(search.trials))
        chosen = [f"{best.value:.4f}", *(best.values[name] for name in names)] if best else [""] * (1 + len(names))
        counts = [str(search.count("pruned")), str(search.count("diverged"))]
        row = [*labels(search), state, *counts, *chosen, ", ".join(search.ends()) or "no" if best else ""]
        seeds = len({run.seed for run in runs})
        rows.append([literal(cell) for cell in row] + [str(seeds), *(over_seeds(runs, tag) for tag in FINAL)])
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    page.table([literal(header[i]) for i in kept], [[row[i] for i in kept] for row in rows])
    page.text(
        "The best value of a search is the largest of several and so lies above what the same values give at another seed: the "
        "judged seeds show that. Near an end: within a twentieth of the range; a better value may lie beyond it."
    )
    gallery = Gallery(page, Look(), formats)
    for j, (_, same) in enumerate(
        group_by(cells, lambda s: (s.cell.setting, s.cell.cell.sched, s.cell.budget)).items()
    ):
        title = f"Values tried, {literal(schedule_words(same[0]))}"
        gallery.add(
            f"tuning{suffix}" + (f"-{chr(97 + j)}" if j else ""), title, "no trial has a value", values_tried, same
        )
    page.bullets(gallery.absent) if gallery.absent else None


LABELS = ("schedule", "noise", "B", "other")
FINAL = ("val/acc", "test/acc")


def place(search: CellSearch) -> tuple:
    """Where a cell stands in the table."""
    c = search.cell.cell
    return c.sched, search.cell.budget, search.cell.length, c.noise, search.cell.fake, c.B, search.name


def labels(search: CellSearch) -> list[str]:
    """A cell's entries under `LABELS`."""
    run = search.cell
    other = [f"lr {run.cell.lr:g}"] * ("lr" not in search.space)
    other += [f"momentum {run.cell.momentum:g}"] * ("momentum" not in search.space and run.cell.momentum != 0.9)
    fake = f" (A/A {run.fake:g})" if run.fake else ""
    noise = file_noise(search) or f"{run.cell.noise:g}"
    return [schedule_words(search), f"{noise}{fake}", str(run.cell.B), ", ".join(other)]


def file_noise(search: CellSearch) -> str:
    """The kind of label noise that comes from a file, whose level a search does not know; empty for any other."""
    return str(search.cell.options["noise_type"]) if search.cell.options.get("noise_file") else ""


def schedule_words(search: CellSearch) -> str:
    run = search.cell
    return run.cell.sched + ("" if run.budget == "any" else f", {run.length} {run.budget}")


def over_seeds(runs: list[Run], tag: str) -> str:
    """Mean and standard deviation over judged runs."""
    values = [v for v in (last_value(run, tag) for run in runs) if v is not None]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}" if values else ""


# ------------------------------------------------------------------------------------------------------------ figure


def values_tried(title: str, cells: list[CellSearch]) -> Figure | None:
    """The metric against each tuned option (rows) at each noise level (columns), in the colours of the batch sizes.

    Filled: trials that came to their end; hollow: ended early, at their last value; crosses at the lower edge: diverged. A ring
    marks each cell's best.
    """
    if not any(t.value is not None for s in cells for t in s.trials):
        return None
    names = list(cells[0].space)
    columns = sorted({(s.cell.cell.noise, s.cell.fake, file_noise(s)) for s in cells})
    size = (max(3.4 * len(columns), 6.0) + 1.2, 2.6 * len(names) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    headline(figure, title)
    axes = figure.subplots(len(names), len(columns), sharey=True, sharex="row", squeeze=False)
    for row, name in zip(axes, names, strict=True):
        positions = positions_of(cells, name)
        row[0].set_ylabel(cells[0].metric)
        for axis, (noise, fake, kind) in zip(row, columns, strict=True):
            if name == names[0]:
                axis.set_title((kind or noise_title(noise)) + (f", A/A {fake:.0%}" if fake else ""))
            axis.set_xlabel(name)
            for search in sorted(cells, key=place):
                if (search.cell.cell.noise, search.cell.fake, file_noise(search)) == (noise, fake, kind):
                    draw_trials(axis, search, name, positions)
            scale_axis(axis, cells[0].space[name], positions)
    marks = [
        Line2D([], [], color=colour(B), ls="", marker=marker_of(B), ms=5, label=str(B))
        for B in sorted({s.cell.cell.B for s in cells})
    ]
    figure.legend(handles=marks, title="batch size", loc="outside right center")
    tried = [t for s in cells for t in s.trials]
    text = f"{len(tried)} trials; filled: trained to the end; hollow: ended early, at the last value; ring: the best of its cell"
    text += "; crosses: diverged" * any(t.state == "diverged" for t in tried)
    footer(figure, f"{text}; seed {', '.join(cells[0].seeds)}")
    return figure


def positions_of(cells: Iterable[CellSearch], name: str) -> dict[str, float]:
    """Where the values of an option stand on the axis: at the number they are, or side by side in the order of the list."""
    spec = next(iter(cells)).space[name]
    listed = spec.split("|")
    if len(listed) > 1:
        return {value: float(i) for i, value in enumerate(listed)}
    return {t.values[name]: float(t.values[name]) for s in cells for t in s.trials}


def draw_trials(axis, search: CellSearch, name: str, positions: dict[str, float]) -> None:
    """One cell's trials in a panel."""
    B = search.cell.cell.B
    style = {"color": colour(B), "marker": marker_of(B), "ls": ""}
    for state, fill in (("complete", "full"), ("pruned", "none")):
        points = [
            (positions[t.values[name]], t.value) for t in search.trials if t.state == state and t.value is not None
        ]
        if points:
            x, y = np.array(points).T
            axis.plot(x, y, **style, ms=5, fillstyle=fill, alpha=0.9 if fill == "full" else 0.6)
    for t in search.trials:
        if t.state == "diverged":
            x = positions[t.values[name]]
            axis.plot([x], [0.02], color=colour(B), marker="x", ms=5, ls="", transform=axis.get_xaxis_transform())
    if search.best:
        x = positions[search.best.values[name]]
        ring = {"marker": "o", "ms": 12, "mew": 1.8, "fillstyle": "none", "ls": ""}
        axis.plot([x], [search.best.value], color=colour(B), **ring)


def scale_axis(axis, spec: str, positions: dict[str, float]) -> None:
    """A panel's x axis: the whole range that was searched, or the list."""
    kind, *ends = spec.split(":")
    if kind in ("log", "lin", "int") and len(ends) == 2:
        low, high = map(float, ends)
        if kind == "log":
            axis.set_xscale("log")
            axis.set_xlim(low / (high / low) ** 0.04, high * (high / low) ** 0.04)
            axis.xaxis.set_major_locator(LogLocator(10))
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
        axis.xaxis.set_major_formatter(FuncFormatter(short_number))
    else:
        axis.set_xticks(list(positions.values()), list(positions))
        axis.set_xlim(-0.5, len(positions) - 0.5)
