"""Runs as tables: that they read back as they were, are written one run at a time, and nothing is overwritten or left half."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import report
from data import InputError
from engine import options
from study import results, runfolders, tables
from study.runfolders import Run

PLAIN = vars(options.parser().parse_args([])) | {"model": "resnet18", "noise": 0.0}


def made(name: str, source: str = "here", **opts) -> Run:
    rng = np.random.default_rng(len(name) + opts.get("bs", 0))
    series = {
        "val/acc": (np.array([0, 50, 100]), rng.random(3)),
        "grad/cos_clean_noisy": (np.arange(0, 100, 10), rng.normal(size=10) * 1e-7),
    }
    summary = {"status": "finished", "val_acc": float(series["val/acc"][1][-1]), "reason": None, "parts": {"a": 1}}
    return Run(name, PLAIN | opts, {"classes": ["a, b", 'c "d"']}, summary, series, source, {"torch": "2.8"})


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_every_value_reads_back(tmp_path):
    runs = [made("a", bs=16), made("b", bs=64, noise=0.5), made("a", "elsewhere", bs=32)]
    summary_line = tables.write_tables(iter(runs), tmp_path / "all.csv")
    assert "3 runs" in summary_line and "39 values" in summary_line
    read_back: dict = {}
    for row in read(tmp_path / "all.csv"):
        read_back.setdefault((row["run"], row["tag"]), []).append((int(row["step"]), float(row["value"])))
    want = {
        (name, tag): list(zip(steps.tolist(), values.tolist(), strict=True))
        for name, run in zip(("a", "b", "a (2)"), runs, strict=True)
        for tag, (steps, values) in run.series.items()
    }
    assert read_back == want  # every bit of every float
    rows = read(tmp_path / "all-runs.csv")
    assert [(r["run"], r["source"], r["bs"], r["noise"]) for r in rows] == [
        ("a", "here", "16", "0.0"), ("b", "here", "64", "0.5"), ("a (2)", "elsewhere", "32", "0.0")]  # fmt: skip
    for row, run in zip(rows, runs, strict=True):
        assert float(row["val/acc"]) == float(row["summary.val_acc"]) == run.summary["val_acc"]
        assert row["summary.reason"] == "" and json.loads(row["resolved.classes"]) == run.resolved["classes"]
        assert set(PLAIN) <= row.keys() and row["versions.torch"] == "2.8"
        assert row["analysis.val_acc"] == row["val/acc"] and (row["analysis.budget"], row["analysis.at_chance"]) == (
            "any",
            "False",
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all-runs.csv", "all.csv"]


def test_runs_are_written_one_at_a_time(tmp_path):
    """A run's values are in the file, or in its buffer, before the next run is asked for; the old table stays until the end."""
    (tmp_path / "all.csv").write_text("old")

    def feed():
        for i in range(3):
            big = made(f"r{i}")
            big.series["val/acc"] = (np.arange(5000), np.arange(5000) / 7)
            yield big
            (part,) = tmp_path.glob(".writing-*/all.csv")
            assert part.stat().st_size > 50_000 * (i + 1)
            assert (tmp_path / "all.csv").read_text() == "old"

    tables.write_tables(feed(), tmp_path / "all.csv")
    assert len(read(tmp_path / "all.csv")) == 3 * 5010


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "all.csv").write_text("old")

    def feed():
        yield made("a")
        raise InputError("a/config.json: cannot be read")

    with pytest.raises(InputError):
        tables.write_tables(feed(), tmp_path / "all.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["all.csv"] and (tmp_path / "all.csv").read_text() == "old"


def test_of_a_real_run(go, tmp_path, monkeypatch, capsys):
    """The command on a run's folder: no report, one row for each scalar; folders are read one after the other."""
    folder = go("--noise", "0.5", name="a")
    order, read_events = [], runfolders.read_events
    monkeypatch.setattr(runfolders, "read_events", lambda f: order.append(f.name) or read_events(f))
    first = next(results.iter_runs([str(folder.parent)]))
    assert order == ["a"] and first.name == "a"
    target = tmp_path / "all.csv"
    assert report.main([str(folder), "--csv", str(target)]) == 0 and "1 runs ->" in capsys.readouterr().out
    rows = read(target)
    want = {(t, s): v for t, (steps, values) in read_events(folder).items() for s, v in zip(steps, values, strict=True)}
    assert {(r["tag"], int(r["step"])): float(r["value"]) for r in rows} == want and len(rows) == len(want)
    (row,) = read(tmp_path / "all-runs.csv")
    assert row["status"] == "finished" and row["width"] == "8" and float(row["noise"]) == 0.5
    assert not (folder / "report").exists()


@pytest.mark.parametrize("what", ["a damaged run", "searches alone"])
def test_tables_of_no_run_are_not_written(what, tmp_path, capsys):
    runs = tmp_path / "runs"
    (runs / "tuning").mkdir(parents=True)
    if what == "a damaged run":
        (runs / "r").mkdir()
        (runs / "r" / "config.json").write_text("{")
    for target in (["--csv"], ["--export", str(tmp_path / "all.npz"), "--csv"]):
        assert report.main([str(runs), *target, str(tmp_path / "all.csv")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and ("r/config.json" in err or "no run in it" in err)
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_what_is_read_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "curves.csv"
    path.write_text("figure\n")
    assert report.main([str(path), "--csv", str(path)]) == 2
    assert "would overwrite" in capsys.readouterr().err and path.read_text() == "figure\n"
