"""Which launcher started this process, and that nothing waits for processes which nobody started.

torchrun and `fabric run` are joined as they are; the tasks of srun too where `--devices` and `--num-nodes` ask for them, with
torchrun's variables, so that there is one case behind this. Whatever else is in the environment, of a batch script (`sbatch
--ntasks=2`), an mpirun, a notebook or a worker that runs this as a command, is of no process of this run.
"""

import os
import sys
from contextlib import contextmanager
from threading import Timer

from data import InputError

TORCHRUN = "TORCHELASTIC_RUN_ID"  # `fabric run` is torchrun, too
OWN = "LABEL_NOISE_SGD_RANKS"  # set by train.py for the processes that Fabric starts for its other ranks
PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # of a process on its own
MEETING = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # what Fabric needs of several machines started by hand
PATIENCE = 60  # seconds of waiting for other processes without a word


def launched() -> bool:
    """Whether this process is one of those that a launcher, or the first process of the run, has started together."""
    return TORCHRUN in os.environ or OWN in os.environ


def rank_zero() -> bool:
    """Whether this process is the one that speaks, before Fabric is there to ask."""
    return not launched() or all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def started() -> tuple[int, int] | None:
    """(processes on this machine, machines) where a launcher has started them; None where that is left to the run."""
    if TORCHRUN not in os.environ:
        return None
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return here, int(os.environ["WORLD_SIZE"]) // here


def settle(devices: int | str, num_nodes: int) -> None:
    """Join what a launcher has started, or put aside the variables of others, with a word where they speak of several processes.

    Raises `InputError` where srun has started other processes than `devices` and `num_nodes` ask for, and for several machines
    without a launcher that do not know of each other.
    """
    if launched():
        return
    os.environ.pop("LT_CLI_USED", None)  # left of `fabric run`
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{what}") or 1) for what in ("TASKS", "NODES"))
    if tasks > 1 and (devices, num_nodes) != (1, 1):
        here = tasks // nodes
        if devices not in (here, "auto") or num_nodes != nodes or here * nodes != tasks:
            raise InputError(
                f"--devices {devices}, --num-nodes {num_nodes}: srun has started {tasks} tasks on {nodes} nodes "
                f"(SLURM_STEP_NUM_TASKS={tasks}), not {devices} on each of {num_nodes}"
            )
        os.environ.update(of_srun(here, nodes))
        return
    other = [f"{name}={os.environ[name]}" for name, alone in PLACE.items() if os.environ.get(name, alone) != alone]
    if other:
        print(f"train.py: {', '.join(other)} in the environment: of another program, and left aside", file=sys.stderr)
    for name in PLACE:
        os.environ.pop(name, None)
    if num_nodes == 1:
        for name in ("GROUP_RANK", *MEETING):
            os.environ.pop(name, None)
    elif missing := [name for name in MEETING if not os.environ.get(name)]:
        raise InputError(
            f"--num-nodes {num_nodes}: {', '.join(missing)} must be in the environment of each machine; torchrun, fabric run "
            "and srun see to that themselves"
        )


def of_srun(here: int, nodes: int) -> dict[str, str]:
    """torchrun's variables for this task of srun, one of `here` on each of `nodes` machines."""
    from lightning_fabric.plugins.environments import SLURMEnvironment

    first = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"]) if nodes > 1 else "127.0.0.1"
    job, step = (int(os.environ.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = 15000 + (100 * job + step) % 10000  # the same for all tasks of a step
    return {
        TORCHRUN: f"srun-{job}-{step}",
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ["SLURM_NODEID"],
        "WORLD_SIZE": str(here * nodes),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first,
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(port),
    }


@contextmanager
def say_if_waiting(processes: int):
    """Within the context the `processes` of the run meet: a line for the user where that takes long."""

    def say() -> None:
        found = " ".join(f"{name}={os.environ[name]}" for name in (*PLACE, *MEETING) if name in os.environ)
        print(f"train.py: waiting for the other of {processes} processes ({found})", file=sys.stderr, flush=True)

    timer = Timer(PATIENCE, say)
    timer.daemon = True
    if processes > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
