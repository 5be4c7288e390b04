"""A run that has not begun to train ends at once on a signal, with status 3 and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from conftest import TINY, free_port, slow, until
from engine import hardware, interrupts, sources
from study import cluster


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_while_data_is_loaded(go, monkeypatch, capsys, name, tmp_path):
    load, handler = sources.load, signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as m:
        m.setattr(sources, "load", lambda args: (os.kill(os.getpid(), getattr(signal, name)), load(args))[1])
        folder = go("--max-steps", "1", status=3)
    assert f"stopped by {name} before training began; nothing was written\n" in capsys.readouterr().err
    assert not folder.parent.exists()
    assert signal.getsignal(getattr(signal, name)) == handler
    assert not any(t.name == "signals-before-training" for t in threading.enumerate())


# Both wait in C++, where no Python handler is run: for the peers of a rendezvous that never come.
PEERS = """
import os, sys, torch, train
os.environ |= {{"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": {port!r}}}
init = torch.distributed.init_process_group
def marked(*args, **named):
    open({marker!r}, "w").close()
    init(*args, **named)
torch.distributed.init_process_group = marked
os._exit(train.main({argv!r}))
"""
DOWNLOAD = """
import os
import time
import torch
import datasets
import train
def make(root):
    open(os.path.join(root, "half"), "w").close()
    open({marker!r}, "w").close()
    {wait}
datasets.DATASETS["cifar10"] = datasets.DataSet(None, files=datasets.Files("set/raw", dict(), make))
os._exit(train.main({argv!r}))
"""
STORE = "torch.distributed.TCPStore('127.0.0.1', 0, 2, True)"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("where", ["peers", "download", "download in C"])
def test_a_signal_while_the_run_waits(zygote, tmp_path, where, name):
    marker, data = tmp_path / "marker", tmp_path / "data"
    argv = [*TINY, "--runs", str(tmp_path / "runs"), "--name", "r"]
    if where == "peers":
        code = PEERS.format(port=free_port(), marker=str(marker), argv=[*argv, "--num-nodes", "2"])
    else:
        wait = STORE if where == "download in C" else "time.sleep(600)"
        argv += ["--dataset", "cifar10", "--data-dir", str(data)]
        code = DOWNLOAD.format(marker=str(marker), argv=argv, wait=wait)
    (pid,) = zygote.start(code=code)
    until(marker.exists)
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(pid, getattr(signal, name))
    assert zygote.wait() == [3], zygote.output()
    assert time.monotonic() - began < 120  # a rendezvous alone waits for ten minutes
    assert zygote.output().splitlines() == [f"train.py: stopped by {name} before training began; nothing was written"]
    assert [p.name for p in tmp_path.iterdir()] == ["marker"]


@pytest.mark.slow
def test_the_processes_of_other_ranks_end_too():
    quiet = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); input()"
    processes = [subprocess.Popen(["sleep", "600"])]
    processes.append(
        subprocess.Popen([sys.executable, "-c", quiet], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )  # one that waits in C++ may not listen
    processes[1].stdout.readline()
    hardware.end_processes(SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=processes))))
    assert [p.wait(120) for p in processes] == [-signal.SIGTERM, -signal.SIGKILL]


def test_what_is_left_is_undone_latest_first():
    order = []
    interrupts.undo_at_end(lambda: order.append("first"))
    with interrupts.undo_if_interrupted(lambda: order.append("not any more")):
        pass
    interrupts.undo_at_end(lambda: 1 / 0)
    interrupts.undo_at_end(lambda: order.append("last"))
    interrupts.undo()
    interrupts.undo()
    assert order == ["last", "first"]


def alive(pid: int) -> bool:
    """Whether it runs: a process that has ended may still wait to be collected."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("cancelled", [True, *slow(False)])
def test_further_ranks_on_ray_end_with_the_first(tmp_path, cancelled):
    """`work` as on a Ray worker, without Ray: a run that leaves a rank behind, or whose task is cancelled."""
    code = "import subprocess; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)"
    code += "; p.wait()" * cancelled
    log = tmp_path / "log"

    def cancel() -> None:
        until(lambda: log.exists() and log.read_text().strip())
        os.kill(os.getpid(), signal.SIGINT)  # as Ray interrupts a task

    thread = threading.Thread(target=cancel if cancelled else int)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell has it ignored
    try:
        thread.start()
        command = [sys.executable, "-c", code]
        status, _, _ = cluster.run_task(command, str(tmp_path / "r"), str(log), str(tmp_path), False)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert status == (-signal.SIGTERM if cancelled else 0)
    until(lambda: not alive(int(log.read_text())))
