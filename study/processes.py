"""Runs as processes of train.py: the state a run is in, its command, and a scheduler for this machine.

A run's folder says how it ended; nothing else is kept, but the output of its process and, for a run that failed
before it had a folder, the reason.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data import InputError
from engine import jsonfiles, locks, schema
from engine.identity import differences
from study.grids import Job

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
POLL = 0.2  # seconds between looks at the running processes
LOGS = ".sweep"  # folder in RUNS: what each process printed, and why it failed if it never got a folder of its own
LOG_TAIL = 65536  # bytes of a log that are read for a reason
STATES = ("finished", "running", "stopped", "failed", "other", "waiting")


def is_held(folder: Path) -> bool:
    """Whether a living process holds the lock of a run's folder."""
    return locks.is_locked(folder / locks.NAME)


def read_or_empty(reader, path: Path) -> dict:
    """What `reader` of schema.py reads, {} for a file that is absent or damaged: resuming can do without it.

    Raises `InputError` for one that has a wrong field, with which the run cannot be resumed.
    """
    try:
        return reader(path) or {}
    except jsonfiles.Unreadable:
        return {}


def options_of(folder: Path) -> dict:
    """A run's options as in its folder, {} where config.json is absent or damaged. Raises `InputError` as `read_or_empty` does."""
    return read_or_empty(schema.read_config, folder / "config.json").get("options", {})


def threads_of(folder: Path) -> int | None:
    """The CPU threads that a run was started with, None if its folder does not hold them."""
    try:
        return options_of(folder).get("threads")
    except InputError:
        return None


def run_state(runs: Path, job: Job, done: dict[str, list[dict]]) -> tuple[str, str]:
    """(one of `STATES`, a detail for the user, maybe empty) of a run, from its folder alone, or from files of results.

    `done`: name and options of the finished runs in such files. "other": the folder is that of another run. A folder
    whose files have a wrong field is that of a failed run, for it cannot be resumed.
    """
    folder, wanted = runs / job.name, vars(job.args)
    if wanted["precision"] == "auto":  # the run's folder holds what the hardware resolved it to
        wanted = {key: value for key, value in wanted.items() if key != "precision"}
    listed = any(not differences(opts, wanted) for opts in done.get(job.name, []))
    if folder.is_dir():
        try:
            given, summary = options_of(folder), read_or_empty(schema.read_summary, folder / "summary.json")
        except InputError as e:
            if is_held(folder):
                return "running", str(e)
            return ("finished", "in a file of results") if listed else ("failed", str(e))
        other = differences(given, wanted)
        if other:
            return "other", f"{folder} is a run of other options ({'; '.join(other.values())}); use another --runs"
        status = summary.get("status", "stopped")
        if status == "finished":
            accuracy = summary.get("val_acc")
            return "finished", f"val/acc {accuracy:.4f}" if isinstance(accuracy, float) else ""
        if is_held(folder):
            return "running", f"{summary.get('steps') or 0} steps at the last summary"
        if listed:
            return "finished", "in a file of results"
        if status == "failed":
            return "failed", str(summary.get("reason") or "no reason given")
        return "stopped", "saved" if status == "stopped" else "killed"
    if listed:
        return "finished", "in a file of results"
    try:
        reason = (runs / LOGS / f"{job.name}.failed").read_text(errors="replace").strip()
        return "failed", reason or "no reason given"
    except OSError:
        return "waiting", ""


def nothing_to_start(status: str, job: Job, again: set[str]) -> bool:
    """Whether there is nothing to start. `again`: failed runs to repeat; one that failed since then is not among them."""
    return status in ("finished", "other") or (status == "failed" and job.name not in again)


def command(job: Job, runs: Path, resume: bool, threads: int | None = None) -> list[str]:
    """The process of a run. A resumed run keeps its first start's threads, for the same bits, if it had fewer."""
    if resume and threads:
        threads = min(threads, threads_of(runs / job.name) or threads)
    place = ["--runs", str(runs), "--name", job.name, *(["--threads", str(threads)] if threads else [])]
    return [sys.executable, str(TRAIN), *job.argv, *place, *(["--resume"] if resume else [])]


def failure_reason(log: Path, code: int, start: int) -> str:
    """A reason for a failure: the signal, or the last line that the process wrote after the log's byte `start`.

    Progress bars do not count.
    """
    try:
        with open(log, "rb") as f:
            f.seek(max(start, f.seek(0, os.SEEK_END) - LOG_TAIL))
            lines = [line.strip() for line in f.read().decode(errors="replace").replace("\r", "\n").splitlines()]
    except OSError:
        lines = []
    last_line = [line[:300] for line in lines if line and "step/s" not in line and "s/step" not in line][-1:]
    if code < 0:
        return "; last line: ".join([f"killed by signal {-code}", *last_line])
    return last_line[0] if last_line else f"exit status {code}"


def note_failure(runs: Path, name: str, reason: str) -> None:
    """Remember the failure of a run that has no folder to say so itself."""
    if not (runs / name).is_dir():
        (runs / LOGS / f"{name}.failed").write_text(reason + "\n")


def end_line(job: Job, status: str, detail: str) -> str:
    """One line on a run that did not finish."""
    return f"{job.name}: {status}: {detail}" if detail else f"{job.name}: {status}"


def make_folder(runs: Path) -> None:
    """Create RUNS and its folder of logs. Raises `InputError` if nothing can be written there."""
    try:
        (runs / LOGS).mkdir(parents=True, exist_ok=True)
        if not os.access(runs / LOGS, os.W_OK):
            raise PermissionError(0, "not writable")
    except OSError as e:
        raise InputError(f"--runs {runs}: cannot be written ({e.strerror})") from e


def kill(process: subprocess.Popen) -> None:
    """End a run at once, all of its processes: they are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class StopSignals:
    """Signals that ask a run to save and end, as a flag: `asked` counts them. A context manager; old handlers come back."""

    def __enter__(self):
        self.asked = 0
        names = [s for s in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, s)]
        self.before = {s: signal.signal(s, self.note) for s in (getattr(signal, name) for name in names)}
        return self

    def note(self, *_) -> None:
        self.asked += 1

    def __exit__(self, *_) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Progress:
    """A bar over runs, weighted by their work for the estimate of the time left."""

    def __init__(self, jobs: list[Job], skipped: int) -> None:
        self.bar = tqdm(
            total=len(jobs) + skipped,
            initial=skipped,
            unit="run",
            bar_format="{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}",
        )
        self.left, self.done, self.began = sum(j.work for j in jobs), 0.0, time.monotonic()
        self.show({}, 0)

    def end(self, job: Job, ended: dict[str, str], running: int) -> None:
        self.left -= job.work
        self.done += job.work
        self.bar.update()
        self.show(ended, running)

    def show(self, ended: dict[str, str], running: int) -> None:
        """`ended`: how each run that ended did so, by name."""
        counts = Counter(ended.values())
        left = (time.monotonic() - self.began) * self.left / self.done if self.done else None
        words = [f"{running} running"] + [f"{n} {s}" for s, n in counts.items() if s != "finished"]
        words.append(f"about {left / 60:.0f} min left" if left is not None else "time left unknown")
        self.bar.set_postfix_str(", ".join(words))


def run_here(
    queue: list[Job],
    runs: Path,
    slots: list[str | None],
    threads: int,
    done: dict[str, list[dict]],
    skipped: int,
    again: set[str],
) -> tuple[dict[str, str], bool]:
    """Run jobs as processes, one in each slot (GPUs, or None for the CPU).

    Returns: how each run that ended did so, by name (a run that was not started is not in it), and whether a signal came.

    A run that another process holds is waited for and looked at again. The first signal is passed on to the
    children, which save; the second kills them. Raises `InputError` if RUNS cannot be written.
    """
    make_folder(runs)
    queue, elsewhere, active, ended, again = list(queue), [], {}, {}, set(again)
    free, passed_on = list(slots), 0
    progress = Progress(queue, skipped)

    def finish(job: Job, status: str, detail: str) -> None:
        ended[job.name] = status
        progress.end(job, ended, len(active))
        if status != "finished":
            tqdm.write(end_line(job, status, detail), file=sys.stderr)

    def start(job: Job) -> None:
        again.discard(job.name)
        (runs / LOGS / f"{job.name}.failed").unlink(missing_ok=True)
        slot, log = free[0], runs / LOGS / f"{job.name}.log"
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": slot} if slot is not None else {})
        argv = command(job, runs, (runs / job.name).is_dir(), threads)
        with open(log, "ab") as out:
            # a session of its own: a terminal's Ctrl-C reaches the sweep alone, which passes it on once
            process = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )
            active[process] = (job, free.pop(0), log, out.tell())
        progress.show(ended, len(active))

    with StopSignals() as stop:
        try:
            while True:
                for process, (job, slot, log, begin) in list(active.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del active[process]
                    free.append(slot)
                    status, detail = run_state(runs, job, done)
                    # a signal that arrives before the run has its handlers ends it without output: no failure
                    if status == "failed" or (
                        status in ("waiting", "stopped") and code not in (0, 3) and not stop.asked
                    ):
                        status, detail = "failed", detail if status == "failed" else failure_reason(log, code, begin)
                        note_failure(runs, job.name, detail)
                    if status == "running":  # another process has taken it
                        elsewhere.append(job)
                    else:
                        finish(job, status, detail)
                if stop.asked > passed_on:
                    if not passed_on:
                        tqdm.write(
                            f"stopping: {len(active)} running runs save and end (again to kill them)", file=sys.stderr
                        )
                    for process in active:
                        kill(process) if passed_on else process.terminate()
                    passed_on = stop.asked
                if stop.asked and not active:
                    break
                if not stop.asked and not queue and not active and elsewhere:
                    queue, elsewhere = elsewhere, []
                    time.sleep(5 * POLL)
                while queue and free and not stop.asked:
                    job = queue.pop(0)
                    status, detail = run_state(runs, job, done)
                    if nothing_to_start(status, job, again):
                        finish(job, status, detail)
                    elif status == "running":
                        again.discard(job.name)  # another process repeats it
                        elsewhere.append(job)
                    else:
                        start(job)
                if not active and not queue and not elsewhere:
                    break
                time.sleep(POLL)
        except BaseException:  # such as a full disk: no run is left behind
            asked = stop.asked
            for process in active:
                process.terminate()
            while any(process.poll() is None for process in active):
                if stop.asked > asked:
                    for process in active:
                        kill(process)
                time.sleep(POLL)
            raise
    progress.bar.close()
    return ended, bool(stop.asked)
