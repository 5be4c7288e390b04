"""What a user adds from outside, one function and one entry in each registry, trains, sweeps and reports with no other change.

The registry of measures after an epoch joins `ENTRIES` once it is there.
"""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import datasets
import losses
import models
import noises
import optim
import report
import schedules
import sweep
import train
from conftest import series
from data import Source
from engine import schema
from study import processes, scheduler


def stripes(args) -> Source:
    """120 training and 20 test images of vertical or horizontal stripes: two classes."""
    y = torch.arange(140) % 2
    line = (torch.arange(32) % 4 < 2).to(torch.uint8) * 255
    x = torch.stack([line.expand(32, 32) if k else line[:, None].expand(32, 32) for k in y])[..., None]
    return Source(x[:120], y[:120], None, x[120:], y[120:], ("flat", "upright"), (0.5,), (0.5,), torch.tensor([1, 0]))


def linear(C: int, K: int, width: int, norm: str) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64 * C, K))


def every_third(true: torch.Tensor, K: int, rate: float, g: torch.Generator, flips: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(len(true)) % 3 == 0, flips[true], true)


def halving(step: int, sched_steps: int, lr: float, momentum: float) -> tuple[float, float]:
    return lr * 0.5 ** (4 * min(step, sched_steps) // sched_steps), momentum


class SignSGD(torch.optim.Optimizer):
    """w <- w - lr sign(g), with a running mean of gradients that it only keeps, to see it saved."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.0})
        for p in self.param_groups[0]["params"]:
            self.state[p]["mean"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mean"].lerp_(p.grad, 0.1)
                p.sub_(group["lr"] * p.grad.sign())


def squared(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Brier's score of each example; differentiated by autograd, for its entry has no gradient."""
    return (logits.softmax(1) - nn.functional.one_hot(labels, logits.shape[1])).square().sum(1)


ENTRIES = {  # option: (registry, its new entry)
    "dataset": (datasets.DATASETS, datasets.DataSet(stripes)),
    "model": (models.MODELS, models.Model(linear)),
    "noise-type": (noises.NOISES, noises.Noise(every_third, frozenset({"flips"}))),
    "loss": (losses.LOSSES, losses.Loss(squared, "squared error of the probabilities")),
    "sched": (schedules.SCHEDULES, schedules.Schedule(halving, "halving rate")),
    "optimizer": (
        optim.OPTIMIZERS,
        optim.Optimizer(lambda parameters, lr, momentum, wd, keeps: SignSGD(parameters, lr), "signs", ("mean",)),
    ),
}


@pytest.fixture
def added(monkeypatch) -> list[str]:
    """The options that use the new entry of each registry, all called `added`."""
    schema.option_actions.cache_clear()  # in a program entries are made before the first file is read
    for registry, entry in ENTRIES.values():
        monkeypatch.setitem(registry, "added", entry)
    yield list(ENTRIES)
    schema.option_actions.cache_clear()


class InProcess:
    """In the place of `subprocess.Popen`: a process of train.py, run here, where the new entries are known."""

    def __init__(self, argv: list[str], **_) -> None:
        self.status = train.main(argv[2:])

    def poll(self) -> int:
        return self.status


def test_entries_from_outside_train_sweep_resume_and_report(added, tmp_path, monkeypatch):
    names = {name: getattr(subprocess, name) for name in ("STDOUT", "DEVNULL")}
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=InProcess, **names))
    monkeypatch.setattr(processes, "possible", lambda: False)  # to fork: that process would not know the entries
    monkeypatch.setattr(scheduler, "POLL", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runs, out = tmp_path / "runs", tmp_path / "report"
    given = "--noise 0.3 --sched-steps 8 --lr 0.01 --bs 16 --epochs 1 --measure-every 2 --precision 32-true --accelerator cpu"
    grid = " ".join(f"{option}=added" for option in added) + " seed=0,1"
    assert sweep.main(["--grid", grid, "--runs", str(runs), "--threads", "1", *given.split(), "--max-steps", "3"]) == 0
    folders = sorted(path for path in runs.iterdir() if (path / "config.json").is_file())
    assert [folder.name for folder in folders] == ["seed0", "seed1"]

    first = json.loads((folders[0] / "config.json").read_text())["options"]
    assert {first[option.replace("-", "_")] for option in added} == {"added"}
    again = [word for option in added for word in (f"--{option}", "added")] + ["--seed", str(first["seed"])]
    again += ["--runs", str(runs), "--name", folders[0].name, "--threads", "1", *given.split(), "--max-steps", "5"]
    assert train.main([*again, "--resume"]) == 0
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["resolved"]["classes"] == ["flat", "upright"]
    assert config["resolved"]["parameters"] == 64 * 2 + 2
    assert config["noise"]["changed"] == 32  # every third of 96
    assert all(0 < v < 2 for _, v in series(folders[0])["train/loss"])  # of two classes at most 2
    rates = [v for _, v in series(folders[0])["optim/lr"]]
    assert rates == pytest.approx([0.01, 0.005, 0.0025])  # of steps 0, 2, 4: halved after each quarter of 8 steps
    state = torch.load(folders[0] / "last.ckpt", weights_only=True)["optimizer"]["state"]
    assert all(entry.keys() == {"mean"} and entry["mean"].any() for entry in state.values())

    assert report.main([str(runs), "--out", str(out), "--format", "png"]) == 0
    page = (out / "report.md").read_text()
    assert "halving rate" in page and "added, added" in page  # data set and model
    assert len(list(out.rglob("*.png"))) >= 3
