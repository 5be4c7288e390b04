"""Runs as processes of train.py: the state a run is in, its command, and a back end of the scheduler for this machine.

A run's folder says how it ended; nothing else is kept, but the output of its process and, for a run that failed
before it had a folder, the reason.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from data import InputError, one_line
from engine import jsonfiles, locks, schema
from engine.identity import differences
from series import VAL_ACC
from study.forkserver import ForkedRun, possible, start_server
from study.grids import Job

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
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
            return "finished", f"{VAL_ACC} {accuracy:.4f}" if isinstance(accuracy, float) else ""
        if is_held(folder):
            return "running", f"{summary.get('steps') or 0} steps at the last summary"
        if listed:
            return "finished", "in a file of results"
        if status == "failed":
            return "failed", one_line(summary.get("reason") or "no reason given")
        return "stopped", "saved" if status == "stopped" else "killed"
    if listed:
        return "finished", "in a file of results"
    try:
        reason = (runs / LOGS / f"{job.name}.failed").read_text("utf-8", "replace")
        return "failed", one_line(reason) or "no reason given"
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
            lines = [one_line(line) for line in f.read().decode(errors="replace").replace("\r", "\n").splitlines()]
    except OSError:
        lines = []
    last_line = [line for line in lines if line and "step/s" not in line and "s/step" not in line][-1:]
    if code < 0:
        return "; last line: ".join([f"killed by signal {-code}", *last_line])
    return last_line[0] if last_line else f"exit status {code}"


def note_failure(runs: Path, name: str, reason: str) -> None:
    """Remember the failure of a run that has no folder to say so itself."""
    if not (runs / name).is_dir():
        (runs / LOGS / f"{name}.failed").write_text(reason + "\n", "utf-8")


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
        raise InputError(f"--runs {runs}: cannot be written ({one_line(e)})") from e


def kill(process: subprocess.Popen | ForkedRun) -> None:
    """End a run at once, all of its processes: they are a process group of their own, but for one that has just begun."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            send(process.pid, signal.SIGKILL)


class Exit(NamedTuple):
    """How the process of a run ended."""

    code: int  # its exit status; that of a signal is negative
    log_start: int  # byte of its log at which its output begins
    lost: str = ""  # why it never ran to an end of its own, where a machine was lost


class LocalProcesses:
    """The scheduler's back end for this machine: a process for each run, one in each of `slots` (GPUs, or None for the CPU).

    Runs of one process are forked from one that has imported train.py, where that is possible.
    """

    def __init__(self, slots: list[str | None], threads: int, runs: int) -> None:
        """`runs`: how many there are to start; for a single one no server is worth its start."""
        self.threads = threads
        self.free = list(slots)
        self.active: dict[
            str, tuple[subprocess.Popen | ForkedRun, str | None, int]
        ] = {}  # process, slot, log's first byte
        self.forks = runs > 1 and possible()
        if self.forks:
            start_server()

    def has_room(self) -> bool:
        return bool(self.free)

    def start(self, job: Job, argv: list[str], folder: Path, log: Path, again: bool) -> None:
        slot = self.free[0]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": slot} if slot is not None else {})
        process: subprocess.Popen | ForkedRun | None = None
        with open(log, "ab") as out:
            begin = out.tell()
            if self.forks and job.args.devices in (1, "auto") and "," not in (slot or ""):
                try:
                    process = ForkedRun(argv[1:], log, environment)
                except (EOFError, OSError):
                    self.forks = False  # the server cannot import, or is lost
            if process is None:
                # a session of its own: a terminal's Ctrl-C reaches the sweep alone, which passes it on once
                process = subprocess.Popen(
                    argv,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,
                )
            self.active[job.name] = (process, self.free.pop(0), begin)

    def wait(self, seconds: float) -> list[tuple[str, Exit]]:
        time.sleep(seconds)
        ended = []
        for name, (process, slot, begin) in list(self.active.items()):
            code = process.poll()
            if code is not None:
                del self.active[name]
                self.free.append(slot)
                ended.append((name, Exit(code, begin, getattr(process, "lost", ""))))
        return ended

    def stop(self, force: bool) -> None:
        for process, _, _ in self.active.values():
            kill(process) if force else process.terminate()

    def stop_run(self, name: str) -> None:
        self.active[name][0].terminate()

    def close(self) -> None:
        """Nothing to let go of: the server ends with this process and the runs."""
