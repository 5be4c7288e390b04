"""benchmarks/speed.py: an error costs one cell of a table, rows become tables, and the timed steps are those of a run."""

import argparse
import json
import sys
from types import SimpleNamespace

import torch

from benchmarks import speed
from engine import fast
from test_metrics import default_dtype, job_for  # noqa: F401

SETTINGS = argparse.Namespace(seconds=0.0, repeats=1, precisions=None)
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
