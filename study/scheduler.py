"""The scheduler of a sweep: starts runs where a back end has room, reads from their folders how they ended, stops on signals."""

import math
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from data import printable
from engine.cmdline import counted
from study.grids import Job
from study.processes import (
    LOGS,
    Exit,
    command,
    end_line,
    failure_reason,
    make_folder,
    note_failure,
    nothing_to_start,
    run_state,
)

POLL = 0.2  # seconds between looks at the running processes
LOOK_AGAIN = 1.0  # seconds between looks at runs that other processes hold
NO_NEWS = ("pruned", "diverged")  # how runs of a search end, besides "finished"
SAVE_SECONDS = 30.0  # before a time limit at which runs are asked to save and end, at most a tenth of it


class Backend(Protocol):
    """Where runs are executed: `processes.LocalProcesses` here, `cluster.RayTasks` on a Ray cluster."""

    threads: int | None  # CPU threads of each process of a run

    @property
    def active(self) -> dict:
        """The runs that were started and have not ended, by name."""

    def has_room(self) -> bool:
        """Whether one more run can be started."""

    def start(self, job: Job, argv: list[str], folder: Path, log: Path, again: bool) -> None:
        """Start a run, its output appended to `log`. `again`: even if its folder says that it failed."""

    def wait(self, seconds: float) -> list[tuple[str, Exit]]:
        """The runs that have ended since the last call; returns after `seconds` at the latest."""

    def stop(self, force: bool) -> None:
        """Ask all runs to save and end, or end them at once."""

    def stop_run(self, name: str) -> None:
        """Ask one run to save and end."""

    def close(self) -> None:
        """The last run has ended: let go of what starting runs needs."""


class Source(Protocol):
    """Runs that follow from how others go, such as the trials of a search (`tuning.Search`)."""

    retry_failed: bool  # whether a run that failed before is started again

    def planned(self) -> list[Job]:
        """A run for each one that will come, as far as is known: for an estimate of the time."""

    def next(self) -> Job | None:
        """A run to start, None where there is none just now."""

    def is_open(self) -> bool:
        """Whether there may be more, now or later."""

    def to_stop(self) -> list[str]:
        """The runs that need not go on."""

    def ended(self, job: Job, status: str, detail: str) -> str:
        """Told that a run has ended; returns how, for a count."""


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


class TimeLimit:
    """When to start nothing more, when to let runs save, and when to end them, for a sweep that may take `minutes`."""

    def __init__(self, minutes: float | None) -> None:
        limit = 60 * minutes if minutes else math.inf
        reserve = min(SAVE_SECONDS, limit / 10)
        self.end = time.monotonic() + limit
        self.save, self.last_start = self.end - reserve, self.end - 2 * reserve

    def stops_asked(self) -> int:
        """0, 1 when runs are to save and end, 2 when they are to be ended at once."""
        now = time.monotonic()
        return (now >= self.save) + (now >= self.end)

    def allows_start(self) -> bool:
        return time.monotonic() < self.last_start


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


class Scheduler:
    """One sweep's runs: those that wait, those that another process holds, and how the others ended."""

    def __init__(
        self,
        queue: list[Job],
        runs: Path,
        backend: Backend,
        done: dict[str, list[dict]],
        skipped: int,
        again: set[str],
        source: Source | None = None,
    ) -> None:
        self.runs, self.backend, self.done, self.source = runs, backend, done, source
        self.jobs = {job.name: job for job in queue}
        self.queue, self.again = list(queue), set(again)
        self.elsewhere: list[Job] = []
        self.ended: dict[str, str] = {}
        self.progress = Progress(queue + (source.planned() if source else []), skipped)
        self.enough: set[str] = set()  # runs that were stopped because they need not go on
        self.looked = -LOOK_AGAIN  # when runs elsewhere were last looked at, on the monotonic clock

    def finish(self, job: Job, status: str, detail: str) -> None:
        if self.source:
            status = self.source.ended(job, status, detail)
        self.ended[job.name] = status
        self.progress.end(job, self.ended, len(self.backend.active))
        if status not in ("finished", *NO_NEWS):
            tqdm.write(printable(end_line(job, status, detail)), file=sys.stderr)

    def log(self, job: Job) -> Path:
        return self.runs / LOGS / f"{job.name}.log"

    def take(self, job: Job) -> None:
        """Start a run, unless its folder says that there is nothing to start or that another process holds it."""
        status, detail = run_state(self.runs, job, self.done)
        if nothing_to_start(status, job, self.again):
            self.finish(job, status, detail)
        elif status == "running":
            self.again.discard(job.name)  # another process repeats it
            self.elsewhere.append(job)
        else:
            folder = self.runs / job.name
            (self.runs / LOGS / f"{job.name}.failed").unlink(missing_ok=True)
            argv = command(job, self.runs, folder.is_dir(), self.backend.threads)
            self.backend.start(job, argv, folder, self.log(job), job.name in self.again)
            self.again.discard(job.name)
            self.progress.show(self.ended, len(self.backend.active))

    def take_all(self) -> None:
        """Start what there is room for."""
        if not self.queue and self.elsewhere and time.monotonic() - self.looked > LOOK_AGAIN:
            self.queue, self.elsewhere, self.looked = self.elsewhere, [], time.monotonic()
        while self.backend.has_room() and (job := self.next_job()):
            self.take(job)

    def next_job(self) -> Job | None:
        """The next run of the queue or, if that is empty, of the source."""
        if self.queue:
            return self.queue.pop(0)
        job = self.source.next() if self.source else None
        if job:
            self.jobs[job.name] = job
            self.again |= {job.name} if self.source.retry_failed else set()
        return job

    def stop_enough(self) -> None:
        """Stop the runs that need not go on."""
        for name in self.source.to_stop() if self.source else ():
            if name in self.backend.active:
                self.enough.add(name)
                self.backend.stop_run(name)

    def may_come(self) -> bool:
        """Whether runs are left to be started."""
        return bool(self.queue or self.elsewhere or (self.source and self.source.is_open()))

    def settle(self, job: Job, how: Exit, stopping: bool) -> None:
        """Note how a run ended whose process has."""
        status, detail = run_state(self.runs, job, self.done)
        # a signal that arrives before the run has its handlers ends it without output: no failure
        if status in ("waiting", "stopped") and how.code not in (0, 3) and not stopping:
            status, detail = "failed", how.lost or failure_reason(self.log(job), how.code, how.log_start)
            note_failure(self.runs, job.name, detail)
        if status == "running":  # another process has taken it, or still holds it, such as a lost task's
            self.elsewhere.append(job)
        else:
            self.finish(job, status, detail)

    def run(self, stop: StopSignals, limit: TimeLimit) -> bool:
        """Until all have ended, or those that were running when a signal came or the time was up; returns whether all have."""
        passed_on, waiting = 0, False
        while True:
            for name, how in self.backend.wait(POLL if self.backend.active or self.elsewhere or waiting else 0):
                self.settle(self.jobs[name], how, stopping=bool(stop.asked or passed_on or name in self.enough))
            self.stop_enough()
            asked = stop.asked + limit.stops_asked()
            if asked > passed_on:
                if not passed_on:
                    why = "" if stop.asked else "the time is up, "
                    message = f"stopping: {why}waiting for {counted(len(self.backend.active), 'run')} to save and end (again to kill)"
                    tqdm.write(message, file=sys.stderr)
                self.backend.stop(force=passed_on > 0)
                passed_on = asked
            if not asked and limit.allows_start():
                self.take_all()
            elif not self.backend.active and self.may_come():
                return False
            if not self.backend.active and not self.may_come():
                return not stop.asked
            waiting = self.source is not None  # for trials of other sweeps

    def abandon(self, stop: StopSignals) -> None:
        """Let the runs save and end; the next signal kills them."""
        asked = stop.asked
        self.backend.stop(force=False)
        while self.backend.active:
            if stop.asked > asked:
                self.backend.stop(force=True)
            self.backend.wait(POLL)


def run_jobs(
    queue: list[Job],
    runs: Path,
    backend: Backend,
    done: dict[str, list[dict]],
    skipped: int,
    again: set[str],
    minutes: float | None = None,
    source: Source | None = None,
) -> tuple[dict[str, str], bool]:
    """Run jobs on a back end, and then those of a source. `done`, `again`: see `processes.run_state` and `nothing_to_start`; `skipped`: jobs left out.

    Returns: how each run that ended did so, by name (a run that was not started is not in it), and whether a signal came or
    the time was up before all had.

    A run that another process holds is looked at again. The first signal is passed on to the runs, which save; the second
    kills them. With `minutes` nothing is started that could not save in that time, and what runs then saves and ends. Raises `InputError` if RUNS cannot be written.
    """
    make_folder(runs)
    scheduler = Scheduler(queue, runs, backend, done, skipped, again, source)
    with StopSignals() as stop:
        try:
            complete = scheduler.run(stop, TimeLimit(minutes))
        except BaseException:  # such as a full disk: no run is left behind
            scheduler.abandon(stop)
            raise
        finally:
            backend.close()
    scheduler.progress.bar.close()
    return scheduler.ended, not complete
