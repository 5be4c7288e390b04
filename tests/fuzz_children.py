"""Child processes for the fuzzer: each call of a program's `main` is a fork of one process that has imported torch.

So a start costs no import, and a crash in native code or an endless wait is the result of one call and not the end.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BAR = re.compile(r"[0-9?](step|run|it)/s|[0-9?]s/(step|run|it)")  # of a line of tqdm's
MEMORY = 24 << 30  # bytes of address space for a child: an endless read ends as one failure

# Run as `python -c`: forks for every line on standard input, answers with a line of exit statuses. A child is the
# leader of its own process group, and after `timeout` seconds tells where it is (SIGABRT, faulthandler) and is killed.
ZYGOTE = """
import faulthandler, json, os, resource, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch, train, noise, report, sweep  # no tensor is touched here, so a fork finds no threads
import torch.distributed.nn, torch.optim.sgd
import matplotlib.backends.backend_agg, matplotlib.figure
from torch.utils.tensorboard import SummaryWriter

def child(ask, rank):
    os.setpgid(0, 0)
    status = 1
    try:
        for fd, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
            path = name if fd == 0 else ask["log"] + f".{{name}}.{{rank}}"
            os.dup2(os.open(path, flags | (os.O_CREAT | os.O_TRUNC if fd else 0), 0o644), fd)
        faulthandler.enable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
        os.environ.update(ask["environments"][rank])
        os.chdir(ask["cwd"])
        sys.argv = [os.path.join({root!r}, ask["program"] + ".py"), *ask["argv"]]
        if ask["before"] and rank == 0:
            exec(ask["before"], {{}})
        status = sys.modules[ask["program"]].main(ask["argv"])
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)

def end(pid, number):
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        pass

for line in sys.stdin:
    ask, waiting, statuses = json.loads(line), {{}}, []
    for rank in range(len(ask["environments"])):
        pid = os.fork()
        if pid == 0:
            child(ask, rank)
        waiting[pid] = rank
        statuses.append(None)
    pids, began, limit, late = list(waiting), time.monotonic(), ask["timeout"], 0
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in waiting:
            status = os.waitstatus_to_exitcode(status)
            statuses[waiting.pop(pid)] = status
            if status < 0:  # as a launcher does: a process of the run is lost
                limit = min(limit, time.monotonic() - began + ask["grace"])
            continue
        if time.monotonic() - began > limit * max(1, os.getloadavg()[0] / os.cpu_count()):  # others' work is not lateness
            late += 1
            limit += 5
            for pid in waiting:
                end(pid, signal.SIGABRT if late == 1 else signal.SIGKILL)
        time.sleep(0.005)
    for pid in pids:
        end(pid, signal.SIGKILL)  # what a run has started itself
    print(json.dumps([statuses, bool(late)]), flush=True)
"""


@dataclass
class Result:
    """How one call ended: exit statuses (negative for a signal), what it printed by rank, whether it was too late."""

    program: str
    argv: list[str]
    statuses: list[int]
    out: list[str] = field(repr=False)
    err: list[str] = field(repr=False)
    late: bool

    @property
    def status(self) -> int:
        return self.statuses[0]

    @property
    def errors(self) -> list[str]:
        """Lines on rank 0's standard error that are not progress bars."""
        lines = self.err[0].replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip() and not BAR.search(line)]

    @property
    def shell(self) -> str:
        ranks = f"  # on {len(self.statuses)} processes" if len(self.statuses) > 1 else ""
        words = [w if len(w) <= 200 else f"{w[:60]}...{len(w)} characters" for w in self.argv]
        return shlex.join([f"{self.program}.py", *words]).encode("utf-8", "backslashreplace").decode() + ranks

    def problems(self, allowed: set[int]) -> list[str]:
        """What no call may do: end late, by a signal, with a traceback or with a status that is not in `allowed`."""
        last = " | ".join([*self.errors, *self.out[0].splitlines()[-1:]][-25:])[-1500:]
        wrong = ["not over in time"] if self.late else []
        for rank, status in enumerate(self.statuses):
            if status not in allowed and not self.late:
                wrong.append(f"status {status} of rank {rank}, not in {sorted(allowed)}")
        for text in (*self.out, *self.err):
            if "Traceback (most recent call last)" in text:
                wrong.append("a traceback")
                break
        return [f"{'; '.join(wrong)}: {self.shell}: {last}"] if wrong else []


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets for each of `ranks` processes on this machine; nothing for one."""
    if ranks == 1:
        return [{}]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "fuzz", "GROUP_RANK": "0"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]


class Children:
    """Calls programs of this repository in forked processes; one process that forks for each thread that asks."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where the output of the calls goes."""
        self.folder, self.local, self.all = folder, threading.local(), []

    def process(self) -> subprocess.Popen:
        if not hasattr(self.local, "process"):
            code = ZYGOTE.format(root=str(ROOT), tests=str(ROOT / "tests"), memory=MEMORY)
            env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | os.environ | {"PYTHONUTF8": "1"}
            self.local.process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
            )
            self.local.log = str(self.folder / f"log{len(self.all)}")
            self.all.append(self.local.process)
        return self.local.process

    def call(
        self,
        program: str,
        argv: list[str],
        cwd: Path,
        ranks: int = 1,
        timeout: float = 120,
        before: str = "",
        grace: float = 5,
    ) -> Result:
        """`program`.main(argv) in a process of its own (`ranks` of them) in folder `cwd`; `before` is code that runs first.

        After `timeout` seconds, or `grace` seconds after one of them was lost, the processes are killed; on a busy
        machine later, in proportion to its load.
        """
        process = self.process()
        ask = {"program": program, "argv": argv, "cwd": str(cwd), "log": self.local.log, "timeout": timeout}
        ask |= {"environments": rank_environments(ranks), "before": before, "grace": grace}
        process.stdin.write(json.dumps(ask) + "\n")
        process.stdin.flush()
        statuses, late = json.loads(process.stdout.readline())
        out, err = (
            [Path(f"{self.local.log}.{kind}.{rank}").read_text(errors="replace") for rank in range(ranks)]
            for kind in ("out", "err")
        )
        return Result(program, argv, statuses, out, err, late)

    def close(self) -> None:
        for process in self.all:
            process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
