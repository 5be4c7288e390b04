"""Many runs of train.py from one command: grids of options, this machine's cores and GPUs, other machines through Ray.

    python sweep.py --preset quick                                          # within an hour on two CPU cores
    python sweep.py --preset report --jobs 1 --seeds 0,1,2                  # the report's whole study
    python sweep.py --grid "noise=0,0.2,0.5 bs=16,64,256 sched=onecycle seed=0,1,2" --epochs 10
    python sweep.py --grid "noise=0,0.5 bs=16,64,256" --seeds 0,1,2 --tune "lr=log:0.003:1"     # each cell at its best rate
    python sweep.py --status --runs runs                                    # every sweep that was started in runs/

Options that are not named here go to every run of train.py. A finished run is skipped, a stopped one resumed, a
failed one reported and not repeated unless asked. Ctrl-C lets the running ones save, and stops.
"""

import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from engine import machine

if __name__ == "__main__":
    machine.explain_loading("sweep.py")

from data import InputError, printable
from engine import cmdline, options
from engine.machine import cores
from series import VAL_ACC
from study import tuning
from study.cluster import RayTasks, Request
from study.grids import PRESETS, REPORT_SIZES, SEEDS, Job, axis_names, expand
from study.joblist import Sweep, any_done, done_in_files, find_earlier, identity_of, read_jobs, write_jobs
from study.outputs import CannotWrite
from study.processes import STATES, LocalProcesses, command, nothing_to_start, run_state
from study.scheduler import Backend, run_jobs
from study.spaces import read_space

TUNING = ("trials", "metric", "tune_seeds")  # options that belong to --tune


def jobs_of(args, extra: list[str]) -> list[Job]:
    """The jobs that the command line asks for. Raises `InputError`."""
    seeds = [] if args.seeds is None else args.seeds.split(",")
    if not all(seeds):
        raise InputError(f"--seeds '{args.seeds}': not a list of seeds like 0,1,2")
    if args.grid is not None:
        if args.part or args.with_1024:
            raise InputError(f"--{'part' if args.part else 'with-1024'}: goes with --preset, not with --grid")
        return expand(args.grid, extra, "--grid", seeds)
    every = [g for grids in PRESETS[args.preset].values() for g in grids]  # whatever the part: one run, one name
    whole = [g.format(sizes=REPORT_SIZES) for g in every]
    return expand(preset_grids(args), extra, f"--preset {args.preset}", seeds, axis_names(every, several=True), whole)


def preset_grids(args) -> list[str]:
    """The grids of the preset's parts that are asked for. Raises `InputError`."""
    parts = PRESETS[args.preset]
    for part in args.part:
        if part not in parts:
            raise InputError(f"--part {part}: --preset {args.preset} has {', '.join(parts)}")
    sizes = REPORT_SIZES + (",1024" if args.with_1024 else "")
    return [g.format(sizes=sizes) for part, grids in parts.items() if not args.part or part in args.part for g in grids]


def written_jobs(args, extra: list[str], runs: Path, sweeps: list[Sweep]) -> list[Job]:
    """The jobs of every sweep that was started in RUNS, for --status without a grid; says which. Raises `InputError`."""
    given = {
        "--part": args.part,
        "--seeds": args.seeds,
        "--with-1024": args.with_1024,
        **dict.fromkeys(extra[:1], True),
    }
    for option in (name for name, value in given.items() if value or value == ""):
        raise InputError(f"{option}: goes with --grid or --preset")
    if not sweeps:
        raise InputError(f"--status: no sweep is written down in {runs}; give its --grid or --preset")
    for sweep in sweeps:
        print(f"# {sweep.started}  {sweep.command}")
    return [job for sweep in sweeps for job in sweep.jobs]


def print_totals(statuses: list[str], before: int) -> None:
    """How many runs are in which state, all of them; `before`: how many of them had finished before."""
    counts = Counter(statuses)
    of_before = f" ({before} of them before)" if before else ""
    line = f"{counts['finished']} of {cmdline.counted(len(statuses), 'run')} finished{of_before}"
    print(", ".join([line, *(f"{counts[s]} {s}" for s in STATES if counts[s] and s != "finished")]))


def print_status(jobs: list[Job], runs: Path, done: dict[str, list[dict]]) -> None:
    """A table of all runs, and how many are in which state."""
    states = [(job, *run_state(runs, job, done)) for job in jobs]
    width = max((len(job.name) for job in jobs), default=4)
    for job, status, detail in states:
        print(f"{job.name:<{width}}  {status:<8}  {printable(detail)}".rstrip())
    counts = Counter(status for _, status, _ in states)
    print(", ".join(f"{counts[s]} {s}" for s in STATES if counts[s]) + f" of {len(jobs)}")


def gpus(place) -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES names them; none with `--accelerator cpu`."""
    if place.accelerator == "cpu":
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [g for g in given.split(",") if g.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def processes_of(place) -> int:
    """Processes of each run: its `--devices`; `auto` is what one of the sweep's slots has. Raises `InputError`."""
    if (place.num_nodes or 1) > 1:
        raise InputError(f"--num-nodes {place.num_nodes}: a sweep's runs have one machine each")
    return place.devices if isinstance(place.devices, int) else 1


def tuning_options(p: cmdline.Parser) -> None:
    """Add the options of a search."""
    g = p.add_argument_group("each cell at its own best values (requirements-tune.txt)")
    g.add_argument(
        "--tune",
        metavar="SPACE",
        help='what is searched for each cell: "lr=log:0.003:1 wd=log:1e-5:1e-2"; also lin:, int:, and lists a|b',
    )
    g.add_argument("--trials", type=cmdline.count, metavar="N", help=f"of each cell (default: {tuning.TRIALS})")
    g.add_argument("--metric", metavar="SERIES", help=f"what decides: {', '.join(tuning.METRICS)} (default: {VAL_ACC})")
    g.add_argument(
        "--tune-seeds",
        metavar="S,S,...",
        help=f"seeds of the trials, other ones than those of the grid (default: {tuning.FIRST_SEED})",
    )


def parser() -> cmdline.Parser:
    p = cmdline.Parser(
        prog="sweep.py", description="Many runs of train.py; its options pass through.", allow_abbrev=False
    )
    g = p.add_argument_group("what to run")
    what = g.add_mutually_exclusive_group()
    what.add_argument(
        "--preset", choices=list(PRESETS), help="; ".join(f"{k}: parts {', '.join(v)}" for k, v in PRESETS.items())
    )
    what.add_argument(
        "--grid", action="append", metavar="AXES", help='may be repeated: "noise=0,0.5 bs=32,128 seed+noise-seed=0,1"'
    )
    g.add_argument(
        "--part", action="append", default=[], metavar="PART", help="only this part of the preset (may be repeated)"
    )
    g.add_argument("--with-1024", action="store_true", help="the report's batch sizes and 1024")
    g.add_argument(
        "--seeds",
        metavar="S,S,...",
        help="seeds of initialization, noise and split, together (presets but quick and medium: 0)",
    )
    g.add_argument("--runs", default="runs", metavar="DIR", help="where the runs are")
    g.add_argument(
        "--done", action="append", default=[], metavar="FILE", help="runs in this exported .npz count as finished"
    )
    g.add_argument("--retry-failed", action="store_true", help="start failed runs again, from their last checkpoint")
    tuning_options(p)
    g = p.add_argument_group("where to run")
    g.add_argument("--jobs", type=cmdline.count, metavar="N", help="runs at a time (GPUs x --per-gpu, or 1)")
    g.add_argument("--per-gpu", type=cmdline.count, default=1, metavar="K", help="runs at a time on one GPU")
    g.add_argument("--threads", type=cmdline.count, metavar="N", help="CPU threads of a run's process (cores / jobs)")
    g.add_argument(
        "--minutes",
        type=cmdline.number(0, 1e6, "a number above 0", open_low=True),
        metavar="M",
        help="end within this time: what runs then saves, and the same command goes on",
    )
    g.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, HOST:PORT, or local to start one here")
    g.add_argument(
        "--retries",
        type=cmdline.number(0, 1000, "a whole number from 0", int),
        default=3,
        metavar="N",
        help="of a Ray task whose machine is lost",
    )
    g = p.add_argument_group("instead of running")
    g.add_argument("--dry-run", action="store_true", help="print what would be done")
    g.add_argument(
        "--print-commands",
        action="store_true",
        help="print a command line for each run that is not finished, for job arrays",
    )
    g.add_argument(
        "--status",
        action="store_true",
        help="print a table of all runs; without --grid or --preset of every sweep that was started in --runs",
    )
    return p


def check_folder(runs: Path) -> None:
    """Raise `InputError` where RUNS cannot be a folder."""
    there = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--runs {runs}: {'' if there == runs.absolute() else f'{there} '}is a file, not a folder")


def named_jobs(args, extra: list[str], runs: Path) -> tuple[list[Job], dict[str, list[dict]]]:
    """Every job once, under the name that its run has in RUNS, and {name: options} of finished runs in files (`--done`).

    Raises `InputError`.
    """
    check_folder(runs)
    sweeps = read_jobs(runs)
    if args.grid is None and args.preset is None:
        if not args.status:
            raise InputError("give --preset or --grid (--status alone shows the sweeps that were started in --runs)")
        jobs = written_jobs(args, extra, runs, sweeps)
    else:
        jobs = jobs_of(args, extra)
    done = done_in_files(args.done)
    if args.done and not any_done(jobs, done):
        print(f"warning: --done: none of these {len(jobs)} runs is finished in {', '.join(args.done)}", file=sys.stderr)
    find_earlier(jobs, sweeps, runs, done)
    return list({(job.name, identity_of(vars(job.args))): job for job in jobs}.values()), done


@dataclass
class Slots:
    """Where a sweep's runs go: `at_once` of them, on `groups` of GPUs, each of `size` processes with `threads` (None: what fits)."""

    groups: list[str]
    size: int
    at_once: int
    threads: int | None

    def words(self, args) -> str:
        """The same for the user."""
        where = f"{args.jobs or 'as many as fit'} at a time" if args.ray else f"{self.at_once} at a time"
        on = " and ".join(self.groups) if self.size > 1 else ", ".join(self.groups)
        where += f" on GPU {on}" if self.groups else ""
        threads = self.threads and f"{cmdline.counted(self.threads, 'thread')} each" + " process" * (self.size > 1)
        return f"{where}, {threads or 'on Ray'}"

    def backend(self, args, place, most: int | None, runs: int) -> Backend:
        """The scheduler's back end for so many `runs`; `most` at a time on Ray. Raises `InputError`."""
        if not args.ray:
            groups = self.groups or [None]
            return LocalProcesses([groups[i % len(groups)] for i in range(self.at_once)], self.threads, runs)
        if self.size > 1 and args.per_gpu > 1:
            raise InputError(f"--per-gpu {args.per_gpu}: on Ray a run of --devices {self.size} has whole GPUs")
        share = 0 if place.accelerator == "cpu" else self.size / args.per_gpu
        return RayTasks(Request(args.ray, share, self.size, self.threads, most, args.retries))


def slots_of(args, place) -> Slots:
    """Where the runs of a sweep go. Raises `InputError`."""
    size = processes_of(place)
    devices = [] if args.ray else gpus(place)
    if devices and size > len(devices):
        raise InputError(f"--devices {size}: this machine has {cmdline.counted(len(devices), 'GPU')}")
    groups = [",".join(devices[i : i + size]) for i in range(0, len(devices) - size + 1, size)]
    at_once = args.jobs or max(len(groups) * args.per_gpu, 1)
    threads = args.threads or (None if args.ray else max(cores() // (at_once * size), 1))
    return Slots(groups, size, at_once, threads)


def run_sweep(args, extra: list[str]) -> int:
    """Do what was asked for; returns the exit status. Raises `InputError`."""
    for word in extra:
        if word.split("=")[0] in ("--name", "--resume"):
            raise InputError(f"{word}: the sweep names and resumes its runs itself")
    runs = Path(args.runs)
    if args.tune is not None:
        return run_tuned(args, extra, runs)
    for option in TUNING:
        if getattr(args, option) is not None:
            raise InputError(f"--{option.replace('_', '-')}: goes with --tune")
    jobs, done = named_jobs(args, extra, runs)
    if args.status:
        print_status(jobs, runs, done)
        return 0
    return run_grid(args, extra, runs, jobs, done)


def run_grid(args, extra: list[str], runs: Path, jobs: list[Job], done: dict[str, list[dict]]) -> int:
    """Run a grid's jobs, or print what would be run; returns the exit status. Raises `InputError`."""
    states = {job.name: run_state(runs, job, done) for job in jobs}
    again = {name for name, (status, _) in states.items() if status == "failed" and args.retry_failed}
    queue = [job for job in jobs if not nothing_to_start(states[job.name][0], job, again)]
    for job in jobs:
        if states[job.name][0] == "other":
            print(f"{job.name}: {printable(states[job.name][1])}", file=sys.stderr)
        elif states[job.name][0] == "failed" and not args.retry_failed:
            reason = printable(states[job.name][1])
            print(f"{job.name}: failed before: {reason} (--retry-failed starts it again)", file=sys.stderr)
    if args.print_commands:
        for job in queue:
            print(shlex.join(command(job, runs, resume=True, threads=args.threads)))
        if not queue:
            print(f"# none of {len(jobs)} runs is left to do", file=sys.stderr)
        return 0
    place = options.parser().parse_args(extra)
    slots = slots_of(args, place)
    if args.dry_run:
        for job in queue:
            print(shlex.join(command(job, runs, states[job.name][0] == "stopped", slots.threads)))
        counts = Counter(status for status, _ in states.values())
        known = ", ".join(f"{n} {s}" for s, n in counts.items())
        print(f"# {len(queue)} of {cmdline.counted(len(jobs), 'run')} to do ({known}), {slots.words(args)}")
        return 0
    write_jobs(runs, jobs, args.words)
    backend = slots.backend(args, place, args.jobs, len(queue))
    runs = runs.resolve() if args.ray else runs  # a worker starts elsewhere
    ended, interrupted = run_jobs(queue, runs, backend, done, len(jobs) - len(queue), again, args.minutes)
    # a run that was never started may have been run by another process
    statuses = [
        ended.get(job.name) or (run_state(runs, job, done) if job in queue else states[job.name])[0] for job in jobs
    ]
    print_totals(statuses, sum(status == "finished" for status, _ in states.values()))
    if interrupted or not set(statuses) <= {"finished", "failed", "other"}:
        return 3
    return 1 if set(statuses) - {"finished"} else 0


def search_of(args, extra: list[str], runs: Path) -> tuning.Search:
    """The search that --tune asks for. Raises `InputError`."""
    if args.grid is None and args.preset is None:
        raise InputError("--tune: give --preset or --grid")
    if args.print_commands:
        raise InputError("--print-commands: goes without --tune, for a trial follows from those before it")
    for word in extra:
        if word.split("=")[0] in SEEDS:
            raise InputError(f"{word}: goes without --tune, whose choice is made on other seeds; give --seeds")
    metric = args.metric or VAL_ACC
    if metric not in tuning.METRICS:
        raise InputError(f"--metric {metric}: not one of {', '.join(tuning.METRICS)}")
    jobs = jobs_of(args, extra)
    # a preset's single values give way, as they do to an option that is given
    in_grid = axis_names(args.grid) if args.grid is not None else axis_names(preset_grids(args), several=True)
    plan = tuning.Plan(
        read_space(args.tune, in_grid, extra),
        metric,
        args.trials or tuning.TRIALS,
        tuning.tuning_seeds(args.tune_seeds, jobs),
        shlex.join(["sweep.py", *args.words]),
        args.retry_failed,
    )
    cells = tuning.cells_of(jobs, plan.space)
    runs = runs.resolve() if args.ray else runs
    return tuning.Search(plan, cells, runs, create=not (args.status or args.dry_run))


def run_tuned(args, extra: list[str], runs: Path) -> int:
    """Search each cell's best values, then run them at the judged seeds; returns the exit status. Raises `InputError`."""
    check_folder(runs)
    search = search_of(args, extra, runs)
    plan, began = search.plan, time.monotonic()
    print(f"# {plan.metric} is {plan.direction}d, with seed {', '.join(plan.seeds)}; trials are in {search.folder}")
    if args.status or args.dry_run:
        print("\n".join(search.table()))
        n, runs_then = len(search.cells), sum(len(cell.runs) for cell in search.cells)
        print(f"# {cmdline.counted(n, 'cell')}, then {cmdline.counted(runs_then, 'run')} at the best values")
        return 0
    place = options.parser().parse_args(extra)
    slots = slots_of(args, place)
    # on Ray as many at a time as there are cells: each trial of a cell then knows how those before it ended
    backend = slots.backend(args, place, args.jobs or len(search.cells), len(search.planned()))
    _, interrupted = run_jobs([], search.folder, backend, {}, 0, set(), args.minutes, search)
    print("\n".join(search.table()))
    if interrupted or search.stopped:
        return 3
    failed = search.without_choice()
    for line in failed:
        print(line, file=sys.stderr)
    jobs = search.judged()
    if args.minutes is not None:
        args.minutes -= (time.monotonic() - began) / 60
        if args.minutes <= 0:
            return 3
    status = run_grid(args, extra, runs, jobs, done_in_files(args.done)) if jobs else 0
    return status or int(bool(failed))


def main(argv: list[str] | None = None) -> int:
    """Bad input becomes one line and status 2; 1 if a run failed, 3 if stopped by a signal or a run is not finished."""
    cmdline.show_anything()
    try:
        words = sys.argv[1:] if argv is None else argv
        args, extra = parser().parse_known_args(words)
        args.words = words
        return run_sweep(args, extra)
    except InputError as e:
        cmdline.complain(e, "sweep.py")
        return 2
    except (OSError, CannotWrite) as e:  # RUNS is lost or full; the runs have been stopped
        cmdline.complain(e, "sweep.py")
        return 1


if __name__ == "__main__":
    sys.exit(main())
