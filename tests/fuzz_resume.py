"""Random runs that are interrupted at random places and resumed: at the end they equal the run that was not.

Where a signal comes is counted in function calls of the process, so that a case can be repeated.
"""

import json
import math
import pickle
import random
from collections import Counter
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

TIMES = ("seconds", "images_per_second", "peak_memory_mb", "measure_seconds", "measure_share")
OF_LENGTH = ("measure_share_counted",)  # a share of the run that was planned first, which may have been shorter

# Runs before train.main: after so many function calls of the main thread, the process gets a signal; `at` 0 counts only.
PROFILE = """
import os, sys
calls, at, number = 0, {at}, {number}
def count(frame, event, argument):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), number)
import train
run = train.run
def counted(*arguments):
    sys.setprofile(count)
    try:
        return run(*arguments)
    finally:
        sys.setprofile(None)
        open({path!r}, "w").write(str(calls))
train.run = counted
"""


def signal_after(at: int, number: int, path: Path) -> str:
    """Code for a child: signal `number` at the call `at` of `train.run`; the count of all calls goes to `path`."""
    return PROFILE.format(at=at, number=number, path=str(path))


def options_of(world, rng: random.Random) -> tuple[list[str], dict]:
    """Options of a random tiny run without its length, and what is to be known of it."""
    precision = rng.choices(["32-true", "64-true", "bf16-mixed", "16-mixed"], [6, 4, 1, 1])[0]
    half = precision.endswith("mixed")
    measure = rng.choice(["off", "split", "full"])
    kinds = ["uniform", "symmetric", "pair", "asymmetric", "matrix", "instance", "dynamic", "human", "file", "matched"]
    kind = rng.choice([*kinds, "fake mask", "none"])
    s = world.inputs.sets["synthetic"]
    argv = ["--dataset", "synthetic", "--synthetic-train", "200", "--synthetic-test", "9", "--accelerator", "cpu"]
    argv += ["--threads", "1", "--precision", precision, "--measure", measure]
    argv += ["--measure-bn", rng.choice(["train", "eval", "separate"]), "--measure-every", rng.choice("1235")]
    argv += ["--sched", rng.choice(["constant", "cosine", "onecycle"]), "--sched-steps", rng.choice(["3", "8", "20"])]
    argv += ["--checkpoint-minutes", rng.choice(["0", "0.001", "10"]), "--lr", rng.choice(["0.1", "0.02"])]
    if half:
        argv[-1] = (
            "0.01"  # in float16 evaluation can overflow after a few steps at a high rate, and the run then fails, as it should
        )
    argv += ["--momentum", rng.choice(["0", "0.9"]), "--seed", str(rng.randint(0, 99))]
    argv += (
        ["--norm", rng.choice(["bn", "gn"]), "--width", "8"] if rng.random() < 0.5 else ["--width", rng.choice("345")]
    )
    argv += ["--subset", "50" if half else "100"]
    if kind in ("human", "file", "matched"):
        argv += ["--noise-type", kind, "--noise-file", s.file("human.pt"), "--noise-labels", "worse_label"]
    elif kind == "fake mask":
        argv += ["--fake-mask", "0.4"]
    elif kind != "none":
        argv += ["--noise-type", kind, "--noise", rng.choice(["0.2", "0.5"])]
        argv += ["--noise-matrix", s.file("T.npy")] if kind == "matrix" else []
    budget = "0.05" if half else rng.choice(["0.05", "1", "1e6"])
    if measure == "full":
        argv += ["--measure-budget", budget, "--chunks", "2", "--permutations", "2"]
    elif measure == "split":
        argv += ["--measure-budget", budget, "--permutations", rng.choice("0123"), "--null-every", rng.choice("123")]
    argv += ["--stratify"] * (rng.random() < 0.2) + ["--best"] * (rng.random() < 0.4)
    bs, n = rng.choice([7, 16, 33, 40]), 40 if half else 80
    bs = 8 if half else bs
    return [*argv, "--bs", str(bs)], {
        "steps_per_epoch": math.ceil(n / bs),
        "grows": measure == "off" or budget == "1e6",  # else a longer run is measured at other steps
        "kind": f"{measure} {precision}",
        "ranks": 2 if not half and rng.random() < 0.06 else 1,
        "half": half,
    }


def length(epochs: int, max_steps: int | None) -> list[str]:
    return ["--epochs", str(epochs), *(["--max-steps", str(max_steps)] if max_steps else [])]


def everything(folder: Path) -> dict[str, list]:
    """Every value of a run's event files, text and pictures too, by tag, in order; hparams and layout are metadata."""
    actual: dict[str, list] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag.startswith("_hparams_") or value.tag.startswith("config"):
                    continue  # these hold names and folders, which differ
                actual.setdefault(value.tag, []).append((event.step, tensor_util.make_ndarray(value.tensor).tolist()))
    return actual


def equal(a: object, b: object) -> bool:
    """Whether two nests of plain values and tensors are the same to the last bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)  # an undefined moment is NaN in both


def newest(folder: Path, damaged: bool) -> dict:
    """A finished run's checkpoint. One `damaged` after the run's last step stays so: then it is the one before."""
    try:
        return torch.load(folder / "last.ckpt", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        if not damaged:
            raise
        return torch.load(folder / "previous.ckpt", weights_only=True)


def differences(whole: Path, cut: Path, grown: bool, damaged: bool) -> list[str]:
    """In what an interrupted run differs from the uninterrupted one; `damaged`: its checkpoints were."""
    a, b = newest(whole, False), newest(cut, damaged)
    wrong = [f"{key} of the checkpoint" for key in ("step", "model", "optimizer", "scaler", "window", "latest")
             if not equal(a.get(key), b.get(key))]  # fmt: skip
    a, b = ((folder / "best.ckpt").exists() for folder in (whole, cut))
    if a != b:
        wrong.append(f"best.ckpt, which is {'missing' if a else 'there'}")
    elif a:
        a, b = (torch.load(folder / "best.ckpt", weights_only=True) for folder in (whole, cut))
        wrong += [f"{key} of the best weights" for key in ("model", "step", "val_acc") if not equal(a[key], b[key])]
    a, b = everything(whole), everything(cut)
    wrong += [f"series {tag}" for tag in sorted(a.keys() | b.keys()) if a.get(tag) != b.get(tag)]
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (whole, cut))
    left_out = {*TIMES, *(OF_LENGTH if grown else ())}
    wrong += [
        f"{key} of the summary" for key in a.keys() | b.keys() if key not in left_out and a.get(key) != b.get(key)
    ]
    if (whole / "noise.npz").read_bytes() != (cut / "noise.npz").read_bytes():
        wrong.append("noise.npz")
    return wrong


def cut_checkpoints(folder: Path, rng: random.Random) -> str:
    """Damage the checkpoints as a lost disk does; at least one way to go on is left: the older one, or a new start."""
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    how = rng.choice(["cut", "cut", "empty", "missing", "both", "leftover"])
    content = last.read_bytes() if last.exists() else b""
    if not content:
        return "nothing to damage"
    if how in ("cut", "both"):
        last.write_bytes(content[: rng.randrange(len(content))])
    elif how == "empty":
        last.write_bytes(b"")
    elif how == "missing":
        last.unlink()
    else:
        (folder / "last.ckpt.tmp").write_bytes(content[: rng.randrange(len(content))])
    if how == "both" and previous.exists():
        previous.write_bytes(previous.read_bytes()[: rng.randrange(previous.stat().st_size + 1)])
    return how


def case(world, rng: random.Random, cwd: Path) -> tuple[str, list[str]]:
    """One run, uninterrupted and interrupted one to five times; the two must be equal."""
    argv, about = options_of(world, rng)
    spe, seconds = about["steps_per_epoch"], 600
    epochs = 2 if spe > 10 or about["half"] else rng.choice([2, 3])
    max_steps = rng.randint(spe, epochs * spe) if rng.random() < 0.3 else None
    calls, how = cwd / "calls", Counter()
    place = ["--runs", str(cwd / "runs"), "--name"]

    def start(name: str, long: list[str], before: str = "", resume: bool = True):
        words = [*argv, *long, *place, name, *(["--resume"] if resume else [])]
        return world.children.call("train", words, cwd, about["ranks"], seconds, before, grace=20)

    whole = start("whole", length(epochs, max_steps), signal_after(0, 0, calls), resume=False)
    if whole.problems({0}):
        return about["kind"], whole.problems({0})
    total, history, grown, signals = int(calls.read_text()), [], False, (9, 9, 15, 2)
    short = length(max(1, epochs - 1), None) if max_steps is None else length(epochs, max(1, max_steps - spe // 2 - 1))
    for _ in range(rng.randint(1, 5)):
        long, number = length(epochs, max_steps), rng.choice(signals)
        if about["grows"] and not how["at full length"] and rng.random() < 0.5:
            long, grown = short, True
        else:
            how["at full length"] += 1
        at = int(total * rng.random() ** 0.5)  # rather later: there is more to lose
        before = "" if long == short and rng.random() < 0.4 else signal_after(at, number, calls)
        result = start("cut", long, before)
        history.append(f"signal {number} at call {at} of {total}" if before else "to the end of a shorter run")
        allowed = {0, 3, -number} if before else {0}
        if about["ranks"] > 1:
            allowed |= {1, -9, -6}  # what the others make of it
            result.late = False
        problems = result.problems(allowed)
        if problems:
            return about["kind"], [f"{p} (after {'; '.join(history)})" for p in problems]
        if rng.random() < 0.3:
            history.append(cut_checkpoints(cwd / "runs" / "cut", rng))
    last = start("cut", length(epochs, max_steps))
    problems = last.problems({0})
    if not problems:
        damaged = any(event in ("cut", "both", "empty", "missing") for event in history)
        wrong = differences(cwd / "runs" / "whole", cwd / "runs" / "cut", grown, damaged)
        problems = [f"differs in {', '.join(wrong[:12])}: {last.shell}"] if wrong else []
    return about["kind"], [f"{p} (after {'; '.join(history)})" for p in problems]
