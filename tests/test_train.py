"""Whole runs in a temporary folder: what they leave, that they repeat bit for bit, and how they fail."""

import hashlib
import json
import math
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

import schedules
import train
from conftest import (
    ROOT,
    SIXTEEN,
    TINY,
    accelerator,
    fabric_run,
    same_weights,
    series,
    slow,
    summary,
    weights,
    without,
)
from engine import hardware, options

SERIES = {  # docs/measurements.md, at measured steps
    *("train/loss", "train/acc", "train/acc_clean", "train/acc_noisy"),
    *("optim/lr", "optim/momentum", "optim/temperature"),
    *("grad/cos_clean_all", "grad/cos_clean_noisy", "grad/clean_fraction"),
    *("grad/norm_clean", "grad/norm_noisy", "grad/norm_all"),
}


def test_a_run_leaves_what_the_contract_says(go):
    folder = go("--noise", "0.5", "--sched", "onecycle", "--sched-epochs", "2", "--checkpoint-minutes", "0")
    actual = series(folder)
    ends = {"val/loss", "val/acc", "val/acc_noisy", "test/acc", "noise/nominal", "noise/realised"}
    ends |= {"detect/aum", "detect/forgetting", "detect/loss", "train/prediction_changes"}
    masks = {"null/permuted_cos_clean_all", "null/permuted_cos_clean_noisy"}
    assert actual.keys() == SERIES | ends | masks
    for tag in masks:
        assert [step for step, _ in actual[tag]] == [0, 4, 8], tag
    for tag in SERIES:
        assert [step for step, _ in actual[tag]] == [0, 2, 4, 6, 8], tag
    assert [step for step, _ in actual["val/acc"]] == [step for step, _ in actual["val/loss"]] == [0, 5, 10]
    assert [step for step, _ in actual["test/acc"]] == [10]
    assert actual["optim/lr"] == [
        (s, pytest.approx(schedules.schedule("onecycle", s, 10, 0.1, 0.9)[0])) for s in range(0, 10, 2)
    ]
    ledger = json.loads((folder / "config.json").read_text())["noise"]
    assert actual["noise/nominal"] == [(0, 0.5)] and actual["noise/realised"] == [
        (0, pytest.approx(ledger["realised"]))
    ]
    outcome = summary(folder)
    assert (outcome["status"], outcome["steps"], outcome["examples"]) == ("finished", 10, 320)
    assert outcome["val_acc"] == pytest.approx(actual["val/acc"][-1][1])
    assert outcome["test_acc"] == pytest.approx(actual["test/acc"][0][1])
    assert outcome["seconds"] > 0 and outcome["images_per_second"] > 0 and outcome["peak_memory_mb"] > 0
    blob = (folder / "noise.npz").read_bytes()
    assert hashlib.sha256(blob).hexdigest() == ledger["noise_npz_sha256"]
    with np.load(folder / "noise.npz", allow_pickle=False) as z:
        assert int((z["true"] != z["label"]).sum()) == ledger["changed"] and len(z["index"]) == 160
    assert {"last.ckpt", "previous.ckpt"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.glob("*.tmp")) and not (folder / "failed.ckpt").exists()


@pytest.mark.parametrize("precision", ["32-true", *slow("bf16-mixed")])
def test_the_same_command_gives_the_same_bits(go, precision):
    options = ("--noise", "0.5", "--precision", precision, "--sched", "cosine")
    options += tuple(SIXTEEN) if precision == "bf16-mixed" else ()
    a, b = go(*options, name="a"), go(*options, name="b")
    assert same_weights(a, b)
    assert series(a) == series(b)
    assert (a / "noise.npz").read_bytes() == (b / "noise.npz").read_bytes()
    c = go(*options, "--seed", "1", name="c")
    assert not same_weights(a, c) and (a / "noise.npz").read_bytes() == (c / "noise.npz").read_bytes()


@pytest.mark.slow
def test_a_different_noise_seed_changes_only_the_noise(go, monkeypatch):
    """Same initial network, same examples in the same order under the same crops, other labels."""
    seen = {}
    step = train.train_step

    def watch(job, batch, number, measured):
        start = torch.cat([p.detach().flatten() for p in job.parameters]) if number == 0 else None
        seen.setdefault(name, []).append((start, batch.x.clone(), batch.true.clone(), batch.y.clone()))
        return step(job, batch, number, measured)

    monkeypatch.setattr(train, "train_step", watch)
    for name, noise_seed in (("a", "0"), ("b", "1")):
        go("--noise", "0.5", "--noise-seed", noise_seed, name=name)
    assert torch.equal(seen["a"][0][0], seen["b"][0][0])
    for (_, x, true, y), (_, x2, true2, y2) in zip(seen["a"], seen["b"], strict=True):
        assert torch.equal(x, x2) and torch.equal(true, true2) and not torch.equal(y, y2)


@pytest.mark.slow
def test_measuring_in_eval_mode_leaves_no_trace(go):
    a = go("--noise", "0.5", "--measure", "off", name="a")
    b = go("--noise", "0.5", "--measure-bn", "eval", name="b")
    c = go("--noise", "0.5", "--measure-bn", "separate", name="c")
    assert same_weights(a, b) and same_weights(a, c)
    plain = series(a)
    assert not [tag for tag in plain if tag.startswith("grad/")]
    assert {tag: series(b)[tag] for tag in plain} == plain


def test_no_noisy_example_no_value(go):
    """At a low rate most batches hold no noisy example: those steps have no value, and no series has a NaN."""
    folder = go("--noise", "0.03", "--bs", "8", "--epochs", "1", "--measure-every", "1")
    actual = series(folder)
    with np.load(folder / "noise.npz") as z:
        assert 0 < (z["true"] != z["label"]).sum() <= 5
    assert [s for s, _ in actual["train/loss"]] == list(range(20))
    with_noise = [s for s, _ in actual["train/acc_noisy"]]
    assert 0 < len(with_noise) <= 5
    for tag in ("grad/cos_clean_all", "grad/cos_clean_noisy", "grad/norm_noisy"):
        assert [s for s, _ in actual[tag]] == with_noise
    assert [s for s, _ in actual["grad/norm_clean"]] == list(range(20))
    assert [s for s, f in actual["grad/clean_fraction"] if f < 1] == with_noise
    assert all(math.isfinite(v) for points in actual.values() for _, v in points)


def test_clean_run_and_full_noise_run(go):
    clean = series(go(name="clean"))
    assert not {"grad/cos_clean_all", "train/acc_noisy"} & clean.keys() and "grad/norm_clean" in clean
    full = series(go("--noise", "1.0", name="full"))
    assert all(math.isfinite(v) for points in full.values() for _, v in points)
    assert full["noise/realised"][0][1] > 0.8


@pytest.mark.slow
def test_max_steps_ends_like_any_other_run(go):
    folder = go("--max-steps", "7", "--noise", "0.2")
    actual, outcome = series(folder), summary(folder)
    assert [s for s, _ in actual["val/acc"]] == [0, 5, 7] and [s for s, _ in actual["test/acc"]] == [7]
    assert (outcome["status"], outcome["steps"], outcome["examples"]) == ("finished", 7, 224)


def test_the_short_last_batch_is_kept(go):
    folder = go("--bs", "48", "--epochs", "1", "--measure-every", "1")  # 160 = 48 + 48 + 48 + 16
    assert summary(folder)["steps"] == 4 and summary(folder)["examples"] == 160
    temperature = series(folder)["optim/temperature"]
    assert temperature[3][1] == pytest.approx(3 * temperature[0][1])


def test_a_loss_that_is_not_finite_stops_the_run(go, monkeypatch, capsys):
    at = schedules.Course.at
    monkeypatch.setattr(schedules.Course, "at", lambda course, step: at(course, step) if step < 5 else (1e30, 0.9))
    folder = go("--noise", "0.5", "--epochs", "4", "--checkpoint-minutes", "0", status=1)
    outcome = summary(folder)
    assert outcome["status"] == "failed" and "not finite" in outcome["reason"] or "is nan" in outcome["reason"]
    assert (folder / "failed.ckpt").exists()
    assert all(t.isfinite().all() for t in weights(folder).values())
    assert not all(t.isfinite().all() for t in torch.load(folder / "failed.ckpt")["model"].values())
    actual = series(folder)
    assert actual["train/loss"] and all(math.isfinite(v) for points in actual.values() for _, v in points)
    lines = capsys.readouterr().err.splitlines()
    assert sum("failed.ckpt" in line for line in lines) == 1 and not any("Traceback" in line for line in lines)


def test_a_crash_is_written_down(go, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("out of paper")

    monkeypatch.setattr(train, "train_step", broken)
    with pytest.raises(RuntimeError, match="out of paper"):
        go("--noise", "0.5")
    outcome = summary(tmp_path / "runs" / "r")
    assert outcome["status"] == "failed" and outcome["reason"] == "RuntimeError: out of paper"


def test_checkpoint_loads_as_plain_data(go):
    state = torch.load(go("--noise", "0.5") / "last.ckpt", weights_only=True)
    assert state["step"] == 10 and state["config"]["options"]["noise"] == 0.5
    assert {"model", "optimizer"} <= state.keys()


@pytest.mark.slow
def test_fabric_run_is_the_same_run(zygote, tmp_path):
    """`fabric run` with one process, with nothing but the accelerator given: the same bits, precision resolved alike, and
    whatever OMP_NUM_THREADS says."""
    argv = without([*TINY, "--noise", "0.5"], "--accelerator", "--precision")
    argv += ["--runs", str(tmp_path / "runs")]
    result = subprocess.run(
        [*fabric_run(), *argv, "--name", "a"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "3"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert zygote.run(["--accelerator", accelerator(), *argv, "--name", "b"]) == [0], zygote.output()
    a, b = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    assert same_weights(a, b) and series(a) == series(b)
    precision = [json.loads((f / "config.json").read_text())["options"]["precision"] for f in (a, b)]
    resolved = options.parse(["--dataset", "synthetic", "--accelerator", accelerator()])
    hardware.resolve(resolved)
    assert precision == [resolved.precision] * 2


@pytest.mark.slow
def test_fashion_mnist_in_one_channel(go, real_data):
    argv = "--dataset fmnist --model resnet18 --subset 200 --noise 0.2 --epochs 1".split()
    folder = go(*argv, "--data-dir", str(real_data))
    assert weights(folder)["conv1.weight"].shape[1] == 1 and summary(folder)["status"] == "finished"


@pytest.mark.slow
def test_training_learns(go):
    """On clean drawn images a narrow net gets far above chance in a few epochs."""
    argv = "--synthetic-train 2500 --synthetic-test 200 --epochs 6 --bs 50 --sched onecycle --sched-epochs 6".split()
    outcome = summary(go(*argv, "--measure-every", "50", "--precision", "auto"))
    assert outcome["val_acc"] > 0.45 and outcome["test_acc"] > 0.4


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as on Linux")
@pytest.mark.parametrize("program", ["train.py", "sweep.py", "report.py", "noise.py"])
def test_a_limit_under_which_torch_cannot_be_loaded_is_said(program):
    """`ulimit -v` of a login node."""
    limited = f"ulimit -v 1200000; exec {shlex.quote(sys.executable)} {program} --help"
    result = subprocess.run(["sh", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=300)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith(
        f"{program}: error: there is too little memory here to load torch ("
    )
    assert line.endswith("; ulimit -v allows 1.1 GiB")
