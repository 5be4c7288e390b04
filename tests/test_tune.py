"""Tuned sweeps: what may be tuned, searches that are shared, killed and resumed, with a stand-in for train.py, and their report."""

import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import report
import sweep
from conftest import ROOT, until
from data import InputError
from engine import options
from study import gallery, processes, scheduler, spaces, trials, tuning
from study.searches import read_searches
from test_report import plant
from test_sweep import cluster  # noqa: F401

FAKE = Path(__file__).with_name("fake_trial.py")
GRID = ["--grid", "noise=0.5 bs=16,64", "--seeds", "0,1", "--epochs", "9", "--measure", "full"]
TUNE = ["--tune", "lr=log:0.0001:10", "--trials", "6"]


@pytest.fixture
def fake(tmp_path, monkeypatch, bare_server):
    """fake(*arguments) -> exit status of a sweep in tmp_path/runs whose runs are those of fake_trial.py."""
    pytest.importorskip("optuna", reason="Optuna is optional: pip install -r requirements-tune.txt")
    monkeypatch.setattr(processes, "TRAIN", FAKE)
    monkeypatch.setattr(scheduler, "POLL", 0.01)
    monkeypatch.setattr(scheduler, "LOOK_AGAIN", 0.1)
    monkeypatch.setattr(tuning, "LOOK", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return lambda *argv: sweep.main([*argv, "--runs", str(tmp_path / "runs")])


def searches(tmp_path) -> dict[str, dict]:
    """{name of the cell: content of its search's file}"""
    return {path.stem: json.loads(path.read_text()) for path in sorted((tmp_path / "runs").glob("tuning/*/*.json"))}


def starts(tmp_path) -> list[list[str]]:
    """(run, epoch, rate, --measure) of every start of a trial's run."""
    (path,) = (tmp_path / "runs").glob("tuning/*/history.txt")
    return [line.split() for line in path.read_text().splitlines()]


def tried(search: dict) -> list[tuple]:
    return [(t["number"], t["values"]["lr"], t["state"], t["value"]) for t in search["trials"]]


# ------------------------------------------------------------------------------------------------------ the space


def test_a_space_of_every_kind():
    text = "lr=log:0.003:1 momentum=lin:0.5:0.99 width=int:8:64 optimizer=sgd|adam"
    lr, momentum, width, optimizer = spaces.read_space(text, {"bs"}, ["--epochs", "2"])
    assert (lr.kind, lr.low, lr.high, lr.corners) == ("log", 0.003, 1.0, ("0.003", "1"))
    assert (momentum.kind, width.kind, optimizer.kind) == ("lin", "int", "choice")
    assert optimizer.corners == ("sgd", "adam") and optimizer.words("adam") == ["--optimizer", "adam"]
    assert lr.spelled(0.0123456) == "0.01235" and lr.spelled(0.99999) == "1" and width.spelled(13) == "13"
    assert (
        momentum.spelled(0.989999) == "0.99"
        and spaces.Dimension("lr", "log:0.00333333:1", "log", 0.00333333, 1.0).spelled(0.00333333) == "0.00333333"
    )  # not rounded out of its range


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ("", "it is empty"),
        ("lr", "'lr' is not NAME=SPEC"),
        ("rate=log:1:2", "'rate' is not an option"),
        ("lr=log:1", "not log:LOW:HIGH"),
        ("lr=log:x:1", "not log:LOW:HIGH"),
        ("lr=log:1:0.1", "1 is not below 0.1"),
        ("lr=log:0:1", "a logarithmic range begins above 0"),
        ("lr=0.1", "a list A|B"),
        ("optimizer=sgd|sgd", "a list A|B"),
        ("optimizer=log:1:2", "takes no number"),
        ("optimizer=sgd|none", "invalid choice"),
        ("lr=log:0.1:1 lr=log:0.2:1", "is there twice"),
        ("width=log:4:8", "takes whole numbers; give int:LOW:HIGH"),
        ("width=int:4:8.5", "whole numbers as its ends"),
        ("lr=lin:-1:1", "'-1' is not a positive number"),
        ("seed=0|1", "it is a seed"),
        ("threads=int:1:2", "changes"),
        ("measure=split|full", "what is measured"),
        ("subset=int:10:20", "it changes the task"),
        ("noise=lin:0:1", "'noise' cannot be tuned"),
        ("epochs=int:1:5", "how long a run is"),
        ("sched=cosine|onecycle", "make it an axis of the grid"),
        ("bs=16|32", "make it an axis of the grid"),
        ("name=a|b", "changes where a run happens"),
        ("wd=log:1e-5:1e-2", "'wd' is in the grid, too"),
        ("momentum=lin:0:0.9", "--momentum is given for every run, too"),
    ],
)
def test_a_bad_space_is_one_line_and_status_2(tune, message, fake, capsys, tmp_path):
    assert fake("--grid", "bs=16 wd=0,1e-4", "--momentum", "0.5", "--tune", tune) == 2
    err = capsys.readouterr().err
    assert err.startswith("sweep.py: error: --tune") and message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tune-seeds", "1,7"], "--tune-seeds 1,7: 1 is a seed of judged runs"),
        (["--tune-seeds", "7,7"], "--tune-seeds 7,7: a seed is there twice"),
        (["--tune-seeds", "7,x"], "--tune-seeds '7,x': not a list of seeds"),
        (["--metric", "test/acc"], "--metric test/acc: not one of val/acc, val/loss"),
        (["--trials", "0"], "--trials"),
        (["--split-seed", "0"], "--split-seed: goes without --tune"),
        (["--print-commands"], "--print-commands: goes without --tune"),
    ],
)
def test_bad_options_of_a_search(argv, message, fake, capsys, tmp_path):
    assert fake(*GRID, "--tune", "lr=log:0.1:1", *argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["--trials=3", "--metric=val/acc", "--tune-seeds=7"])
def test_options_that_need_a_space(option, tmp_path, capsys):
    assert sweep.main(["--grid", "bs=16", option, "--runs", str(tmp_path)]) == 2
    assert "goes with --tune" in capsys.readouterr().err


def test_seeds_that_choose_are_other_ones():
    jobs = sweep.expand(["bs=16"], [], "--grid", ["0", "1000"])
    assert tuning.tuning_seeds(None, jobs) == ["1001"] and tuning.tuning_seeds("5,06", jobs) == ["5", "6"]
    with pytest.raises(InputError, match="1000 is a seed of judged runs"):
        tuning.tuning_seeds("1000", jobs)


def test_without_optuna_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # importing it raises ImportError
    for more in ([], ["--dry-run"], ["--status"]):
        assert sweep.main([*GRID, *TUNE, *more, "--runs", str(tmp_path / "runs")]) == 2
        line = "sweep.py: error: --tune: Optuna is not installed; pip install -r requirements-tune.txt\n"
        assert capsys.readouterr().err == line


# ------------------------------------------------------------------------------------------------------- searches


def test_each_cell_is_tuned_on_other_seeds_and_judged_at_the_grids(fake, tmp_path, capsys):
    assert fake(*GRID, "--tune", "lr=log:0.0001:10", "--trials", "8", "--tune-seeds", "7,8", "--jobs", "4") == 0
    out = capsys.readouterr().out
    assert "4 of 4 runs finished" in out and "val/acc is maximized, with seed 7, 8" in out
    found = searches(tmp_path)
    assert len(found) == 2
    judged = {path.parent.name for path in (tmp_path / "runs").glob("*/config.json")}
    assert judged == {name for search in found.values() for name in search["judged"]} and len(judged) == 4
    for search in found.values():
        assert search["complete"] and search["seeds"] == ["7", "8"] and len(search["trials"]) == 8
        value, best = search["best"]["values"]["lr"], search["best"]["number"]
        bs = search["options"]["bs"]
        assert set(search["judged"]) == {f"bs{bs}_lr{float(value)}_seed{s}" for s in (0, 1)}
        complete = [t for t in search["trials"] if t["state"] == "complete"]
        assert best == max(complete, key=lambda t: t["value"])["number"]
        assert all(t["evaluations"] < 9 for t in search["trials"] if t["state"] == "pruned")
    states = Counter(t["state"] for search in found.values() for t in search["trials"])
    assert states["pruned"] and states["complete"] and states["diverged"] + states["pruned"] + states["complete"] == 16
    begun = starts(tmp_path)
    assert {measure for *_, measure in begun} == {"off"}  # trials measure nothing
    assert {name.rpartition("_seed")[2] for name, *_ in begun} == {"7", "8"}
    both = {name.rpartition("_seed")[0] for name, *_ in begun if name.endswith("_seed8")}
    assert len(both) == states["complete"]  # what is ended early is not trained with the second seed
    assert fake(*GRID, "--tune", "lr=log:0.0001:10", "--trials", "8", "--tune-seeds", "7,8") == 0
    assert starts(tmp_path) == begun  # nothing is repeated
    assert "4 of 4 runs finished (4 of them before)" in capsys.readouterr().out


def test_the_same_line_gives_the_same_trials_also_when_stopped(fake, tmp_path, capsys, monkeypatch):
    few = ["--grid", "bs=16", "--seeds", "0", "--epochs", "9", *TUNE]
    assert fake(*few) == 0
    whole = searches(tmp_path)
    assert len(whole) == 1
    stopped = 0
    with monkeypatch.context() as m:  # a signal at each of the first looks at running trials
        actual = tuning.Search.to_stop

        def looked(self):
            nonlocal stopped
            stopped += 1
            if stopped in (3, 25, 60):
                os.kill(os.getpid(), signal.SIGTERM)
            return actual(self)

        m.setattr(tuning.Search, "to_stop", looked)
        statuses = []
        while not statuses or statuses[-1] == 3:
            statuses.append(sweep.main([*few, "--runs", str(tmp_path / "again" / "runs")]))
    assert statuses[-1] == 0 and len(statuses) > 2
    (again,) = searches(tmp_path / "again").values()
    assert [tried(search) for search in whole.values()] == [tried(again)]
    resumed = [words for words in starts(tmp_path / "again") if int(words[1]) > 0]
    assert resumed  # from where it was, not anew


SWEEP = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from study import forkserver, processes, scheduler, tuning
forkserver.PRELOAD = ()
processes.TRAIN, scheduler.POLL, scheduler.LOOK_AGAIN, tuning.LOOK = Path({fake!r}), 0.01, 0.1, 0.02
import os, sweep
os.environ["FAKE_HOLD"] = {hold!r}
status = sweep.main({argv!r})
sys.stdout.flush()
os._exit(status)
"""


def test_killed_sweeps_on_one_journal_share_and_finish_it(zygote, fake, tmp_path):
    argv = [*GRID, *TUNE, "--jobs", "2", "--runs", str(tmp_path / "runs")]
    code = SWEEP.format(root=str(ROOT), fake=str(FAKE), argv=argv, hold=str(tmp_path / "go"))
    pids = zygote.start(code=code, ranks=2)
    until(lambda: len(list((tmp_path / "runs").glob("tuning/*/*_seed1000/summary.json"))) == 4)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert zygote.wait() == [-9, -9]
    (tmp_path / "go").touch()  # their runs go on
    zygote.start(code=code, ranks=2)
    assert zygote.wait() == [0, 0], zygote.output(0) + zygote.output(1)
    found = searches(tmp_path)
    assert len(found) == 2
    for search in found.values():
        assert [t["number"] for t in search["trials"]] == [0, 1, 2, 3, 4, 5] and search["complete"]
        assert len(search["judged"]) == 2
    begun = Counter((name, int(epoch)) for name, epoch, *_ in starts(tmp_path))
    assert (
        len({name for name, _ in begun}) == 12 and max(begun.values()) == 1
    )  # no trial twice, none from its start again
    assert not list((tmp_path / "runs").glob("tuning/*/.*trial*.lock"))


def test_a_search_goes_on_with_more_trials_and_more_seeds(fake, tmp_path, capsys):
    few = ["--grid", "bs=16", "--epochs", "3", "--tune", "lr=log:0.0001:10"]
    assert fake(*few, "--seeds", "0", "--trials", "3", "--jobs", "3") == 0
    (before,) = searches(tmp_path).values()
    assert fake(*few, "--seeds", "0,1", "--trials", "3", "--jobs", "3") == 0
    (more_seeds,) = searches(tmp_path).values()
    assert more_seeds["trials"] == before["trials"] and set(more_seeds["judged"]) > set(before["judged"])
    assert fake(*few, "--seeds", "0", "--trials", "5", "--dry-run") == 0
    assert "3 of 5 trials" in capsys.readouterr().out
    assert fake(*few, "--seeds", "0", "--trials", "5", "--jobs", "3") == 0
    (after,) = searches(tmp_path).values()
    assert after["trials"][:3] == before["trials"] and len(after["trials"]) == 5


def test_a_search_of_an_earlier_version_goes_on(fake, tmp_path):
    """One that commit 8e81a75 has made: read by a report, and its trials are not made again."""
    shutil.copytree(ROOT / "tests" / "before", tmp_path / "runs" / "tuning")
    ((cell, before),) = searches(tmp_path).items()
    (read,) = read_searches([str(tmp_path / "runs")], left_out := [])
    assert (read.count("complete"), read.best.values, left_out) == (2, {"lr": "0.1562"}, [])
    few = ["--grid", "bs=16", "--seeds", "0", "--epochs", "3", "--tune", "lr=log:0.0001:10"]
    assert fake(*few, "--trials", "4") == 0
    (after,) = searches(tmp_path).values()
    assert after["trials"][:3] == before["trials"] and set(before["judged"]) < set(after["judged"])
    assert [name for name, *_ in starts(tmp_path)] == [f"{cell}_trial3_seed1000"]


def test_where_nothing_can_be_chosen(fake, tmp_path, capsys):
    few = ["--grid", "bs=16", "--seeds", "0", "--epochs", "3", "--trials", "2"]
    assert fake(*few, "--tune", "lr=log:6:10") == 1
    assert "no trial came to its end" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("bs16*"))


def test_a_journal_that_is_none(fake, tmp_path, capsys):
    few = ["--grid", "bs=16", "--seeds", "0", "--epochs", "3", *TUNE]
    assert fake(*few, "--status") == 0  # nothing is written by looking
    assert "0 of 6 trials" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    assert fake(*few, "--minutes", "1e-9") == 3
    (journal,) = (tmp_path / "runs").glob("tuning/*/journal.log")
    journal.write_text("not JSON\nat all\n")
    capsys.readouterr()
    assert fake(*few) == 2
    err = capsys.readouterr().err
    assert "journal.log: not a journal of Optuna" in err and err.count("\n") == 1


def test_a_journal_with_a_cut_line_goes_on(fake, tmp_path, capsys):
    """As after a full disk: cut anywhere in its last line, at once or after Optuna has written on behind the cut."""
    few = ["--grid", "bs=16", "--seeds", "0", "--epochs", "2", "--tune", "lr=log:0.0001:5", "--trials", "1"]
    assert fake(*few) == 0
    before = searches(tmp_path)
    (journal,) = (tmp_path / "runs").glob("tuning/*/journal.log")
    whole = journal.read_bytes()
    first, kept = whole.splitlines(keepends=True)[0], whole[: whole[:-1].rfind(b"\n") + 1]
    cuts = [*range(len(kept) + 1, len(whole) - 1, 9), len(whole) - 1]
    damaged = [(whole[:cut] + behind, kept) for cut in cuts[:-1] for behind in (b"", bytes(5))]
    damaged += [(whole[:cut] + first, kept + first) for cut in cuts] + [(whole[:-1], whole)]
    for content, right in damaged:
        journal.write_bytes(content)
        capsys.readouterr()
        trials.mend(journal)
        assert journal.read_bytes() == right
        assert capsys.readouterr().err == f"warning: {journal}: a line was cut off; the whole ones are kept\n"
    for content in (b"", b"text", b"one\ntwo", whole):
        journal.write_bytes(content)
        trials.mend(journal)
        assert journal.read_bytes() == content and capsys.readouterr().err == ""
    journal.write_bytes(cut := whole[:-9])
    assert fake(*few, "--status") == 0 and "1 of 1 trials, 1 running" in capsys.readouterr().out
    assert journal.read_bytes() == cut  # nothing is written by looking
    assert fake(*few) == 0
    assert "a line was cut off" in capsys.readouterr().err and searches(tmp_path) == before


def test_a_search_on_a_ray_cluster(cluster, fake, tmp_path):  # noqa: F811
    assert fake("--grid", "bs=16,64", "--seeds", "0,1", "--epochs", "9", *TUNE, "--ray", cluster.address) == 0
    found = searches(tmp_path)
    assert len(found) == 2 and all(search["complete"] and len(search["judged"]) == 2 for search in found.values())
    states = Counter(t["state"] for search in found.values() for t in search["trials"])
    assert sum(states.values()) == 12 and states["pruned"]
    assert len({name for name, *_ in starts(tmp_path)}) == len(starts(tmp_path)) == 12


# --------------------------------------------------------------------------------------------------------- report


def planted(folder: Path, seeds=(0, 1, 2), budgets=("steps", "epochs"), fixed: bool = True) -> None:
    """A tuned sweep: at its own rate each size memorizes alike, at the one rate the larger ones memorize more."""
    common = "--dataset synthetic --synthetic-train 2000 --epochs 2 --sched onecycle --width 8"
    for budget in budgets:
        for noise in (0.0, 0.5):
            for i, B in enumerate((16, 64, 256)):
                cell = f"{common} --sched-{budget} {50 if budget == 'steps' else 2} --noise {noise} --bs {B}"
                judged = {}
                for s in seeds:
                    words = f"{cell} --seed {s} --noise-seed {s} --split-seed {s}"
                    for rate in (0.1, [0.02, 0.08, 0.3][i]) if fixed else ([0.02, 0.08, 0.3][i],):
                        shift = 0.1 * i if rate == 0.1 else 0.0
                        at = 0.001 * ((7 * s + 3 * i) % 5)
                        shares = {
                            f"probe/{name}": [(200, 0.4 + shift + at)] for name in ("memorized", "memorized_excess")
                        }
                        series = {"val/acc": [(200, 0.8 - 0.3 * noise - 0.02 * abs(i - 1) + at)]} | (
                            shares if noise else {}
                        )
                        run = plant(folder, f"{words} --lr {rate}", series)
                        judged |= {run.name: {"lr": f"{rate}"}} if rate != 0.1 else {}
                best = next(iter(judged.values()))
                trials = [{"number": 0, "state": "complete", "values": best, "value": 0.81, "evaluations": 2}]
                trials += [{"number": 1, "state": "pruned", "values": {"lr": "0.9"}, "value": 0.3, "evaluations": 1}]
                trials += [
                    {"number": 2, "state": "diverged", "values": {"lr": "0.95"}, "value": None, "evaluations": 0}
                ]
                content = {
                    "format": "label-noise search 1",
                    "command": "",
                    "options": vars(options.parse(cell.split())),
                }
                content |= {"space": {"lr": "log:0.003:1"}, "metric": "val/acc", "direction": "maximize"}
                content |= {"seeds": ["1000"], "most": 3, "complete": True, "trials": trials, "judged": judged}
                path = folder / "tuning" / "lr-0" / f"{budget}{noise:g}_{B}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content | {"best": {"number": 0, "values": best}}))


@pytest.mark.slow
def test_the_report_of_a_tuned_sweep_beside_one_rate(tmp_path, capsys):
    planted(tmp_path / "runs")
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "svg"]) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "out" / "report.md").read_text()
    main, _, tuned = page.partition("## Tuned cells")
    assert "compared at learning rate" not in main  # no run of a search is pooled with others
    assert re.search(r"\| 2\. Larger batches memorize more, at lr 0\.1 \|[^\n]*\*\*supported\*\*", main)
    assert re.search(
        r"\| 2\. Larger batches memorize more, at each cell's tuned rate \|[^\n]*\*\*negligible\*\*", tuned
    )
    assert {"2.", "3.", "5."} <= set(re.findall(r"\| (\d\w*\.) ", tuned)) and "| 1b." not in tuned
    row = next(line for line in tuned.splitlines() if line.startswith("| onecycle, 2 epochs | 0.5 | 256"))
    assert "| 3 | 1 | 1 | 0.8100 | 0.3 | no | 3 | 0.63" in row
    assert "lr over log:0.003:1" in tuned and "(tuning.svg)" in tuned
    drawn = (tmp_path / "out" / "tuning.svg").read_text()
    assert "50% label noise" in drawn and "batch size" in drawn and "ring: the best of its cell" in drawn
    assert "at each cell's tuned rate" in printed and "at lr 0.1" in printed


def test_the_report_of_tuned_cells_alone_and_of_damaged_searches(tmp_path, capsys):
    planted(tmp_path / "runs", seeds=(0,), budgets=("epochs",), fixed=False)
    folder = tmp_path / "runs" / "tuning" / "lr-0"
    cut, other, earlier, *_ = sorted(folder.glob("*.json"))
    cut.write_text(cut.read_text()[:100])
    other.write_text(json.dumps({"format": "label-noise search 1"}))
    content = json.loads(earlier.read_text())
    content["best"]["values"] = content["trials"][0]["values"] = {"lr": "0.5"}
    earlier.write_text(json.dumps(content))
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    err = capsys.readouterr().err
    assert f"left out {cut.name}" in err and f"left out {other.name}" in err
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Tuned cells" in page and "1 runs are left out: they are at values" in page


def test_an_export_holds_the_searches(tmp_path, capsys, monkeypatch):
    """A report on the file is that on the folder, also through a second export."""
    monkeypatch.setattr(gallery, "save_styled", lambda *_, **__: False)  # drawing takes long, and is not in question
    planted(tmp_path / "runs")
    typed = ["--runs /home/me/runs --data-dir=/home/me/data --epochs 3", "sweep.py 'open"]
    for path, command in zip(sorted((tmp_path / "runs" / "tuning").glob("*/*.json")), typed):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"command": command}))
    pages = []
    for path, made in (("runs", "a.npz"), ("a.npz", "b.npz"), ("b.npz", "c.npz")):
        out = ["--out", str(tmp_path / "out"), "--format", "svg"]
        assert report.main([str(tmp_path / path), *out, "--export", str(tmp_path / made)]) == 0
        pages.append((tmp_path / "out" / "report.md").read_text())
    assert pages[0] == pages[1] == pages[2] and "at each cell's tuned rate" in pages[0]
    with np.load(tmp_path / "a.npz") as z:
        arrays = dict(z)
    content = json.loads(arrays["searches"].tobytes())
    commands = [search["command"] for _, search in content["searches"] if "command" in search]
    assert {"--epochs 3", ""} <= set(commands) and b"/home/me" not in arrays["searches"].tobytes()
    assert not any({"runs", "data_dir"} & set(search["options"]) for _, search in content["searches"])
    content["searches"][0][1]["trials"] = 3
    np.savez(tmp_path / "one.npz", **arrays | {"searches": np.frombuffer(json.dumps(content).encode(), np.uint8)})
    capsys.readouterr()
    assert report.main([str(tmp_path / "one.npz"), "--out", str(tmp_path / "out"), "--format", "svg"]) == 0
    assert f"left out {content['searches'][0][0]}" in capsys.readouterr().err
    for damaged in (b"[]", b'{"searches": 1}', b'{"searches": [[1, 2]]}', b"\xff"):
        np.savez(tmp_path / "bad.npz", **arrays | {"searches": np.frombuffer(damaged, np.uint8)})
        assert report.main([str(tmp_path / "bad.npz"), "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "bad.npz" in err


def test_noise_from_a_file_is_named_by_its_kind(tmp_path):
    planted(tmp_path / "runs", seeds=(0,), budgets=("epochs",), fixed=False)
    for path in (tmp_path / "runs" / "tuning" / "lr-0").glob("*0.5*.json"):
        content = json.loads(path.read_text())
        content["options"] |= {"noise": None, "noise_type": "human", "noise_file": "a.pt"}
        path.write_text(json.dumps(content))
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "svg"]) == 0
    page = (tmp_path / "out" / "report.md").read_text().partition("## Tuned cells")[2]
    assert "| onecycle, 2 epochs | human | 256 |" in page and "| onecycle, 2 epochs | 0 | 256 |" in page
    drawn = [(tmp_path / "out" / f"tuning{end}.svg").read_text() for end in ("", "-b")]  # no noise is another setting
    assert any("human" in text for text in drawn) and not any("50% label noise" in text for text in drawn)


def test_searches_without_a_judged_run_are_a_report(tmp_path, capsys):
    planted(tmp_path / "runs")
    for folder in (tmp_path / "runs").iterdir():
        if folder.name != "tuning":
            shutil.rmtree(folder)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "svg"]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Tuned cells" in page and "has its best values run at the judged seeds yet" in page
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "no run in it" in capsys.readouterr().err
