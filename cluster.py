"""Runs as tasks of a Ray cluster. Ray is optional: requirements-ray.txt."""

import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data import InputError
from grids import Job
from processes import LOGS, POLL, Progress, Stop, command, note_failure, state, why


def run_on_ray(
    queue: list[Job],
    runs: Path,
    address: str,
    gpu_share: float,
    threads: int,
    retries: int,
    done: set[str],
    skipped: int,
) -> Counter:
    """Run jobs as tasks of a Ray cluster, whose machines see this code and RUNS under the same paths.

    Where the cluster has GPUs each run asks for `gpu_share` of one, and Ray shows it that one alone.

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
                argv,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            try:
                while child.poll() is None:
                    time.sleep(0.2)  # not wait(), out of which Ray's interrupt of a task does not come
            except KeyboardInterrupt:  # ray.cancel
                child.terminate()
            return child.wait()

    gpus = gpu_share if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(work).options(num_cpus=threads, num_gpus=gpus, max_retries=retries)
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
