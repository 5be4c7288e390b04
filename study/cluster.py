"""Runs as tasks of a Ray cluster. Ray is optional: requirements-ray.txt."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import InputError
from study.grids import Job
from study.processes import (
    LOGS,
    POLL,
    Progress,
    StopSignals,
    command,
    end_line,
    failure_reason,
    make_folder,
    note_failure,
    nothing_to_start,
    run_state,
)


@dataclass
class Request:
    """What a sweep asks of a cluster."""

    address: str
    share: float  # GPUs of a run, where the cluster has any
    size: int  # processes of a run
    threads: int | None  # CPU threads of each, None for what fits
    jobs: int | None  # runs at a time, None for as many as fit
    retries: int


def fit_to_nodes(where: Request, nodes: list[tuple[float, float]]) -> tuple[int, float]:
    """(CPU threads of a process, GPUs of a run) that some node of (CPUs, GPUs) has. Raises `InputError` if none has.

    Threads that are not given are the same for all runs, for their bits depend on them: so many that every node that is
    of use takes runs, and on a node with GPUs one for every share of them.
    """
    share = where.share if any(gpus for _, gpus in nodes) else 0
    usable = [(int(cpus), gpus) for cpus, gpus in nodes if gpus >= share]
    if not usable:
        raise InputError(f"--devices {where.size}: no node of the cluster has so many GPUs")
    most = max(cpus for cpus, _ in usable)
    needed = where.size * (where.threads or 1)
    if most < needed:
        made_of = f"{where.size} processes of {where.threads or 1} threads"
        raise InputError(f"--ray {where.address}: a run needs {needed} CPUs ({made_of}), the largest node has {most}")
    if where.threads:
        return where.threads, share
    usable = [(cpus, gpus) for cpus, gpus in usable if cpus >= where.size]
    if share:
        return min(max(cpus // (int(gpus / share) * where.size), 1) for cpus, gpus in usable), share
    threads = min(cpus for cpus, _ in usable) // where.size
    while threads > 1 and sum(cpus // (threads * where.size) for cpus, _ in usable) < (where.jobs or 1):
        threads -= 1
    return threads, share


def run_task(argv: list[str], folder: str, log: str, cwd: str, again: bool) -> tuple[int, int, str]:
    """On the worker; uses the standard library alone, since only the function travels.

    Returns the run's exit status, the byte of the log at which its output begins, and why it was not started if it was not.
    """
    import ctypes
    import json
    import os
    import signal
    import socket
    import subprocess
    import sys
    import time

    def die_with_parent():  # a lost worker's run saves and lets go of its lock (PR_SET_PDEATHSIG)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    def signal_group(group, number):  # whether there is a process left in it
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return False
        return True

    if not os.path.isdir(cwd):
        return 2, 0, f"{socket.gethostname()} has no folder {cwd}, where the sweep was started"
    try:
        with open(os.path.join(folder, "summary.json")) as f:
            failed = json.load(f)["status"] == "failed"
    except (OSError, ValueError, KeyError, TypeError):
        failed = False
    if failed and not again:  # since the task was given to the cluster
        return 1, 0, ""
    argv = argv + (["--resume"] if os.path.isdir(folder) and "--resume" not in argv else [])
    with open(log, "ab") as out:
        begin = out.tell()
        child = subprocess.Popen(
            argv,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)  # not wait(), out of which Ray's interrupt of a task does not come
        except KeyboardInterrupt:  # ray.cancel
            signal_group(child.pid, signal.SIGTERM)  # all of its processes agree on where to stop
        code = child.wait()
        for _ in range(25):  # the run's other processes leave after its first one
            if not signal_group(child.pid, 0):
                break
            time.sleep(0.2)
        else:
            signal_group(child.pid, signal.SIGKILL)
        return code, begin, ""


def run_on_ray(
    queue: list[Job], runs: Path, where: Request, done: dict[str, list[dict]], skipped: int, again: set[str]
) -> tuple[dict[str, str], bool]:
    """Run jobs as tasks of a Ray cluster, whose machines see this code, this folder and RUNS under the same paths.

    Ray shows a run the GPUs that it has asked for, alone. A task whose machine is lost is given to another one, where
    the run goes on from its last checkpoint. The first signal lets the runs save, the second kills them. Returns what
    `processes.run_here` does. Raises `InputError` without Ray, where no cluster answers at the address ("local" starts
    one here), or where no node is large enough.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--ray: Ray is not installed; pip install -r requirements-ray.txt") from None
    try:
        if not ray.is_initialized():
            local = where.address == "local"
            ray.init(address=None if local else where.address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise InputError(f"--ray {where.address}: no cluster answers ({str(e).splitlines()[0][:120]})") from e
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    threads, share = fit_to_nodes(where, [(n.get("CPU", 0), n.get("GPU", 0)) for n in nodes])
    runs = runs.resolve()  # a worker starts elsewhere
    make_folder(runs)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this module
    task = ray.remote(run_task).options(num_cpus=threads * where.size, num_gpus=share, max_retries=where.retries)
    queue, elsewhere, pending, ended, again = list(queue), [], {}, {}, set(again)
    progress, cancelled = Progress(queue, skipped), 0

    def finish(job: Job, status: str, detail: str) -> None:
        ended[job.name] = status
        progress.end(job, ended, len(pending))
        if status != "finished":
            tqdm.write(end_line(job, status, detail), file=sys.stderr)

    def submit(job: Job) -> None:
        status, detail = run_state(runs, job, done)
        if nothing_to_start(status, job, again):
            finish(job, status, detail)
        elif status == "running":
            again.discard(job.name)  # another process repeats it
            elsewhere.append(job)
        else:
            log, folder = runs / LOGS / f"{job.name}.log", runs / job.name
            (runs / LOGS / f"{job.name}.failed").unlink(missing_ok=True)
            argv = command(job, runs, folder.is_dir(), threads)
            ref = task.remote(argv, str(folder), str(log), os.getcwd(), job.name in again)
            again.discard(job.name)
            pending[ref] = (job, log)

    def ended_task(ref) -> None:
        job, log = pending.pop(ref)
        try:
            code, begin, lost = ray.get(ref)
        except Exception as e:  # the machine was lost too often, or the task cancelled before its start
            code, begin, lost = 1, 0, type(e).__name__
        status, detail = run_state(runs, job, done)
        if status == "running" and not cancelled:  # another process still holds it, such as a lost task's
            elsewhere.append(job)
            return
        if not cancelled and (status == "failed" or (status in ("waiting", "stopped") and code not in (0, 3))):
            detail = detail if status == "failed" else lost or failure_reason(log, code, begin)
            status = "failed"
            note_failure(runs, job.name, detail)
        finish(job, status, detail)

    with StopSignals() as stop:
        try:
            while pending or ((queue or elsewhere) and not stop.asked):
                if stop.asked > cancelled:
                    for ref in pending:
                        # first an interrupt, which the task passes on to its run, then the end of both; waiting
                        # tasks never start
                        ray.cancel(ref, force=cancelled > 0)
                    cancelled = stop.asked
                while queue and not stop.asked and len(pending) < (where.jobs or len(pending) + 1):
                    submit(queue.pop(0))
                progress.show(ended, len(pending))
                if pending:
                    for ref in ray.wait(list(pending), timeout=0.5)[0]:
                        ended_task(ref)
                else:
                    time.sleep(5 * POLL)
                if elsewhere and not queue:
                    queue, elsewhere[:] = list(elsewhere), []
        except BaseException:  # such as a full disk: no run is left behind
            for ref in pending:
                ray.cancel(ref)
            if pending:
                ray.wait(list(pending), num_returns=len(pending), timeout=60)
            raise
    progress.bar.close()
    return ended, bool(stop.asked)
