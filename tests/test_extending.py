"""What a user adds from outside, one function and one entry in a registry, trains, sweeps and reports with no other change."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import datasets
import models
import noises
import optim
import report
import schedules
import sweep
import train
from conftest import TINY, series
from data import Source
from engine import schema
from study import processes


def stripes(args) -> Source:
    """60 training and 20 test images of vertical or horizontal stripes: two classes."""
    y = torch.arange(80) % 2
    line = (torch.arange(32) % 4 < 2).to(torch.uint8) * 255
    x = torch.stack([line.expand(32, 32) if k else line[:, None].expand(32, 32) for k in y])[..., None]
    return Source(x[:60], y[:60], None, x[60:], y[60:], ("flat", "upright"), (0.5,), (0.5,), torch.tensor([1, 0]))


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


# {registry: (its dictionary, the new entry, options that use it)}
ENTRIES = {
    "dataset": (datasets.DATASETS, datasets.DataSet(stripes), "--dataset added"),
    "model": (models.MODELS, models.Model(linear), "--model added"),
    "noise": (noises.NOISES, noises.Noise(every_third, frozenset({"flips"})), "--noise-type added"),
    "schedule": (schedules.SCHEDULES, schedules.Schedule(halving, "halving rate"), "--sched added --sched-steps 8"),
    "optimizer": (
        optim.OPTIMIZERS,
        optim.Optimizer(lambda parameters, lr, momentum, wd, keeps: SignSGD(parameters, lr), "signs", ("mean",)),
        "--optimizer added --lr 0.001",
    ),
}


@pytest.fixture
def add(monkeypatch):
    """add(registry) -> the options that use its new entry, `added`."""
    schema.option_actions.cache_clear()  # in a program entries are made before the first file is read

    def enter(registry: str) -> list[str]:
        entries, entry, words = ENTRIES[registry]
        monkeypatch.setitem(entries, "added", entry)
        return words.split()

    yield enter
    schema.option_actions.cache_clear()


class InProcess:
    """In the place of `subprocess.Popen`: a process of train.py, run here, where the new entries are known."""

    def __init__(self, argv: list[str], **_) -> None:
        self.status = train.main(argv[2:])

    def poll(self) -> int:
        return self.status


@pytest.mark.parametrize("registry", list(ENTRIES))
def test_an_entry_from_outside_trains_sweeps_resumes_and_reports(add, registry, tmp_path, monkeypatch, capsys):
    option, value, *words = add(registry)
    if "--noise" not in words:
        words += ["--noise", "0.3"]
    names = {name: getattr(subprocess, name) for name in ("STDOUT", "DEVNULL")}
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=InProcess, **names))
    monkeypatch.setattr(processes, "POLL", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runs, out, rest = tmp_path / "runs", tmp_path / "report", [*TINY, *words, "--epochs", "2", "--bs", "16"]
    grid = f"{option.removeprefix('--')}={value} seed=0,1"
    argv = ["--grid", grid, "--runs", str(runs), "--threads", "1", *without(option, rest), "--max-steps", "3"]
    assert sweep.main(argv) == 0
    folders = sorted(path for path in runs.iterdir() if (path / "config.json").is_file())
    assert len(folders) == 2 and all("added" in folder.name for folder in folders)
    seed = folders[0].name[folders[0].name.index("seed") + 4]
    again = [option, value, *without(option, rest), "--seed", seed, "--runs", str(runs), "--name", folders[0].name]
    assert train.main([*again, "--max-steps", "5", "--resume"]) == 0
    assert json.loads((folders[0] / "summary.json").read_text())["steps"] == 5
    check(registry, folders[0])

    assert report.main([str(runs), "--out", str(out)]) == 0
    page = (out / "report.md").read_text()
    assert ("halving rate" if registry == "schedule" else "added") in page or registry == "noise"
    assert len(list(out.rglob("*.png"))) >= 3


def without(option: str, argv: list[str]) -> list[str]:
    """`argv` without `option` and without the width of a ResNet, which another model refuses."""
    dropped = (option, "--width") if option == "--model" else (option,)
    return [w for before, w in zip(["", *argv], argv, strict=False) if w not in dropped and before not in dropped]


def check(registry: str, folder: Path) -> None:
    """Whether the entry did what it says, in a run of 5 steps resumed after 3."""
    config = json.loads((folder / "config.json").read_text())
    if registry == "dataset":
        assert config["resolved"]["classes"] == ["flat", "upright"]
    if registry == "noise":
        assert config["noise"]["changed"] == 54  # every third of 160
    if registry == "schedule":  # halved after each quarter of 8 steps
        assert [v for _, v in series(folder)["optim/lr"]] == pytest.approx([0.1, 0.05, 0.025])  # of steps 0, 2, 4
    if registry == "optimizer":
        state = torch.load(folder / "last.ckpt", weights_only=True)["optimizer"]["state"]
        assert all(entry.keys() == {"mean"} and entry["mean"].any() for entry in state.values())
