"""Many runs of train.py from one command: grids of options, this machine's cores and GPUs, other machines through Ray.

    python sweep.py --preset quick                                          # about 15 minutes on two CPU cores
    python sweep.py --preset report --jobs 1 --seeds 0,1,2                  # the report's whole study
    python sweep.py --grid "noise=0,0.2,0.5 bs=16,64,256 sched=onecycle seed=0,1,2" --epochs 10
    python sweep.py --preset report --status

Options that are not named here go to every run of train.py. A finished run is skipped, a stopped one resumed, a
failed one reported and not repeated unless asked. Ctrl-C lets the running ones save, and stops.
"""

import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import options
import results
from data import InputError

TRAIN = Path(__file__).resolve().parent / "train.py"
POLL = 0.2  # seconds between looks at the running processes
LOGS = ".sweep"  # folder in RUNS: what each process printed, and why it failed if it never got a folder of its own
STATES = ("finished", "running", "stopped", "failed", "waiting")
REPORT_SIZES = "16,32,64,128,256,512"
MAIN = "dataset=cifar10 model=resnet18 epochs=64 lr=0.1 measure=full noise=0,0.2,0.5 "
RATIO = "dataset=cifar10 model=resnet18 epochs=80 lr=0.05,0.1 bs=64,128 noise=0,0.2,0.5 "
QUICK = (
    "dataset=cifar10 subset=3000 val-frac=0.4 width=16 no-augment=on epochs=5 measure=full measure-every=20 "
    "sched=onecycle seed+noise-seed=0,1,2 "  # 1800 training examples
)

# A preset's parts, each a list of grids; {sizes} are the report's batch sizes. An A/A run measures a fake noisy set.
PRESETS = {
    "report": {
        "4-12": [MAIN + "bs={sizes} sched=constant,cosine,onecycle sched-steps=5000"],
        "13-14": [RATIO + "sched=onecycle,constant sched-steps=25000"],
        "15-17": ["dataset=fmnist model=vgg16 epochs=64 lr=0.1 noise=0,0.2,0.5 bs={sizes} sched=onecycle sched-steps=5000"],
    },
    "budget": {
        "steps": [MAIN + "bs={sizes} sched=constant,cosine,onecycle sched-steps=5000"],
        "epochs": [MAIN + "bs={sizes} sched=cosine,onecycle sched-epochs=64"],
        "examples": [MAIN + "bs={sizes} sched=cosine,onecycle sched-examples=640000"],  # 5000 steps of 128
        "ratio": [RATIO + "sched=onecycle,constant sched-steps=25000", RATIO + "sched=onecycle sched-epochs=80"],
        "aa": [MAIN.replace("noise=0,0.2,0.5", "fake-mask=0.2,0.5") + "bs={sizes} sched=onecycle"],
    },
    "quick": {
        "steps": [QUICK + "noise=0,0.5 bs=16,64,256 sched-steps=40"],  # all of the training at 256, a fifteenth at 16
        "epochs": [QUICK + "noise=0,0.5 bs=16,64,256 sched-epochs=5"],
        "aa": [QUICK + "fake-mask=0.5 bs=64 sched-epochs=5"],
    },
}


# -------------------------------------------------------------------------------------------------------- the grid


@dataclass
class Job:
    """One run: train.py's options for it, without those that say where and on what, and its checked namespace."""

    argv: list[str]
    args: object = field(repr=False)

    @property
    def name(self) -> str:
        return self.args.name

    @property
    def work(self) -> float:
        """Rough cost in examples, for estimates: training examples, and 150 more for each step's launches."""
        total = {"fmnist": 60_000, "synthetic": self.args.synthetic_train}.get(self.args.dataset, 50_000)
        n = (self.args.subset or total) * (1 - self.args.val_frac)
        steps = self.args.epochs * math.ceil(n / self.args.bs)
        share = min(self.args.max_steps or steps, steps) / steps
        return share * (self.args.epochs * n + 150 * steps)


def axes(grid: str, said: str) -> list[list[list[str]]]:
    """A grid's axes as lists of alternatives, each the options it adds.

    `grid`: words NAME=VALUE,VALUE,..., NAME any option of train.py. Two options move together as A+B=VALUE,VALUE
    (one value for both) or A+B=X:Y,X:Y. A switch takes on or off; `default` leaves an option out. Raises `InputError`.
    """
    known = {a.option_strings[0].removeprefix("--"): a for a in options.parser()._actions if a.option_strings}
    known.pop("-h", None)
    found = []
    for word in grid.split():
        names, equals, values = word.partition("=")
        keys = [k.strip("-").replace("_", "-") for k in names.split("+")]
        if not equals or not values:
            raise InputError(f"{said}: '{word}' is not NAME=VALUE,VALUE,...")
        for key in keys:
            if key not in known or key in ("runs", "name", "resume", "help"):
                raise InputError(f"{said}: '{key}' is not an option of train.py that a sweep can vary")
        alternatives = []
        for value in values.split(","):
            parts = value.split(":") if len(keys) > 1 and ":" in value else [value] * len(keys)
            if len(parts) != len(keys) or not all(parts):
                raise InputError(f"{said}: '{value}' in '{word}' is not one value for each of {', '.join(keys)}")
            alternative = []
            for key, part in zip(keys, parts, strict=True):
                if known[key].nargs == 0:  # a switch
                    if part not in ("on", "off", "default"):
                        raise InputError(f"{said}: {key} is a switch, on or off, not '{part}'")
                    alternative += [f"--{key}"] * (part == "on")
                elif part != "default":
                    alternative += [f"--{key}", part]
            alternatives.append(alternative)
        found.append(alternatives)
    if not found:
        raise InputError(f"{said}: it is empty")
    return found


def expand(grids: list[str], extra: list[str], said: str, seeds: list[str] = ()) -> list[Job]:
    """The jobs of some grids, each once, in order. `extra` options hold for all and override the grid's.

    `seeds` set seed and noise seed alike, in place of an axis. Every run is checked by train.py's own parser before
    any is started; raises `InputError`.
    """
    jobs: dict[str, Job] = {}
    for grid in grids:
        alternatives = axes(grid, said)
        if seeds:
            alternatives = [a for a in alternatives if not any("--seed" in options_ for options_ in a)]
            alternatives.append([["--seed", s, "--noise-seed", s] for s in seeds])
        for chosen in itertools.product(*alternatives):
            argv = [word for alternative in chosen for word in alternative] + extra
            try:
                args = options.parse(argv)
            except InputError as e:
                raise InputError(f"{said}: {e}") from e
            jobs.setdefault(args.name, Job(argv, args))
    return list(jobs.values())


def jobs_of(args, extra: list[str]) -> list[Job]:
    """The jobs that the command line asks for. Raises `InputError`."""
    seeds = args.seeds.split(",") if args.seeds else []
    if args.grid is not None:
        if args.part or args.with_1024:
            raise InputError(f"--{'part' if args.part else 'with-1024'}: goes with --preset, not with --grid")
        return expand([args.grid], extra, "--grid", seeds)
    parts = PRESETS[args.preset]
    for part in args.part:
        if part not in parts:
            raise InputError(f"--part {part}: --preset {args.preset} has {', '.join(parts)}")
    sizes = REPORT_SIZES + (",1024" if args.with_1024 else "")
    grids = [g.format(sizes=sizes) for part, grids in parts.items() if not args.part or part in args.part for g in grids]
    return expand([g for grid in grids for g in offered(grid)], extra, f"--preset {args.preset}", seeds)


def offered(grid: str) -> list[str]:
    """A preset's grid without what this train.py does not offer: plain measurement instead of full, no A/A runs."""
    known = {a.dest: a for a in options.parser()._actions}
    if "fake-mask=" in grid and "fake_mask" not in known:
        return []
    return [grid if "full" in known["measure"].choices else grid.replace(" measure=full", "")]


# --------------------------------------------------------------------------------------------------------- states


def held(folder: Path) -> bool:
    """Whether a living process holds the lock of a run's folder."""
    try:
        import fcntl

        with open(folder / ".lock") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ImportError):
        pass
    return False


def state(runs: Path, name: str, done: set[str]) -> tuple[str, str]:
    """(one of `STATES`, what there is to say about it) of a run, from its folder alone, or from files of results."""
    folder = runs / name
    if folder.is_dir():
        summary = results.read_json(folder / "summary.json")
        status = summary.get("status", "stopped")
        if status == "finished":
            return "finished", f"val/acc {summary['val_acc']:.4f}" if summary.get("val_acc") is not None else ""
        if held(folder):
            return "running", f"{summary.get('steps') or 0} steps at the last summary"
        if name in done:
            return "finished", "in a file of results"
        if status == "failed":
            return "failed", str(summary.get("reason") or "no reason given")
        return "stopped", "saved" if status == "stopped" else "killed"
    if name in done:
        return "finished", "in a file of results"
    try:
        return "failed", (runs / LOGS / f"{name}.failed").read_text().strip()
    except OSError:
        return "waiting", ""


def command(job: Job, runs: Path, resume: bool, threads: int | None = None) -> list[str]:
    """The process of a run. A resumed run keeps its first start's threads, for the same bits, if it had fewer."""
    if resume and threads:
        threads = min(threads, results.read_json(runs / job.name / "config.json").get("options", {}).get("threads") or threads)
    place = ["--runs", str(runs), "--name", job.name, *(["--threads", str(threads)] if threads else [])]
    return [sys.executable, str(TRAIN), *job.argv, *place, *(["--resume"] if resume else [])]


def why(log: Path, code: int) -> str:
    """A reason for a failure: the last line that the process wrote, without progress bars, or its exit status."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    except OSError:
        lines = []
    said = [line for line in lines if line and "step/s" not in line and "s/step" not in line]
    return (said[-1][:300] if said else "") or (f"killed by signal {-code}" if code < 0 else f"exit status {code}")


def note_failure(runs: Path, name: str, reason: str) -> None:
    """Remember the failure of a run that has no folder to say so itself."""
    if not (runs / name).is_dir():
        (runs / LOGS / f"{name}.failed").write_text(reason + "\n")


def print_status(jobs: list[Job], runs: Path, done: set[str]) -> None:
    """A table of all runs, and how many are in which state."""
    found = [(job, *state(runs, job.name, done)) for job in jobs]
    width = max((len(job.name) for job in jobs), default=4)
    for job, status, said in found:
        print(f"{job.name:<{width}}  {status:<8}  {said}".rstrip())
    counts = Counter(status for _, status, _ in found)
    print(", ".join(f"{counts[s]} {s}" for s in STATES if counts[s]) + f" of {len(jobs)}")


# ----------------------------------------------------------------------------------------------------- this machine


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus(extra: list[str]) -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES names them; none with `--accelerator cpu`."""
    if options.parser().parse_args(extra).accelerator == "cpu":
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [g for g in given.split(",") if g.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


class Stop:
    """SIGINT and SIGTERM as a flag: `asked` counts them. A context manager; old handlers come back."""

    def __enter__(self):
        self.asked = 0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, *_) -> None:
        self.asked += 1

    def __exit__(self, *_) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Progress:
    """A bar over runs, weighted by their work for the estimate of the time left."""

    def __init__(self, jobs: list[Job], skipped: int) -> None:
        self.bar = tqdm(total=len(jobs) + skipped, initial=skipped, unit="run", bar_format="{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}")
        self.left, self.done, self.began = sum(j.work for j in jobs), 0.0, time.monotonic()
        self.show(Counter(), 0)

    def end(self, job: Job, counts: Counter, running: int) -> None:
        self.left -= job.work
        self.done += job.work
        self.bar.update()
        self.show(counts, running)

    def show(self, counts: Counter, running: int) -> None:
        left = (time.monotonic() - self.began) * self.left / self.done if self.done else None
        words = [f"{running} running"] + [f"{n} {s}" for s, n in counts.items() if s != "finished"]
        words.append(f"about {left / 60:.0f} min left" if left is not None else "time left unknown")
        self.bar.set_postfix_str(", ".join(words))


def run_here(queue: list[Job], runs: Path, slots: list[str | None], threads: int, done: set[str], skipped: int) -> Counter:
    """Run jobs as processes, one in each slot (a GPU, or None for the CPU); returns how they ended.

    A run that another process holds is waited for and looked at again. The first signal is passed on to the
    children, which save; the second kills them.
    """
    (runs / LOGS).mkdir(parents=True, exist_ok=True)
    queue, elsewhere, active, ended = list(queue), [], {}, Counter()
    free, passed_on = list(slots), 0
    progress = Progress(queue, skipped)

    def finish(job: Job, status: str, said: str) -> None:
        ended[status] += 1
        progress.end(job, ended, len(active))
        if status != "finished":
            tqdm.write(f"{job.name}: {status}: {said}", file=sys.stderr)

    with Stop() as stop:
        while True:
            for process, (job, slot, log, out) in list(active.items()):
                code = process.poll()
                if code is None:
                    continue
                out.close()
                del active[process]
                free.append(slot)
                status, said = state(runs, job.name, done)
                # a signal that comes before the run listens for it ends it without a word, and that is no failure
                if status == "failed" or (status in ("waiting", "stopped") and code not in (0, 3) and not stop.asked):
                    status, said = "failed", said if status == "failed" else why(log, code)
                    note_failure(runs, job.name, said)
                if status == "running":  # somebody else was faster
                    elsewhere.append(job)
                else:
                    finish(job, status, said)
            if stop.asked > passed_on:
                if not passed_on:
                    tqdm.write(f"stopping: {len(active)} running runs save and end (again to kill them)", file=sys.stderr)
                for process in active:
                    process.send_signal(signal.SIGKILL if passed_on else signal.SIGTERM)
                passed_on = stop.asked
            if stop.asked and not active:
                break
            if not stop.asked and not queue and not active and elsewhere:
                queue, elsewhere = elsewhere, []
                time.sleep(5 * POLL)
            while queue and free and not stop.asked:
                job = queue.pop(0)
                status, said = state(runs, job.name, done)
                if status == "running":
                    elsewhere.append(job)
                    continue
                if status == "finished":
                    finish(job, status, said)
                    continue
                (runs / LOGS / f"{job.name}.failed").unlink(missing_ok=True)
                slot = free.pop(0)
                log = runs / LOGS / f"{job.name}.log"
                out = open(log, "ab")
                env = os.environ | ({"CUDA_VISIBLE_DEVICES": slot} if slot is not None else {})
                argv = command(job, runs, (runs / job.name).is_dir(), threads)
                # a session of its own: a terminal's Ctrl-C reaches the sweep alone, which passes it on once
                process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
                active[process] = (job, slot, log, out)
                progress.show(ended, len(active))
            if not active and not queue and not elsewhere:
                break
            time.sleep(POLL)
        ended["interrupted"] = bool(stop.asked)
    progress.bar.close()
    return ended


# -------------------------------------------------------------------------------------------------- other machines


def run_on_ray(queue: list[Job], runs: Path, address: str, gpu_share: float, threads: int, retries: int, done: set[str], skipped: int) -> Counter:
    """Run jobs as tasks of a Ray cluster, whose machines see this code and RUNS under the same paths.

    A task whose machine is lost is given to another one, where the run goes on from its last checkpoint. Raises
    `InputError` without Ray, or where no cluster answers at `address` ("local" starts one here).
    """
    try:
        import ray
    except ImportError:
        raise InputError("--ray: Ray is not installed; pip install -r requirements-ray.txt") from None
    try:
        if not ray.is_initialized():
            ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise InputError(f"--ray {address}: no cluster answers ({str(e).splitlines()[0][:120]})") from e
    (runs / LOGS).mkdir(parents=True, exist_ok=True)

    def work(argv: list[str], folder: str, log: str) -> int:
        """On the worker; uses the standard library alone, since only the function travels."""
        import ctypes
        import os
        import signal
        import subprocess
        import sys
        import time

        def die_with_parent():  # a lost worker's run saves and lets go of its lock (PR_SET_PDEATHSIG)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)

        argv = argv + (["--resume"] if os.path.isdir(folder) else [])
        with open(log, "ab") as out:
            child = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent
            )
            try:
                while child.poll() is None:
                    time.sleep(0.2)  # not wait(), out of which Ray's interrupt of a task does not come
            except KeyboardInterrupt:  # ray.cancel
                child.terminate()
            return child.wait()

    task = ray.remote(work).options(num_cpus=threads, num_gpus=gpu_share, max_retries=retries)
    progress, ended, pending = Progress(queue, skipped), Counter(), {}

    def submit(job: Job) -> None:
        log = runs / LOGS / f"{job.name}.log"
        (runs / LOGS / f"{job.name}.failed").unlink(missing_ok=True)
        pending[task.remote(command(job, runs, False, threads), str(runs / job.name), str(log))] = (job, log)

    for job in queue:
        submit(job)
    progress.show(ended, len(pending))
    with Stop() as stop:
        cancelled = False
        while pending:
            if stop.asked and not cancelled:
                cancelled = True
                for ref in pending:
                    ray.cancel(ref)  # an interrupt in the task, which passes it on; tasks that wait never start
            ready, _ = ray.wait(list(pending), timeout=0.5)
            for ref in ready:
                job, log = pending.pop(ref)
                try:
                    code, lost = ray.get(ref), ""
                except Exception as e:  # the machine is lost once too often, or the task cancelled before it began
                    code, lost = -1, f"{type(e).__name__}"
                status, said = state(runs, job.name, done)
                if status == "running" and not cancelled:  # another process still holds it, such as a lost task's
                    time.sleep(5 * POLL)
                    submit(job)
                    continue
                if status != "finished" and not cancelled and (status in ("waiting", "failed") or code not in (0, 3)):
                    said = said if status == "failed" else lost or why(log, code)
                    status = "failed"
                    note_failure(runs, job.name, said)
                ended[status] += 1
                progress.end(job, ended, len(pending))
                if status != "finished":
                    tqdm.write(f"{job.name}: {status}: {said}", file=sys.stderr)
        ended["interrupted"] = cancelled
    progress.bar.close()
    return ended


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> options.Parser:
    p = options.Parser(prog="sweep.py", description="Many runs of train.py; its options pass through.", allow_abbrev=False)
    g = p.add_argument_group("what to run")
    what = g.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", choices=list(PRESETS), help="; ".join(f"{k}: parts {', '.join(v)}" for k, v in PRESETS.items()))
    what.add_argument("--grid", metavar="AXES", help='for instance "noise=0,0.5 bs=32,128 seed+noise-seed=0,1"')
    g.add_argument("--part", action="append", default=[], metavar="PART", help="only this part of the preset (may be repeated)")
    g.add_argument("--with-1024", action="store_true", help="the report's batch sizes and 1024")
    g.add_argument("--seeds", metavar="S,S,...", help="seeds of initialization and of noise, together (presets but quick: 0)")
    g.add_argument("--runs", default="runs", metavar="DIR", help="where the runs are")
    g.add_argument("--done", action="append", default=[], metavar="FILE", help="runs in this exported .npz count as finished")
    g.add_argument("--retry-failed", action="store_true", help="start failed runs again, from their last checkpoint")
    g = p.add_argument_group("where to run")
    g.add_argument("--jobs", type=options.count, metavar="N", help="runs at a time (GPUs x --per-gpu, or 1)")
    g.add_argument("--per-gpu", type=options.count, default=1, metavar="K", help="runs at a time on one GPU")
    g.add_argument("--threads", type=options.count, metavar="N", help="CPU threads of a run (cores / jobs)")
    g.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, HOST:PORT, or local to start one here")
    g.add_argument("--retries", type=options.number(0, 1000, "a whole number from 0", int), default=3, metavar="N", help="of a Ray task whose machine is lost")
    g = p.add_argument_group("instead of running")
    g.add_argument("--dry-run", action="store_true", help="print what would be done")
    g.add_argument("--print-commands", action="store_true", help="print a command line for each run that is not finished, for job arrays")
    g.add_argument("--status", action="store_true", help="print a table of all runs")
    return p


def run(args, extra: list[str]) -> int:
    """Do what was asked for; returns the exit status. Raises `InputError`."""
    for word in extra:
        if word.split("=")[0] in ("--name", "--resume"):
            raise InputError(f"{word}: the sweep names and resumes its runs itself")
    runs = Path(args.runs)
    if runs.is_file():
        raise InputError(f"--runs {runs}: is a file, not a folder")
    jobs = jobs_of(args, extra)
    done = {r.name for path in args.done for r in results.read_export(Path(path)) if r.finished}
    if args.status:
        print_status(jobs, runs, done)
        return 0
    states = {job.name: state(runs, job.name, done) for job in jobs}
    wanted = {"running", "stopped", "waiting"} | ({"failed"} if args.retry_failed else set())
    queue = [job for job in jobs if states[job.name][0] in wanted]
    devices = [] if args.ray else gpus(extra)
    jobs_at_once = args.jobs or max(len(devices) * args.per_gpu, 1)
    threads = args.threads or max(cores() // jobs_at_once, 1)
    if args.print_commands:
        for job in queue:
            print(shlex.join(command(job, runs, resume=True, threads=args.threads)))
        return 0
    for job in jobs:
        if states[job.name][0] == "failed" and not args.retry_failed:
            print(f"{job.name}: failed before: {states[job.name][1]} (--retry-failed starts it again)", file=sys.stderr)
    if args.dry_run:
        for job in queue:
            print(shlex.join(command(job, runs, states[job.name][0] == "stopped", threads)))
        counts = Counter(status for status, _ in states.values())
        where = f"{jobs_at_once} at a time" + (f" on GPU {', '.join(devices)}" if devices else "") + f", {threads} threads each"
        print(f"# {len(queue)} of {len(jobs)} runs to do ({', '.join(f'{n} {s}' for s, n in counts.items())}), {where}")
        return 0
    skipped = len(jobs) - len(queue)
    if args.ray:
        ended = run_on_ray(queue, runs, args.ray, 1 / args.per_gpu if args.per_gpu > 1 else 0, threads, args.retries, done, skipped)
    else:
        slots = (devices * args.per_gpu or [None] * jobs_at_once)[:jobs_at_once]
        slots += [devices[i % len(devices)] for i in range(jobs_at_once - len(slots))] if devices else []
        ended = run_here(queue, runs, slots, threads, done, skipped)
    interrupted = ended.pop("interrupted")
    failed = ended["failed"] + sum(s == "failed" for s, _ in states.values()) * (not args.retry_failed)
    print(f"{skipped - (failed - ended['failed'])} were finished, " + ", ".join(f"{n} {s}" for s, n in ended.items() if n) + f"; {failed} failed")
    return 3 if interrupted else 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Bad input becomes one line and status 2; 1 if a run failed, 3 if stopped by a signal."""
    try:
        args, extra = parser().parse_known_args(argv)
        return run(args, extra)
    except InputError as e:
        print(f"sweep.py: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
