"""What `benchmarks/lease.py` does in which order: tests, cells of the table of steps, groups of runs; and what the cells say about
how the runs are best made."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import sweep
from datasets import CIFAR10_FOLDER, FMNIST_FOLDER
from engine import hardware, options
from study.grids import Job

PRECISION = "bf16-mixed"
USUAL = 128  # batch size
SCHEDS, SIZES = ("onecycle", "cosine", "constant"), (512, 256, 128, 64, 32, 16)  # figures 4, 7 and 10 first
FASTEST = ("graph", "both")  # on an H100 at B = 16, 128 and 512; the other ways are timed after these
GAIN = 1.1  # more runs at once on a GPU are to save so much of its time
LEAST = 4  # runs at once, however fast one alone is: a start takes as long as 5,000 steps of a small batch
IMAGES = 40_000  # trained on in the report's grid, a fifth being held out
TESTS = (  # those that train, what only a GPU runs first
    "fast train gradsplit metrics measure launches resume devices pretended_gpu first_run estimates models other_models "
    "noise_files optim end folder signals tensorboard extending schema"
)


@functools.cache
def jobs_of(words: tuple[str, ...]) -> list[Job]:
    """The jobs of a sweep's arguments."""
    return sweep.jobs_of(*sweep.parser().parse_known_args(list(words)))


@dataclass(frozen=True)
class Group:
    """Runs that are made alike: those of a preset, its part, or of a grid, perhaps of one batch size and one schedule alone."""

    part: tuple[str, ...]  # a sweep's arguments
    model: str  # as the table of steps names it
    B: int | None = None
    sched: str | None = None
    folder: str | None = None  # of the data set

    @property
    def words(self) -> list[str]:
        """A sweep's arguments, but for those that say where."""
        chosen = {"--bs": self.B, "--sched": self.sched}
        return [*self.part, *(str(word) for option in chosen.items() if option[1] for word in option)]

    def jobs(self) -> list[Job]:
        chosen = lambda args: self.B in (None, args.bs) and self.sched in (None, args.sched)  # noqa: E731
        return [job for job in jobs_of(self.part) if chosen(job.args)]

    def steps(self) -> int:
        """Of its longest run."""
        of = lambda job: options.run_steps(job.args, math.ceil(IMAGES / job.args.bs))[0]  # noqa: E731
        return max(map(of, self.jobs()))


@dataclass(frozen=True)
class Plan:
    tests: tuple[str, ...]  # pytest's arguments
    groups: tuple[Group, ...]
    cells: tuple[tuple, ...]  # of the table of steps, in order of value
    at_once: tuple[tuple[str, int], ...] = ()  # (model, B) for which several runs at once are timed, too
    least: float = 20.0  # seconds, under which nothing more is begun
    seconds: float = 1.0  # of timing, of each cell
    workers: int = 1  # among which the tests are shared out, where pytest-xdist is there


def report_plan() -> Plan:
    """Everything, on one GPU."""
    wide, part = "resnet18-64", lambda name: ("--preset", "report", "--part", name)
    plots = [("--preset", "full", "--seeds", seeds) for seeds in ("0", "1,2")]
    groups = [Group(words, wide, folder=CIFAR10_FOLDER) for words in plots]
    groups += [Group(part("4-12"), wide, B, sched, CIFAR10_FOLDER) for sched in SCHEDS for B in SIZES]
    groups += [Group(part("13-14"), wide, B, sched, CIFAR10_FOLDER) for sched in SCHEDS[::2] for B in (128, 64)]
    groups += [Group(part("15-17"), "vgg16", B, None, FMNIST_FOLDER) for B in SIZES]
    cells = [(wide, PRECISION, B, way) for B in (512, 16, 128, 64, 256, 32) for way in FASTEST]
    cells += [(wide, PRECISION, B, "eager") for B in (512, 16, 128, 64, 256, 32, 1024)]
    cells += [(wide, PRECISION, B, "compile") for B in (512, 128, 256)]
    cells += [("vgg16", PRECISION, B, way) for B in (512, 128, 16) for way in ("eager", "graph")]
    cells += [(wide, "32-true", 128, "eager"), ("resnet18-16", PRECISION, 128, "eager")]
    cells += [("vgg16-linear", PRECISION, 128, "eager"), (wide, "32-true", 1024, "eager")]
    tests = *(f"tests/test_{name}.py" for name in TESTS.split()), "--with=--accelerator cuda"
    workers = min(8, hardware.cores() // 2)
    return Plan(tests, tuple(groups), tuple(cells), tuple((wide, B) for B in SIZES[::-1]), workers=workers)


TINY = (
    "--dataset synthetic --synthetic-train 60 --synthetic-test 20 --width 4 --epochs 2 --measure-every 2 "
    "--precision 32-true --accelerator cpu"
)


def rehearsal() -> Plan:
    """The same path with tiny settings, on a CPU."""
    grid = "--grid", "noise=0.5 bs=16,8,4", *TINY.split()
    groups = [Group(grid, "resnet18-8", B) for B in (16, 8, 4)]
    cells = ("resnet18-8", "32-true", 16, "eager"), ("resnet18-8", "32-true", 16, "graph")
    return Plan(("tests/test_schedules.py", "-k", "onecycle"), tuple(groups), cells, least=1.0, seconds=0.01)


# --------------------------------------------------------------------------------------------------- what the cells say


def key(row: dict) -> tuple:
    """What names a row of the table of steps."""
    return (*(row.get(name) for name in ("model", "precision", "B", "way")), row.get("runs at once", 1))


class Choice(NamedTuple):
    """How a run is best made."""

    way: str = "eager"
    at_once: int = 1  # runs on a GPU

    @property
    def words(self) -> list[str]:
        """Options of a sweep."""
        on = {name: "on" if self.way in (name, "both") else "off" for name in ("compile", "graph")}
        return [f"--per-gpu={max(self.at_once, LEAST)}", *(f"--{name}={value}" for name, value in on.items())]


def choose(rows: list[dict], model: str, B: int | None, steps: int, runs: int = 1) -> Choice | None:
    """The way in which so many runs of `steps` steps take least of the GPU's time, from what was timed at this batch size (None:
    of several, at the usual one), or at the nearest one. None where nothing was."""
    B = B or USUAL
    timed = [r for r in rows if (r.get("model"), r.get("precision")) == (model, PRECISION) and ".seconds" in r]
    nearest = min((row["B"] for row in timed), key=lambda size: abs(math.log2(size / B)), default=B)
    cost = {}
    for row in (row for row in timed if row["B"] == nearest):
        at_once = row.get("runs at once", 1)
        compiles = row["way"] in ("compile", "both")  # once: the other runs find the kernels in torch's cache
        ready = float(row.get("made ready in, s", 0)) / (runs if compiles else 1)
        cost[Choice(row["way"], at_once)] = (row[".seconds"] * steps + ready) / at_once
    if not cost:
        return None
    best = min(cost, key=cost.__getitem__)
    single = min((c for c in cost if c.at_once == 1), key=cost.__getitem__, default=best)
    return best if cost[single] > GAIN * cost[best] else single


def wanted(plan: Plan, rows: list[dict]) -> list[list]:
    """The cells that are to be timed, in order of value, without those of `rows`.

    Several runs at once are timed for the best single way, more of them as long as that gains.
    """
    done = {key(row) for row in rows}
    cells = [[*cell] for cell in plan.cells if (*cell, 1) not in done]
    more = []
    for model, B in plan.at_once:
        here = [row for row in rows if row.get("B") == B]
        single = choose([row for row in here if row.get("runs at once", 1) == 1], model, B, steps=10_000)
        for at_once in (2, 4) if single else ():
            if (model, PRECISION, B, single.way, at_once) not in done:
                more.append([model, PRECISION, B, single.way, at_once])
                break
            best = choose(here, model, B, steps=10_000)
            if best is None or best.at_once < at_once:
                break
    essential = [
        cell for cell in cells if cell[1] == PRECISION and cell[3] in FASTEST and (cell[0], cell[2]) in plan.at_once
    ]
    return essential + more + [cell for cell in cells if cell not in essential]
