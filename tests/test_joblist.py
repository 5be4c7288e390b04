"""A sweep's names, what it writes down in RUNS, and its last line; with a stand-in for train.py."""

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

import sweep
from conftest import TINY
from engine import options
from study import exports, grids, joblist, processes, results
from test_sweep import fake, held, once, started  # noqa: F401  fixtures


def names(*lines: str, extra: str = "", **kwargs) -> list[str]:
    return [job.name for job in grids.expand([*lines], extra.split(), "--grid", **kwargs)]


def test_names_are_what_the_runs_of_a_grid_differ_in():
    """Axes, at their default too; what all runs share is no part of a name, and three seeds that are alike are one."""
    actual = names("noise=0,0.5 bs=64,128 sched=onecycle seed+noise-seed=0,1 no-augment=off,on", extra="--epochs 3")
    assert len(set(actual)) == 16
    assert all(re.fullmatch(r"no-augment(-off)?_noise0(\.5)?_bs(64|128)_seed[01]_noise-seed[01]", n) for n in actual)
    assert sum("_bs128" in name and "noise0_" in name for name in actual) == 4  # as in TensorBoard's filter
    assert names("bs=64,128", seeds=["0", "1"])[1] == "bs64_seed1"
    assert names("bs=64,128", seeds=["3"], extra="--split-seed 0")[0] == "bs64_seed3_noise-seed3"
    assert names("noise=default,0.5 subset=default,9")[:2] == [
        "noise0",
        "subset9_noise0",
    ]  # what has no value has no part
    assert names("wd=0.0005 model=resnet18 sched=constant") == [
        "model-resnet18_wd0.0005_sched-constant"
    ]  # a single run


def test_a_name_is_not_cut_where_its_axes_are():
    """Thirteen options that all runs share took the room of a name; what differed was in a hash behind them."""
    shared = "dataset=synthetic subset=1500 val-frac=0.3333 width=8 no-augment=on epochs=16 sched=onecycle sched-steps=192 end=schedule "
    shared += "measure=full measure-every=20 measure-budget=0.45 chunks=2"
    assert names(f"{shared} noise=0,0.5 bs=16,64", seeds=["0", "1"])[-1] == "noise0.5_bs64_seed1"


def test_one_run_has_one_name_in_all_grids_of_a_sweep():
    actual = names("noise=0 sched=onecycle sched-steps=5000", "bs=128 sched=onecycle", "sched=onecycle sched-epochs=3")
    assert actual == ["noise0_sched-steps5000", "noise0_sched-epochs3"]
    assert names("bs=128", seeds=["0"]) == ["seed0"]


def test_a_preset_names_what_varies_whatever_the_part():
    listed = {}
    for part in ([], ["--part", "13-14"], ["--part", "15-17", "--bs", "16"]):
        args, extra = sweep.parser().parse_known_args(["--preset", "report", *part])
        listed[" ".join(part)] = [job.name for job in sweep.jobs_of(args, extra)]
    assert set().union(*listed.values()) == set(listed[""])
    assert (
        listed[""][0] == "cifar10_noise0_model-resnet18_bs16_lr0.1_epochs64_sched-constant_sched-steps5000_measure-full"
    )
    args, extra = sweep.parser().parse_known_args(["--preset", "quick"])
    assert max(len(job.name) for job in sweep.jobs_of(args, extra)) < 100


def finished(folder: Path, argv: list[str], name: str) -> None:
    """The folder of a run that has finished, as train.py would have left it."""
    (folder / name).mkdir(parents=True)
    given = vars(options.parse(argv)) | {"precision": "bf16-mixed", "name": name}  # what the hardware made of auto
    (folder / name / "config.json").write_text(json.dumps({"options": given}))
    (folder / name / "summary.json").write_text(json.dumps({"status": "finished"}))


def test_runs_named_in_any_other_way_are_found(fake, tmp_path, capsys):  # noqa: F811
    """By what they compute: such as those of before, whose names began with what all runs share; also in files of results."""
    runs, shared = tmp_path / "runs", "dataset=synthetic width=8 epochs=1"
    words = "--dataset synthetic --width 8 --epochs 1 --noise 0.5 --bs".split()
    finished(runs, [*words, "16"], "synthetic_noise0.5_width8_bs16_epochs1")
    finished(tmp_path / "elsewhere", [*words, "32"], "by-hand")
    exports.export_runs(results.load_runs([str(tmp_path / "elsewhere")]), tmp_path / "done.npz")
    argv = ("--grid", f"{shared} noise=0,0.5 bs=16,32", "--done", str(tmp_path / "done.npz"))
    assert fake(*argv) == 0
    assert started(tmp_path) == ["noise0_bs16", "noise0_bs32"]
    assert "4 of 4 runs finished (2 of them before)" in capsys.readouterr().out
    assert fake(*argv, "--status") == 0
    assert re.search(r"^synthetic_noise0.5_width8_bs16_epochs1 +finished", capsys.readouterr().out, re.M)


def test_runs_with_labels_of_a_file_are_found_in_a_file_of_results(fake, tmp_path):  # noqa: F811
    """Its folder and its export have the level that the file turned out to have, the command line has none."""
    words = ["--noise-type", "file", "--noise-file", "n.npz", "--epochs", "1", "--bs"]
    for bs in ("16", "32"):
        finished(tmp_path / "elsewhere", [*words, bs], f"of-bs{bs}")
        config = tmp_path / "elsewhere" / f"of-bs{bs}" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"noise": {"nominal": 0.4}}))
    exports.export_runs(results.load_runs([str(tmp_path / "elsewhere")]), tmp_path / "done.npz")
    assert fake("--grid", "bs=16,32", *words[:-1], "--done", str(tmp_path / "done.npz")) == 0
    assert not (tmp_path / "runs" / "history.txt").exists()


def test_a_name_that_another_run_has_goes_on_with_what_its_grid_shares(fake, tmp_path):  # noqa: F811
    assert fake("--grid", "bs=16,32 epochs=1") == 0
    assert fake("--grid", "bs=16,32 epochs=2") == 0
    assert started(tmp_path) == ["bs16", "bs32", "bs16_epochs2", "bs32_epochs2"]
    assert (
        fake("--grid", "bs=16,32 epochs=2") == fake("--grid", "bs=16,32 epochs=1") == 0 and len(started(tmp_path)) == 4
    )
    assert fake("--grid", "bs=8,4 lr=9,0.1 epochs=1") == 1  # no folder: the sweep has written its names down
    assert fake("--grid", "bs=8,4 lr=9,0.1 epochs=2") == 1
    assert started(tmp_path)[4:] == ["bs8_lr0.1", "bs4_lr0.1", "bs8_lr0.1_epochs2", "bs4_lr0.1_epochs2"]


def test_of_several_such_runs_the_finished_one_counts(fake, tmp_path):  # noqa: F811
    for name in ("a", "b"):
        finished(tmp_path / "runs", ["--epochs", "1", "--bs", "16"], name)
    (tmp_path / "runs" / "a" / "summary.json").write_text('{"status": "failed"}')
    assert fake("--grid", "bs=16,32 epochs=1") == 0 and started(tmp_path) == ["bs32"]


def test_a_damaged_folder_is_no_run_of_other_options(fake, tmp_path):  # noqa: F811
    """Its config.json says nothing: it is not taken for a run of the defaults."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text("{")
    assert fake("--grid", "bs=128 lr=0.1,0.2") == 0
    assert started(tmp_path) == ["lr0.1", "lr0.2"]


def test_runs_under_earlier_names_are_found(fake, tmp_path, capsys):  # noqa: F811
    """Names that train.py gives, and those of a sweep over other axes: finished runs are skipped, stopped ones resumed."""
    runs = tmp_path / "runs"
    config = lambda **changed: json.dumps({"options": vars(options.parse(["--epochs", "1"])) | changed})  # noqa: E731
    for name, status, bs in (
        ("epochs1", "finished", 128),
        ("bs64_epochs1", "stopped", 64),
        ("bs32_epochs1", "stopped", 7),
    ):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.json").write_text(config(bs=bs))
        (runs / name / "summary.json").write_text(json.dumps({"status": status}))
    argv = ("--grid", "noise=0 bs=128,64,32 epochs=1")
    assert fake(*argv) == 0
    # the folder called bs32_epochs1 is a run of other options
    assert started(tmp_path) == ["bs64_epochs1", "bs32"]
    assert "3 of 3 runs finished (1 of them before)" in capsys.readouterr().out
    assert fake("--grid", "bs=32 seed=0,1 epochs=1") == 0  # fewer axes, then more
    assert started(tmp_path)[2:] == ["seed1"]
    assert fake("--grid", "bs=32 epochs=1 seed=1 wd=0.0005", "--status") == 0
    assert "seed1  finished" in capsys.readouterr().out


def test_status_without_a_grid(fake, tmp_path, capsys):  # noqa: F811
    assert fake("--status") == 2
    assert "--status: no sweep is written down in" in capsys.readouterr().err
    assert fake("--grid", "bs=16 lr=9,0.1 epochs=1") == 1
    assert fake("--grid", "bs=16,32 lr=0.1 epochs=1") == 0
    runs = tmp_path / "runs"
    (runs / processes.LOGS / "jobs-broken.json").write_text(
        '{"format": "label-noise sweep 1", "jobs": [{"name": "../x"}]}'
    )
    os.mkfifo(runs / processes.LOGS / "jobs-pipe.json")
    capsys.readouterr()
    assert fake("--status") == 0
    result = capsys.readouterr()
    lines = result.out.splitlines()
    assert [line.split("  ")[1] for line in lines[:2]] == [
        f"sweep.py --grid 'bs=16 lr=9,0.1 epochs=1' --runs {shlex.quote(str(runs))}",
        f"sweep.py --grid 'bs=16,32 lr=0.1 epochs=1' --runs {shlex.quote(str(runs))}",
    ]
    assert [line.split()[:2] for line in lines[2:-1]] == [
        ["lr9.0", "failed"],
        ["lr0.1", "finished"],
        ["bs32", "finished"],
    ]
    assert lines[-1] == "2 finished, 1 failed of 3"
    assert result.err.count("left out") == result.err.count("\n") == 2
    for option in (["--seeds", "1"], ["--epochs", "3"], ["--with-1024"]):
        assert fake("--status", *option) == 2
        assert f"{option[0]}: goes with --grid or --preset" in capsys.readouterr().err
    assert fake() == 2
    assert "--grid" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"name": "a/b"}, {"name": ".."}, {"argv": [1]}, {"options": {"dataset": 3}}, {"x": 1}]
)
def test_entries_that_are_no_job_are_refused(wrong):
    entry = {"name": "a", "argv": ["--bs", "16"], "options": {"bs": 16}}
    assert joblist.checked(**entry).args.bs == 16
    with pytest.raises((ValueError, TypeError)):
        joblist.checked(**entry | wrong)


def test_nothing_is_written_down_where_nothing_is_run(fake, tmp_path):  # noqa: F811
    for instead in ("--dry-run", "--print-commands", "--status"):
        assert fake("--grid", "bs=16", instead) == 0
    assert not (tmp_path / "runs").exists()


def test_what_a_stopped_sweep_prints_adds_up(fake, held, tmp_path, capsys):  # noqa: F811
    """One run is finished before, one fails, one is stopped, three wait."""
    assert fake("--grid", "bs=16 epochs=1 noise=0") == 0
    steps = tmp_path / "runs" / "noise0_bs32_epochs90" / "steps.txt"
    once(steps.exists, os.kill, os.getpid(), signal.SIGINT)
    argv = (
        "--grid",
        "bs+epochs=16:1,32:90,64:1 noise=0",
        "--grid",
        "bs=4,8 lr=0.1 epochs=1",
        "--grid",
        "noise=0.9 epochs=2",
    )
    capsys.readouterr()
    assert fake(*argv, "--jobs", "1") == 3
    result = capsys.readouterr()
    assert result.out.splitlines()[-1] == "1 of 6 runs finished (1 of them before), 1 stopped, 4 waiting"
    assert not re.search(r": (\w+): *$", result.err, re.M)
    assert fake(*argv, "--status") == 0
    assert "1 finished, 1 stopped, 4 waiting of 6" in capsys.readouterr().out


def test_a_run_that_is_stopped_before_it_has_a_folder_has_no_empty_reason(tmp_path):
    (job,) = grids.expand(["bs=16"], [], "--grid")
    assert processes.end_line(job, "waiting", "") == "bs16: waiting"
    (tmp_path / processes.LOGS).mkdir()
    (tmp_path / processes.LOGS / "bs16.failed").write_text("\n")
    assert processes.run_state(tmp_path, job, {}) == ("failed", "no reason given")


def test_a_real_run_under_train_s_own_name_is_found(go, tmp_path, capsys):
    folder: Path = go(name="bs32-by-hand")
    own = [w for w in TINY if w not in ("--bs", "32")]
    (name,) = (job.name for job in grids.expand(["bs=32 noise=0"], own, "--grid"))
    folder.rename(folder.with_name(options.run_name(options.parse(TINY))))
    assert sweep.main(["--grid", "bs=32 noise=0", *own, "--runs", str(folder.parent)]) == 0
    assert "1 of 1 run finished (1 of them before)" in capsys.readouterr().out
    assert not (folder.parent / name).exists()
