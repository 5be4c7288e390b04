"""Figures, tables and verdicts from runs: event files and summaries in, a Markdown and a self-contained HTML report out.

    python report.py runs --out report                                     # everything in runs/
    python report.py runs --out report --reference ../shared/report/curves.csv   # the report's own curves beside ours
    python report.py runs/NAME --out report                                # one run, one page
    python report.py runs other.npz --export all.npz                       # keep, merge, send: a few MB for a whole grid

A path is a folder of runs, one run's folder, a file made by --export, or a .csv of the report's curves.
"""

import math
import statistics
import sys
from pathlib import Path

import figures
import findings
import options
import results
from data import InputError
from figures import Look, styled
from markup import literal
from outputs import CannotWrite, whole_folder
from page import Page
from results import Run, Setting, last
from schedules import percent

KINDS = (  # tag, y label, does it exist without noise, first figure on CIFAR-10, on Fashion-MNIST
    ("val/acc", "validation accuracy", True, 4, 15),
    ("grad/cos_clean_all", "cosine of clean and all", False, 7, 16),
    ("train/acc_noisy", "training accuracy on noisy examples", False, 10, 17),
)
BUDGET_WORDS = {
    "any": "",
    "steps": "",
    "epochs": ", schedule matched in epochs",
    "examples": ", schedule matched in examples",
}


# ------------------------------------------------------------------------------------------------------------- parts


def shown(i: findings.Interval | None) -> str:
    """Mean, interval and number of seeds."""
    if i is None:
        return "no runs"
    bounds = f" [{i.low:+.4f}, {i.high:+.4f}]" if math.isfinite(i.low) else ""
    return f"{i.mean:+.4f}{bounds}, n = {i.n}"


def judge(settings: list[Setting], margins: dict[str, float], tuned: bool) -> list[tuple[str, findings.Result]]:
    """(setting, result) of every finding: in each setting that has something to say on it, or in the largest one."""
    judged = []
    for finding in findings.FINDINGS:
        by_ratio = finding.id.startswith("4")
        if tuned and by_ratio:
            continue  # tuned cells have no learning rate of their own
        found = []
        for s in settings:
            runs = s.all_runs if tuned else s.ratio_runs if by_ratio else s.runs
            rows = [results.row_of(r) for r in runs]
            result = findings.evaluate(finding, findings.tuned(rows) if tuned else rows, margins)
            found.append((s.label, result))
        said = [pair for pair in found if any(pair[1].intervals.values())]
        judged += said or found[:1]
    return judged


def write_findings(page: Page, judged: list[tuple[str, findings.Result]]) -> None:
    header = ["finding", "setting", "verdict", *findings.BUDGETS.values(), "margin"]
    rows = []
    for setting, r in judged:
        f = r.finding
        intervals = [shown(r.intervals[b]) for b in findings.BUDGETS]
        rows.append([f"{f.id}. {f.title}", setting, f"**{r.verdict}**", *intervals, f"{r.margin:g}"])
    page.table(header, rows)
    items = []
    for setting, r in judged:
        f = r.finding
        item = f"**{f.id}** ({setting}). Claim: {f.claim}. Statistic: {f.statistic}; claimed {'above' if f.direction > 0 else 'below'} 0. "
        item += f"Verdict: **{r.verdict}**, for: {findings.RULES[r.verdict]}."
        if f.null and r.aa:
            item += f" A/A runs: {shown(r.aa)}."
        if r.missing:
            some = r.missing[:8]
            item += (
                " Missing: "
                + "; ".join(some)
                + (f"; and {len(r.missing) - len(some)} more" if len(r.missing) > len(some) else "")
                + "."
            )
        if r.verdict == "not resolved" and r.needed:
            item += f" About {r.needed} seeds would resolve it, if effect and spread stay as they are."
        items.append(item)
    page.bullets(items)


def write_rules(page: Page, margins: dict[str, float]) -> None:
    page.text(
        "The unit is the seed: a statistic is computed from each seed's runs alone (same noise, split and initialization), averaged over "
        "the cells that the claim speaks of, and only then tested; intervals are Student t, 95 %. Runs without a schedule count under "
        f"every budget. Margins: {margins['acc']:g} in accuracy (and per doubling of B), {margins['cos']:g} in a cosine or ratio, "
        f"{margins['log2b']:g} doublings of B. The first rule that applies decides:"
    )
    page.table(["verdict", "rule"], [[k, v] for k, v in findings.RULES.items()])


def write_state(page: Page, runs: list[Run]) -> None:
    """Which runs there are, and what is wrong with those that did not finish."""
    finished = sum(r.finished for r in runs)
    page.text(f"{len(runs)} runs, {finished} finished.")
    rest = [r for r in runs if not r.finished]
    if rest:
        table = [
            [
                literal(r.name),
                literal(r.summary.get("status", "no summary")),
                literal(r.summary.get("steps", "")),
                literal(r.summary.get("reason") or ""),
            ]
            for r in rest
        ]
        page.table(["not finished", "state", "steps", "reason"], table)
    made = {(r.versions.get("torch"), r.resolved.get("device"), r.options.get("precision")) for r in runs if r.versions}
    if made:
        page.text("Made with " + "; ".join(f"torch {v} on {d}, {p}" for v, d, p in sorted(made, key=str)) + ".")


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
        page.table(header, rows)
        page.text(
            "Accuracies at the end; cosine and accuracy on noisy examples: mean of the last tenth of the points. ± one standard deviation over seeds. Seen of it: the part of "
            "the schedule that the run lasts for, and what share of the run then stands at the schedule's last value."
        )


def schedule_seen(runs: list[Run]) -> str:
    """What the runs of a cell see of their schedule, in words; empty for a constant rate."""
    seen = {results.schedule_seen(r) for r in runs} - {None}
    return "; ".join(
        percent(fraction) + (f", then {percent(held)} at its end" if held else "") for fraction, held in sorted(seen)
    )


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


def draw(page: Page, settings: list[Setting], look: Look, suffix: str = "") -> None:
    """Every figure that the runs have series for, numbered as in the report; those left out are named."""
    absent: list[str] = []

    def add(stem: str, title: str, make, *args, **kwargs) -> bool:
        if not styled(make, title, *args, stem=page.out / (stem + suffix), **kwargs):
            return False
        page.figure(stem + suffix, title)
        return True

    used: dict[str, int] = {}
    if not suffix and styled(figures.schedules, [r for s in settings for r in s.runs], stem=page.out / "figure-03"):
        page.figure("figure-03", "Figure 3: schedules")
    for s in settings:
        fmnist = any(r.options["dataset"] == "fmnist" for r in s.runs)
        for tag, label, with_clean, first, first_fmnist in KINDS:
            for i, sched in enumerate(figures.REPORT_SCHEDS):
                for budget, words in BUDGET_WORDS.items():
                    runs = [r for r in s.ratio_runs if (r.cell.sched, r.budget) == (sched, budget)]
                    one_rate = [r for r in s.runs if (r.cell.sched, r.budget) == (sched, budget)]
                    if not runs:
                        continue
                    number = first_fmnist if fmnist and i == 0 else first + i if not fmnist else None
                    pairs = figures.ratio_pairs(runs)  # figures 13 and 14; any other grid of rates has no number
                    wanted = [(None if pairs else number, tag.replace("/", "-"), one_rate, False)]
                    if s.ratio and tag == "val/acc":
                        by_rate = ((13, None, 14)[i] if pairs else None, "val-acc-by-rate", runs, True)
                        wanted = [by_rate] if pairs else [*wanted, by_rate]
                    for number, stem, chosen, by_lr in wanted:
                        stem = f"figure-{number:02d}" if number else f"{stem}-{sched}"
                        stem += f"-{budget}" if budget in ("epochs", "examples") else ""
                        used[stem] = used.get(stem, 0) + 1
                        title = f"Figure {number}: " if number else ""
                        title += f"{label}, {figures.SCHED_NAMES[sched]}{words}{', by rate' * by_lr} ({s.label})"
                        stem += f"-{used[stem]}" if used[stem] > 1 else ""
                        if not add(stem, title, figures.curves, label, chosen, tag, look, with_clean, by_lr=by_lr):
                            absent.append(f"{title}: no run has {tag}")
        number = f"-{settings.index(s) + 1}" if settings.index(s) else ""
        for sched in {r.cell.sched for r in s.runs}:
            for budget, words in BUDGET_WORDS.items():
                runs = [
                    r
                    for r in s.runs
                    if (r.cell.sched, r.budget) == (sched, budget) or (r.fake and r.cell.sched == sched)
                ]
                if not any(r.budget == budget and not r.fake for r in runs):
                    continue
                where = f"{figures.SCHED_NAMES[sched]}{words} ({s.label})"
                end = f"{sched}-{budget}{number}"
                for pair, name in (("cos_clean_all", "clean and all"), ("cos_clean_noisy", "clean and noisy")):
                    title = f"Cosine of {name} beside its null, {where}"
                    if not add(f"null-{pair}-{end}", title, figures.nulls, runs, pair):
                        absent.append(f"{title}: no run with noise has null/{pair} or corrected/{pair}")
                title = f"Corrected cosine of clean and noisy, {where}"
                own = [r for r in runs if r.budget == budget]
                if not add(
                    f"corrected-{end}",
                    title,
                    figures.curves,
                    "corrected cosine",
                    own,
                    "corrected/cos_clean_noisy",
                    look,
                    False,
                ):
                    absent.append(f"{title}: no run with noise has corrected/cos_clean_noisy")
                title = f"Noisy training examples: memorized, recovered, other; {where}"
                if not add(f"probes-{end}", title, figures.probes, own, look):
                    absent.append(f"{title}: no run with noise has probe/memorized")
        title = f"Accuracy by lr/B and by lr/(B(1-m)) ({s.label})"
        if not add(f"ratio{number}", title, figures.by_ratio, s.ratio_runs):
            absent.append(f"{title}: no finished run")
        title = f"Best batch size against noise ({s.label})"
        if not add(f"best-batch{number}", title, figures.best_sizes, s.runs):
            absent.append(f"{title}: needs finished runs of three batch sizes")
    if absent:
        page.text("Not drawn:")
        page.bullets(absent)


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


def one_page(page: Page, run: Run, look: Look) -> None:
    """The report on a single run."""
    page.heading(1, run.name)
    said = run.summary
    rows = [[literal(k), f"{v:.4f}" if isinstance(v, float) else literal(v)] for k, v in said.items() if v is not None]
    page.table(["summary", ""], rows or [["status", "no summary.json"]])
    styled(figures.single, run, look, stem=page.out / "run")
    page.figure("run", run.name)
    values = results.values_of(run)
    means = {"cos_minus_null": "cosine of clean and noisy minus its null", "corrected_minus_1": "corrected cosine minus 1",
             "participation_minus_1": "participation ratio over its isotropic value, minus 1"}  # fmt: skip
    page.table(
        ["mean over the run", ""],
        [[label, f"{values[k]:+.4f}" if k in values else f"no {findings.SERIES_OF[k]}"] for k, label in means.items()],
    )
    page.table(["option", "value"], [[literal(k), literal(v)] for k, v in run.options.items()])


def full(
    page: Page, runs: list[Run], reference: list[Run], look: Look, margins: dict[str, float], left_out: list[str]
) -> list[tuple[str, findings.Result]]:
    """The report on many runs; returns its verdicts. `left_out` are the runs that cannot be read, and why."""
    settings = results.settings(runs)
    page.heading(1, "Label noise and SGD: figures and findings")
    write_state(page, runs)
    if left_out:
        page.text(f"{len(left_out)} more cannot be read and are left out:")
        page.bullets(left_out)
    page.heading(2, "Findings")
    judged = judge(settings, margins, tuned=False)
    write_findings(page, judged)
    notes = [f"{s.label}: {note}" for s in settings for note in s.notes]
    if notes:
        page.bullets(notes)
    write_rules(page, margins)
    best = at_best(settings)
    if best:
        page.heading(2, "Findings at each cell's best learning rate and weight decay")
        page.text(
            "Chosen for each cell and seed by the mean validation accuracy of the other seeds, so that no run is judged on what chose it."
        )
        write_findings(page, judge(best, margins, tuned=True))
    if reference:
        page.heading(2, "Beside the report")
        write_comparison(page, runs, reference)
    page.heading(2, "Figures")
    draw(page, settings, look)
    if best:
        page.heading(2, "Figures at each cell's best learning rate and weight decay")
        draw(page, best, look, "-tuned")
    for s in settings:
        page.heading(2, f"Values: {s.label}")
        write_cells(page, s)
    return judged


def parser() -> options.Parser:
    p = options.Parser(prog="report.py", description="Figures, tables and verdicts from runs.", allow_abbrev=False)
    p.add_argument(
        "paths", nargs="+", metavar="RUNS", help="folder of runs, one run's folder, exported .npz, or curves .csv"
    )
    p.add_argument("--out", metavar="DIR", help="where report.md, report.html and the figures go")
    p.add_argument("--reference", metavar="CSV", help="the report's own curves, drawn and tabled beside ours")
    p.add_argument("--x", choices=list(figures.X_LABEL), default="steps", help="x axis of curves")
    p.add_argument("--log-x", action="store_true", help="logarithmic x axis of curves")
    p.add_argument(
        "--bands",
        choices=["seeds", "window"],
        default="seeds",
        help="spread over seeds, or the smoothing's, as in the report",
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


def run(args) -> int:
    """Read, export, draw and judge. Raises `InputError`, and `CannotWrite` where the disk refuses."""
    if not args.out and not args.export:
        raise InputError("--out: say where the report goes (or give --export FILE)")
    for name in ("out", "export"):
        path = Path(getattr(args, name) or ".")
        if (name == "out" and path.is_file()) or (name == "export" and getattr(args, name) and path.suffix != ".npz"):
            raise InputError(
                f"--{name} {path}: {'is a file, not a folder' if name == 'out' else 'the name must end in .npz'}"
            )
    left_out: list[str] = []
    runs = results.load(args.paths, left_out=left_out)
    if not runs:
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise InputError(f"no run can be read: {left_out[0]}{more}" if left_out else f"{args.paths[0]}: no run in it")
    for line in left_out:
        print(f"report.py: warning: left out {' '.join(line.split())}", file=sys.stderr)
    reference = results.read_curves(Path(args.reference)) if args.reference else []
    if args.export:
        results.export(runs, Path(args.export))
        print(f"{len(runs)} runs -> {args.export} ({Path(args.export).stat().st_size / 1e6:.2f} MB)")
    if not args.out:
        return 0
    look = Look(args.x, args.log_x, args.bands, reference)
    with whole_folder(Path(args.out)) as folder:
        page = Page(folder)
        if len(runs) == 1 and len(args.paths) == 1 and results.is_run(Path(args.paths[0])):
            one_page(page, runs[0], look)
            page.write(runs[0].name)
        else:
            margins = {name: getattr(args, f"margin_{name}") for name in findings.MARGINS}
            for setting, result in full(page, runs, reference, look, margins, left_out):
                print(f"{result.finding.id:<13} {result.verdict:<14} {result.finding.title} ({setting})")
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
