"""benchmarks/lease.py: what it does first, how it survives a kill and a lost machine, and what it takes over; with it the cells
of benchmarks/speed.py, each timed by itself, and packed data sets."""

import argparse
import csv
import hashlib
import io
import json
import lzma
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import leaseplan, packages, packs, speed
from conftest import Times
from data import InputError
from engine import fast, options
from study import exports, results, tables
from study.runfolders import Run
from test_metrics import default_dtype, job_for  # noqa: F401

# ---------------------------------------------------------------------------------------------------------- the rehearsal

# The runs of a sweep as forks of its own process, which has imported all that they need.
FORKED = """
import os, signal, subprocess, sys
import train
from benchmarks import lease
from study import processes
class Fork:
    def __init__(self, argv, stdout, **_):
        self.code, self.pid = None, os.fork()
        if self.pid == 0:
            status = 1
            try:
                for s in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(s, signal.SIG_DFL)
                os.setsid()
                os.dup2(stdout.fileno(), 1)
                os.dup2(1, 2)
                status = train.main(argv[2:])
            finally:
                os._exit(status)
    def poll(self):
        if self.code is None:
            pid, how = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(how) if pid else None
        return self.code
    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)
processes.subprocess = type("module", (), dict(vars(subprocess), Popen=Fork))
lease.sweep.cores = lambda: 1  # threads of a run: several would wait for each other at these sizes
import torch.utils.tensorboard, torchvision  # which every run imports
os._exit(max(lease.sweep.main(argv[1:]) if argv[0] == "sweep" else lease.main(argv) for argv in {argvs!r}))
"""


def started_runs(work: Path) -> list[Path]:
    return list(work.glob("runs/*/config.json"))


@pytest.mark.slow
def test_three_calls_a_kill_and_a_lost_machine(zygote, tmp_path):
    """The runs come out as those of sweeps that nothing interrupted."""
    out, first, second = tmp_path / "out", tmp_path / "first", tmp_path / "second"
    call = ["grid", "--rehearse", "--out", str(out)]
    pids = zygote.start(code=FORKED.format(argvs=[[*call, "--work", str(first), "--minutes", "5"]]))
    end = time.monotonic() + 60
    while not started_runs(first) and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 2))
    os.kill(pids[0], signal.SIGKILL)
    assert zygote.wait() in ([-signal.SIGKILL], [0])

    status = zygote.run(code=FORKED.format(argvs=[[*call, "--work", str(first), "--minutes", "0.1"]]))
    assert status in ([3], [0]), zygote.output()
    earlier = tmp_path / "earlier"
    out.rename(earlier)  # what the lost machine had sent; its folder WORK is gone

    argv = [*call, "--work", str(second), "--minutes", "5", "--earlier", str(earlier)]
    groups = leaseplan.rehearsal().groups
    whole = [["sweep", *group.words, "--runs", str(tmp_path / "whole")] for group in groups]
    assert zygote.run(code=FORKED.format(argvs=[argv, *whole])) == [0], zygote.output()
    made = {path.parent.name for path in started_runs(second)}
    before = (
        {run.name for run in results.load_runs([str(earlier / "runs.npz")])}
        if (earlier / "runs.npz").exists()
        else set()
    )
    names = {job.name for group in groups for job in group.jobs()}
    assert made == names - before, "a run that was exported is not made again"
    assert {path.name for path in out.iterdir()} <= {"lease.md", "lease.json", "runs.npz", "RESULTS.md", "tests.log"}

    exports.export_runs(results.load_runs([str(tmp_path / "whole")]), tmp_path / "whole.npz")
    for name, path in (("a", out / "runs.npz"), ("b", tmp_path / "whole.npz")):
        tables.write_tables(results.load_runs([str(path)]), tmp_path / f"{name}.csv")
    values = [sorted(csv.reader(io.StringIO((tmp_path / f"{n}.csv").read_text()))) for n in "ab"]
    assert len(values[0]) > 100 and values[0] == values[1]


@pytest.mark.slow
def test_a_rehearsal_of_tests_and_timings(tmp_path):
    own = [sys.executable, "benchmarks/lease.py", "check", "speed", "--rehearse", "--minutes", "5"]
    own += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    ended = subprocess.run(own, cwd=speed.ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    state = json.loads((tmp_path / "out" / "lease.json").read_text())
    assert len(state["tests"]) > 3 and {test["outcome"] for test in state["tests"]} == {"passed"}
    ((eager, graph),) = state["cells"].values()
    assert eager[".seconds"] > 0 and graph["failed"].startswith("--graph on: needs one CUDA GPU")
    assert "| resnet18-8 | 32-true | 16 | eager |" in (tmp_path / "out" / "RESULTS.md").read_text()
    assert "## Runs: 3 waiting" in (tmp_path / "out" / "lease.md").read_text()


# ------------------------------------------------------------------------------------------------------- what comes first


def row(B: int, way: str, seconds: float, at_once: int = 1, **more) -> dict:
    known = {"model": "resnet18-64", "precision": leaseplan.PRECISION, "B": B, "way": way, ".seconds": seconds}
    return known | ({"runs at once": at_once} if at_once > 1 else {}) | more


def test_runs_are_made_in_the_way_that_was_fastest():
    rows = [row(16, "eager", 0.01), row(16, "graph", 0.004), row(512, "eager", 0.02), row(512, "graph", 0.02)]
    rows.append(row(512, "compile", 0.015, **{"made ready in, s": "40"}))
    pick = lambda B, steps: leaseplan.choose(rows, "resnet18-64", B, steps)  # noqa: E731
    assert pick(16, 5000) == pick(64, 5000) == ("graph", 1)  # the nearest size
    assert leaseplan.choose(rows, "vgg16", 16, 5000) is None
    assert pick(512, 5000) == ("eager", 1) and pick(512, 50_000) == ("compile", 1)  # 40 s of compiling pay later
    assert leaseplan.choose(rows, "resnet18-64", 512, 5000, runs=3) == ("compile", 1)  # or are shared
    rows.append(row(16, "graph", 0.0078, at_once=2))
    assert pick(16, 5000) == ("graph", 1)  # 2 % are not worth it
    assert pick(None, 5000) == pick(512, 5000)  # of those timed the nearest to 128
    assert pick(16, 5000).words[0] == "--per-gpu=4"  # whose starts are hidden
    rows.append(row(16, "graph", 0.006, at_once=2))
    assert pick(16, 5000) == ("graph", 2)
    assert pick(16, 5000).words == ["--per-gpu=4", "--compile=off", "--graph=on"]
    assert leaseplan.Choice("both").words[1:] == ["--compile=on", "--graph=on"]


def test_cells_are_timed_once_and_more_runs_at_once_where_that_gains():
    plan, rows = leaseplan.report_plan(), []
    first = leaseplan.wanted(plan, rows)
    assert first[:2] == [["resnet18-64", "bf16-mixed", 512, "graph"], ["resnet18-64", "bf16-mixed", 512, "both"]]
    assert all(len(cell) == 4 for cell in first)
    for cell in first[:12]:
        rows.append(row(*cell[2:], 0.01 if cell[3] == "graph" else 0.005))
    assert leaseplan.wanted(plan, rows)[0] == ["resnet18-64", "bf16-mixed", 16, "both", 2]
    rows.append(row(16, "both", 0.0055, at_once=2))
    assert leaseplan.wanted(plan, rows)[0] == ["resnet18-64", "bf16-mixed", 16, "both", 4]
    rows.append(row(16, "both", 0.02, at_once=4))
    rows.append(row(32, "both", 0.01, at_once=2))  # no gain: four are not tried
    assert leaseplan.wanted(plan, rows)[0] == ["resnet18-64", "bf16-mixed", 64, "both", 2]
    failed = {"model": "resnet18-64", "precision": "bf16-mixed", "B": 512, "way": "compile", "failed": "no compiler"}
    assert ["resnet18-64", "bf16-mixed", 512, "compile"] not in leaseplan.wanted(plan, [*rows, failed])


def test_the_plan_is_the_reports_grid():
    """Figures 4, 7 and 10 as the report measured them, with one seed and then with two more; then all 96 runs with full
    measurements. Large batches come first, and each run ends with its schedule."""
    plan = leaseplan.report_plan()
    jobs = [job for group in plan.groups for job in group.jobs()]
    assert len({job.name for job in jobs}) == len(jobs) == 54 + 96
    plots = [[job.args for job in group.jobs()] for group in plan.groups[:2]]
    assert [args.bs for args in plots[0]] == [B for B in (512, 256, 128, 64, 32, 16) for _ in range(3)]
    assert [{args.seed for args in some} for some in plots] == [{0}, {1, 2}] and list(map(len, plots)) == [18, 36]
    assert {args.measure_bn for some in plots for args in some} == {"eval"}
    assert [(group.B, group.sched) for group in plan.groups[2:9]] == [
        *((B, "onecycle") for B in (512, 256, 128, 64, 32, 16)),
        (512, "cosine"),
    ]
    for group in (plan.groups[0], plan.groups[2]):
        assert group.steps() == 5000 and {job.args.end for job in group.jobs()} == {"schedule"}
    assert all(Path(speed.ROOT, name).is_file() for name in plan.tests if name.startswith("tests/"))


# ------------------------------------------------------------------------------------------------------------ single cells

SETTINGS = argparse.Namespace(seconds=0.0, repeats=1, precisions=None, meet=None)
CHILD = """
import json, os, sys
name, cells = json.loads(sys.argv[1])
for B, in cells:
    if B == 3:
        os.kill(os.getpid(), 9)
    print(json.dumps([dict(B=B, value=B * B, pid=os.getpid())]), flush=True)
    if B == 2:
        sys.exit(4)
"""


def test_an_error_costs_one_cell(monkeypatch):
    """After it the others are timed in a fresh process; a process that dies is one, too."""
    monkeypatch.setattr(speed, "child", lambda name, cells, _: [sys.executable, "-c", CHILD, json.dumps([name, cells])])
    found = dict((cell[0], rows[0]) for cell, rows in speed.run_cells("data", [[1], [2], [3], [4]], SETTINGS))
    assert [found[B].get("value") for B in (1, 2, 3, 4)] == [1, 4, None, 16]
    assert found[3] == {"B": 3, "failed": "its process ended with status -9"}
    assert found[1]["pid"] == found[2]["pid"] != found[4]["pid"]
    assert list(speed.run_cells("data", [[1]], SETTINGS, end=time.monotonic() - 1)) == []


def test_what_goes_on_after_an_error_and_what_does_not(monkeypatch, capsys):
    raised = {1: torch.OutOfMemoryError("CUDA out of memory. Tried"), 2: fast.Unfit("--graph on: failed here")}
    raised[3] = RuntimeError("CUDA error: an illegal memory access\nmore")

    def measure(mine, B: int) -> list[dict]:
        if B in raised:
            raise raised[B]
        return [{"B": B}]

    monkeypatch.setitem(speed.PARTS, "data", speed.PARTS["data"]._replace(measure=measure))
    settings = lambda *cells: SimpleNamespace(cells=json.dumps(["data", [[B] for B in cells]]))  # noqa: E731
    assert speed.measure_cells(settings(0, 1, 2, 5)) == 0
    rows = [json.loads(line)[0] for line in capsys.readouterr().out.splitlines()]
    assert [r.get("failed") for r in rows] == [None, "out of memory", "--graph on: failed here", None]
    assert speed.measure_cells(settings(3, 5)) == speed.BROKEN
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == [{"B": 3, "failed": "RuntimeError: CUDA error: an illegal memory access"}]


def test_rows_become_tables():
    rows = [{"B": 1, "failed": "no"}, {"B": 2, "x": 3, ".hidden": 1}, {"width": 8, "x": 1}]
    assert speed.tables(rows).splitlines() == [
        *("| B | x | failed |", "| --- | --- | --- |", "| 1 |  | no |", "| 2 | 3 |  |", ""),
        *("| width | x |", "| --- | --- |", "| 8 | 1 |"),
    ]


def test_other_kernels_are_chosen_for_a_step_alone():
    """The columns of a GPU, tried on the CPU: each is a step, after which the flags are as they were."""
    job = job_for("--bs", "16", "--deterministic", "on")
    assert speed.variants(job, [], on_gpu=False) == {}
    acts = speed.variants(job, [], on_gpu=True)
    assert list(acts) == ["cudnn.benchmark", "without cudnn.deterministic"]
    seen, flags = [], torch.backends.cudnn
    job.optimizer.step = lambda: seen.append((flags.benchmark, flags.deterministic))
    for act in acts.values():
        act()
    assert seen == [(True, False), (False, False)] and (flags.benchmark, flags.deterministic) == (False, True)


def test_processes_begin_together(tmp_path, monkeypatch):
    cell = ["resnet18-8", "32-true", 16, "eager"]
    (tmp_path / "another").touch()
    with speed.companions(cell, 1, argparse.Namespace(**vars(SETTINGS) | {"meet": f"{tmp_path},2"})):
        assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(speed, "MEET_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match="did not come together"):
        with speed.companions(cell, 1, argparse.Namespace(**vars(SETTINGS) | {"meet": f"{tmp_path},4"})):
            pass


# ------------------------------------------------------------------------------------------------- tests and their times


def report(test: str, when: str, outcome: str, seconds: float, text="") -> SimpleNamespace:
    return SimpleNamespace(nodeid=test, when=when, outcome=outcome, duration=seconds, longrepr=text)


def test_tests_are_remembered_by_name(tmp_path):
    path = tmp_path / "times"
    times = Times(path)
    for test, outcome, text in (
        ("a", "passed", ""),
        ("b", "failed", "E  assert 1 == 2"),
        ("c", "skipped", ("", 1, "no")),
    ):
        times.pytest_runtest_logstart(test)
        times.pytest_runtest_logreport(report(test, "setup", "passed", 0.25))
        times.pytest_runtest_logreport(report(test, "call", outcome, 0.5, text))
        times.pytest_runtest_logreport(report(test, "teardown", "passed", 0.25))
    for _ in range(2):
        times.pytest_runtest_logstart("d")  # which ends the process each time
    times.pytest_runtest_logstart("e")
    with open(path, "a") as f:
        f.write('{"test": "f", "outc')
    items, gone = [SimpleNamespace(nodeid=name) for name in "abcdefg"], []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: gone.extend(items)))
    Times(path).pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == ["e", "f", "g"] and [item.nodeid for item in gone] == list("abcd")
    ended = [
        line
        for line in map(json.loads, path.read_text().replace('{"test": "f", "outc', "").splitlines())
        if "outcome" in line
    ]
    assert [(line["test"], line["outcome"], line["seconds"]) for line in ended] == [
        *(("a", "passed", 1.0), ("b", "failed", 1.0), ("c", "skipped", 1.0)),
        ("d", "never ended", 0.0),
    ]
    assert "assert 1 == 2" in ended[1]["why"] and ended[2]["why"] == "no"


# ------------------------------------------------------------------------------------------------------- data and packages


def blobs(*parts: bytes) -> bytes:
    return struct.pack(f"<{len(parts) + 1}I", len(parts), *map(len, parts)) + b"".join(parts)


def webp(images: np.ndarray) -> bytes:
    """(n, 3, 32, 32) uint8 as a lossless column."""
    out = io.BytesIO()
    column = images.transpose(0, 2, 3, 1).reshape(-1, 32, 3)
    Image.fromarray(column).save(out, "WEBP", lossless=True, exact=True)
    return out.getvalue()


def test_packs_give_back_every_byte(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    whole = {
        "data_batch_1": b"head" + images.tobytes() + b"tail",
        "train-images-idx3-ubyte": bytes(1000),
        "meta": b"names",
    }
    packed = {
        "cifar-a/data_batch_1": blobs(
            lzma.compress(b"head"), lzma.compress(b"tail"), webp(images[:2]), webp(images[2:])
        ),
        "cifar-b/meta": blobs(b"names"),
        "fmnist/train-images-idx3-ubyte": blobs(lzma.compress(bytes(1000))),
    }
    folders = {"c": ("data_batch_1", "meta"), "f/raw": ("train-images-idx3-ubyte",)}
    md5 = {f: {n: hashlib.md5(whole[n]).hexdigest() for n in names} for f, names in folders.items()}
    monkeypatch.setattr(packs, "PUBLISHED", md5)
    for name in ("cifar-a/data_batch_1", "fmnist/train-images-idx3-ubyte"):  # one pack comes later
        (tmp_path / "packs" / name).parent.mkdir(parents=True)
        (tmp_path / "packs" / name).write_bytes(packed[name])
    packs.unpack(tmp_path / "packs", tmp_path / "data")
    assert packs.missing(tmp_path / "data", "c") == ["meta"] and not packs.missing(tmp_path / "data", "f/raw")
    (tmp_path / "packs" / "cifar-b").mkdir()
    (tmp_path / "packs" / "cifar-b" / "meta").write_bytes(packed["cifar-b/meta"])
    packs.unpack(tmp_path / "packs", tmp_path / "data")
    for folder, names in folders.items():
        for name in names:
            assert (tmp_path / "data" / folder / name).read_bytes() == whole[name]
    for damage, message in (
        (packed["cifar-b/meta"][:-1], "is cut off"),
        (blobs(b"other"), "md5 differs"),
        (b"", "is cut off"),
    ):
        (tmp_path / "data" / "c" / "meta").unlink(missing_ok=True)
        (tmp_path / "packs" / "cifar-b" / "meta").write_bytes(damage)
        with pytest.raises(InputError, match=message):
            packs.unpack(tmp_path / "packs", tmp_path / "data")


@pytest.mark.parametrize(("more", "taken_over"), [((), {"gpu"}), (("--rehearse",), {"cpu", "gpu"})])
def test_a_cpu_s_runs_are_made_again(more, taken_over, tmp_path):
    """An export may hold runs of both, as that of the full study does; the grid is to be of one machine and precision."""
    from benchmarks import lease

    made = [finished_run(name, accelerator) for name, accelerator in (("cpu", "cpu"), ("gpu", "cuda"))]
    exports.export_runs(made, tmp_path / "before.npz")
    places = [
        "--out",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path / "work"),
        "--earlier",
        str(tmp_path / "before.npz"),
    ]
    call = lease.Call(lease.parser().parse_args(["--minutes", "9", *places, *more]))
    assert {run.name for run in exports.read_export(call.exported)} == taken_over
    assert (call.out / "runs.npz").read_bytes() == call.exported.read_bytes()


def finished_run(name: str, accelerator: str) -> Run:
    given = vars(options.parse(["--dataset", "synthetic"])) | {"name": name, "accelerator": accelerator}
    return Run(name, given, {}, {"status": "finished"}, {}, "")


def test_missing_packages_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(packages, "missing", lambda names: [n for n in names if n in ("scipy", "torchvision")])
    assert packages.prepare([]) == "not installed here: torchvision; give a folder of wheels with --wheels"
    monkeypatch.setattr(packages, "missing", lambda names: [n for n in names if n == "scipy"])
    assert packages.prepare(["--minutes", "9"]) is None
    assert capsys.readouterr().out.startswith("scipy is not installed here: no reports here")
    wrong = packages.prepare(["--wheels", str(tmp_path), "--work", str(tmp_path / "w")])
    assert wrong == f"--wheels {tmp_path}: no wheel in it"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "9", "grid", "grids"], "'grids': not among check, speed, grid"),
        (["--minutes", "9", "--earlier", "nowhere"], "--earlier nowhere: there is no such file or folder"),
    ],
)
def test_bad_input_is_one_line(argv, says, tmp_path, capsys):
    from benchmarks import lease

    assert lease.main([*argv, "--out", str(tmp_path / "o"), "--work", str(tmp_path / "w")]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and err.startswith("lease.py: error: ")
