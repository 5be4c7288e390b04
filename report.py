"""Figures, tables and verdicts from runs: event files and summaries in, a Markdown and a self-contained HTML report out.

    python report.py runs --out report                                     # everything in runs/
    python report.py runs --out report --reference ../shared/report/curves.csv   # the report's own curves beside ours
    python report.py runs/NAME                                             # one run, one page: in runs/NAME/report/
    python report.py runs other.npz --export all.npz                       # keep, merge, send: a few MB for a whole grid
    python report.py runs --csv all.csv                                    # every value, and all-runs.csv with a row for each run

A path is a folder of runs, one run's folder, a file made by --export, or a .csv of the report's curves.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine import machine

if __name__ == "__main__":
    machine.explain_loading("report.py")
os.environ["MPLBACKEND"] = "agg"  # in place of a notebook's, which this Python may not have: matplotlib would not load

from data import InputError, printable
from engine import cmdline
from study import exports, results, runfolders, tables
from study.analysis.hypotheses import MARGINS
from study.drawing import X_LABEL, Look, formats_of
from study.manyruns import write_full_report
from study.onerun import one_page
from study.outputs import CannotWrite, whole_folder
from study.page import Page
from study.reference import read_curves
from study.runfolders import Run
from study.searches import read_searches
from study.verdicts import Judged, titled

MARGIN_WORDS = {  # of every key of MARGINS
    "acc": "accuracy as a share, and shares per doubling of the batch size",
    "drift": "change of grad/difference / B per doubling of the batch size, as a share of its mean",
    "dimension": "natural logarithm of a ratio of effective dimensions",
}


def formats(text: str) -> tuple[str, ...]:
    """The type of --format."""
    try:
        return formats_of(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def parser() -> cmdline.Parser:
    p = cmdline.Parser(prog="report.py", description="Figures, tables and verdicts from runs.", allow_abbrev=False)
    p.add_argument(
        "paths", nargs="+", metavar="RUNS", help="folder of runs, one run's folder, exported .npz, or curves .csv"
    )
    p.add_argument(
        "--out",
        metavar="DIR",
        help="where report.md, report.html and the figures go; for one run's folder RUNS/NAME/report by default",
    )
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
    for name, what in MARGIN_WORDS.items():
        text = f"smallest effect of interest, {what}"
        p.add_argument(f"--margin-{name}", type=cmdline.positive, default=MARGINS[name], metavar="X", help=text)
    return p


def check_report_options(args) -> None:
    """Everything about the options that can be known before a run is read. Raises `InputError`."""
    one = len(args.paths) == 1 and runfolders.is_run(Path(args.paths[0]))
    if not (args.out or args.export or args.csv):
        if not one:
            raise InputError("--out: say where the report goes (or give --export FILE or --csv FILE)")
        args.out = str(Path(args.paths[0]) / "report")
    if args.out and Path(args.out).is_file():
        raise InputError(f"--out {args.out}: is a file, not a folder")
    if args.export and Path(args.export).suffix != ".npz":
        raise InputError(f"--export {args.export}: the name must end in .npz")
    if args.csv:
        tables.check_targets(
            Path(args.csv), [Path(p) for p in (*args.paths, *([args.reference] * bool(args.reference)))]
        )


def look_of(args, reference: list[Run]) -> Look:
    """How curves are drawn. An x axis that is named is linear unless it says otherwise."""
    x = args.x or "steps"
    log_x = True if args.log_x or x.startswith("log-") else None if args.x is None else False
    return Look(x=x.removeprefix("log-"), log_x=log_x, bands=args.bands, reference=reference)


def print_verdicts(judged: Judged) -> None:
    """A line for each finding whose statistic these runs give; the other findings by name."""
    for setting, result in judged:
        if result.readings:
            shared = f" [of {' and '.join(result.shared)}]" if result.shared else ""
            read = ", ".join(
                f"{budget} {reading.word}" for budget, reading in result.readings.items() if budget != "any"
            )
            print(
                f"{result.hypothesis.id:<4} {result.verdict:<22} {titled(result)} ({setting}){f': {read}' * bool(read)}{shared}"
            )
    unjudged = dict.fromkeys(result.hypothesis.id for _, result in judged if not result.readings)
    if unjudged:
        print(f"these runs cannot judge: {', '.join(unjudged)}")


def at_least_one(runs: Iterable[Run], args, left_out: list[str]) -> Iterator[Run]:
    """The same runs. Raises `InputError` at their end where there was none."""
    there = False
    for run in runs:
        there = True
        yield run
    if not there:
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise InputError(f"no run can be read: {left_out[0]}{more}" if left_out else f"{args.paths[0]}: no run in it")


def warn(left_out: list[str], remarks: list[str]) -> None:
    """A line on standard error for each thing that a reader of the results should know."""
    for line in [f"left out {line}" for line in left_out] + remarks:
        print(f"report.py: warning: {printable(line)}", file=sys.stderr)


def make_report(args) -> int:
    """Read, export, draw and judge. Raises `InputError`, and `CannotWrite` where the disk refuses."""
    check_report_options(args)
    left_out: list[str] = []
    remarks: list[str] = []
    if args.csv and not (args.out or args.export):  # one run at a time in memory
        runs = at_least_one(results.iter_runs(args.paths, left_out=left_out, remarks=remarks), args, left_out)
        print(tables.write_tables(runs, Path(args.csv)))
        warn(left_out, remarks)
        return 0
    runs = results.load_runs(args.paths, left_out=left_out, remarks=remarks)
    searches = read_searches(args.paths, left_out) if args.out or args.export else []
    if args.csv or not searches:
        runs = list(at_least_one(runs, args, left_out))
    warn(left_out, remarks)
    reference = read_curves(Path(args.reference)) if args.reference else []
    if args.csv:
        print(tables.write_tables(runs, Path(args.csv)))
    if args.export:
        exports.export_runs(runs, Path(args.export), [(s.name, s.content) for s in searches])
        print(f"{len(runs)} runs -> {args.export} ({Path(args.export).stat().st_size / 1e6:.2f} MB)")
    if not args.out:
        return 0
    look = look_of(args, reference)
    with whole_folder(Path(args.out)) as folder:
        page = Page(folder, "png" if "png" in args.format else "svg")
        if len(runs) == 1 and len(args.paths) == 1 and runfolders.is_run(Path(args.paths[0])):
            one_page(page, runs[0], look, args.format)
            page.write(runs[0].name)
        else:
            margins = {name: getattr(args, f"margin_{name}") for name in MARGINS}
            about = (runs, reference, look, margins, args.format, left_out, searches, remarks)
            for judged in write_full_report(page, *about):
                print_verdicts(judged)
            page.write("Label noise and SGD")
    print(f"-> {Path(args.out) / 'report.md'}, report.html")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Bad input becomes one line and status 2, results that cannot be written one line and status 1."""
    cmdline.show_anything()
    try:
        return make_report(parser().parse_args(argv))
    except (InputError, CannotWrite) as e:
        cmdline.complain(e, "report.py")
        return 1 if isinstance(e, CannotWrite) else 2


if __name__ == "__main__":
    sys.exit(main())
