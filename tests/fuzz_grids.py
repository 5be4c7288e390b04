"""Random sweeps, looked at and not run: valid grids list their runs or their tuned cells, invalid ones are refused in one line."""

import importlib.util
import random
import shlex
from pathlib import Path

from engine import options
from study import grids

VALUES = {  # axes that go together in any combination
    "bs": ["1", "7", "16", "32", "512"],
    "noise": ["0", "0.2", "0.5", "1", "default"],
    "seed": ["0", "1", "2", str(2**63 - 1)],
    "noise-seed": ["0", "3"],
    "lr": ["0.1", "1e-3", ".5"],
    "momentum": ["0", "0.9"],
    "wd": ["0", "5e-4"],
    "epochs": ["1", "64"],
    "max-steps": ["5", "default"],
    "sched": ["constant", "cosine", "onecycle"],
    "width": ["4", "7", "64", "default"],
    "measure": ["off", "split", "full"],
    "measure-every": ["1", "50"],
    "measure-bn": ["train", "eval", "separate"],
    "measure-budget": ["0.05", "2"],
    "permutations": ["0", "4"],
    "stratify": ["on", "off", "default"],
    "no-augment": ["on", "off"],
    "noise-type": ["uniform", "pair", "symmetric", "dynamic", "instance"],
    "dataset": ["cifar10", "fmnist", "synthetic"],
    "subset": ["100", "default"],
    "split-seed": ["0", "1"],
    "precision": ["auto", "32-true", "64-true"],
    "chunks": ["2", "4", "64"],
    "window": ["1", "20"],
    "sched-steps": ["1", "5000", "default"],
    "val-frac": ["0.1", ".5"],
    "synthetic-train": ["64", "200", "default"],
    "sync-bn": ["on", "off"],
    "model": ["resnet18", "default"],
}
WORDS = ("bs", "bs=", "=1", "bs=1,,2", "bs=x", "nosuch=1", "bs=0", "threads=1,2", "runs=a", "name=b", "resume=on")
WORDS += ("stratify=yes", "seed+noise-seed=0:1:2", "seed+noise-seed=:", "bs+bs", "help=on", "sched=triangle", "h=1")
WORDS += ("noise=nan", "noise=0.5,-1", "=", "+", "+=", "a+b=1", "seed=٣", "bs=1_0", "lr=" + "9" * 5000, "\udcff=1")
WORDS += ("dataset=cifar11", "norm=gn width=7", "model=vgg16 width=8", "sched-steps=1 sched-epochs=2", "val-frac=2")
WORDS += (
    "measure=split,full null-every=2",
    "measure=off null-every=1",
    "null-every=0",
    "best=on",
    "config=a",
    "config=",
)
WORDS += ("bs=32,32x", "bs=32:64", "seed=0,,1", "--bs=", "width=1025", "image-size=32", "checkpoint-minutes=1")
OPTIONS = (["--part", "nosuch"], ["--jobs", "0"], ["--name", "x"], ["--resume"], ["--nosuch", "1"], ["--bs", "x"])
OPTIONS += (["--seeds", "0,x"], ["--done", "absent.npz"], ["--jobs", "1_0"], ["--retries", "-1"], ["--epochs=0"])
OPTIONS += (
    ["--config", "absent.json"],
    ["--config", "."],
    ["--best=on"],
    ["--null-every", "0"],
    ["--permutations", "x"],
)
OPTIONS += (
    ["--per-gpu", "0"],
    ["--seeds", ""],
    ["--seeds", "0,0.5"],
    ["--threads", "x"],
    ["--grid", ""],
    ["--jobs", "1 "],
)


SPACES = {  # what may be tuned, with valid and wrong ranges
    "lr": (["log:0.003:1", "lin:1e-3:.5", "0.1|0.2"], ["log:0:1", "log:1:0.1", "lin:a:b", "0.1", "log:1", ":", "|"]),
    "wd": (["log:1e-5:1e-2", "0|5e-4"], ["log:0:1", "int:0:1.5", "0|0", "lin:-1:1"]),
    "optimizer": (["sgd|adam"], ["sgd", "sgd|none", "log:1:2"]),
    "width": (["int:4:64", "4|8"], ["int:4:2000", "log:4:8", "int:8:4"]),
    "warmup-epochs": (["int:1:2"], ["int:0:2", "lin:1:2"]),
}
NEVER = (
    "bs=16|32",
    "seed=0|1",
    "noise=lin:0:1",
    "runs=a|b",
    "threads=int:1:2",
    "epochs=int:1:2",
    "nosuch=1|2",
    "lr",
    "=",
    "",
)
WITH_OPTUNA = importlib.util.find_spec("optuna") is not None


def tuned(rng: random.Random, good: bool) -> tuple[list[str], str]:
    """Arguments of a tuned sweep, valid or not, and how the last line of its --dry-run or --status begins."""
    cells = rng.sample(["16", "32", "128"], rng.randint(1, 3))
    names = rng.sample(list(SPACES), rng.randint(1, 3))
    words = [f"{name}={rng.choice(SPACES[name][0])}" for name in names]
    argv = ["--grid", f"bs={','.join(cells)} sched=onecycle sched-epochs=9", "--epochs", "9", "--seeds", "0,1"]
    if not good:
        wrong = rng.choice([*NEVER, *(f"{name}={spec}" for name in names for spec in SPACES[name][1]), "--tune-seeds"])
        words = words if wrong == "--tune-seeds" else [wrong] if not wrong else [*words[1:], wrong]
        argv += ["--tune-seeds", rng.choice(["0", "x", "7,7", "", "1,2"])] * (wrong == "--tune-seeds")
    return [*argv, "--tune", " ".join(words)], f"# {len(cells)} cells, then {2 * len(cells)} runs"


def grid(rng: random.Random) -> tuple[str, int]:
    """A valid grid and an upper bound on its number of runs."""
    words, runs = [], 1
    names = rng.sample(list(VALUES), rng.randint(1, 5))
    for name in names:
        values = rng.sample(VALUES[name], rng.randint(1, len(VALUES[name])))
        if runs * len(values) > 60:
            continue
        runs *= len(values)
        words.append(f"{name}={','.join(values)}")
    if "seed" not in names and "noise-seed" not in names and rng.random() < 0.3:
        words.append(rng.choice(["seed+noise-seed=0,1", "seed+noise-seed=0:1,1:0"]))
        runs *= 2
    return " ".join(words), runs


def valid(rng: random.Random) -> tuple[list[str], int]:
    """Arguments that name runs, and an upper bound on their number."""
    if rng.random() < 0.15:
        preset = rng.choice(list(grids.PRESETS))
        part = ["--part", rng.choice(list(grids.PRESETS[preset]))] if rng.random() < 0.5 else []
        return ["--preset", preset, *part], 10_000
    chosen = [grid(rng) for _ in range(rng.choice([1, 1, 2]))]
    argv = [word for text, _ in chosen for word in ("--grid", text)]
    return argv, sum(n for _, n in chosen)


def printed(text: str, what: str, bound: int) -> list[str]:
    """What is wrong with a list of runs on standard output."""
    lines = text.splitlines()
    if not lines or len(lines) > bound + 1:
        return [f"{len(lines)} lines for at most {bound} runs"]
    if what == "--status":
        return [] if lines[-1].endswith(f"of {len(lines) - 1}") else ["the last line does not count the others"]
    names = set()
    for line in lines:
        if not line.startswith("#"):
            argv = shlex.split(line)[2:]
            names.add(options.parse(argv).name)
    n = len(lines) - (what == "--dry-run")
    return [] if len(names) == n else [f"{len(names)} names of {n} runs"]


def tuned_case(world, rng: random.Random, cwd: Path) -> tuple[str, list[str]]:
    """One tuned sweep that is looked at: status 0 and its cells, or status 2 and one line, also without Optuna."""
    good, what = rng.random() < 0.5, rng.choice(["--dry-run", "--status"])
    argv, last = tuned(rng, good)
    result = world.children.call("sweep", [*argv, what, "--accelerator", "cpu", "--runs", "runs"], cwd, timeout=120)
    good = good and WITH_OPTUNA
    problems = result.problems({0} if good else {2})
    if not problems and good and not result.out[0].splitlines()[-1].startswith(last):
        problems = [f"the last line is not '{last}...'"]
    elif not problems and not good and len(result.err[0].splitlines()) != 1:
        problems = [f"{len(result.err[0].splitlines())} lines on standard error"]
    problems += [f"created {sorted(p.name for p in cwd.iterdir())}"] * any(cwd.iterdir())
    return f"tuned {'valid' if good else 'invalid'} {what}", [
        p if "sweep.py" in p else f"{p}: {result.shell}" for p in problems
    ]


def case(world, rng: random.Random, cwd: Path) -> tuple[str, list[str]]:
    """One sweep, valid or not: status 0 and every run listed, or status 2 and one line; nothing created."""
    if rng.random() < 0.15:
        return tuned_case(world, rng, cwd)
    argv, bound = valid(rng)
    what = rng.choice(["--dry-run", "--print-commands", "--status"])
    good = rng.random() < 0.5
    if not good and "--grid" in argv and rng.random() < 0.7:
        at = argv.index("--grid") + 1
        words = argv[at].split()
        words.insert(rng.randint(0, len(words)), rng.choice(WORDS))
        argv[at] = " ".join(words)
    elif not good:
        argv += rng.choice(OPTIONS)
    if not (not good and "--jobs" in argv) and rng.random() < 0.3:
        argv += ["--jobs", str(rng.randint(1, 4))]
    argv += [what, "--accelerator", "cpu", "--runs", rng.choice(["runs", "ü x"])]
    result = world.children.call("sweep", argv, cwd, timeout=120)
    problems = result.problems({0} if good else {2})
    if not problems and good:
        problems = printed(result.out[0], what, bound)
    elif not problems and len(result.err[0].splitlines()) != 1:
        problems = [f"{len(result.err[0].splitlines())} lines on standard error"]
    elif not problems and len(result.err[0]) > 1000:
        problems = [f"a line of {len(result.err[0])} characters"]
    problems += [f"created {sorted(p.name for p in cwd.iterdir())}"] * any(cwd.iterdir())
    return ("valid" if good else "invalid") + " " + what, [
        p if "sweep.py" in p else f"{p}: {result.shell}" for p in problems
    ]
