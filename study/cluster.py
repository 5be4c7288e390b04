"""Runs as tasks of a Ray cluster, a back end of the scheduler. Ray is optional: requirements-ray.txt."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import InputError, one_line
from engine.cmdline import counted
from study.grids import Job
from study.processes import Exit


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
        made_of = f"{counted(where.size, 'process')} of {counted(where.threads or 1, 'thread')}"
        raise InputError(
            f"--ray {where.address}: a run needs {counted(needed, 'CPU')} ({made_of}), the largest node has {most}"
        )
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


class RayTasks:
    """The scheduler's back end for a Ray cluster, whose machines see this code, this folder and the runs under the same paths.

    Ray shows a run the GPUs that it has asked for, alone. A task whose machine is lost is given to another one, where
    the run goes on from its last checkpoint. Raises `InputError` without Ray, where no cluster answers at the address
    ("local" starts one here), or where no node is large enough.
    """

    def __init__(self, where: Request) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("--ray: Ray is not installed; pip install -r requirements-ray.txt") from None
        try:
            if not ray.is_initialized():
                local = where.address == "local"
                ray.init(address=None if local else where.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise InputError(f"--ray {where.address}: no cluster answers ({one_line(e)})") from e
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.threads, share = fit_to_nodes(where, [(n.get("CPU", 0), n.get("GPU", 0)) for n in nodes])
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this module
        self.ray, self.most = ray, where.jobs
        self.task = ray.remote(run_task).options(
            num_cpus=self.threads * where.size, num_gpus=share, max_retries=where.retries
        )
        self.active: dict[str, Any] = {}  # the task's reference, by run

    def has_room(self) -> bool:
        return self.most is None or len(self.active) < self.most  # Ray lets tasks wait until they fit

    def start(self, job: Job, argv: list[str], folder: Path, log: Path, again: bool) -> None:
        self.active[job.name] = self.task.remote(argv, str(folder), str(log), os.getcwd(), again)

    def wait(self, seconds: float) -> list[tuple[str, Exit]]:
        if not self.active:
            time.sleep(seconds)
            return []
        names = {ref: name for name, ref in self.active.items()}
        ended = []
        for ref in self.ray.wait(list(names), num_returns=len(names), timeout=seconds)[0]:
            try:
                how = Exit(*self.ray.get(ref))
            except Exception as e:  # the machine was lost too often, or the task cancelled before its start
                how = Exit(1, 0, type(e).__name__)
            del self.active[names[ref]]
            ended.append((names[ref], how))
        return ended

    def stop(self, force: bool) -> None:
        for ref in self.active.values():
            # first an interrupt, which the task passes on to its run, then the end of both; waiting tasks never start
            self.ray.cancel(ref, force=force)

    def stop_run(self, name: str) -> None:
        self.ray.cancel(self.active[name], force=False)

    def close(self) -> None:
        """Nothing to let go of: Ray ends with this process."""
