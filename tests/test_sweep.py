"""Grids, presets, and the scheduler: what is started, skipped, resumed, reported; with a stand-in for train.py."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import sweep
import train
from conftest import ROOT, TINY, until
from data import InputError
from engine import identity, options
from study import exports, grids, joblist, processes, runfolders, scheduler
from study.cluster import Request, fit_to_nodes

FAKE = Path(__file__).with_name("fake_train.py")


@pytest.fixture
def fake(tmp_path, monkeypatch, bare_server):
    """fake(*arguments) -> exit status of a sweep in tmp_path/runs whose runs are those of fake_train.py."""
    monkeypatch.setattr(processes, "TRAIN", FAKE)
    monkeypatch.setattr(scheduler, "POLL", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return lambda *argv: sweep.main([*argv, "--runs", str(tmp_path / "runs")])


@pytest.fixture
def held(tmp_path, monkeypatch) -> Path:
    """Runs of the fixture `fake` wait after their first step for a signal, or for this file."""
    monkeypatch.setenv("FAKE_HOLD", str(tmp_path / "go"))
    return tmp_path / "go"


def history(tmp_path) -> list[list[str]]:
    path = tmp_path / "runs" / "history.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def started(tmp_path) -> list[str]:
    return [words[1] for words in history(tmp_path) if words[0] == "start"]


def once(condition, act, *arguments) -> None:
    """Do something beside a sweep as soon as a condition holds."""
    threading.Thread(target=lambda: (until(condition), act(*arguments)), daemon=True).start()


# ------------------------------------------------------------------------------------------------- grids and presets


def test_a_grid_is_every_combination_once():
    jobs = grids.expand(["noise=0,0.5 bs=16,64 sched=onecycle", "noise=0.5 bs=64,128 sched=onecycle"], [], "--grid")
    assert [(j.args.noise, j.args.bs) for j in jobs] == [(0, 16), (0, 64), (0.5, 16), (0.5, 64), (0.5, 128)]
    assert jobs[0].name == "noise0_bs16" and jobs[0].argv == "--noise 0 --bs 16 --sched onecycle".split()


def test_a_sweep_of_several_grids():
    words = "--grid", "bs=16 sched-steps=80", "--grid", "bs=16,64 sched-epochs=20", "--seeds", "0,1"
    args, extra = sweep.parser().parse_known_args(words)
    actual = [(j.args.bs, j.args.sched_steps, j.args.sched_epochs, j.args.seed) for j in sweep.jobs_of(args, extra)]
    assert sorted(map(str, actual)) == sorted(
        str((b, steps, epochs, s))
        for b, steps, epochs in ((16, 80, None), (16, None, 20), (64, None, 20))
        for s in (0, 1)
    )


def test_axes_that_move_together_switches_and_defaults():
    jobs = grids.expand(
        ["seed+noise-seed=0,7 bs+lr=64:0.05,128:0.1 no-augment=on,off subset=default,1000"], [], "--grid"
    )
    actual = {(j.args.seed, j.args.noise_seed, j.args.bs, j.args.lr, j.args.no_augment, j.args.subset) for j in jobs}
    assert actual == {
        (s, s, b, lr, a, n)
        for s in (0, 7)
        for b, lr in ((64, 0.05), (128, 0.1))
        for a in (True, False)
        for n in (None, 1000)
    }
    assert len(jobs) == len(actual) == 16


def test_options_of_train_pass_through_and_override(fake, capsys):
    assert fake("--grid", "bs=16,32", "--epochs", "2", "--width", "8", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("--epochs 2 --width 8" in line for line in lines[:2]) and "2 of 2 runs" in lines[2]


def test_seeds_set_initialization_noise_and_split():
    three = lambda jobs: [(j.args.seed, j.args.noise_seed, j.args.split_seed) for j in jobs]  # noqa: E731
    assert three(grids.expand(["noise=0.5"], [], "--grid", ["0", "3"])) == [(0, 0, 0), (3, 3, 3)]
    assert three(grids.expand(["noise=0.5"], ["--split-seed", "7"], "--grid", ["0", "3"])) == [(0, 0, 7), (3, 3, 7)]
    assert three(grids.expand(["seed+noise-seed+split-seed=0,1,2"], [], "--grid", ["5"])) == [(5, 5, 5)]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("bs=16,x", "--bs: 'x' is not a whole number"),
        ("what=1", "'what' is not an option"),
        ("bs", "'bs' is not NAME=VALUE"),
        ("", "it is empty"),
        ("name=a,b", "'name' is not an option"),
        ("seed+noise-seed=1:2:3", "not one value for each"),
        ("no-augment=maybe", "a switch"),
        ("sched-steps=5 sched-epochs=3", "once"),
        ("bs=16 compile=on,off", "'compile' changes where a run happens"),
        ("data_dir=a,b", "give --data-dir for all runs"),
    ],
)
def test_a_bad_grid_is_one_line_and_status_2(grid, message, fake, capsys, tmp_path):
    assert fake("--grid", grid) == 2
    err = capsys.readouterr().err
    assert err.startswith("sweep.py: error: --grid") and message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "report", "--part", "9"], "--part 9"),
        (["--grid", "bs=16", "--with-1024"], "--with-1024"),
        (["--grid", "bs=16", "--name", "x"], "--name"),
        (["--grid", "bs=16", "--jobs", "0"], "--jobs"),
        (["--grid", "bs=16", "--wrong", "1"], "--wrong"),
        (["--grid", "bs=16", "--done", "absent.npz"], "absent.npz"),
        (["--grid", "bs=16", "--num-nodes", "2"], "--num-nodes 2"),
        (["--grid", "bs+seed=16:0,32:1", "--seeds", "5"], "--seeds: --grid varies --bs together with the seed"),
        (["--seeds", "1"], "--preset"),
        (["--grid", "bs=16", "--seeds", ""], "--seeds ''"),
        (["--grid", "bs=16", "--seeds", "0,,1"], "--seeds '0,,1'"),
    ],
)
def test_bad_options_are_one_line_and_status_2(argv, message, fake, capsys):
    assert fake(*argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_done_is_no_pipe(fake, capsys, tmp_path):
    """It would be waited for."""
    os.mkfifo(tmp_path / "done.npz")
    assert fake("--grid", "bs=16", "--done", str(tmp_path / "done.npz")) == 2
    assert "done.npz: not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["file/below", "file/below/that", "folder"])
def test_a_place_that_cannot_be_written_is_one_line_and_status_2(below, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / processes.LOGS).write_text("")
    assert sweep.main(["--grid", "bs=16", "--runs", str(tmp_path / below)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"sweep.py: error: --runs {tmp_path / below}: ")


def test_the_command_lines_schedule_length_replaces_the_grids():
    jobs = grids.expand(["bs=16,32 sched=onecycle sched-steps=80", "sched-epochs=3"], ["--sched-epochs=9"], "--grid")
    assert [(j.args.bs, j.args.sched_steps, j.args.sched_epochs) for j in jobs] == [
        (16, None, 9),
        (32, None, 9),
        (128, None, 9),
    ]
    assert "--sched-steps" not in jobs[0].argv and "80" not in jobs[0].argv


def own_data(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x_train=np.zeros(1))
    return str(path)


def test_paths_of_one_name_are_different_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a grid's values hold no space, and the folder's own name may
    sets = [own_data(Path(name)) for name in ("a/own.npz", "b/own.npz", "数据.npz")] + ["imgs.v1", "imgs.v2"]
    for version in sets[3:]:
        Path(version).mkdir()
    sets = f"dataset={','.join(sets)}"
    names = [j.name for j in grids.expand([sets], [], "--grid")]
    assert len(set(names)) == 5 and [n[:-6] for n in (*names[:2], *names[3:])] == [
        "own-",
        "own-",
        "imgs.v1-",
        "imgs.v2-",
    ]
    assert options.parser().parse_args(["--name", names[2]]).name == names[2]  # does not begin as an option does
    files = [["--noise-type", "file", "--noise-file", f"{folder}/n.pt", "--noise-labels", "x"] for folder in "ab"]
    assert options.parse(files[0]).name != options.parse(files[1]).name
    monkeypatch.chdir(tmp_path / "a")
    assert options.parse(["--dataset", "own.npz"]).name == names[0]


def test_two_runs_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"two runs would be called .*: --noise-labels was a@b and is a-b now"):
        grids.expand(["noise-labels=a@b,a-b"], ["--noise-type", "human", "--noise-file", "c.pt"], "--grid")


def test_a_schedule_of_the_default_length_is_the_same_run_however_it_is_written():
    first = {"options": vars(options.parse(["--sched", "onecycle", "--threads", "1"]))}
    again = options.parse(["--sched", "onecycle", "--sched-steps", "5000"])
    assert again.name == first["options"]["name"]
    identity.continue_from(again, first)
    with pytest.raises(InputError, match="--sched-steps was 5000 and is 4000 now"):
        identity.continue_from(options.parse(["--sched", "onecycle", "--sched-steps", "4000"]), first)


def preset(name: str, *parts: str, sizes: str = grids.REPORT_SIZES) -> list[grids.Job]:
    chosen = [
        g.format(sizes=sizes)
        for part, listed in grids.PRESETS[name].items()
        if not parts or part in parts
        for g in listed
    ]
    return grids.expand(chosen, [], name)


def test_the_reports_study():
    main, ratio, fmnist = (preset("report", part) for part in ("4-12", "13-14", "15-17"))
    assert (len(main), len(ratio), len(fmnist), len(preset("report"))) == (54, 24, 18, 96)
    assert len(preset("report", "4-12", sizes=grids.REPORT_SIZES + ",1024")) == 63
    plain = options.parse([])
    for job in main:
        a = job.args
        assert (a.dataset, a.model, a.epochs, a.lr, options.sched_steps(a, 1)) == ("cifar10", "resnet18", 64, 0.1, 5000)
        assert (a.momentum, a.wd, a.val_frac, a.width) == (plain.momentum, plain.wd, 0.2, 64)
    assert {(j.args.lr, j.args.bs, j.args.epochs, j.args.sched_steps) for j in ratio} == {
        (lr, B, 80, 25_000) for lr in (0.05, 0.1) for B in (64, 128)
    }
    assert {j.args.sched for j in ratio} == {"onecycle", "constant"}
    assert {(j.args.dataset, j.args.model, j.args.sched, j.args.noise) for j in fmnist} == {
        ("fmnist", "vgg16", "onecycle", n) for n in (0, 0.2, 0.5)
    }


def test_the_budget_study_matches_schedules_three_ways():
    jobs = preset("budget", "steps", "epochs", "examples")
    alike = lambda jobs: {joblist.identity_of(vars(job.args)) for job in jobs}  # noqa: E731
    assert alike(preset("report", "4-12")) <= alike(jobs)
    assert len(jobs) == 54 + 36 + 36
    length = {"steps": set(), "epochs": set(), "examples": set()}
    for a in (j.args for j in jobs if j.args.sched == "onecycle"):
        unit = "epochs" if a.sched_epochs else "examples" if a.sched_examples else "steps"
        n = -(-40_000 // a.bs)
        length[unit].add({"steps": 1, "epochs": 1 / n, "examples": a.bs}[unit] * options.sched_steps(a, n))
    assert length == {"steps": {5000}, "epochs": {64}, "examples": {640_000}}


def test_the_quick_study_can_be_judged():
    """Three seeds with a split each, three batch sizes, two budgets, noise and none, and A/A runs at every size."""
    jobs = preset("quick")
    assert {j.args.seed for j in jobs} == {0, 1, 2}
    assert all(j.args.seed == j.args.noise_seed == j.args.split_seed for j in jobs)
    for budget in ("steps", "epochs"):
        cells = {(j.args.noise, j.args.bs, j.args.seed) for j in preset("quick", budget)}
        assert len(cells) == 2 * 3 * 3
    aa = preset("quick", "aa")
    assert len(jobs) == 36 + 9 and {j.args.fake_mask for j in aa} == {0.5}
    assert {(j.args.bs, j.args.seed) for j in aa} == {(B, s) for B in (16, 64, 256) for s in range(3)}


def test_the_medium_study_can_be_judged():
    """Five seeds with a split each; the two budgets train the largest batch alike; one lr/B beside one rate."""
    jobs = preset("medium")
    assert len(jobs) == 2 * 75 + 30 + 80 + 15  # a scaled rate of 0.1 is the fixed one
    assert {(j.args.seed, j.args.noise_seed, j.args.split_seed) for j in jobs} == {(s, s, s) for s in range(5)}
    for budget in ("steps", "epochs"):
        cells = {(j.args.noise, j.args.bs, j.args.seed) for j in preset("medium", budget)}
        assert len(cells) == 3 * 5 * 5
    largest = [j.args for j in jobs if j.args.bs == 256 and j.args.sched != "constant"]
    assert {options.sched_steps(a, -(-3000 // 256)) for a in largest} == {12 * 16}
    assert {j.args.lr / j.args.bs for j in preset("medium", "scaled")} == {0.1 / 64}
    assert len(preset("medium", "aa")) == 15


def test_the_reports_own_cells_are_measured_as_its_plots():
    jobs = preset("full")
    report = {(j.args.sched, j.args.bs, j.args.noise): j.args for j in preset("report", "4-12")}
    assert len(jobs) == 18 and len(preset("full", "16-32")) == 6
    for a in (j.args for j in jobs):
        theirs = report[a.sched, a.bs, a.noise]
        named = ("dataset", "model", "width", "epochs", "lr", "momentum", "wd", "val_frac", "sched_steps", "end")
        assert [getattr(a, name) for name in named] == [getattr(theirs, name) for name in named]
        assert a.measure_bn == "eval"


# --------------------------------------------------------------------------------------------------------- scheduler


def test_everything_runs_once_and_only_once(fake, tmp_path, capsys):
    argv = ("--grid", "bs=16,32,64 epochs=1", "--jobs", "2", "--threads", "3")
    assert fake(*argv) == 0
    assert sorted(started(tmp_path)) == ["bs16", "bs32", "bs64"]
    assert all(words[2:4] == ["0", "3"] for words in history(tmp_path))
    assert fake(*argv) == 0
    assert len(started(tmp_path)) == 3
    assert capsys.readouterr().out.splitlines() == ["3 of 3 runs finished", "3 of 3 runs finished (3 of them before)"]


def test_jobs_at_a_time_and_their_share_of_the_cores(fake, held, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "cores", lambda: 4)
    once(lambda: len(started(tmp_path)) == 2, held.touch)
    assert fake("--grid", "bs=16,32,64,128 epochs=2", "--jobs", "2") == 0
    active = most = 0
    for what, *_ in history(tmp_path):
        active += 1 if what == "start" else -1
        most = max(most, active)
    assert most == 2 and {words[3] for words in history(tmp_path)} == {"2"}


def test_runs_are_spread_over_gpus(fake, held, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    once(lambda: len(started(tmp_path)) == 4, held.touch)
    assert fake("--grid", "bs=16,32,64,128 epochs=2", "--per-gpu", "2") == 0
    first = [words for words in history(tmp_path)][:4]
    assert [w[0] for w in first] == ["start"] * 4 and sorted(w[4] for w in first) == ["4", "4", "6", "6"]


def test_a_run_of_several_processes_has_its_gpus_or_its_share_of_the_cores(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "cores", lambda: 12)
    assert fake("--grid", "bs=16", "--devices", "2", "--jobs", "3", "--accelerator", "cpu", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("--threads 2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7,8,9")
    assert fake("--grid", "bs=16,32 epochs=1", "--devices", "2") == 0
    assert {(w[4], w[3]) for w in history(tmp_path)} == {("4,6", "3"), ("7,8", "3")}
    assert fake("--grid", "bs=64", "--devices", "6") == 2
    assert "--devices 6: this machine has 5 GPUs" in capsys.readouterr().err


def test_a_failure_is_reported_with_its_reason_and_not_repeated(fake, tmp_path, capsys):
    argv = ("--grid", "noise=0,0.9,0.2 epochs=1")
    assert fake(*argv) == 1
    assert "noise0.9: failed: train/loss is nan at step 3" in capsys.readouterr().err
    assert len(started(tmp_path)) == 3  # the failure stopped nothing
    assert fake(*argv) == 1
    assert "failed before: train/loss is nan" in capsys.readouterr().err
    assert len(started(tmp_path)) == 3
    assert fake(*argv, "--retry-failed") == 1
    assert started(tmp_path)[3:] == ["noise0.9"] and history(tmp_path)[-1][2] == "1"


def test_failures_without_a_folder_or_a_word(fake, tmp_path, capsys):
    assert fake("--grid", "lr=9 epochs=1") == 1
    assert "--lr 9: too large for a test" in capsys.readouterr().err
    assert fake("--grid", "lr=9 epochs=1") == 1  # remembered, though there is no folder
    assert "failed before: train.py: error: --lr 9" in capsys.readouterr().err
    assert fake("--grid", "wd=9 epochs=1") == 1
    assert "wd9.0_epochs1: failed: killed by signal 9; last line: step 1 is done" in capsys.readouterr().err
    assert fake("--grid", "wd=9 epochs=1", "--status") == 0
    assert "stopped   killed" in capsys.readouterr().out
    assert fake("--grid", "wd=9 bs=16,32 epochs=1", "--grid", "bs=64 epochs=1") == 1  # several: forked
    err = capsys.readouterr().err
    assert err.count("failed: killed by signal 9; last line: step 1 is done") == 2
    assert history(tmp_path)[-1][:2] == ["end", "bs64_wd0.0005"]


def test_a_reason_is_of_this_attempt(tmp_path):
    log = tmp_path / "log"
    log.write_text("an earlier reason\n")
    begin = log.stat().st_size
    assert (
        processes.failure_reason(log, -9, begin) == "killed by signal 9"
        and processes.failure_reason(log, 1, begin) == "exit status 1"
    )
    with open(log, "a") as f:
        f.write("x" * 2 * processes.LOG_TAIL + "\ntoo few examples\r 3/9 [2.1step/s]\n")
    assert processes.failure_reason(log, 2, begin) == "too few examples"


def test_a_damaged_folder_stops_nobody_else(fake, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert fake("--grid", "bs=16,32 epochs=1") == 0
    (runs / "bs16" / "summary.json").write_text("")
    (runs / "bs16" / "config.json").write_text("[]")
    assert fake("--grid", "bs=16,32 epochs=1", "--status") == 0
    assert "1 finished, 1 stopped of 2" in capsys.readouterr().out
    assert fake("--grid", "bs=16,32,64 epochs=1") == 0
    assert started(tmp_path)[2:] == ["bs16", "bs64"]


def test_an_error_in_the_sweep_leaves_no_run_behind(fake, held, tmp_path, monkeypatch, capsys):
    """Its second run cannot be started; the first saves, is waited for, and says so in its folder."""
    made = processes.command

    def command(job, *args):
        if job.args.bs == 32:
            until((tmp_path / "runs" / "bs16" / "steps.txt").exists)  # it listens now
            raise OSError(28, "No space left on device")
        return made(job, *args)

    monkeypatch.setattr(scheduler, "command", command)
    assert fake("--grid", "bs=16,32 epochs=90", "--jobs", "2") == 1
    assert "sweep.py: error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert [w[0] for w in history(tmp_path)] == ["start", "stop"]


def test_a_folder_of_other_options_is_reported_and_left_alone(fake, tmp_path, capsys):
    assert fake("--grid", "bs=16 epochs=1") == 0
    config = tmp_path / "runs" / "bs16_epochs1" / "config.json"
    config.write_text(config.read_text().replace("16", "17"))
    capsys.readouterr()
    for more in ((), ("--retry-failed",)):
        assert fake("--grid", "bs=16 epochs=1", *more) == 1
        err = capsys.readouterr().err
        assert f"{config.parent} is a run of other options (--bs was 17 and is 16 now)" in err
    assert len(started(tmp_path)) == 1
    assert fake("--grid", "bs=16 epochs=1", "--status") == 0
    assert "1 other of 1" in capsys.readouterr().out


def test_a_run_that_somebody_else_stops_is_not_done(fake, held, tmp_path):
    folder = tmp_path / "runs" / "bs16_epochs90"
    once((folder / "steps.txt").exists, lambda: os.kill(int((folder / "pid").read_text()), signal.SIGTERM))
    assert fake("--grid", "bs+epochs=16:90,32:1") == 3
    assert [w[:2] for w in history(tmp_path)][-1] == ["end", "bs32_epochs1"]


def test_a_run_that_fails_elsewhere_meanwhile_is_not_repeated(fake, tmp_path, monkeypatch, capsys):
    """It fails after this sweep has looked, in a process of somebody else."""
    seen, looked = [], processes.run_state

    def state(runs, job, done):
        if job.args.noise == 0.9:
            seen.append(1)
            if len(seen) > 1:
                (runs / job.name).mkdir(parents=True, exist_ok=True)
                (runs / job.name / "summary.json").write_text('{"status": "failed", "reason": "elsewhere"}')
        return looked(runs, job, done)

    monkeypatch.setattr(scheduler, "run_state", state)
    monkeypatch.setattr(sweep, "run_state", state)
    assert fake("--grid", "noise=0,0.9 epochs=1") == 1
    assert "noise0.9: failed: elsewhere" in capsys.readouterr().err
    assert started(tmp_path) == ["noise0"]


@pytest.mark.parametrize(
    ("first", "epochs"), [(signal.SIGTERM, "90"), (signal.SIGUSR1, "90"), (signal.SIGTERM, "90,1")]
)
def test_a_second_signal_kills_all_processes_of_a_run(first, epochs, fake, held, tmp_path, monkeypatch):
    """The run does not listen, and its second process holds the lock as long as it lives."""
    folder = tmp_path / "runs" / ("wd8.0_epochs90" if epochs == "90" else "epochs90")
    once((folder / "steps.txt").exists, os.kill, os.getpid(), first)
    stop = processes.LocalProcesses.stop

    def then_again(backend, force):
        stop(backend, force)
        if not force:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(processes.LocalProcesses, "stop", then_again)
    assert fake("--grid", f"wd=8 epochs={epochs}") == 3  # one of several is forked
    assert [w[0] for w in history(tmp_path)] == ["start"]
    until(lambda: not processes.is_held(folder))


def test_a_signal_lets_the_runs_save_and_they_are_resumed(fake, held, tmp_path, capsys):
    argv = ("--grid", "bs=16,32,64 epochs=6", "--jobs", "2")
    once(lambda: len(list(tmp_path.glob("runs/*/steps.txt"))) == 2, os.kill, os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    assert fake(*argv) == 3
    assert signal.getsignal(signal.SIGTERM) == before
    assert [w[0] for w in history(tmp_path)] == ["start", "start", "stop", "stop"]
    capsys.readouterr()
    assert fake(*argv, "--status") == 0
    assert "2 stopped, 1 waiting of 3" in capsys.readouterr().out
    held.touch()
    assert fake(*argv) == 0
    assert [w[2] for w in history(tmp_path) if w[0] == "start"] == ["0", "0", "1", "1", "0"]
    for folder in (p for p in (tmp_path / "runs").iterdir() if p.name.startswith("bs")):
        assert (folder / "steps.txt").read_text().split() == [
            str(i) for i in range(1, 7)
        ]  # no step twice, none left out


@pytest.mark.slow
def test_a_time_limit_lets_runs_save(fake, tmp_path, capsys):
    """--minutes ends a sweep in time; the same command goes on, and no step is lost or made twice."""
    argv = ("--grid", "bs=16,32 epochs=70", "--jobs", "2")
    assert fake(*argv, "--minutes", "0.1") == 3
    assert "the time is up, waiting for 2 runs to save and end" in capsys.readouterr().err
    assert sorted(w[0] for w in history(tmp_path)) == ["start", "start", "stop", "stop"]
    assert fake(*argv, "--minutes", "10") == 0
    for folder in (p for p in (tmp_path / "runs").iterdir() if p.name.startswith("bs")):
        assert (folder / "steps.txt").read_text().split() == [str(i) for i in range(1, 71)]


def test_a_time_limit_ends_at_once_what_does_not_save(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    limit = scheduler.TimeLimit(10)
    for clock[0], starts, asked in ((0, True, 0), (539, True, 0), (541, False, 0), (571, False, 1), (600, False, 2)):
        assert (limit.allows_start(), limit.stops_asked()) == (starts, asked)
    short = scheduler.TimeLimit(1)  # a tenth of the minute for saving
    clock[0] = 600 + 53
    assert not short.allows_start() and short.stops_asked() == 0
    clock[0] = 1e9
    assert scheduler.TimeLimit(None).allows_start() and scheduler.TimeLimit(None).stops_asked() == 0


@pytest.mark.slow
def test_a_killed_sweeps_runs_are_waited_for(fake, tmp_path):
    """SIGKILL leaves the children alive; a new sweep neither starts them twice nor gives them up."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from study import forkserver, processes
import sweep
processes.TRAIN, forkserver.PRELOAD = Path({str(FAKE)!r}), ()
sweep.main(sys.argv[1:])
"""
    argv = ["--grid", "bs=16,32 epochs=30", "--jobs", "1", "--runs", str(tmp_path / "runs")]
    first = subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.DEVNULL)
    summary = tmp_path / "runs" / "bs16" / "summary.json"
    until(summary.exists)
    first.kill()
    first.wait()
    assert fake(*argv[:4]) == 0
    assert started(tmp_path) == ["bs16", "bs32"]


def test_runs_in_a_file_of_results_count_as_done(fake, tmp_path, capsys):
    own = vars(options.parse(["--bs", "16", "--epochs", "1"]))
    run = runfolders.Run(
        "bs16_epochs1", own, {}, {"status": "finished"}, {"val/acc": (np.array([0]), np.array([0.5]))}, ""
    )
    half = runfolders.Run("bs32_epochs1", {}, {}, {"status": "stopped"}, {}, "")
    exports.export_runs([run, half], tmp_path / "done.npz")
    assert fake("--grid", "bs=16,32 epochs=1", "--done", str(tmp_path / "done.npz")) == 0
    assert started(tmp_path) == ["bs32"]
    other = runfolders.Run("bs64_epochs1", own, {}, {"status": "finished"}, run.series, "")
    exports.export_runs([other], tmp_path / "other.npz")
    assert "--done" not in capsys.readouterr().err
    assert fake("--grid", "bs=64 epochs=1", "--done", str(tmp_path / "other.npz")) == 0
    assert f"--done: none of these 1 runs is finished in {tmp_path / 'other.npz'}" in capsys.readouterr().err
    assert started(tmp_path)[1:] == ["bs64_epochs1"]


def test_commands_for_job_arrays_can_be_repeated(fake, tmp_path, capsys):
    assert fake("--grid", "bs=16,32 epochs=1", "--print-commands") == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 2 and not (tmp_path / "runs").exists()
    for line in commands * 2:  # every line resumes, so a second submission does no harm
        words = shlex.split(line)
        assert words[0] == sys.executable and "--resume" in words and "--threads" not in words
        (tmp_path / "runs").mkdir(exist_ok=True)
        subprocess.run(words, check=True, capture_output=True)
    assert fake("--grid", "bs=16,32 epochs=1", "--print-commands") == 0
    assert capsys.readouterr() == ("", "# none of 2 runs is left to do\n")


def test_without_ray_the_option_says_what_to_install(fake, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert fake("--grid", "bs=16", "--ray", "auto") == 2
    err = capsys.readouterr().err
    assert "pip install -r requirements-ray.txt" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "nodes", "fits"),
    [
        ({}, [(8, 0), (4, 0)], (4, 0)),  # every node takes runs
        ({"jobs": 6}, [(8, 0), (4, 0)], (2, 0)),
        ({"size": 2}, [(8, 0), (1, 0)], (4, 0)),
        ({"threads": 8}, [(8, 0), (4, 0)], (8, 0)),
        ({"threads": 9}, [(8, 0), (4, 0)], "a run needs 9 CPUs (1 process of 9 threads), the largest node has 8"),
        ({"size": 9}, [(8, 0)], "a run needs 9 CPUs"),
        ({}, [], "the cluster has"),
        ({"share": 1}, [(16, 4), (64, 0)], (4, 1)),
        ({"share": 0.5}, [(16, 4)], (2, 0.5)),
        ({"share": 2, "size": 2}, [(16, 4), (16, 1)], (4, 2)),
        ({"share": 8, "size": 8}, [(16, 4)], "--devices 8"),
        ({"share": 1}, [(2, 0)], (2, 0)),  # no GPU in the cluster
        ({"share": 1}, [(2, 8)], (1, 1)),
    ],
)
def test_what_fits_on_a_cluster(asked, nodes, fits):
    where = Request(**{"address": "auto", "share": 0, "size": 1, "threads": None, "jobs": None, "retries": 0} | asked)
    if isinstance(fits, tuple):
        assert fit_to_nodes(where, nodes) == fits
    else:
        with pytest.raises(InputError) as e:
            fit_to_nodes(where, nodes)
        assert fits in str(e.value)


@pytest.fixture(scope="module")
def cluster():
    """A local Ray cluster of two nodes of one CPU each."""
    pytest.importorskip("ray", reason="Ray is optional: pip install -r requirements-ray.txt")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.second = made.add_node(num_cpus=1)
    yield made
    ray.shutdown()
    made.shutdown()


def test_on_a_ray_cluster_of_two_nodes(cluster, fake, tmp_path, capsys):
    """Six runs, two at a time; a failure is reported and stops nothing; nothing is done twice."""
    argv = ("--grid", "noise=0,0.9 bs=16,32,64 epochs=8", "--ray", cluster.address)
    assert fake(*argv) == 1
    assert capsys.readouterr().err.count("train/loss is nan") == 3
    assert len(started(tmp_path)) == 6
    active = [0]
    for what, *_ in (words for words in history(tmp_path) if "noise0.9" not in words[1]):
        active.append(active[-1] + (1 if what == "start" else -1))
    assert max(active) == 2  # one on each node
    assert {(w[3], w[5]) for w in history(tmp_path)} == {("1", os.getcwd())}  # threads that fit, the driver's folder
    assert fake(*argv) == 1 and len(started(tmp_path)) == 6
    capsys.readouterr()
    assert fake(*argv, "--retry-failed", "--threads", "2") == 2
    err = capsys.readouterr().err
    assert "needs 2 CPUs" in err and "largest node has 1" in err


def test_a_relative_folder_and_a_number_at_a_time_on_ray(cluster, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "bs16").mkdir(parents=True)
    config = {"options": {"bs": 16, "threads": 1}}
    (tmp_path / "runs" / "bs16" / "config.json").write_text(json.dumps(config))
    argv = ["--grid", "bs=16,32 epochs=8", "--ray", cluster.address, "--jobs", "1", "--runs", "runs"]
    assert sweep.main(argv) == 0
    assert [w[0] for w in history(tmp_path)] == ["start", "end", "start", "end"]
    assert [w[2] for w in history(tmp_path)] == ["1", "1", "0", "0"]


def test_a_second_signal_to_a_sweep_on_ray_kills(cluster, fake, tmp_path):
    folder = tmp_path / "runs" / "wd8.0_epochs200"

    def signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGTERM)

    once((folder / "steps.txt").exists, signals)
    assert fake("--grid", "wd=8 epochs=200", "--ray", cluster.address) == 3
    time.sleep(0.5)
    steps = (folder / "steps.txt").read_text()
    time.sleep(0.5)
    assert (folder / "steps.txt").read_text() == steps and [w[0] for w in history(tmp_path)] == ["start"]


def test_a_signal_to_a_sweep_on_ray_lets_the_runs_save(cluster, fake, tmp_path):
    argv = ("--grid", "bs=16,32,64 epochs=40", "--ray", cluster.address, "--threads", "1")
    once(lambda: len(list(tmp_path.glob("runs/*/steps.txt"))) == 2, os.kill, os.getpid(), signal.SIGTERM)
    assert fake(*argv) == 3
    assert [w[0] for w in history(tmp_path)] == ["start", "start", "stop", "stop"]


def test_a_lost_node_s_run_goes_on_elsewhere(cluster, fake, tmp_path):
    argv = ("--grid", "bs=16,32 epochs=40", "--ray", cluster.address, "--threads", "1")
    both = lambda: len(list(tmp_path.glob("runs/*/steps.txt"))) == 2  # noqa: E731
    once(both, lambda: cluster.remove_node(cluster.second, allow_graceful=False))
    assert fake(*argv) == 0
    assert [w[2] for w in history(tmp_path) if w[0] == "start"] == ["0", "0", "1"]  # one was resumed
    for folder in (p for p in (tmp_path / "runs").iterdir() if p.name.startswith("bs")):
        assert (folder / "steps.txt").read_text().split() == [str(i) for i in range(1, 41)]


# ---------------------------------------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_a_real_run_and_a_real_failure(tmp_path, capsys):
    """train.py itself: one run that finishes, one that its data cannot start."""
    tiny = [w for w in TINY if w not in ("--bs", "32", "--threads", "1")]
    assert sweep.main(["--grid", "bs=32,500", "--runs", str(tmp_path), *tiny]) == 1
    err = capsys.readouterr().err
    assert "--bs 500: larger than the training split of 160 examples" in err
    finished = [p for p in tmp_path.iterdir() if (p / "summary.json").exists()]
    assert len(finished) == 1 and json.loads((finished[0] / "summary.json").read_text())["status"] == "finished"
    assert runfolders.read_folder(finished[0]).finished
    assert sweep.main(["--grid", "bs=32,500", "--runs", str(tmp_path), *tiny, "--status"]) == 0
    assert "1 finished, 1 failed of 2" in capsys.readouterr().out  # its own options are not other ones


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_same_results(tmp_path):
    """Stopped in its second run and started again: the same series as runs by themselves, and the first run untouched."""
    own = [*TINY, "--epochs", "8", "--checkpoint-minutes", "0"]
    argv = ["--grid", "noise=0.5 seed=0,1", *own]
    jobs = grids.expand(["noise=0.5 seed=0,1"], own, "--grid")
    names = [job.name for job in jobs]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sweep.py"), *argv, "--runs", str(tmp_path / "killed")], stderr=subprocess.DEVNULL
    )
    second = tmp_path / "killed" / names[1]
    until(lambda: (second / "last.ckpt").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 3
    assert json.loads((second / "summary.json").read_text())["status"] == "stopped"
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / names[0]).iterdir()}
    assert sweep.main([*argv, "--runs", str(tmp_path / "killed")]) == 0
    assert first == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / names[0]).iterdir()}
    for job in jobs:
        assert train.main([*job.argv, "--runs", str(tmp_path / "whole"), "--name", job.name]) == 0
    for name in names:
        a, b = (runfolders.read_folder(tmp_path / where / name) for where in ("killed", "whole"))
        assert a.finished and a.series.keys() == b.series.keys()
        for tag in a.series:
            assert [v.tolist() for v in a.series[tag]] == [v.tolist() for v in b.series[tag]], tag
    assert len(json.loads((second / "config.json").read_text())["segments"]) == 2


def test_bad_grids_raise_input_errors():
    with pytest.raises(InputError):
        grids.axes("bs=", "--grid")
