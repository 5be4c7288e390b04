"""Runs as processes of train.py: the state a run is in, its command, and a scheduler for this machine.

A run's folder says how it ended; nothing else is kept, but the output of its process and, for a run that failed
before it had a folder, the reason.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import results
from grids import Job

TRAIN = Path(__file__).resolve().parent / "train.py"
POLL = 0.2  # seconds between looks at the running processes
LOGS = ".sweep"  # folder in RUNS: what each process printed, and why it failed if it never got a folder of its own
STATES = ("finished", "running", "stopped", "failed", "waiting")


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
        threads = min(
            threads, results.read_json(runs / job.name / "config.json").get("options", {}).get("threads") or threads
        )
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
        self.bar = tqdm(
            total=len(jobs) + skipped,
            initial=skipped,
            unit="run",
            bar_format="{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}",
        )
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


def run_here(
    queue: list[Job], runs: Path, slots: list[str | None], threads: int, done: set[str], skipped: int
) -> Counter:
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
                    tqdm.write(
                        f"stopping: {len(active)} running runs save and end (again to kill them)", file=sys.stderr
                    )
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
                process = subprocess.Popen(
                    argv,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=env,
                    start_new_session=True,
                )
                active[process] = (job, slot, log, out)
                progress.show(ended, len(active))
            if not active and not queue and not elsewhere:
                break
            time.sleep(POLL)
        ended["interrupted"] = bool(stop.asked)
    progress.bar.close()
    return ended
