"""Figures, tables and verdicts from runs: event files and summaries in, a Markdown and a self-contained HTML report out.

    python report.py runs --out report                                     # everything in runs/
    python report.py runs --out report --reference ../shared/report/curves.csv   # the report's own curves beside ours
    python report.py runs/NAME                                             # one run, one page: in runs/NAME/report/
    python report.py runs other.npz --export all.npz                       # keep, merge, send: a few MB for a whole grid
    python report.py runs --csv all.csv                                    # every value, and all-runs.csv with a row for each run

A path is a folder of runs, one run's folder, a file made by --export, or a .csv of the report's curves.
"""

import argparse
import contextlib
import statistics
import sys
from pathlib import Path

from data import InputError
from engine import options
from schedules import percent
from study import figures, findings, results, tables
from study.drawing import X_LABEL, Look, formats_of
from study.gallery import KINDS, draw
from study.markup import literal
from study.onerun import one_page
from study.outputs import CannotWrite, whole_folder
from study.page import Page
from study.results import Run, Setting, last
from study.verdicts import Judged, judge, speaks, write_findings, write_rules

FOLDED = 5  # a list of more unfinished runs than these is folded

# ------------------------------------------------------------------------------------------------------------- parts


def write_state(page: Page, runs: list[Run]) -> None:
    """Which runs there are, and what they were made with."""
    finished = sum(r.finished for r in runs)
    text = f"{len(runs)} runs, {finished} finished."
    made = {(r.versions.get("torch"), r.resolved.get("device"), r.options.get("precision")) for r in runs if r.versions}
    if made:
        text += " Made with " + "; ".join(f"torch {v} on {d}, {p}" for v, d, p in sorted(made, key=str)) + "."
    page.text(text)


def write_unfinished(page: Page, runs: list[Run]) -> None:
    """What is wrong with the runs that did not finish; a long list is folded."""
    rest = [r for r in runs if not r.finished]
    rows = [
        [
            literal(r.name),
            literal(r.summary.get("status", "no summary")),
            literal(r.summary.get("steps", "")),
            literal(r.summary.get("reason") or ""),
        ]
        for r in rest
    ]
    with page.folded(f"{len(rest)} runs are not finished") if len(rest) > FOLDED else contextlib.nullcontext():
        if rest:
            page.table(["not finished", "state", "steps", "reason"], rows)


def tail(run: Run, tag: str) -> float | None:
    """Last value of val/acc; mean of the last tenth of the points of any other series, without cosines of exactly 1.

    The report logged a cosine of 1 where a batch held no noisy example; here nothing is logged.
    """
    if tag == "val/acc":
        return last(run, tag)
    if tag not in run.series:
        return None
    values = run.series[tag][1]
    values = values[-max(len(values) // 10, 1) :]
    values = values[values < 1] if tag.startswith("grad/cos") else values
    return float(values.mean()) if len(values) else None


def write_cells(page: Page, setting: Setting) -> None:
    """Final values of every cell, mean and spread over seeds."""
    rows = []
    runs = [r for r in setting.ratio_runs if r.finished]
    for (budget, fake, cell), same in sorted(results.by(runs, lambda r: (r.budget, r.fake, r.cell)).items()):
        columns = []
        for tag in ("val/acc", "test/acc", "grad/cos_clean_all", "train/acc_noisy", "probe/memorized"):
            values = [
                v
                for v in (last(r, tag) if tag.startswith(("test", "probe")) else tail(r, tag) for r in same)
                if v is not None
            ]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            columns.append(f"{statistics.fmean(values):.4f}{spread}" if values else "")
        sched = cell.sched + ("" if budget == "any" else f", {same[0].length} {budget}")
        rows.append(
            [
                sched,
                schedule_seen(same),
                f"{cell.noise:g}" + (f" (A/A {fake:g})" if fake else ""),
                str(cell.B),
                f"{cell.lr:g}, {cell.momentum:g}",
                str(len({r.seed for r in same})),
                *columns,
            ]
        )
    if rows:
        header = [
            "schedule",
            "seen of it",
            "noise",
            "B",
            "lr, momentum",
            "seeds",
            "val/acc",
            "test/acc",
            "cosine clean-all",
            "acc. on noisy",
            "memorized",
        ]
        page.table(*without_empty(header, rows))
        page.text(
            "Accuracies at the end; cosine and accuracy on noisy examples: mean of the last tenth of the points. ± one standard "
            "deviation over seeds. Seen of it: the part of the schedule that the run lasts for, and what share of the run then "
            "stands at the schedule's last value."
        )


def schedule_seen(runs: list[Run]) -> str:
    """What the runs of a cell see of their schedule, in words; empty for a constant rate."""
    seen = {results.schedule_seen(r) for r in runs} - {None}
    return "; ".join(
        percent(fraction) + (f", then {percent(held)} at its end" if held else "") for fraction, held in sorted(seen)
    )


def without_empty(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that no row has anything in."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def write_comparison(page: Page, runs: list[Run], reference: list[Run]) -> None:
    """Ours, the report's, the difference, in units of our spread over seeds; each setting of ours for itself."""
    rows = []
    for theirs in sorted(reference, key=lambda r: (r.options["epochs"], r.cell)):
        fit = [r for r in runs if r.finished and figures.comparable(r, theirs)]
        for setting, ours in results.by(fit, lambda r: r.setting).items():
            how = ", ".join(
                f"{k.replace('_', '-')} {v}"
                for k, v in setting
                if k in figures.TOLERATED and (k == "measure_bn" or (k, v) not in theirs.setting)
            )
            for tag, label, *_ in KINDS:
                seeds: dict[str, list[float]] = {}
                for r in ours:
                    if (value := tail(r, tag)) is not None:
                        seeds.setdefault(r.seed, []).append(value)
                a, b = [statistics.fmean(v) for v in seeds.values()], tail(theirs, tag)
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
            "(it logged that where a batch held no noisy example). The report's cosines are measured with BatchNorm in eval mode: "
            "those of a run without --measure-bn eval are of another mode, and a difference may come from that. The report's values are "
            "one run each; its figure 4 at batch 128 without noise is the run of figure 13 (80 epochs, about 25,000 schedule steps) "
            "and not comparable with its neighbours. Only runs whose setting and weight decay are the report's are compared."
        )
    else:
        page.text(
            "None of these runs is of a setting, cell, schedule length and number of epochs that the reference has."
        )


def at_best(settings: list[Setting]) -> list[Setting]:
    """The settings that have several learning rates or weight decays, at each cell's best value of the other seeds."""
    found = []
    for s in settings:
        if len({(r.cell.lr, r.options["wd"]) for r in s.all_runs}) > 1:
            names = {row.name for row in findings.tuned([results.row_of(r) for r in s.all_runs if r.finished])}
            runs = [r for r in s.all_runs if r.name in names]
            found.append(Setting(f"{s.label}, tuned", runs, runs, s.all_runs, [], False))
    return found


# ---------------------------------------------------------------------------------------------------------- programme


def full(
    page: Page,
    runs: list[Run],
    reference: list[Run],
    look: Look,
    margins: dict[str, float],
    formats: tuple[str, ...],
    left_out: list[str],
) -> Judged:
    """The report on many runs: cells, figures, findings, the rest; returns its verdicts.

    `left_out` are the runs that cannot be read, as "NAME: reason".
    """
    settings = results.settings(runs)
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
    page.heading(2, "Figures")
    notes = [f"{s.label}: {note}" for s in settings for note in s.notes]
    if notes:
        page.bullets(notes)
    draw(page, settings, look, formats)
    best = at_best(settings)
    if best:
        page.heading(2, "Figures at each cell's best learning rate and weight decay")
        draw(page, best, look, formats, "-tuned")
    page.heading(2, "Findings")
    judged = judge(settings, margins, tuned=False)
    write_findings(page, judged)
    if best:
        page.heading(2, "Findings at each cell's best learning rate and weight decay")
        page.text(
            "Chosen for each cell and seed by the mean validation accuracy of the other seeds, so that no run is judged on what chose it."
        )
        write_findings(page, judge(best, margins, tuned=True))
    with page.folded("How the verdicts are reached"):
        write_rules(page, margins)
    if reference:
        page.heading(2, "Beside the report")
        write_comparison(page, runs, reference)
    return judged


def formats(text: str) -> tuple[str, ...]:
    """The type of --format."""
    try:
        return formats_of(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def parser() -> options.Parser:
    p = options.Parser(prog="report.py", description="Figures, tables and verdicts from runs.", allow_abbrev=False)
    p.add_argument(
        "paths", nargs="+", metavar="RUNS", help="folder of runs, one run's folder, exported .npz, or curves .csv"
    )
    p.add_argument("--out", metavar="DIR", help="where report.md, report.html and the figures go; for one run's folder RUNS/NAME/report by default")
    p.add_argument("--reference", metavar="CSV", help="the report's own curves, drawn and tabled beside ours")
    p.add_argument(
        "--x",
        choices=[*X_LABEL, *(f"log-{x}" for x in X_LABEL)],
        help="x axis of curves (steps, logarithmic where the line of a batch size would be a sliver otherwise)",
    )
    p.add_argument("--log-x", action="store_true", help="logarithmic x axis of curves, as --x log-steps and so on")
    p.add_argument(
        "--bands",
        choices=["seeds", "window"],
        default="seeds",
        help="spread over seeds, or the smoothing's, as in the report",
    )
    p.add_argument(
        "--format",
        type=formats,
        default=("png", "svg"),
        metavar="png,svg,pdf",
        help="the files of every figure (png,svg); the pages show the png, else the svg",
    )
    p.add_argument(
        "--csv",
        metavar="FILE",
        help="write every value into FILE.csv (run, tag, step, value), and FILE-runs.csv with a row for each run",
    )
    p.add_argument("--export", metavar="FILE", help="write the series of all runs into one .npz")
    p.add_argument(
        "--margin-acc",
        type=options.positive,
        default=findings.MARGINS["acc"],
        metavar="X",
        help="smallest effect of interest, accuracy as a share (0.01)",
    )
    p.add_argument(
        "--margin-cos",
        type=options.positive,
        default=findings.MARGINS["cos"],
        metavar="X",
        help="the same for a cosine or a ratio (0.05)",
    )
    p.add_argument(
        "--margin-log2b",
        type=options.positive,
        default=findings.MARGINS["log2b"],
        metavar="X",
        help="the same for the best batch size, in doublings (0.5)",
    )
    return p


def check(args) -> None:
    """Everything about the options that can be known before a run is read. Raises `InputError`."""
    one = len(args.paths) == 1 and results.is_run(Path(args.paths[0]))
    if not (args.out or args.export or args.csv):
        if not one:
            raise InputError("--out: say where the report goes (or give --export FILE or --csv FILE)")
        args.out = str(Path(args.paths[0]) / "report")
    if args.out and Path(args.out).is_file():
        raise InputError(f"--out {args.out}: is a file, not a folder")
    if args.export and Path(args.export).suffix != ".npz":
        raise InputError(f"--export {args.export}: the name must end in .npz")
    if args.csv:
        tables.check(Path(args.csv), [Path(p) for p in (*args.paths, *([args.reference] * bool(args.reference)))])


def look_of(args, reference: list[Run]) -> Look:
    """How curves are drawn. An x axis that is named is linear unless it says otherwise."""
    x = args.x or "steps"
    log_x = True if args.log_x or x.startswith("log-") else None if args.x is None else False
    return Look(x.removeprefix("log-"), log_x, args.bands, reference)


def print_verdicts(judged: Judged) -> None:
    """A line for each finding that these runs can speak about."""
    for setting, result in judged:
        if speaks(result):
            print(f"{result.finding.id:<13} {result.verdict:<14} {result.finding.title} ({setting})")
    silent = dict.fromkeys(result.finding.id for _, result in judged if not speaks(result))
    if silent:
        print(f"these runs cannot judge: {', '.join(silent)}")


def run(args) -> int:
    """Read, export, draw and judge. Raises `InputError`, and `CannotWrite` where the disk refuses."""
    check(args)
    if args.csv and not (args.out or args.export):  # one run at a time in memory
        print(tables.write(results.each(args.paths), Path(args.csv)))
        return 0
    left_out: list[str] = []
    runs = results.load(args.paths, left_out=left_out)
    if not runs:
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise InputError(f"no run can be read: {left_out[0]}{more}" if left_out else f"{args.paths[0]}: no run in it")
    for line in left_out:
        print(f"report.py: warning: left out {' '.join(line.split())}", file=sys.stderr)
    reference = results.read_curves(Path(args.reference)) if args.reference else []
    if args.csv:
        print(tables.write(runs, Path(args.csv)))
    if args.export:
        results.export(runs, Path(args.export))
        print(f"{len(runs)} runs -> {args.export} ({Path(args.export).stat().st_size / 1e6:.2f} MB)")
    if not args.out:
        return 0
    look = look_of(args, reference)
    with whole_folder(Path(args.out)) as folder:
        page = Page(folder, "png" if "png" in args.format else "svg")
        if len(runs) == 1 and len(args.paths) == 1 and results.is_run(Path(args.paths[0])):
            one_page(page, runs[0], look, args.format)
            page.write(runs[0].name)
        else:
            margins = {name: getattr(args, f"margin_{name}") for name in findings.MARGINS}
            print_verdicts(full(page, runs, reference, look, margins, args.format, left_out))
            page.write("Label noise and SGD")
    print(f"-> {Path(args.out) / 'report.md'}, report.html")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Bad input becomes one line and status 2, results that cannot be written one line and status 1."""
    options.show_anything()
    try:
        return run(parser().parse_args(argv))
    except (InputError, CannotWrite) as e:
        print(f"report.py: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1 if isinstance(e, CannotWrite) else 2


if __name__ == "__main__":
    sys.exit(main())
