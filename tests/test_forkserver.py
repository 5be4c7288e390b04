"""Runs forked from a process that has imported train.py: the same as plain ones, each alone with its end."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, TINY, same_weights, series, summary, until
from study import forkserver, processes
from study.forkserver import ForkServer

pytestmark = pytest.mark.skipif(not forkserver.possible(), reason="runs are forked on Linux alone")

SCRIPT = """
import json, os, signal, sys, time
if __name__ == "__main__":
    files = len(os.listdir("/proc/self/fd"))
    print(json.dumps([sys.argv[1:], sys.path[0], os.getsid(0) == os.getpid(), os.read(0, 1).decode(), files]), flush=True)
    if sys.argv[1] == "raise":
        raise ValueError("no")
    if sys.argv[1] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if sys.argv[1] == "wait":
        time.sleep(600)
    sys.exit(sys.argv[2] if sys.argv[1] == "say" else int(sys.argv[1]) if sys.argv[1].isdigit() else None)
"""
STATE = """
import json, os, random, sys
import torch
from tqdm import tqdm
threads, locked = len(os.listdir("/proc/self/task")), "_lock" in vars(tqdm)
before = set(sys.modules)
import train
status = train.main(sys.argv[1:])
late = sorted(set(sys.modules) - before)
print("STATE " + json.dumps([status, threads, torch.cuda.is_initialized(), locked, random.random(), late]))
"""


def ready(server: ForkServer) -> ForkServer:
    while server.warming(1.0):
        pass
    return server


def ended(run: forkserver.ForkedRun) -> int:
    """The run's exit status, waited for."""
    until(lambda: run.poll() is not None)
    return run.poll()


class Place:
    """A small script, a server of it, and a file for its output."""

    def __init__(self, folder: Path, first: str = "") -> None:
        """`first`: what the script does before all else; it may import `helper`."""
        self.script, self.log = folder / "script.py", folder / "log"
        (folder / "helper.py").write_text("")
        self.script.write_text(first + SCRIPT)
        self.server = ready(ForkServer(self.script))

    def start(self, *words: str) -> forkserver.ForkedRun | None:
        with open(self.log, "ab") as out:
            return self.server.start([str(self.script), *words], out.fileno())


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.server.close()


def test_a_forked_run_is_a_process_of_its_own(place):
    """Script, session, no input, no files but its own, and an exit status as a plain process has it."""
    for words, status in (
        (["3"], 3),
        (["say", "a reason"], 1),
        (["raise"], 1),
        (["crash"], -signal.SIGSEGV),
        (["x"], 0),
    ):
        place.log.unlink(missing_ok=True)
        assert ended(place.start(*words)) == status
        forked = place.log.read_text().splitlines()
        with open(place.log, "wb") as out:
            plain = [sys.executable, str(place.script), *words]
            where = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "start_new_session": True}
            assert subprocess.run(plain, **where, check=False).returncode == status
        assert (lines := place.log.read_text().splitlines())[0] == forked[0] and lines[-1] == forked[-1]


def test_runs_end_in_any_order_and_by_signals(place):
    waiting, last = place.start("wait"), place.start("4")
    assert ended(last) == 4 and waiting.poll() is None
    waiting.terminate()
    assert ended(waiting) == -signal.SIGTERM
    killed = place.start("wait")
    processes.kill(killed)
    assert ended(killed) == -signal.SIGKILL
    processes.kill(killed)  # nobody is there
    killed.terminate()


def test_runs_outlive_their_server(place):
    """Their end is seen all the same; what they ended with is not known."""
    run = place.start("wait")
    place.server.process.kill()
    place.server.process.wait()
    assert run.poll() is None and place.start("0") is None
    processes.kill(run)
    assert ended(run) == 1 and run.lost == forkserver.LOST


def test_changed_code_is_not_run_from_memory(tmp_path):
    """A server refuses once a module that it has imported is another one; what it has started goes on."""
    place = Place(tmp_path, "import helper\n")
    run = place.start("wait")
    assert run
    (tmp_path / "helper.py").write_text("x = 2\n")
    assert place.start("0") is None and run.poll() is None
    run.terminate()
    assert ended(run) == -signal.SIGTERM
    place.server.close()


def test_a_server_ends_with_the_sweep(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from study.forkserver import ForkServer
server = ForkServer({str(tmp_path / "script.py")!r})
while server.warming(1.0): pass
print(server.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    pid = int(killed.stdout)
    until(lambda: not forkserver.lives(pid))


@pytest.mark.parametrize("why", ["it cannot import", "threads", "it is lost"])
def test_without_a_server_runs_are_plain_processes(why, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    trouble = {
        "it cannot import": "raise OSError",
        "threads": "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        "it is lost": "",
    }[why]
    script.write_text(SCRIPT + f"else:\n    {trouble or 'pass'}\n")
    monkeypatch.setattr(processes, "TRAIN", script)
    monkeypatch.setattr(processes, "LATE_IMPORTS", ())
    backend = processes.LocalProcesses([None, None], 1, 2)
    try:
        for _ in range(100):
            if backend.has_room():
                break
            backend.wait(0)
        if why == "it is lost":
            backend.server.process.kill()
            backend.server.process.wait()
        job = processes.Job([], type("Args", (), {"name": "r", "devices": 1})())
        backend.start(job, [sys.executable, str(script), "5"], tmp_path, tmp_path / "log", again=False)
        assert isinstance(backend.active["r"][0], subprocess.Popen)
        end = []
        while not end:
            end = backend.wait(0.01)
        assert end == [("r", processes.Exit(5, 0))]
    finally:
        backend.close()


@pytest.mark.parametrize("slot", ["1", None, "2,3"])
def test_a_run_sees_the_gpus_of_its_slot(slot, tmp_path, monkeypatch):
    """One of several processes is started afresh; the others are forked. None sees what another one was given."""
    script = tmp_path / "script.py"
    script.write_text(
        'import os\nif __name__ == "__main__":\n    print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)\n'
    )
    monkeypatch.setattr(processes, "TRAIN", script)
    monkeypatch.setattr(processes, "LATE_IMPORTS", ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    backend = processes.LocalProcesses(["5", slot], 1, 2)
    try:
        while not backend.has_room():
            backend.wait(0.01)
        kinds = []
        for name, devices in (("a", 1), ("b", 2 if slot == "2,3" else 1)):
            job = processes.Job([], type("Args", (), {"name": name, "devices": devices})())
            backend.start(job, [sys.executable, str(script)], tmp_path, tmp_path / name, again=False)
            kinds.append(type(backend.active[name][0]))
        while backend.active:
            backend.wait(0.01)
    finally:
        backend.close()
    assert [(tmp_path / name).read_text() for name in "ab"] == ["5\n", f"{slot or 7}\n"]
    assert kinds == [forkserver.ForkedRun, subprocess.Popen if slot == "2,3" else forkserver.ForkedRun]


def test_single_runs_need_no_server(monkeypatch):
    monkeypatch.setattr(processes, "ForkServer", lambda *_: pytest.fail("a server was started"))
    assert processes.LocalProcesses([None], 1, 1).has_room()
    monkeypatch.setattr(processes, "possible", lambda: False)
    assert processes.LocalProcesses([None], 1, 5).has_room()


@pytest.fixture(scope="module")
def of_train():
    server = ready(ForkServer(processes.TRAIN, processes.LATE_IMPORTS))
    yield server
    server.close()


@pytest.mark.slow
def test_a_forked_run_has_the_bits_of_a_plain_one(of_train, tmp_path):
    argv = [*TINY, "--noise", "0.5", "--measure", "full", "--measure-budget", "0.5", "--runs", str(tmp_path)]
    with open(tmp_path / "log", "ab") as out:
        run = of_train.start([str(processes.TRAIN), *argv, "--name", "forked"], out.fileno())
        plain = [sys.executable, str(processes.TRAIN), *argv, "--name", "plain"]
        subprocess.run(plain, stdout=out, stderr=out, stdin=subprocess.DEVNULL, check=True)
        assert ended(run) == 0
    forked, plain = tmp_path / "forked", tmp_path / "plain"
    assert same_weights(forked, plain) and series(forked) == series(plain)
    assert (forked / "noise.npz").read_bytes() == (plain / "noise.npz").read_bytes()
    same = ("val_acc", "test_acc", "train_acc_noisy", "measure_share_counted")
    assert {k: summary(forked)[k] for k in same} == {k: summary(plain)[k] for k in same}


def test_a_server_shares_neither_threads_nor_chance_nor_a_gpu(of_train, tmp_path):
    """And has imported what a run needs: what it imports itself counts for every run."""
    (tmp_path / "state.py").write_text(STATE)
    found = []
    for name in "ab":
        log = tmp_path / f"log-{name}"
        argv = [*TINY, "--max-steps", "1", "--noise", "0.5", "--runs", str(tmp_path), "--name", name]
        with open(log, "wb") as out:
            assert ended(of_train.start([str(tmp_path / "state.py"), *argv], out.fileno())) == 0
        line = next(line for line in log.read_text().splitlines() if line.startswith("STATE "))
        status, threads, cuda, locked, chance, late = json.loads(line[6:])
        assert (status, threads, cuda, locked) == (0, 1, False, False)  # tqdm's lock would be that of all runs
        assert len([name for name in late if name.partition(".")[0] in ("torch", "torchvision", "tensorboard")]) < 20, (
            late
        )
        found.append(chance)
    assert found[0] != found[1]


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for this signal."""
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_signal_before_training_ends_a_forked_run(of_train, tmp_path):
    """As it does a plain one: at once, with status 3 and nothing written."""
    with open(tmp_path / "log", "wb") as out:
        run = of_train.start(
            [str(processes.TRAIN), *TINY, "--synthetic-train", "200000", "--runs", str(tmp_path)], out.fileno()
        )
    until(lambda: catches(run.pid, signal.SIGTERM))  # it draws the images, for seconds
    os.kill(run.pid, signal.SIGTERM)
    assert ended(run) == 3
    assert "stopped by SIGTERM before training began" in (tmp_path / "log").read_text()
    assert os.listdir(tmp_path) == ["log"]
