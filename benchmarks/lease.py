"""Spend a few minutes of a GPU, and again with the same line until all is done: the tests, what a step costs, the report's grid.

    python benchmarks/lease.py --minutes 9 --out lease --work /tmp/lease                # check, speed and grid
    python benchmarks/lease.py --minutes 9 --out lease --work /tmp/lease speed grid     # some of them
    python benchmarks/lease.py --minutes 9 --out lease --work /tmp/new --earlier before # on a fresh machine, with an earlier --out
    python benchmarks/lease.py --minutes 2 --out lease --work /tmp/lease --rehearse     # tiny settings, on a CPU

WORK remembers what is finished; a run that is not is saved there and resumed. OUT gets five files, whole at any time:
`lease.md` (what is done, what failed and what is left), `lease.json` (the same, to be read by --earlier), `runs.npz` (the
finished runs, as by report.py --export), `RESULTS.md` (the table of steps) and `tests.log`. With the first two of them
and `runs.npz` as --earlier nothing that was finished elsewhere is done again.

Exit status: 0 all is done, 1 all is done and a test or a run failed, 2 bad input, 3 something is left.
"""

import sys
import time
from pathlib import Path

BEGAN = time.monotonic()  # the imports take part of the lease, too
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import packages  # noqa: E402

if __name__ == "__main__":  # before what may be missing is imported
    problem = packages.prepare(sys.argv[1:])
    if problem:
        print(f"lease.py: error: {problem}", file=sys.stderr)
        sys.exit(2)

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import threading  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Sequence  # noqa: E402

import sweep  # noqa: E402
from benchmarks import leaseplan, packs, speed  # noqa: E402
from data import InputError, one_line  # noqa: E402
from engine import cmdline, files, jsonfiles  # noqa: E402
from study import exports, results, runfolders  # noqa: E402
from study.outputs import CannotWrite  # noqa: E402
from study.processes import run_state  # noqa: E402

FORMAT = "label-noise lease 1"
SHARES = {"check": 0.4, "speed": 0.5}  # of the time that is left, as long as a later part needs some
REFRESH = 15.0  # seconds between looks for finished runs
DONE, FAILED, LEFT = 0, 1, 3  # exit status


class Stopped(BaseException):
    """A signal asks the call to end: what is there is written."""


class Call:
    """One call: its options, its plan, when it ends, and what was finished up to now."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.work = args, Path(args.out), Path(args.work)
        self.plan = leaseplan.rehearsal() if args.rehearse else leaseplan.report_plan()
        limit = 60 * args.minutes
        self.end = BEGAN + limit - min(20.0, 0.06 * limit)  # then results are written
        self.place = speed.where()
        self.lines: list[str] = []  # of this call, for lease.md
        self.broken = False  # whether the tests could not be started
        for folder in (self.out, self.work):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise InputError(f"--out, --work: {folder} cannot be made ({one_line(e)})") from e
        self.runs, self.exported, self.times = (self.work / name for name in ("runs", "runs.npz", "tests.jsonl"))
        self.state = {"format": FORMAT, "cells": {}} | read_state(self.work / "lease.json")
        self.lock = threading.Lock()  # held by whoever writes the exported runs
        for path in args.earlier:
            self.take_over(Path(path))

    def left(self) -> float:
        """Seconds until the call is to end."""
        return self.end - time.monotonic()

    @property
    def cells(self) -> list[dict]:
        """The rows that were timed on hardware like this."""
        return self.state["cells"].setdefault(self.place, [])

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(f"lease.py: {line}", flush=True)

    def save(self) -> None:
        files.replace(self.work / "lease.json", json.dumps(self.state, indent=1).encode())

    def take_over(self, path: Path) -> None:
        """What an earlier call left in its --out, or the runs of an exported file. Raises `InputError`."""
        if not path.exists():
            raise InputError(f"--earlier {path}: there is no such file or folder")
        exported = path if path.suffix == ".npz" else path / "runs.npz"
        if exported.is_file():
            self.export(exports.read_export(exported))
        if path.is_dir():
            earlier = read_state(path / "lease.json")
            for place, rows in earlier.get("cells", {}).items():
                own = self.state["cells"].setdefault(place, [])
                known = {leaseplan.key(row) for row in own}
                own += [row for row in rows if leaseplan.key(row) not in known]
            known = {line["test"] for line in self.tests()}
            with open(self.times, "a") as f:
                for line in earlier.get("tests", []):
                    if line["test"] not in known:
                        f.write(json.dumps(line) + "\n")
            self.save()

    def tests(self) -> list[dict]:
        """The tests that have ended, as the tests' `--times` writes them."""
        lines = self.times.read_text().split("\n")[:-1] if self.times.exists() else []
        ended = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return list({line["test"]: line for line in ended if "outcome" in line}.values())

    def finished_folders(self) -> list[Path]:
        folders = sorted(self.runs.iterdir()) if self.runs.is_dir() else []
        finished = []
        for folder in filter(runfolders.is_run, folders):
            with contextlib.suppress(InputError):
                if runfolders.read_folder(folder, with_series=False).finished:
                    finished.append(folder)
        return finished

    def counts(self, run: runfolders.Run) -> bool:
        """Whether an earlier call's run is not made again: finished, and not on a CPU, which the grid's own are not."""
        return run.finished and (self.args.rehearse or run.options.get("accelerator") != "cpu")

    def export(self, earlier: Sequence[runfolders.Run] = ()) -> None:
        """Add finished runs, of WORK and of an `earlier` call, to those exported before, here and in OUT."""
        with self.lock:
            known = exports.read_export(self.exported) if self.exported.exists() else []
            names = {run.name for run in known}
            more = [run for run in earlier if run.name not in names and self.counts(run)]
            names |= {run.name for run in more}
            new = [str(folder) for folder in self.finished_folders() if folder.name not in names]
            if new or more:
                made = [run for run in results.load_runs(new, progress=False) if run.finished]
                exports.export_runs(sorted([*known, *more, *made], key=lambda run: run.name), self.exported)
            if self.exported.exists() and (new or more or not (self.out / "runs.npz").exists()):
                files.replace(self.out / "runs.npz", self.exported.read_bytes())


def read_state(path: Path) -> dict:
    """What `Call.save` or `write_results` wrote, {} where it is absent. Raises `InputError` for another file."""
    if not path.exists():
        return {}
    state = jsonfiles.read_json(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a file of benchmarks/lease.py ('{FORMAT}')")
    return state


# ----------------------------------------------------------------------------------------------------------------- parts


def check(call: Call, until: float) -> bool:
    """Run the tests that have not ended before; returns whether all have."""
    if packages.missing(["pytest"]):
        return True
    command = [sys.executable, "-m", "pytest", *call.plan.tests, f"--times={call.times.absolute()}"]
    command.append("--continue-on-collection-errors")
    if call.plan.workers > 1 and not packages.missing(["xdist"]):
        command.append(f"--numprocesses={call.plan.workers}")
    while until - time.monotonic() > call.plan.least:
        before = call.times.stat().st_size if call.times.exists() else 0
        with open(call.out / "tests.log", "ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=speed.end_with_parent
            )
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
            finally:
                process.kill()
                process.wait()
        if process.returncode in (0, 1, 5):  # passed, failed, none left
            return True
        if call.times.exists() and call.times.stat().st_size > before:
            continue  # a test has ended the process: the others go on without it
        call.say(f"check: pytest ended with status {process.returncode} before a test; see tests.log")
        call.broken = True
        return True
    return False


def time_steps(call: Call, until: float) -> bool:
    """Time the cells of the table of steps that were not, in order of value; returns whether all were."""
    settings = argparse.Namespace(seconds=call.plan.seconds, repeats=1, precisions=None)
    while cells := leaseplan.wanted(call.plan, call.cells):
        if until - time.monotonic() < call.plan.least:
            return False
        order, timed = cells, 0
        for _, rows in speed.run_cells("steps", cells, settings, until):
            call.cells.extend(rows)
            call.save()
            timed += 1
            if leaseplan.wanted(call.plan, call.cells) != order[timed:]:
                break  # what was just timed asks for others
        if not timed:
            return False
    return True


def find_data(call: Call) -> str:
    """The folder of the data sets; what lies in packs is unpacked into WORK. Raises `InputError`."""
    given = [call.args.data_dir] if call.args.data_dir else [ROOT.parent / "shared" / "data", ROOT / "data"]
    there = next((d for d in map(Path, given) if d.is_dir()), None)
    if call.args.packs is not None:
        there = call.work / "data"
        packs.unpack(Path(call.args.packs), there)
    return str(there or call.work / "data")


def make_grid(call: Call, until: float) -> bool:
    """Make the runs that are not finished, the groups in turn; returns whether all are."""
    data_dir, complete = find_data(call), True
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(REFRESH):
            with contextlib.suppress(OSError, InputError, CannotWrite):
                call.export()

    watcher = threading.Thread(target=refresh, daemon=True, name="exports-finished-runs")
    watcher.start()
    try:
        for group in call.plan.groups:
            lacking = packs.missing(Path(data_dir), group.folder) if group.folder else []
            if lacking:
                call.say(f"grid: {' '.join(group.words)}: no {group.folder}/{lacking[0]} in {data_dir}")
                complete = False
                continue
            seconds = until - time.monotonic()
            if seconds < call.plan.least:
                return complete and not unfinished(call)
            choice = leaseplan.choose(call.cells, group.model, group.B, group.steps(), len(group.jobs()))
            words = [*group.words, "--runs", str(call.runs), "--minutes", str(seconds / 60)]
            words += ["--data-dir", data_dir] if group.folder else []
            words += choice.words if choice else [f"--per-gpu={leaseplan.LEAST}"]
            words += ["--done", str(call.exported)] if call.exported.exists() else []
            status = sweep.main(words)
            if status == 2:
                raise InputError(f"the group {' '.join(group.words)} cannot be started (see above)")
            call.export()
            if status == LEFT:  # the time is up, or a signal has come
                if until - time.monotonic() > call.plan.least:
                    raise Stopped
                return False
    finally:
        ended.set()
        watcher.join()
    return complete


def states(call: Call) -> dict[str, tuple[str, str]]:
    """{run: (its state, a detail)} of all groups."""
    done: dict[str, list[dict]] = {}
    for run in exports.read_export(call.exported) if call.exported.exists() else []:
        done.setdefault(run.name, []).append(run.options)
    return {job.name: run_state(call.runs, job, done) for group in call.plan.groups for job in group.jobs()}


def unfinished(call: Call) -> list[str]:
    return [name for name, (status, _) in states(call).items() if status not in ("finished", "failed")]


PARTS = {"check": check, "speed": time_steps, "grid": make_grid}


def spend(call: Call, done: dict[str, bool]) -> None:
    """The parts in turn, then once more with what time is left; notes in `done` which are."""
    for limited in (True, False):
        for number, name in enumerate(done):
            if done[name] or call.left() < call.plan.least:
                continue
            later = limited and number + 1 < len(done)
            share = SHARES.get(name, 1) if later else 1
            began = time.monotonic()
            done[name] = PARTS[name](call, began + share * call.left())
            call.say(f"{name}: {'done' if done[name] else 'not done'} after {time.monotonic() - began:.0f} s")


# --------------------------------------------------------------------------------------------------------------- results


def write_results(call: Call, done: dict[str, bool]) -> int:
    """Everything of OUT; returns the exit status."""
    with contextlib.suppress(InputError):
        call.export()
    tests, runs = call.tests(), states(call)
    call.save()
    whole = json.dumps(call.state | {"tests": tests}, indent=1)
    files.replace(call.out / "lease.json", whole.encode())
    if call.cells:
        text = f"## Steps, by benchmarks/lease.py: {speed.about('steps')}\n\n{call.place} ({time.strftime('%Y-%m-%d')})\n\n"
        text += speed.tables(call.cells) + speed.after_steps(call.cells)
        speed.keep(call.out / "RESULTS.md", "steps of lease.py", call.place, text)
    outcomes, statuses = Counter(test["outcome"] for test in tests), Counter(status for status, _ in runs.values())
    counted = lambda counts: ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "none"  # noqa: E731
    page = [f"# Lease: {call.place}", "", *(f"- {line}" for line in call.lines), ""]
    page += [f"- left: {name}" for name, is_done in done.items() if not is_done]
    page += ["", f"## Tests: {counted(outcomes)}", ""]
    wrong = [test for test in tests if test["outcome"] not in ("passed", "skipped")]
    for test in wrong:
        page += [f"### {test['test']}: {test['outcome']}", "", "```", test.get("why", ""), "```", ""]
    rows = [[f"{t['seconds']:.1f}", t["outcome"], f"`{t['test']}`"] for t in sorted(tests, key=lambda t: -t["seconds"])]
    page += [speed.table(["s", "outcome", "test"], rows), "", f"## Steps: {len(call.cells)} rows", ""]
    page += [speed.tables(call.cells) if call.cells else "", "", f"## Runs: {counted(statuses)}", ""]
    page += [f"- {name}: {status} {detail}" for name, (status, detail) in runs.items() if status != "finished"]
    files.replace(call.out / "lease.md", ("\n".join(page) + "\n").encode())
    call.say(f"tests: {counted(outcomes)}; runs: {counted(statuses)} -> {call.out / 'lease.md'}")
    if not all(done.values()):
        return LEFT
    return FAILED if wrong or statuses["failed"] or call.broken else DONE


def parser() -> cmdline.Parser:
    p = cmdline.Parser(
        prog="lease.py", description="Spend a few minutes of a GPU, again and again.", allow_abbrev=False
    )
    minutes = cmdline.number(0, 1e5, "a number above 0", open_low=True)
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, in this order (all)")
    p.add_argument("--minutes", type=minutes, required=True, metavar="M", help="the call ends within this time")
    p.add_argument("--out", required=True, metavar="DIR", help="results, five files")
    p.add_argument("--work", required=True, metavar="DIR", help="what is finished, unfinished runs, unpacked data")
    about = "an earlier call's --out, or exported runs: not done again, but for a CPU's (may be repeated)"
    p.add_argument("--earlier", action="append", default=[], metavar="PATH", help=about)
    p.add_argument("--data-dir", metavar="DIR", help="where torchvision's folders lie (../shared/data or data)")
    p.add_argument("--packs", metavar="DIR", help="packed data sets (benchmarks/packs.py), unpacked into WORK")
    p.add_argument("--wheels", metavar="DIR", help="wheels of packages that are missing, installed into WORK")
    p.add_argument("--rehearse", action="store_true", help="tiny settings, on a CPU")
    return p


def main(argv: list[str] | None = None) -> int:
    """Bad input becomes one line and status 2; whatever else happens, what is there is written."""

    def stop(*_) -> None:
        raise Stopped

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        args = parser().parse_args(argv)
        for name in (name for name in args.parts if name not in PARTS):
            raise InputError(f"'{name}': not among {', '.join(PARTS)}")
        parts = [name for name in PARTS if name in (args.parts or PARTS)]
        call, done = Call(args), dict.fromkeys(parts, False)
        try:
            spend(call, done)
        except Stopped:
            call.say("stopped by a signal")
        except InputError:
            write_results(call, done)
            raise
        return write_results(call, done)
    except InputError as e:
        cmdline.complain(e, "lease.py")
        return 2
    except (OSError, CannotWrite) as e:
        cmdline.complain(e, "lease.py")
        return 1
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


if __name__ == "__main__":
    sys.exit(main())
