"""Interruptions change nothing: kills, signals, damaged and missing checkpoints, full disks, second writers."""

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import epochwise
import train
from conftest import TINY, same_weights, series, slow, summary, until, weights
from engine import labels, record

NOISY = [*TINY, "--noise", "0.5", "--sched", "onecycle", "--sched-epochs", "4", "--checkpoint-minutes", "1e-6"]


TIMES = ("seconds", "images_per_second", "peak_memory_mb", "measure_seconds", "measure_share")


def measured(folder: Path) -> dict:
    """The summary but for times and memory."""
    return {k: v for k, v in summary(folder).items() if k not in TIMES}


def assert_same_run(a: Path, b: Path) -> None:
    assert same_weights(a, b)
    assert series(a) == series(b)
    assert measured(a) == measured(b)
    assert (a / "noise.npz").read_bytes() == (b / "noise.npz").read_bytes()


def written(folder: Path) -> int:
    """When the last checkpoint was written, in nanoseconds; 0 before there is one."""
    with suppress(FileNotFoundError):
        return (folder / "last.ckpt").stat().st_mtime_ns
    return 0


def lives(pid: int) -> bool:
    """Whether there is a process of this number; the zygote collects those that have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.parametrize("times", slow(12))
def test_killed_again_and_again(zygote, tmp_path, times):
    """SIGKILL at random moments, many of them within a checkpoint (one is written after every step), and resumed."""
    argv = [*NOISY, "--runs", str(tmp_path), "--epochs", str(min(16, 2 * times)), "--measure-every", "3"]
    assert zygote.run([*argv, "--name", "whole"]) == [0]
    rng, kills, steps = random.Random(0), 0, set()
    folder = tmp_path / "cut"
    while kills < times:
        before = written(folder)
        (pid,) = zygote.start([*argv, "--name", "cut", "--resume"])
        if rng.random() < 0.75:  # while it trains, once it has come a step further; else while it starts
            until(lambda: written(folder) > before or not lives(pid))
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, 1.5))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        (status,) = zygote.wait()
        if status == 0:  # it had finished: the kill came too late; begin a new one and go on killing
            assert_same_run(tmp_path / "whole", folder)
            shutil.rmtree(folder)
        else:
            assert status == -signal.SIGKILL
            kills += 1
            state = record.load_state(folder / "last.ckpt") if (folder / "last.ckpt").exists() else {"step": 0}
            steps.add(state["step"])
    assert len(steps) > times // 5  # they did come at different places
    assert zygote.run([*argv, "--name", "cut", "--resume"]) == [0]
    assert_same_run(tmp_path / "whole", folder)


@pytest.fixture(scope="module")
def whole(zygote, tmp_path_factory) -> Path:
    """The uninterrupted run of four epochs."""
    runs = tmp_path_factory.mktemp("whole")
    assert zygote.run([*NOISY, "--epochs", "4", "--runs", str(runs), "--name", "whole"]) == [0]
    return runs / "whole"


@pytest.mark.parametrize("name", ["SIGTERM", *slow("SIGINT", "SIGUSR1")])
def test_a_signal_saves_and_status_is_3(zygote, whole, tmp_path, name):
    argv = [*NOISY, "--runs", str(tmp_path), "--epochs", "4"]
    assert zygote.run_and(lambda pid: os.kill(pid, getattr(signal, name)), [*argv, "--name", "cut"], at=7) == 3
    result = summary(tmp_path / "cut")
    assert (result["status"], result["reason"]) == ("stopped", name)
    assert record.load_state(tmp_path / "cut" / "last.ckpt")["step"] == result["steps"] < 20
    assert "--resume" in zygote.output()
    assert zygote.run([*argv, "--name", "cut", "--resume"]) == [0]
    assert_same_run(whole, tmp_path / "cut")


def test_a_second_interrupt_ends_at_once(zygote, tmp_path):
    (pid,) = zygote.start([*NOISY, "--runs", str(tmp_path), "--epochs", "200", "--name", "r"])
    until((tmp_path / "r" / "last.ckpt").exists)
    os.kill(pid, signal.SIGSTOP)  # so that both are there before the step ends
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    status = zygote.wait()
    assert status in ([-signal.SIGTERM], [3])  # the kernel may deliver SIGTERM first: then one stop is enough
    assert record.load_state(tmp_path / "r" / "last.ckpt")


def test_second_interrupt_by_handler():
    from engine import interrupts

    signals, killed = interrupts.Signals(), []
    signals.hold()
    with signals.caught():
        original, os.kill = os.kill, lambda pid, number: killed.append(number)
        try:
            signals(signal.SIGTERM, None)
            signals(signal.SIGTERM, None)
            assert (signals.received, killed) == ("SIGTERM", [])  # a launcher repeats SIGTERM: still one clean stop
            signals.received = None
            signals(signal.SIGINT, None)
            signals(signal.SIGTERM, None)
            assert (signals.received, killed) == ("SIGINT", [signal.SIGTERM])
        finally:
            os.kill = original


@pytest.mark.parametrize("how", ["truncated", "missing", *slow("garbage", "both")])
def test_damaged_checkpoint(zygote, whole, tmp_path, how):
    argv = [*NOISY, "--epochs", "4", "--runs", str(tmp_path)]
    shutil.copytree(whole, tmp_path / "cut")
    last, previous = tmp_path / "cut" / "last.ckpt", tmp_path / "cut" / "previous.ckpt"
    content = last.read_bytes()
    if how == "missing":  # a kill between the two renames leaves just the previous one
        last.unlink()
    else:
        last.write_bytes(content[: len(content) // 2] if how != "garbage" else b"no checkpoint")
    if how == "both":
        previous.write_bytes(b"")
    assert zygote.run([*argv, "--name", "cut", "--resume"]) == [0]
    result = zygote.output()
    assert ("last.ckpt is damaged" in result) == (how != "missing")
    assert ("no readable checkpoint" in result and "starting at step 0" in result) == (how == "both")
    assert_same_run(whole, tmp_path / "cut")


def test_resume_without_a_run_starts_it_and_a_finished_one_is_left(go, capsys):
    folder = go("--noise", "0.5", "--resume")
    assert "starting at step 0" in capsys.readouterr().err
    before = {p: p.read_bytes() for p in folder.iterdir()}
    go("--noise", "0.5", "--resume")
    assert "finished already" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(("option", "before", "after"), [*slow(("--epochs", "2", "4")), ("--max-steps", "7", "13")])
def test_a_finished_run_may_grow(go, option, before, after):
    go("--noise", "0.5", option, before, name="a")
    a = go("--noise", "0.5", option, after, "--resume", name="a")
    b = go("--noise", "0.5", option, after, name="b")
    assert_same_run(a, b)


def test_other_options_are_refused_by_name(go, capsys, tmp_path):
    folder = go("--noise", "0.5", "--max-steps", "3")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    capsys.readouterr()
    change = ("--lr", "0.2", "--bs", "16", "--noise", "0.4", "--max-steps", "2", "--precision", "64-true")
    go("--noise", "0.5", *change, "--resume", status=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for text in ("--lr was 0.1 and is 0.2", "--bs", "--noise was 0.5", "--max-steps", "only grow", "--precision"):
        assert text in err
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_a_resume_without_the_options_says_the_words_that_go_on(go, capsys, tmp_path):
    folder = go("--noise", "0.5", "--norm", "gn", "--sched", "cosine", "--max-steps", "2")
    own = ["--runs", str(folder.parent), "--name", "r", "--resume"]
    capsys.readouterr()
    for given, clause in ([], ""), (["--lr", "0.3"], "--lr was 0.1 and is 0.3 now; "):
        assert train.main([*given, *own]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        words = f"--config {folder / 'config.json'} --resume --name r --runs {folder.parent}"
        assert line.startswith(f"train.py: error: {clause}{folder} was started with other options: {words} goes on")
        assert line.count(" was ") == 1 + bool(clause)
    assert train.main([*words.split(), "--max-steps", "3"]) == 0
    assert "resuming r at step 2 of 3" in capsys.readouterr().err and summary(folder)["steps"] == 3


def test_precision_and_threads_are_kept(go, monkeypatch):
    """`auto` keeps the first start's value, and so does the number of threads: bits depend on both."""
    args = train.options.parse(["--dataset", "synthetic"])
    config = {
        "options": vars(train.options.parse(["--dataset", "synthetic", "--threads", "3"])) | {"precision": "64-true"}
    }
    train.identity.continue_from(args, config)
    assert (args.precision, args.threads) == ("64-true", 3)


def test_a_second_writer_is_refused(zygote, tmp_path, capsys):
    argv = [*NOISY, "--runs", str(tmp_path), "--name", "r", "--epochs", "200"]
    (pid,) = zygote.start(argv)
    until((tmp_path / "r" / "last.ckpt").exists)
    assert train.main([*argv, "--resume"]) == 2
    assert "another process is writing" in capsys.readouterr().err
    os.kill(pid, signal.SIGKILL)
    zygote.wait()
    assert len(record.Record(tmp_path / "r", False).event_sizes()) == 1


LIMIT = """
import resource, signal, train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))  # events fit, the second checkpoint's size does not
import os
os._exit(train.main({argv!r}))
"""


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(zygote, tmp_path, capsys):
    argv = [*TINY, "--noise", "0.5", "--runs", str(tmp_path), "--name", "r"]
    assert train.main([*argv, "--max-steps", "5"]) == 0
    kept = (tmp_path / "r" / "last.ckpt").read_bytes()
    assert len(kept) > 900_000
    assert zygote.run(code=LIMIT.format(argv=[*argv, "--max-steps", "10", "--resume"])) == [1]
    result = zygote.output()
    size = record.memory.format_bytes(record.size_of(record.load_state(tmp_path / "r" / "last.ckpt")))
    assert f"last.ckpt in {tmp_path / 'r'} cannot be written (File too large; it needs {size})" in result
    assert "Traceback" not in result
    assert summary(tmp_path / "r")["status"] == "failed"
    assert (tmp_path / "r" / "last.ckpt").read_bytes() == kept
    assert not list((tmp_path / "r").glob("*.tmp"))
    assert train.main([*argv, "--max-steps", "10", "--resume"]) == 0  # room again: it goes on


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_no_room_for_a_checkpoint_is_said_with_how_much_it_takes(tmp_path, monkeypatch):
    """torch makes an error of its own of what the system says while it saves."""
    full, opened = os.open("/dev/full", os.O_WRONLY), os.open
    state = {"model": {"w": torch.zeros(2**18)}, "optimizer": {"state": [torch.zeros(2**18)]}, "step": 3}
    monkeypatch.setattr(
        record.files.os, "open", lambda path, *_: full if "last.ckpt" in str(path) else opened(path, *_)
    )
    monkeypatch.setattr(record.files.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**18))
    with pytest.raises(OSError, match="No space left on device; it needs 2.0 MiB, 768.0 KiB are free"):
        record.write_state(tmp_path / "last.ckpt", state)
    assert not list(tmp_path.iterdir())


def test_the_start_says_where_there_is_no_room_for_checkpoints(go, monkeypatch, capsys):
    go("--max-steps", "1")
    assert "room" not in capsys.readouterr().err
    monkeypatch.setattr(record.files.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    folder = go("--max-steps", "1", name="full")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "room" in line)
    assert line.startswith("train.py: warning: --runs ") and line.endswith("of room, and 1.0 MiB are free")
    size = record.size_of(record.load_state(folder / "last.ckpt"))
    assert float(re.search(r"up to ([0-9.]+) MiB", line)[1]) == pytest.approx(3 * size / 2**20, rel=0.03)


def test_a_read_only_file_system(go, monkeypatch, capsys, tmp_path):
    """No folder can be made: bad input. Refused later: status 1 and one line. (As root, permissions refuse nothing.)"""

    def refuse(*_, **__):
        raise OSError(30, os.strerror(30))

    with monkeypatch.context() as m:
        m.setattr(Path, "mkdir", refuse)
        assert train.main([*TINY, "--runs", str(tmp_path / "new"), "--name", "r"]) == 2
    assert "Read-only file system" in capsys.readouterr().err
    monkeypatch.setattr(record.os, "fsync", refuse)
    folder = go("--noise", "0.5", status=1)
    err = capsys.readouterr().err
    assert "Read-only file system" in err and "Traceback" not in err
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.ckpt"))


GN = ("--noise", "0.5", "--norm", "gn", "--checkpoint-minutes", "0")
REFUSING = """
import os, signal, sys
from engine import eventfile, files, record
import train
full = []  # there is no room for files with one of these in their name

def refusing(write, path):
    def act(*args):
        if any(name in os.fsdecode(path(args[0])) for name in full):
            raise OSError(28, os.strerror(28))
        return write(*args)
    return act

def before(owner, name, act):
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **named: (act(*args), original(*args, **named))[1])

record.write_temporary = refusing(record.write_temporary, lambda path: path)
files.replace = refusing(files.replace, lambda path: path)
eventfile.EventFile.flush = refusing(eventfile.EventFile.flush, lambda self: self.file.name)
{code}
status = train.main({argv!r})
sys.stdout.flush()
os._exit(status)
"""
STOP = """
def stop(job, batch, step, *_):
    if step == 2:
        full.append("last.ckpt")
        os.kill(os.getpid(), signal.SIGTERM)
before(train, "train_step", stop)
"""
REFUSED = {  # when: (what is refused then, what the line names, the last checkpoint's step)
    "at the start": ("full.append('events')", "the event file", None),
    "with the first values": (
        "before(record.Record, 'start', lambda *_: full.append('events'))",
        "the event file",
        None,
    ),
    "at an epoch's end": (
        "before(train, 'validate', lambda job, _: full.extend(['events'] * (job.state.step == 10)))",
        "the event file",
        5,
    ),
    "after a signal": (STOP, "last.ckpt", None),
    "with the hyperparameters": (
        "before(record.Record, 'session_ended', lambda *_: full.append('events'))",
        "the event file",
        10,
    ),
    "in the last summary": (
        "before(record.Record, 'session_ended', lambda *_: full.append('summary.json'))",
        "summary.json",
        10,
    ),
}


@pytest.mark.parametrize(
    ("when", "ranks"),
    [
        *((when, 1) for when in REFUSED),
        *slow(*((when, 2) for when in REFUSED)),
    ],
)
def test_whatever_is_refused_ends_the_run_with_one_line(zygote, plain, tmp_path, when, ranks):
    """Status 1 on all processes, and no checkpoint that lacks what was refused: once there is room nothing is missing."""
    code, name, step = REFUSED[when]
    argv = [*TINY, *GN, "--runs", str(tmp_path), "--name", "r"]
    assert zygote.run(code=REFUSING.format(code=code, argv=argv), ranks=ranks) == [1] * ranks, zygote.output()
    result = zygote.output()
    assert result.count("train.py: error: ") == 1 and f"{name} in {tmp_path}" in result and "No space left" in result
    assert "Traceback" not in "".join(map(zygote.output, range(ranks))) and "stopped by" not in result
    assert "test accuracy" not in result
    assert summary(tmp_path / "r")["status"] == ("running" if name == "summary.json" else "failed")
    last = tmp_path / "r" / "last.ckpt"
    assert (record.load_state(last)["step"] if last.exists() else None) == step
    assert train.main([*argv, "--resume"]) == 0
    assert steps(tmp_path / "r") == steps(plain)


@pytest.fixture(scope="module")
def plain(zygote, tmp_path_factory) -> Path:
    """An uninterrupted run of two epochs."""
    runs = tmp_path_factory.mktemp("plain")
    assert zygote.run([*TINY, *GN, "--runs", str(runs), "--name", "plain"]) == [0]
    return runs / "plain"


@pytest.fixture
def copied(plain, tmp_path) -> Path:
    """A copy of it where `go` resumes it."""
    return Path(shutil.copytree(plain, tmp_path / "runs" / "r"))


def steps(folder: Path) -> dict[str, list[int]]:
    """Where the points of each series stand."""
    return {tag: [step for step, _ in points] for tag, points in series(folder).items()}


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.iterdir()}


def refused(go, capsys, folder: Path, *options: str) -> str:
    """The one line with which a resume is refused; nothing in the folder has changed."""
    before = content(folder)
    capsys.readouterr()
    go(*GN, *options, "--resume", name=folder.name, status=2)
    err = capsys.readouterr().err.splitlines()
    assert content(folder) == before
    assert sum("error: " in line for line in err) == 1 and not any("Traceback" in line for line in err)
    return err[-1]


@pytest.mark.parametrize("config", ["", "{}", "[1]", None])
def test_without_config_json_the_checkpoint_knows_the_options(go, capsys, copied, config):
    folder = copied
    if config is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(config)
    line = refused(go, capsys, folder, "--lr", "0.3", "--bs", "16")
    assert "--lr was 0.1 and is 0.3" in line and "--bs was 32" in line
    if config is None:
        go(*GN, "--epochs", "3", "--resume")
        assert [s["step"] for s in json.loads((folder / "config.json").read_text())["segments"]] == [0, 10]


def test_what_the_checkpoint_says_counts(go, capsys, copied):
    """config.json is another run's, or was so before the folder was locked."""
    folder = copied
    config = json.loads((folder / "config.json").read_text())
    config["options"]["lr"] = 0.3
    (folder / "config.json").write_text(json.dumps(config))
    assert "--lr was 0.1 and is 0.3" in refused(go, capsys, folder, "--lr", "0.3")
    config["options"]["lr"], config["noise"]["labels_sha256"] = 0.1, "another"
    (folder / "config.json").write_text(json.dumps(config))
    assert "labels are not those" in refused(go, capsys, folder)


TOO_BIG = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), MemoryError(), TOO_BIG], ids=["EIO", "ME", "torch"]
)
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(go, monkeypatch, capsys, copied, error):
    def fail(*_, **__):
        raise error

    if isinstance(error, OSError):
        read = record.files.open_regular
        monkeypatch.setattr(
            record.files, "open_regular", lambda path, *mode: (fail if path.suffix == ".ckpt" else read)(path, *mode)
        )
    else:
        monkeypatch.setattr(record.torch, "load", fail)
    assert f"{copied / 'last.ckpt'} cannot be read" in refused(go, capsys, copied)


def test_a_checkpoint_that_one_process_cannot_read(zygote, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "r")
    before = content(tmp_path / "r")
    argv = [*TINY, *GN, "--epochs", "3", "--runs", str(tmp_path), "--name", "r", "--resume"]
    code = "import os, train\nfrom engine import checkpoints\ndef fail(_): raise OSError(116, os.strerror(116))\nif rank: checkpoints.load_state = fail\n"
    assert zygote.run(code=f"{code}os._exit(train.main({argv!r}))", ranks=2) == [2, 2]
    assert "last.ckpt cannot be read by another process" in zygote.output() and "Traceback" not in zygote.output(1)
    assert content(tmp_path / "r") == before


@pytest.mark.parametrize("left", ["the older checkpoint's", "too little", "nothing"])
def test_lost_events(go, capsys, plain, copied, left):
    """A machine that went down may lose what was not yet on its disk."""
    folder = copied
    (events,) = (path for path in folder.glob("events*") if path.suffix != ".hparams")
    sizes = [record.load_state(folder / f"{name}.ckpt")["events"][events.name] for name in ("previous", "last")]
    os.truncate(events, {"the older checkpoint's": sizes[1] - 1, "too little": sizes[0] - 1, "nothing": 0}[left])
    if left == "nothing":
        events.unlink()
    if left != "the older checkpoint's":
        assert f"{events} has lost events" in refused(go, capsys, folder)
        (folder / "previous.ckpt").write_bytes(b"")
        assert f"{events} has lost events" in refused(go, capsys, folder)
        return
    capsys.readouterr()
    go(*GN, "--resume")
    assert "has lost events that last.ckpt goes on from; trying the one before" in capsys.readouterr().err
    assert_same_run(plain, folder)


def stop_at(monkeypatch, step: int) -> None:
    """A SIGTERM during that step."""
    original = train.train_step

    def act(job, batch, number, measured):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(job, batch, number, measured)

    monkeypatch.setattr(train, "train_step", act)


def test_a_damaged_checkpoint_does_not_replace_a_good_one(go, monkeypatch, copied):
    folder = copied
    (folder / "last.ckpt").write_bytes(b"no checkpoint")
    stop_at(monkeypatch, 7)
    go(*GN, "--resume", status=3)
    assert [record.load_state(folder / f"{name}.ckpt")["step"] for name in ("last", "previous")] == [8, 5]
    stop_at(monkeypatch, 8)
    go(*GN, "--resume", status=3)
    assert [record.load_state(folder / f"{name}.ckpt")["step"] for name in ("last", "previous")] == [9, 8]


def test_events_are_on_the_disk_before_their_checkpoint(go, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(record.os, "fsync", lambda f: (synced.append(os.fstat(f).st_ino), fsync(f)))
    folder = go("--noise", "0.5", "--epochs", "1")
    (events,) = (path for path in folder.glob("events*") if path.suffix != ".hparams")
    order = [path.stat().st_ino for path in (folder / "config.json", events, folder / "last.ckpt")]
    assert [inode for inode in synced if inode in order] == order
    assert (folder / "summary.json").stat().st_ino in synced


@pytest.mark.parametrize("measure", ["split", *slow("full")])
def test_a_signal_once_there_is_a_folder(go, monkeypatch, capsys, measure):
    options = ("--noise", "0.5", "--measure", measure, "--measure-budget", "5", "--epochs", "1")
    whole = go(*options, name="whole")
    claim = record.Record.claim
    with monkeypatch.context() as m:
        m.setattr(record.Record, "claim", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), claim(*args))[1])
        folder = go(*options, name="cut", status=3)
    assert "stopped by SIGTERM before the first step;" in capsys.readouterr().err
    assert (summary(folder)["status"], summary(folder)["steps"]) == ("stopped", 0)
    go(*options, "--resume", name="cut")
    assert_same_run(whole, folder)


@pytest.mark.slow
def test_a_grown_run_keeps_its_first_plan(go, monkeypatch):
    """Five steps afford one full measurement, fifteen two of them eight steps apart: they stay at 4, 10, ..., as they began."""
    for name, small in (("CURVATURE_EXAMPLES", 16), ("CURVATURE_PRODUCTS", 2), ("TRACE_PROBES", 2)):
        monkeypatch.setattr(epochwise, name, small)
    options = ("--noise", "0.5", "--measure", "full", "--measure-budget", "8")
    folder = go(*options, "--epochs", "1")
    plan = record.load_state(folder / "last.ckpt")["plan"]
    assert (plan["steps"], plan["total_steps"]) == (6, 5)
    assert (
        go(*options, "--epochs", "3", name="long")
        and record.load_state(folder.parent / "long" / "last.ckpt")["plan"]["steps"] == 8
    )
    go(*options, "--epochs", "3", "--resume")
    assert record.load_state(folder / "last.ckpt")["plan"] == plan
    assert steps(folder)["null/cos_clean_all"] == [4, 10]


def test_what_did_not_fit_at_first_is_planned_when_the_run_grows():
    first = {"steps": 6, "probe": 0, "share": 0.1, "total_steps": 5}
    now = {"steps": 4, "probe": 2, "share": 0.2, "total_steps": 15}
    assert epochwise.kept_plan(first, now) == {"steps": 6, "probe": 2, "share": 0.1, "total_steps": 5}
    assert epochwise.kept_plan({}, now) == now


def saves(monkeypatch) -> list[int]:
    """The steps at which last.ckpt is written, filled in as a run goes on."""
    steps, save = [], record.Record.save
    monkeypatch.setattr(record.Record, "save", lambda *args: (steps.append(args[1]["step"]), save(*args)))
    return steps


@pytest.mark.parametrize(("minutes", "at"), [("2", [4, 8, 10]), ("0", [5, 10]), ("1e-6", [*range(1, 11)]), ("9", [10])])
def test_checkpoints_by_time(go, monkeypatch, minutes, at):
    """A step takes half a minute, an epoch has five: after that many minutes and at the end, not after each epoch."""
    step, clock, steps = train.train_step, [0.0], saves(monkeypatch)
    monkeypatch.setattr(
        train, "train_step", lambda *args, **named: (clock.append(clock[-1] + 30), step(*args, **named))[1]
    )
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    go("--noise", "0.5", "--checkpoint-minutes", minutes)
    assert steps == at


def test_a_stop_saves_whatever_the_time_and_once(go, monkeypatch):
    steps = saves(monkeypatch)
    stop_at(monkeypatch, 4)  # the last step of its epoch
    go("--noise", "0.5", status=3)
    assert steps == [5]


CLOCK = """
import os, time, types, train
from engine import agreement, record
written, save = [], record.Record.save
record.Record.save = lambda *args: (written.append(args[1]["step"]), save(*args))
agreement.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1e6 * (rank == {ahead}))
status = train.main({argv!r})
print("written", written, flush=True)
os._exit(status)
"""


@pytest.mark.parametrize(("ahead", "at"), slow((0, [5, 10, 15]), (1, [15])))
def test_the_clock_of_rank_0_decides_for_all(zygote, tmp_path, ahead, at):
    argv = [*TINY, "--noise", "0.5", "--norm", "gn", "--epochs", "3", "--runs", str(tmp_path), "--name", "r"]
    assert zygote.run(code=CLOCK.format(ahead=ahead, argv=argv), ranks=2) == [0, 0], zygote.output()
    assert f"written {at}" in zygote.output(0) and "written []" in zygote.output(1)


def test_checkpoints_do_not_count_as_training(go, monkeypatch):
    """By a clock on which a step takes a second and a checkpoint a thousand."""
    clock = [0.0]

    def taking(seconds: float, act):
        return lambda *args, **named: (clock.append(clock[-1] + seconds), act(*args, **named))[1]

    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    monkeypatch.setattr(train, "train_step", taking(1, train.train_step))
    monkeypatch.setattr(train, "checkpoint", taking(1000, train.checkpoint))
    folder = go("--noise", "0.5", "--checkpoint-minutes", "1e-6")
    assert clock[-1] > 9000  # after each step
    assert 0 < record.load_state(folder / "last.ckpt")["steps_seconds"] <= 10


def test_changed_data_is_noticed(go, monkeypatch, capsys):
    go("--noise", "0.5", "--max-steps", "3")
    monkeypatch.setattr(labels, "apply", lambda kind, true, *_: true.roll(1))
    go("--noise", "0.5", "--max-steps", "5", "--resume", status=2)
    assert "labels are not those" in capsys.readouterr().err


@pytest.mark.slow
def test_config_lists_every_segment(go):
    go("--noise", "0.5", "--max-steps", "3")
    folder = go("--noise", "0.5", "--max-steps", "6", "--threads", "2", "--resume")
    segments = json.loads((folder / "config.json").read_text())["segments"]
    assert [(s["step"], s["threads"]) for s in segments] == [(0, 1), (3, 2)]


def test_checkpoint_is_finite_and_plain(go):
    folder = go("--noise", "0.5", "--checkpoint-minutes", "0")
    assert all(t.isfinite().all() for t in weights(folder).values())
    assert torch.load(folder / "previous.ckpt", weights_only=True)["step"] == 5
