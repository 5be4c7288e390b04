"""Runs forked from a process that has imported train.py: the same as plain ones, each alone with its end."""

import json
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, TINY, same_weights, series, summary, until
from study import forkserver, processes
from study.forkserver import ForkedRun

pytestmark = pytest.mark.skipif(not forkserver.possible(), reason="runs are forked on Linux alone")

SCRIPT = """
import atexit, json, os, signal, sys, time
print(json.dumps([sys.argv[1:], sys.path[0], os.getsid(0) == os.getpid(), os.read(0, 1).decode()]), flush=True)
atexit.register(print, "the end")
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


def server() -> int:
    """Its process id."""
    return multiprocessing.forkserver._forkserver._forkserver_pid


def ended(run: ForkedRun) -> int:
    """The run's exit status, waited for."""
    until(lambda: run.poll() is not None)
    return run.poll()


@pytest.fixture
def start(tmp_path, bare_server):
    """start(word, ...) -> a run of SCRIPT, whose output goes to tmp_path/log."""
    (tmp_path / "script.py").write_text(SCRIPT)
    return lambda *words: ForkedRun([str(tmp_path / "script.py"), *words], tmp_path / "log", os.environ)


@pytest.mark.parametrize(
    ("words", "status"),
    [(["3"], 3), (["say", "a reason"], 1), (["raise"], 1), (["crash"], -signal.SIGSEGV), (["x"], 0)],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_a_forked_run_is_a_process_of_its_own(words, status, start, tmp_path):
    """Script, session, no input, what it does at its end, and an exit status as a plain process has it."""
    assert ended(start(*words)) == status
    forked = (tmp_path / "log").read_text().splitlines()
    plain = [sys.executable, str(tmp_path / "script.py"), *words]
    with open(tmp_path / "log", "wb") as out:
        where = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "start_new_session": True}
        assert subprocess.run(plain, **where, check=False).returncode == status
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == forked[0] and {"the end", "a reason", "ValueError: no"}.isdisjoint(set(lines) ^ set(forked))


def test_runs_end_in_any_order_and_by_signals(start):
    waiting, last = start("wait"), start("4")
    assert ended(last) == 4 and waiting.poll() is None
    waiting.terminate()
    assert ended(waiting) == -signal.SIGTERM
    killed = start("wait")
    processes.kill(killed)
    assert ended(killed) == -signal.SIGKILL
    processes.kill(killed)  # nobody is there
    killed.terminate()


def test_runs_outlive_their_server(start):
    """Their end is seen all the same; what they ended with is not known. The next run has another server."""
    run = start("wait")
    os.kill(server(), signal.SIGKILL)
    until(lambda: not forkserver.lives(server()))
    assert run.poll() is None and ended(start("5")) == 5
    processes.kill(run)
    assert ended(run) == 1 and run.lost == forkserver.LOST


CHANGE = """
import os, sys, time
from pathlib import Path
from study import forkserver
forkserver.PRELOAD = ("helper",)
for text in (None, "x = 2", "x = 3"):
    if text:
        Path("helper.py").write_text(text + "  # longer")
    run = forkserver.ForkedRun([os.path.abspath("script.py")], Path("log"), os.environ)
    while run.poll() is None:
        time.sleep(0.01)
    print(run.pid, run.poll())
"""


@pytest.mark.parametrize("threads", [False, True])
def test_changed_code_is_not_run_from_memory(threads, tmp_path):
    """A run begins anew, under its process id, where a module that the server has imported is another one; as it does where the
    server has a thread, which would be missing in a fork."""
    (tmp_path / "study").mkdir()
    shutil.copy(forkserver.__file__, tmp_path / "study")
    thread = "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    (tmp_path / "helper.py").write_text("x = 1\nloaded = 'x'\n" + thread * threads)
    text = "import os, sys; early = 'helper' in sys.modules; import helper; print(os.getpid(), helper.x, early); sys.exit(helper.x)"
    (tmp_path / "script.py").write_text(text)
    own = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    made = subprocess.run([sys.executable, "-c", CHANGE], cwd=tmp_path, env=own, stdout=subprocess.PIPE, text=True)
    pids, codes = zip(*(line.split() for line in made.stdout.splitlines()))
    assert codes == ("1", "2", "3")
    log = (tmp_path / "log").read_text().splitlines()
    assert log == [f"{pids[0]} 1 {not threads}", f"{pids[1]} 2 False", f"{pids[2]} 3 False"]


def test_modules_are_the_tools_own(tmp_path, monkeypatch, bare_server):
    """Not those of the same name in the folder in which a sweep is started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("import sys; print(sys.modules['schedules'].__file__)")
    (tmp_path / "schedules.py").write_text("")
    monkeypatch.setattr(forkserver, "PRELOAD", ("schedules",))
    assert ended(ForkedRun([str(tmp_path / "script.py")], tmp_path / "log", os.environ)) == 0
    assert (tmp_path / "log").read_text() == f"{ROOT / 'schedules.py'}\n"


def test_a_killed_sweep_leaves_its_runs_and_no_server(tmp_path):
    (tmp_path / "script.py").write_text("import sys, time; time.sleep(0.3); open(sys.argv[1], 'w').close()")
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from multiprocessing import forkserver as standard
from pathlib import Path
from study import forkserver
forkserver.PRELOAD = ()
forkserver.ForkedRun([{str(tmp_path / "script.py")!r}, {str(tmp_path / "done")!r}], Path("log"), os.environ)
print(standard._forkserver._forkserver_pid, flush=True)
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, check=False)
    pid = int(killed.stdout)
    until(lambda: not forkserver.lives(pid))
    until((tmp_path / "done").exists)


def backend_of(script: Path, slots: list[str | None], monkeypatch) -> processes.LocalProcesses:
    monkeypatch.setattr(processes, "TRAIN", script)
    return processes.LocalProcesses(slots, 1, 2)


def job(name: str, devices: int = 1) -> processes.Job:
    return processes.Job([], type("Args", (), {"name": name, "devices": devices})())


def test_without_a_server_runs_are_plain_processes(tmp_path, monkeypatch, bare_server, capfd):
    (tmp_path / "trouble.py").write_text("raise OSError")
    (tmp_path / "script.py").write_text("import sys; sys.exit(5)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(forkserver, "PRELOAD", ("trouble",))
    backend = backend_of(tmp_path / "script.py", [None, None], monkeypatch)
    backend.start(job("r"), [sys.executable, str(tmp_path / "script.py")], tmp_path, tmp_path / "log", again=False)
    assert isinstance(backend.active["r"][0], subprocess.Popen)
    end = []
    until(lambda: end.extend(backend.wait(0)) or end)
    assert end == [("r", processes.Exit(5, 0))]


@pytest.mark.parametrize("slot", ["1", None, "2,3"])
def test_a_run_sees_the_gpus_of_its_slot(slot, tmp_path, monkeypatch, bare_server):
    """One of several processes is started afresh; the others are forked. None sees what another one was given."""
    script = tmp_path / "script.py"
    script.write_text('import os\nprint(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("PYTHONPATH"))\n')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("PYTHONPATH", "/own")
    backend = backend_of(script, ["5", slot], monkeypatch)
    kinds = []
    for name, devices in (("a", 1), ("b", 2 if slot == "2,3" else 1)):
        backend.start(job(name, devices), [sys.executable, str(script)], tmp_path, tmp_path / name, again=False)
        kinds.append(type(backend.active[name][0]))
    while backend.active:
        backend.wait(0.01)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["5 /own\n", f"{slot or 7} /own\n"]
    assert kinds == [ForkedRun, subprocess.Popen if slot == "2,3" else ForkedRun]


def test_single_runs_need_no_server(monkeypatch):
    monkeypatch.setattr(processes, "start_server", lambda: pytest.fail("a server was started"))
    assert processes.LocalProcesses([None], 1, 1).has_room()
    monkeypatch.setattr(processes, "possible", lambda: False)
    assert processes.LocalProcesses([None], 1, 5).has_room()


@pytest.fixture(scope="module")
def of_train():
    """of_train(script, option, ..., log=...) -> a run forked from a server that has imported train.py."""
    multiprocessing.forkserver._forkserver._stop()
    yield lambda script, *argv, log: ForkedRun([str(script), *argv], log, os.environ)
    multiprocessing.forkserver._forkserver._stop()


@pytest.mark.slow
def test_a_forked_run_has_the_bits_of_a_plain_one(of_train, tmp_path):
    argv = [*TINY, "--noise", "0.5", "--measure", "full", "--measure-budget", "0.5", "--runs", str(tmp_path)]
    run = of_train(processes.TRAIN, *argv, "--name", "forked", log=tmp_path / "log")
    plain = [sys.executable, str(processes.TRAIN), *argv, "--name", "plain"]
    subprocess.run(plain, capture_output=True, stdin=subprocess.DEVNULL, check=True)
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
        assert ended(of_train(tmp_path / "state.py", *argv, log=log)) == 0, log.read_text()
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
    argv = [*TINY, "--synthetic-train", "200000", "--runs", str(tmp_path)]
    run = of_train(processes.TRAIN, *argv, log=tmp_path / "log")
    until(lambda: catches(run.pid, signal.SIGUSR1))  # its imports are done; now it draws the images, for seconds
    os.kill(run.pid, signal.SIGTERM)
    assert ended(run) == 3
    assert "stopped by SIGTERM before training began" in (tmp_path / "log").read_text()
    assert os.listdir(tmp_path) == ["log"]
