"""The report on many runs: tables of final values, figures, findings, and a comparison with the report's own curves."""

import contextlib
import math
import statistics
from collections.abc import Sequence

from data import one_line
from schedules import percent
from series import ACC_NOISY, COS_CLEAN_ALL, COSINE, MEMORIZED, SERIES, TEST_ACC, VAL_ACC
from study import figures, runvalues
from study.analysis import runs as analysis
from study.correlates import write_correlates
from study.detection import write_detection
from study.drawing import Look
from study.gallery import FIRST_FIGURES, add_figures
from study.markup import literal
from study.page import Page
from study.runfolders import SEEDS, Run
from study.runvalues import last_value
from study.searches import CellSearch, sort_runs
from study.settings import Setting, group_by, group_settings
from study.sidebyside import write_side_by_side
from study.stopping import write_stopping
from study.tunedcells import write_tuned
from study.verdicts import Judged, judge_settings, write_drift, write_findings, write_rules

FINAL = {  # columns of a cell's values at its end
    **{VAL_ACC: VAL_ACC, TEST_ACC: TEST_ACC},
    **{COS_CLEAN_ALL: "cosine clean-all", ACC_NOISY: "acc. on noisy", MEMORIZED: "memorized"},
}
FOLDED = 5  # a list of more unfinished runs than these is folded


def write_state(page: Page, runs: list[Run]) -> None:
    """How many runs there are, and on which versions and devices they were made."""
    finished = sum(r.finished for r in runs)
    text = f"{len(runs)} runs, {finished} finished."
    table = analysis.table(runs)
    for count, words in (
        (table["copies"].ne("").sum(), "the same computation as another: a schedule in steps can be one in epochs"),
        (table["at_chance"].sum(), "at chance at the end"),
    ):
        text += f" {count} of them {'is' if count == 1 else 'are'} {words}." if count else ""
    made = {(r.versions.get("torch"), r.resolved.get("device"), r.options.get("precision")) for r in runs if r.versions}
    if made:
        text += " Made with " + "; ".join(f"torch {v} on {d}, {p}" for v, d, p in sorted(made, key=str)) + "."
    page.text(text)


def write_unfinished(page: Page, runs: list[Run]) -> None:
    """State and reason of the runs that did not finish; a long list is folded."""
    rest = [r for r in runs if not r.finished]
    rows = [
        [
            literal(r.name),
            literal(r.summary.get("status", "no summary")),
            literal(r.summary.get("steps", "")),
            literal(one_line(r.summary.get("reason") or "")),
        ]
        for r in rest
    ]
    with page.folded(f"{len(rest)} runs are not finished") if len(rest) > FOLDED else contextlib.nullcontext():
        if rest:
            page.table(["not finished", "state", "steps", "reason"], rows)


def final_value(run: Run, tag: str, until: float = math.inf) -> float | None:
    """Last value of a mean over a whole set; mean of the last tenth of the points up to step `until` of any other series, without
    cosines of exactly 1.

    The report logged a cosine of 1 where a batch held no noisy example; here nothing is logged.
    """
    if SERIES[tag].exact:
        return last_value(run, tag)
    if tag not in run.series:
        return None
    steps, values = run.series[tag]
    values = values[steps <= until]
    values = values[-max(len(values) // 10, 1) :]
    values = values[values < 1] if SERIES[tag].limits == COSINE else values
    return float(values.mean()) if len(values) else None


def write_cells(page: Page, setting: Setting) -> None:
    """Final values of every cell, mean and spread over seeds."""
    rows = []
    runs = [r for r in setting.ratio_runs if r.finished]
    for (budget, fake, cell), same in sorted(group_by(runs, lambda r: (r.budget, r.fake, r.cell)).items()):
        columns = []
        for tag in FINAL:
            values = [v for r in same if (v := final_value(r, tag)) is not None]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            columns.append(f"{statistics.fmean(values):.4f}{spread}" if values else "")
        sched = cell.sched + ("" if budget == "any" else f", {same[0].length} {budget}")
        rows.append(
            [
                sched,
                schedule_text(same),
                f"{cell.noise:g}" + (f" (A/A {fake:g})" if fake else ""),
                str(cell.B),
                f"{cell.lr:g}, {cell.momentum:g}",
                str(len({r.seed for r in same})),
                *columns,
            ]
        )
    if rows:
        header = ["schedule", "seen of it", "noise (nominal)", "B", "lr, momentum", "seeds", *FINAL.values()]
        page.table(*without_empty(header, rows))
        page.text(
            "Accuracies at the end; cosine and accuracy on noisy examples: mean of the last tenth of the points. ± one standard "
            "deviation over seeds. Seen of it: the part of the schedule that the run lasts for, and what share of the run then "
            "stands at the schedule's last value; or that the run ended with it (--end schedule)."
        )


def schedule_text(runs: list[Run]) -> str:
    """What the runs of a cell see of their schedule, in words; empty for a constant rate."""
    shares = ((runvalues.schedule_shares(r), r.left_out > 0) for r in runs)
    seen = {(*of_schedule, ended) for of_schedule, ended in shares if of_schedule}
    return "; ".join(
        percent(fraction) + (f", then {percent(held)} at its end" if held else ", ended with it" * ended)
        for fraction, held, ended in sorted(seen)
    )


def without_empty(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without its empty columns."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def write_comparison(page: Page, runs: list[Run], reference: list[Run]) -> None:
    """Ours, the report's, the difference, in units of our spread over seeds; each setting of ours for itself."""
    rows = []
    for theirs in sorted(reference, key=lambda r: (r.options["epochs"], r.cell)):
        fit = [r for r in runs if r.finished and figures.comparable(r, theirs)]
        for setting, ours in group_by(fit, lambda r: r.setting).items():
            how = ", ".join(
                f"{k.replace('_', '-')} {v}"
                for k, v in setting
                if k in figures.TOLERATED_OPTIONS and (k == "measure_bn" or (k, v) not in theirs.setting)
            )
            for tag in FIRST_FIGURES:
                label = SERIES[tag].label
                seeds: dict[str, list[float]] = {}
                for r in ours:
                    if (value := final_value(r, tag)) is not None:
                        seeds.setdefault(r.seed, []).append(value)
                until = min((int(r.summary["steps"]) for r in ours if r.left_out), default=math.inf)
                a, b = [statistics.fmean(v) for v in seeds.values()], final_value(theirs, tag, until)
                if not a or b is None:
                    continue
                mean, sd = statistics.fmean(a), statistics.stdev(a) if len(a) > 1 else 0
                units = f"{(mean - b) / sd:+.1f}" if sd > 0 else "one seed" if len(a) == 1 else "no spread"
                c = theirs.cell
                if figures.other_modes(ours, tag):
                    label += f" (the report's: {figures.REPORT_BN})"
                where = [how, c.sched, str(theirs.options["epochs"]), f"{c.noise:g}", str(c.B), f"{c.lr:g}"]
                rows.append([label, *where, f"{mean:.4f} (n = {len(a)})", f"{b:.4f}", f"{mean - b:+.4f}", units])
    if rows:
        page.table(
            [
                "value",
                "measured with",
                "schedule",
                "epochs",
                "noise",
                "B",
                "lr",
                "ours (n seeds)",
                "the report's",
                "difference",
                "in our sd over seeds",
            ],
            rows,
        )
        page.text(
            "Last validation accuracy; mean of the last tenth of the points of the others, without the report's cosines of exactly 1 "
            "(it logged that where a batch held no noisy example), beside a run that ended with its schedule up to the same step. The report's cosines are measured with BatchNorm in eval mode: "
            "those of a run without --measure-bn eval are of another mode, and a difference may come from that. The report's values are "
            "one run each; its figure 4 at batch 128 without noise is the run of figure 13 (80 epochs, about 25,000 schedule steps) "
            "and not comparable with its neighbours. Only runs whose setting and weight decay are the report's are compared."
        )
    else:
        page.text(
            "None of these runs is of a setting, cell, schedule length and number of epochs that the reference has."
        )


def at_best(settings: list[Setting]) -> tuple[list[Setting], list[str]]:
    """The settings at each cell's best learning rate and weight decay of the other seeds, and notes on how many were tried.

    Only schedules of which every cell has several: a cell with a single one is not at its best, and batch sizes of which more
    was tried would have the advantage. The notes name the schedules left out, and numbers that differ.
    """
    tuned_settings, notes = [], []
    for s in settings:
        kept = []
        for sched, runs in group_by(s.all_runs, lambda r: r.cell.sched).items():
            judged = [r for r in runs if not r.fake]  # A/A runs are subtracted, whatever their rate
            cells = group_by(judged, lambda r: (r.budget, r.cell._replace(lr=0.0)))
            sizes: dict[int, list[int]] = {}  # {number of rates and decays tried: batch sizes of its cells}
            for (_, cell), same in cells.items():
                sizes.setdefault(len({(r.cell.lr, r.options["wd"]) for r in same}), []).append(cell.B)
            named = {n: ", ".join(map(str, sorted(set(of)))) for n, of in sorted(sizes.items())}
            if 1 not in sizes:
                kept += runs
                if len(sizes) > 1:
                    numbers = "; ".join(f"{n} at batch size {of}" for n, of in named.items())
                    notes.append(
                        f"{s.label}, {sched}: more learning rates and weight decays were tried in some cells than in others "
                        f"({numbers}), which is a slight advantage"
                    )
            elif len(sizes) > 1:
                notes.append(
                    f"{s.label}, {sched}: not compared at each cell's best learning rate and weight decay, for "
                    f"{len(sizes[1])} of {len(cells)} cells have a single one (batch size {named[1]})"
                )
        if kept:
            table = analysis.table(kept)
            chosen = analysis.tuned(table).dropna(subset="val_acc")
            runs = [kept[i] for i in sorted(chosen.index)]
            every = len(
                table.dropna(subset="val_acc")
                .assign(lr=0.0)
                .drop_duplicates([*analysis.CELL, "budget", "fake", *SEEDS])
            )
            if every > len(chosen):
                notes.append(
                    f"{s.label}: {every - len(chosen)} of {every} cells of a seed are left out, for no other seed has run there to choose by"
                )
            tuned_settings.append(Setting(f"{s.label}, tuned", runs, runs, kept, [], False))
    return tuned_settings, notes


def write_full_report(
    page: Page,
    runs: list[Run],
    reference: list[Run],
    look: Look,
    margins: dict[str, float],
    formats: tuple[str, ...],
    left_out: list[str],
    searches: Sequence[CellSearch] = (),
    remarks: Sequence[str] = (),
) -> list[Judged]:
    """The report on many runs: cells, figures, findings, the rest; returns its verdicts: at one rate, at tuned cells.

    `left_out` are the runs and searches that cannot be read, as "NAME: reason"; `searches`: the oldest first; `remarks`: on
    what was read.
    """
    searched = sort_runs(runs, list(searches))
    settings = group_settings(searched.fixed)
    page.heading(1, "Label noise and SGD: figures and findings")
    write_state(page, runs)
    for s in settings:
        page.heading(2, f"Results: {s.label}")
        if any(r.finished for r in s.ratio_runs):
            write_cells(page, s)
        else:
            page.text("No run of this setting is finished yet.")
    write_unfinished(page, runs)
    if left_out:
        page.text(f"{len(left_out)} more cannot be read and are left out:")
        page.bullets([literal(line) for line in left_out])
    if remarks:
        page.bullets([literal(line) for line in remarks])
    judged = write_judged(page, settings, look, margins, formats) if settings else []
    at_tuned = write_tuned(page, searched, look, formats, margins)
    with page.folded("How the verdicts are reached"):
        write_rules(page, margins)
    write_correlates(page, settings)
    write_side_by_side(page, settings)
    write_stopping(page, settings)
    write_detection(page, settings)
    if reference:
        page.heading(2, "Beside the report")
        write_comparison(page, searched.fixed, reference)
    return [judged, at_tuned]


def write_judged(
    page: Page, settings: list[Setting], look: Look, margins: dict[str, float], formats: tuple[str, ...]
) -> Judged:
    """Figures and findings at the rates that the grid gives; returns the verdicts at one rate."""
    page.heading(2, "Figures")
    best, rates_tried = at_best(settings)
    notes = [f"{s.label}: {note}" for s in settings for note in s.notes] + rates_tried
    if notes:
        page.bullets(notes)
    add_figures(page, settings, look, formats)
    if best:
        page.heading(2, "Figures at each cell's best learning rate and weight decay")
        add_figures(page, best, look, formats, "-tuned")
    page.heading(2, "Findings")
    judged = judge_settings(settings, margins)
    write_findings(page, judged)
    write_drift(page, settings)
    scaled = [s for s in settings if s.scaled]
    if scaled:
        page.heading(2, "Findings at equal lr/B")
        page.text(
            "Each batch size at a rate in proportion to it. At one rate for all, lr/B falls as the batch grows, and what that does is "
            "not told from what the batch size does."
        )
        write_findings(page, judge_settings(scaled, margins, "scaled"))
    if best:
        page.heading(2, "Findings at each cell's best learning rate and weight decay")
        page.text(
            "Chosen for each cell and seed by the mean validation accuracy of the other seeds, so that no run is judged on what chose it."
        )
        write_findings(page, judge_settings(best, margins, "tuned"))
    return judged
