"""Interruptions change nothing: kills, signals, damaged and missing checkpoints, full disks, second writers."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import record
import train
from conftest import TINY, same_weights, series, summary, weights

NOISY = [*TINY, "--noise", "0.5", "--sched", "onecycle", "--sched-epochs", "4", "--checkpoint-minutes", "0"]


TIMES = ("seconds", "images_per_second", "peak_memory_mb", "measure_seconds", "measure_share")


def measured(folder: Path) -> dict:
    """The summary but for times and memory."""
    return {k: v for k, v in summary(folder).items() if k not in TIMES}


def assert_same_run(a: Path, b: Path) -> None:
    assert same_weights(a, b)
    assert series(a) == series(b)
    assert measured(a) == measured(b)
    assert (a / "noise.npz").read_bytes() == (b / "noise.npz").read_bytes()


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def written(folder: Path) -> int:
    """When the last checkpoint was written, in nanoseconds; 0 before there is one."""
    with suppress(FileNotFoundError):
        return (folder / "last.ckpt").stat().st_mtime_ns
    return 0


def test_killed_twenty_times(zygote, tmp_path):
    """SIGKILL at random moments, many of them within a checkpoint (one is written after every step), and resumed."""
    argv = [*NOISY, "--runs", str(tmp_path), "--epochs", "16", "--measure-every", "3"]
    assert zygote.run([*argv, "--name", "whole"]) == [0]
    rng, kills, steps = random.Random(0), 0, set()
    folder = tmp_path / "cut"
    while kills < 20:
        before = written(folder)
        (pid,) = zygote.start([*argv, "--name", "cut", "--resume"])
        if rng.random() < 0.75:  # while it trains, once it has come a step further; else while it starts
            wait_for(lambda: written(folder) > before)
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
    assert len(steps) > 4  # they did come at different places
    assert zygote.run([*argv, "--name", "cut", "--resume"]) == [0]
    assert_same_run(tmp_path / "whole", folder)


@pytest.fixture(scope="module")
def whole(zygote, tmp_path_factory) -> Path:
    """The uninterrupted run of four epochs."""
    runs = tmp_path_factory.mktemp("whole")
    assert zygote.run([*NOISY, "--epochs", "4", "--runs", str(runs), "--name", "whole"]) == [0]
    return runs / "whole"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_status_is_3(zygote, whole, tmp_path, name):
    argv = [*NOISY, "--runs", str(tmp_path), "--epochs", "4"]
    (pid,) = zygote.start([*argv, "--name", "cut"])
    wait_for(lambda: (tmp_path / "cut" / "last.ckpt").exists())
    os.kill(pid, getattr(signal, name))
    assert zygote.wait() == [3]
    said = summary(tmp_path / "cut")
    assert (said["status"], said["reason"]) == ("stopped", name)
    assert record.load_state(tmp_path / "cut" / "last.ckpt")["step"] == said["steps"] < 20
    assert "--resume" in zygote.said()
    assert zygote.run([*argv, "--name", "cut", "--resume"]) == [0]
    assert_same_run(whole, tmp_path / "cut")


def test_a_second_interrupt_ends_at_once(zygote, tmp_path):
    (pid,) = zygote.start([*NOISY, "--runs", str(tmp_path), "--epochs", "200", "--name", "r"])
    wait_for(lambda: (tmp_path / "r" / "last.ckpt").exists())
    os.kill(pid, signal.SIGSTOP)  # so that both are there before the step ends
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    status = zygote.wait()
    assert status in ([-signal.SIGTERM], [3])  # the kernel may deliver SIGTERM first: then one stop is enough
    assert record.load_state(tmp_path / "r" / "last.ckpt")


def test_second_interrupt_by_handler():
    import hardware

    signals, killed = hardware.Signals(), []
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


@pytest.mark.parametrize("how", ["truncated", "garbage", "missing", "both"])
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
    said = zygote.said()
    assert ("last.ckpt is damaged" in said) == (how != "missing")
    assert ("starting at step 0" in said) == (how == "both")
    assert_same_run(whole, tmp_path / "cut")


def test_resume_without_a_run_starts_it_and_a_finished_one_is_left(go, capsys):
    folder = go("--noise", "0.5", "--resume")
    assert "starting at step 0" in capsys.readouterr().err
    before = {p: p.read_bytes() for p in folder.iterdir()}
    go("--noise", "0.5", "--resume")
    assert "finished already" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("grow", [("--epochs", "2", "4"), ("--max-steps", "7", "13")])
def test_a_finished_run_may_grow(go, grow):
    option, few, more = grow
    go("--noise", "0.5", option, few, name="a")
    a = go("--noise", "0.5", option, more, "--resume", name="a")
    b = go("--noise", "0.5", option, more, name="b")
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


def test_precision_and_threads_are_kept(go, monkeypatch):
    """`auto` keeps the first start's value, and so does the number of threads: bits depend on both."""
    args = train.options.parse(["--dataset", "synthetic"])
    config = {
        "options": vars(train.options.parse(["--dataset", "synthetic", "--threads", "3"])) | {"precision": "64-true"}
    }
    train.options.continue_from(args, config)
    assert (args.precision, args.threads) == ("64-true", 3)


def test_a_second_writer_is_refused(zygote, tmp_path, capsys):
    argv = [*NOISY, "--runs", str(tmp_path), "--name", "r", "--epochs", "200"]
    (pid,) = zygote.start(argv)
    wait_for(lambda: (tmp_path / "r" / "last.ckpt").exists())
    assert train.main([*argv, "--resume"]) == 2
    assert "another process is writing" in capsys.readouterr().err
    os.kill(pid, signal.SIGKILL)
    zygote.wait()
    assert len(list((tmp_path / "r").glob("events.out.tfevents.*"))) == 1


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
    said = zygote.said()
    assert "last.ckpt" in said and "cannot be written" in said and "Traceback" not in said
    assert summary(tmp_path / "r")["status"] == "failed"
    assert (tmp_path / "r" / "last.ckpt").read_bytes() == kept
    assert not list((tmp_path / "r").glob("*.tmp"))
    assert train.main([*argv, "--max-steps", "10", "--resume"]) == 0  # room again: it goes on


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
    assert summary(folder)["reason"].startswith("last.ckpt")


def test_changed_data_is_noticed(go, monkeypatch, capsys):
    go("--noise", "0.5", "--max-steps", "3")
    monkeypatch.setattr(train.noise, "apply", lambda kind, true, *_: true.roll(1))
    go("--noise", "0.5", "--max-steps", "5", "--resume", status=2)
    assert "labels are not those" in capsys.readouterr().err


def test_config_lists_every_segment(go):
    go("--noise", "0.5", "--max-steps", "3")
    folder = go("--noise", "0.5", "--max-steps", "6", "--threads", "2", "--resume")
    segments = json.loads((folder / "config.json").read_text())["segments"]
    assert [(s["step"], s["threads"]) for s in segments] == [(0, 1), (3, 2)]


def test_checkpoint_is_finite_and_plain(go):
    folder = go("--noise", "0.5")
    assert all(t.isfinite().all() for t in weights(folder).values())
    assert torch.load(folder / "previous.ckpt", weights_only=True)["step"] == 5
