"""Random command lines, damaged run folders, grids and interruptions, each in a child process; seeded, counted.

    python tests/fuzz.py                                        # all parts at full size: an hour or two on two cores
    python tests/fuzz.py --part invalid --n 40 --seed 7         # part of it
    python tests/fuzz.py --part commands --seed 0 --case 123    # one case again, its folder kept; failures print this

Status 0 if every case passed. A case is a function of the seed and its number alone (in `resume` a signal may come a
step earlier or later where the machine is slower).
"""

import argparse
import json
import math
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402

import fuzz_damage  # noqa: E402
import fuzz_grids  # noqa: E402
import fuzz_invalid  # noqa: E402
import fuzz_options  # noqa: E402
import fuzz_resume  # noqa: E402
from conftest import series, summary  # noqa: E402
from engine import identity, options  # noqa: E402
from fuzz_children import Children  # noqa: E402
from fuzz_inputs import Inputs, make_inputs  # noqa: E402

LONGEST = 1000  # characters of a line that refuses one thing


@dataclass
class World:
    """What cases are run with: child processes, inputs, and a folder for what is made once and shared."""

    children: Children
    inputs: Inputs
    shared: Path


def finished_run(c: fuzz_options.Command, cwd: Path) -> list[str]:
    """What is wrong with the run that a valid command line has made in the empty folder `cwd`."""
    made = sorted(p.name for p in cwd.iterdir())
    first = Path(str(c.value("runs", "runs"))).parts[0]
    if made != [first]:
        return [f"made {made} and not {first} alone"]
    folders = [p.parent for p in cwd.rglob("summary.json")]
    if len(folders) != 1:
        return [f"{len(folders)} run folders"]
    wrong, actual, ended = [], series(folders[0]), summary(folders[0])
    if (ended["status"], ended["steps"]) != ("finished", c.total_steps):
        wrong.append(f"summary: {ended['status']} after {ended['steps']} of {c.total_steps} steps")
    for tag, points in actual.items():
        steps = [step for step, _ in points]
        if len(set(steps)) < len(steps):
            wrong.append(f"{tag} has a step twice")
        if not all(math.isfinite(value) for _, value in points):
            wrong.append(f"{tag} holds a value that is not finite")
        if not 0 <= min(steps) <= max(steps) <= c.total_steps:
            wrong.append(f"{tag} has steps {min(steps)}..{max(steps)} in a run of {c.total_steps}")
    due = set(range(0, c.total_steps, c.value("measure_every", 50)))
    if {step for step, _ in actual.get("train/loss", [])} != due:
        wrong.append("train/loss is not at every measured step")
    epochs = {0, c.total_steps} | set(range(0, c.total_steps, math.ceil(c.n_train / c.value("bs", 128))))
    if {step for step, _ in actual.get("val/acc", [])} != epochs or len(actual.get("test/acc", [])) != 1:
        wrong.append("val/acc is not after every epoch, or test/acc not once")
    state = torch.load(folders[0] / "last.ckpt", weights_only=True)["model"]
    if not all(bool(t.isfinite().all()) for t in state.values()):
        wrong.append("weights that are not finite")
    wrong += best_weights(folders[0], ended["best_val_acc"] if c.value("best") else None)
    first = json.loads((folders[0] / "config.json").read_text())["options"]
    again = identity.differences(first, vars(options.parse(["--config", str(folders[0] / "config.json")])))
    wrong += [f"--config with its config.json: {'; '.join(again.values())}"] * bool(again)
    left = {p.name for p in folders[0].iterdir() if p.suffix == ".tmp" or p.name.startswith("tmp")}
    return wrong + [f"left behind {sorted(left)}"] * bool(left)


def best_weights(folder: Path, best: float | None) -> list[str]:
    """What is wrong with best.ckpt, which is there if --best was given and any validation had an accuracy above 0."""
    path = folder / "best.ckpt"
    if path.exists() != (best is not None):
        return [f"best.ckpt is {'there' if path.exists() else 'missing'}, the best accuracy being {best}"]
    state = torch.load(path, weights_only=True) if best else {"val_acc": None, "model": {}}
    finite = all(bool(t.isfinite().all()) for t in state["model"].values())
    return [f"best.ckpt: accuracy {state['val_acc']}, not {best}, or not finite"] * (
        state["val_acc"] != best or not finite
    )


def command_case(world: World, rng: random.Random, cwd: Path) -> tuple[str, list[str]]:
    """A valid command line: status 0 and a whole run, every value finite, no step twice."""
    c = fuzz_options.valid(rng, world.inputs)
    slow = c.value("compile") == "on" or c.vgg or c.set.grown or c.value("devices") == 2
    result = world.children.call("train", c.argv(), cwd, c.ranks, timeout=900 if slow else 300)
    kind = f"{c.value('measure', 'split')} {'vgg' if c.vgg else 'resnet'} {c.ranks * c.value('devices', 1) if c.value('devices') != 'auto' else 1}p"
    problems = result.problems({0})
    if not problems:
        problems = [f"{wrong}: {result.shell}" for wrong in finished_run(c, cwd)]
    return kind, problems


def invalid_case(world: World, rng: random.Random, cwd: Path) -> tuple[str, list[str]]:
    """An invalid command line: status 2, one line on standard error that names what is wrong, nothing created."""
    kind, argv = fuzz_invalid.invalid(rng, world.inputs)
    result = world.children.call("train", argv, cwd, timeout=60)
    problems = result.problems({2})
    if problems:
        return kind, problems
    lines = result.err[0].splitlines()
    if len(lines) != 1 or not lines[0].startswith("train.py: error: ") or result.out[0]:
        problems.append(f"{len(lines)} lines on standard error, {len(result.out[0])} characters on standard output")
    elif len(lines[0]) > LONGEST:
        problems.append(f"a line of {len(lines[0])} characters")
    elif not any(word in lines[0] for word in ("--", "option", "argument", "/")):
        problems.append("the line names neither an option nor a file")
    made = sorted(p.name for p in cwd.iterdir())
    if made:
        problems.append(f"created {made}")
    return kind, [f"{p}: {result.shell}: {result.err[0][:500]}" for p in problems]


PARTS = {  # name: (a case, cases of a whole run)
    "commands": (command_case, 400),
    "invalid": (invalid_case, 400),
    "folders": (fuzz_damage.case, 300),
    "grids": (fuzz_grids.case, 100),
    "resume": (fuzz_resume.case, 100),
}


def one(world: World, part: str, seed: int, number: int, parent: Path, keep: bool) -> tuple[str, list[str], float]:
    """One case in a folder of its own; (its kind, what was wrong, seconds)."""
    began = time.monotonic()
    cwd = parent / f"{part}-{number}"
    cwd.mkdir(parents=True)
    rng = random.Random(f"{seed}/{part}/{number}")
    try:
        return *PARTS[part][0](world, rng, cwd), time.monotonic() - began
    except Exception as e:  # a defect of the fuzzer, or a folder it cannot read: shown like a failure
        return "fuzzer", [f"the fuzzer itself: {type(e).__name__}: {e}"], time.monotonic() - began
    finally:
        if not keep:
            shutil.rmtree(cwd, ignore_errors=True)


def run_part(
    world: World,
    part: str,
    cases: list[int],
    seed: int,
    jobs: int,
    parent: Path,
    keep: bool = False,
    minutes: float = math.inf,
) -> list[str]:
    """Run some cases of a part, printing failures as they come, then counts; returns the failures.

    After `minutes` no more cases are begun, and the counts say how many were left out.
    """
    began, kinds, failures, times = time.monotonic(), Counter(), [], []

    def timely(number: int) -> tuple | None:
        late = time.monotonic() - began > 60 * minutes
        return None if late else (number, *one(world, part, seed, number, parent, keep))

    with ThreadPoolExecutor(jobs) as pool:
        for number, kind, problems, seconds in filter(None, pool.map(timely, cases)):
            kinds[kind] += 1
            times.append((seconds, number))
            for problem in problems:
                again = shlex.join(
                    ["python", "tests/fuzz.py", "--part", part, "--seed", str(seed), "--case", str(number)]
                )
                failures.append(f"{problem.encode('utf-8', 'backslashreplace').decode()}\n    again: {again}")
                print(f"FAILED {failures[-1]}", flush=True)
    listed = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    slowest = ", ".join(f"{seconds:.0f} s case {number}" for seconds, number in sorted(times, reverse=True)[:4])
    left_out = f" ({len(cases) - len(times)} more left out)" if len(times) < len(cases) else ""
    print(
        f"{part}: {len(times)} cases{left_out}, {len(failures)} failures, seed {seed}, "
        f"{time.monotonic() - began:.0f} s ({listed}; slowest: {slowest})",
        flush=True,
    )
    return failures


def run(
    parts: list[str], n: int | None, seed: int, jobs: int, case: int | None = None, minutes: float = math.inf
) -> list[str]:
    """`n` cases of each part (its full number without), or number `case` alone; returns the failures."""
    fuzz_options.check_complete()
    parent = Path(tempfile.mkdtemp(prefix="fuzz-"))
    children = Children(parent)
    failures = []
    try:
        world = World(children, make_inputs(parent / "inputs"), parent / "shared")
        world.shared.mkdir()
        for part in parts:
            cases = list(range(n or PARTS[part][1])) if case is None else [case]
            failures += run_part(world, part, cases, seed, jobs, parent, case is not None, minutes)
    finally:
        children.close()
        if case is None:
            shutil.rmtree(parent, ignore_errors=True)
        else:
            print(f"the case's folder is in {parent}")
    return failures


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--part", choices=list(PARTS), action="append", help="only this part (may be repeated)")
    p.add_argument("--n", type=int, help="cases of each part; default: 400, 400, 300, 100, 100")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--case", type=int, help="this case alone, its folder kept")
    p.add_argument("--jobs", type=int, default=1, help="cases at a time")
    p.add_argument("--minutes", type=float, default=math.inf, help="begin no more cases of a part after so many")
    args = p.parse_args()
    failures = run(args.part or list(PARTS), args.n, args.seed, args.jobs, args.case, args.minutes)
    print(f"{len(failures)} failures in all")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
