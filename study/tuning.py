"""Tuned comparisons: each cell of a grid at its own best values, chosen on other seeds than the ones judged.

A search is a source of runs for the scheduler. Each of its trials trains a cell at some values, once for each tuning seed,
in RUNS/tuning/SEARCH; the best values then become runs of the grid, at its own seeds, in RUNS. A file for each cell there
says what was searched and chosen, for reports.
"""

import hashlib
import json
import math
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data import InputError
from datasets import known_shape
from engine import options, roles
from series import SERIES
from study.grids import SEEDS, Job, named, without
from study.joblist import find_earlier, identity_of, read_jobs
from study.outputs import whole_file
from study.runfolders import read_events
from study.searches import FOLDER, FORMAT
from study.spaces import Dimension
from study.trials import CellStudy, Journal

METRICS = {tag: series.search for tag, series in SERIES.items() if series.search}
TRIALS = 24  # of a cell, where no number is given
FIRST_SEED = 1000  # the tuning seed where none is given, or the next that no judged run has
LOOK = 1.0  # seconds between looks at the values of running trials, and at trials of other sweeps
DIVERGED = re.compile(r"\bis (nan|-?inf) at step|are not finite")  # why a run failed whose values were too bold
MEASURING = tuple(f"--{option.replace('_', '-')}" for option in roles.having(roles.MEASURING))


@dataclass
class Plan:
    """What is searched: `most` trials of each cell, each trained with all of `seeds`, judged by the last value of `metric`."""

    space: list[Dimension]
    metric: str
    most: int
    seeds: list[str]
    command: str  # as it was typed
    retry_failed: bool = False

    @property
    def direction(self) -> str:
        return METRICS[self.metric]

    @property
    def key(self) -> str:
        """The search's name. More trials are the same search, other ranges, metrics or tuning seeds another one."""
        what = json.dumps([sorted((d.option, d.text) for d in self.space), self.metric, self.seeds])
        return "-".join([*(d.option for d in self.space), hashlib.sha256(what.encode()).hexdigest()[:8]])


@dataclass
class Cell:
    """The runs of a grid that differ in their seeds alone. `argv`: their options without seeds; `runs`: at the judged seeds."""

    name: str
    argv: list[str]
    runs: list[Job]
    study: CellStudy | None = None
    broken: str = ""  # why its search cannot go on

    @property
    def evaluations(self) -> int:
        """How often a run of it is validated after training has begun."""
        args, shape = self.runs[0].args, known_shape(self.runs[0].args)
        n = math.ceil((args.subset or (shape.train if shape else 50_000)) * (1 - args.val_frac))
        an_epoch = math.ceil(n / args.bs)
        return math.ceil(options.run_steps(args, an_epoch)[0] / an_epoch)


@dataclass
class Trial:
    """A trial that this sweep runs. `results`: the metric with each seed that has been trained."""

    cell: Cell
    trial: object  # Optuna's
    values: dict[str, str]
    results: list[float] = field(default_factory=list)
    pruned: bool = False
    seen: int = -1  # bytes of events that were looked at

    @property
    def first(self) -> bool:
        """Whether its first run is on, by which it may be ended early."""
        return not self.results


def tuning_seeds(given: str | None, jobs: list[Job]) -> list[str]:
    """The seeds that choose. Raises `InputError` unless they are seeds, and none is that of a judged run."""
    judged = {str(getattr(job.args, option)) for job in jobs for option in roles.having(roles.SEED)}
    if given is None:
        return [next(str(s) for s in range(FIRST_SEED, 2**63) if str(s) not in judged)]
    seeds = given.split(",")
    for seed in seeds:
        try:
            options.parser().parse_args(["--seed", seed])
        except InputError as e:
            raise InputError(f"--tune-seeds '{given}': not a list of seeds like 1000,1001") from e
        if str(int(seed)) in judged:
            raise InputError(f"--tune-seeds {given}: {seed} is a seed of judged runs; the choice is made on others")
    if len({int(seed) for seed in seeds}) < len(seeds):
        raise InputError(f"--tune-seeds {given}: a seed is there twice")
    return [str(int(seed)) for seed in seeds]


def check_corners(argv: list[str], space: list[Dimension]) -> None:
    """Raise `InputError` unless the trials of a cell can have all values of the space, one option at a time."""
    first = {d.option: d.corners[0] for d in space}
    for d in space:
        for corner in d.corners:
            try:
                options.parse(trial_words(argv, "0", first | {d.option: corner}, space))
            except InputError as e:
                raise InputError(f"--tune: {d.option}={d.text}: {e}") from e


def cells_of(jobs: list[Job], space: list[Dimension]) -> list[Cell]:
    """The cells of a grid's jobs, each checked at every corner of the space. Runs that are measured in different ways are of
    one cell. Raises `InputError`."""
    tuned = {d.option.replace("-", "_") for d in space}
    plain = vars(options.parser().parse_args([]))
    cells: dict[str, Cell] = {}
    for job in jobs:
        neutral = {key: plain[key] for key in (*roles.having(roles.SEED, roles.MEASURING), *tuned)}
        args = type(job.args)(**vars(job.args) | neutral)
        which = identity_of(vars(args))
        if which not in cells:
            name = options.run_name(args, job.always - neutral.keys())
            digits = hashlib.sha256(which.encode()).hexdigest()[
                :6
            ]  # for what a name does not tell, such as a file's place
            cells[which] = Cell(f"{name}-{digits}", without(SEEDS, job.argv), [])
            check_corners(cells[which].argv, space)
        cells[which].runs.append(job)
    return list(cells.values())


def trial_words(argv: list[str], seed: str, values: dict[str, str], space: list[Dimension]) -> list[str]:
    """The options of a trial's run: a cell's, with a seed and values. It measures nothing: it trains alike, and saves that cost."""
    seeds = [word for name in SEEDS for word in (name, seed)]
    words = [word for d in space for word in d.words(values[d.option])]
    return [*without(MEASURING, argv), *seeds, *words, "--measure", "off"]


def at_values(job: Job, values: dict[str, str], space: list[Dimension]) -> Job:
    """A run of the grid at tuned values, which are in its name."""
    words = [word for d in space for word in d.words(values[d.option])]
    argv, tuned = [*job.argv, *words], {d.option.replace("-", "_") for d in space}
    return named(argv, options.parse(argv), job.always | tuned, (job.varied or job.always) | tuned)


class Search:
    """The searches of all cells: a source of runs for the scheduler, see `scheduler.Source`."""

    def __init__(self, plan: Plan, cells: list[Cell], runs: Path, create: bool = True) -> None:
        """`create`: to run it; without, to look at it, and nothing is written. Raises `InputError`."""
        self.plan, self.cells = plan, cells
        self.runs_folder, self.folder = runs, runs / FOLDER / plan.key
        self.journal = Journal(self.folder, create)
        there = self.journal.names()
        for cell in (cell for cell in cells if create or cell.name in there):
            cell.study = CellStudy(self.journal, cell.name, plan.space, plan.direction, cell.evaluations)
        self.retry_failed = plan.retry_failed
        self.running: dict[str, Trial] = {}  # by run
        self.ready: list[Job] = []  # runs of further seeds
        self.looked = self.watched = -LOOK  # on the monotonic clock
        self.stopped = False  # whether a run was stopped before its end, by this sweep or from outside

    # ---------------------------------------------------------------------------------------- for the scheduler

    def next(self) -> Job | None:
        """A run to start, None where there is none just now."""
        if self.ready:
            return self.ready.pop(0)
        if time.monotonic() - self.looked < LOOK:
            return None
        while True:
            left = [cell for cell in self.cells if not cell.broken]
            # cells in turn, so that TPE knows how most of a cell's trials ended when it draws the next
            for cell in sorted(left, key=lambda cell: len(cell.study.trials())):
                claimed = cell.study.claim(self.plan.most)
                if claimed:
                    break
            else:
                self.looked = time.monotonic()
                return None
            trial = Trial(cell, *claimed)
            if "pruned" not in trial.trial.user_attrs:
                return self.run_of(trial)
            self.end(trial)  # the sweep that ran it was killed before it had said so

    def run_of(self, trial: Trial) -> Job:
        """The next run of a trial: that of its first seed that has no result yet."""
        seed, cell = self.plan.seeds[len(trial.results)], trial.cell
        argv = trial_words(cell.argv, seed, trial.values, self.plan.space)
        args = options.parse(argv)
        args.name = f"{cell.name}_trial{trial.trial.number}_seed{seed}"
        self.running[args.name] = trial
        return Job(argv, args)

    def is_open(self) -> bool:
        """Whether trials are left to be run, here or by another sweep."""
        return any(not cell.broken and not cell.study.is_complete(self.plan.most) for cell in self.cells)

    def to_stop(self) -> list[str]:
        """The runs whose trials are to end early."""
        if time.monotonic() - self.watched < LOOK:
            return []
        self.watched, names = time.monotonic(), []
        for name, trial in self.running.items():
            if trial.first and not trial.pruned and self.has_news(name, trial):
                trial.pruned = trial.cell.study.report(trial.trial, self.evaluations(name))
                names += [name] * trial.pruned
        return names

    def ended(self, job: Job, status: str, detail: str) -> str:
        """Note how a run ended; returns its status for a count."""
        trial = self.running.pop(job.name)
        if status == "finished" and trial.first and not trial.pruned:
            trial.pruned = trial.cell.study.report(trial.trial, self.evaluations(job.name))
        if trial.pruned:
            self.end(trial)
            return "pruned"
        if status == "failed" and DIVERGED.search(detail):
            self.end(trial, diverged=detail[:300])
            return "diverged"
        if status == "finished":
            values = self.evaluations(job.name)
            if values:
                trial.results.append(values[-1])
                if len(trial.results) < len(self.plan.seeds):
                    self.ready.append(self.run_of(trial))
                else:
                    self.end(trial, sum(trial.results) / len(trial.results))
                return status
            status, detail = "failed", f"it has no {self.plan.metric}"
        trial.cell.study.release(trial.trial.number)
        trial.cell.broken = f"{job.name}: {status}: {detail}"
        self.stopped |= status == "stopped"
        return status

    # ------------------------------------------------------------------------------------------------ trials

    def has_news(self, name: str, trial: Trial) -> bool:
        """Whether a run has written events since it was last looked at."""
        size = sum(path.stat().st_size for path in (self.folder / name).glob("events.out.tfevents.*"))
        trial.seen, before = size, trial.seen
        return size != before

    def evaluations(self, name: str) -> list[float]:
        """The metric of a run after each epoch so far, without the untrained network's."""
        series = read_events(self.folder / name).get(self.plan.metric)
        return [] if series is None else series[1][series[0] > 0].tolist()

    def end(self, trial: Trial, value: float | None = None, **attributes) -> None:
        """End a trial, and bring the cell's file up to date."""
        with self.journal.guard:
            trial.cell.study.end(trial.trial, value, **attributes)
            self.write(trial.cell, {})
        self.looked = -LOOK  # another may start at once

    def planned(self) -> list[Job]:
        """A run for each one that is left, as far as is known: for an estimate of the time."""
        left = []
        for cell in self.cells:
            done = sum(t.state.is_finished() for t in cell.study.trials())
            left += [cell.runs[0]] * max(0, self.plan.most - done) * len(self.plan.seeds)
        return left

    # ---------------------------------------------------------------------------------------------- outcomes

    def judged(self) -> list[Job]:
        """The runs at the best values of every cell that has them, written down in the cells' files."""
        jobs = []
        for cell in self.cells:
            best = cell.study.best()
            if cell.broken or best is None:
                continue
            values = cell.study.values(best)
            chosen = [at_values(job, values, self.plan.space) for job in cell.runs]
            find_earlier(chosen, read_jobs(self.runs_folder), self.runs_folder, {})
            with self.journal.guard:
                self.write(cell, {job.name: values for job in chosen})
            jobs += chosen
        return jobs

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def write(self, cell: Cell, judged: dict[str, dict[str, str]]) -> None:
        """Bring a cell's file up to date, with more judged runs {name: values}; those of before stay in it."""
        best, complete = cell.study.best(), cell.study.is_complete(self.plan.most)
        try:
            earlier = json.loads(self.path(cell).read_text())["judged"]
        except (OSError, ValueError, KeyError, TypeError):
            earlier = {}
        content = {
            "format": FORMAT,
            "command": self.plan.command,
            "options": vars(cell.runs[0].args),
            "space": {d.option: d.text for d in self.plan.space},
            "metric": self.plan.metric,
            "direction": self.plan.direction,
            "seeds": self.plan.seeds,
            "most": self.plan.most,
            "complete": complete,
            "trials": cell.study.listed(),
            "best": None if best is None else {"number": best.number, "values": cell.study.values(best)},
            "judged": earlier | judged,
        }
        with whole_file(self.path(cell), "--runs") as path:
            path.write_text(json.dumps(content, indent=1) + "\n")

    def without_choice(self) -> list[str]:
        """A line for each cell whose search has ended without values to choose, with the reason."""
        lines = []
        for cell in self.cells:
            if cell.broken:
                lines.append(f"{cell.name}: its search cannot go on: {cell.broken}")
            elif cell.study.is_complete(self.plan.most) and cell.study.best() is None:
                lines.append(f"{cell.name}: no trial came to its end: all of them diverged or were ended early")
        return lines

    def table(self) -> list[str]:
        """A line for each cell: its trials by state, and the best values so far."""
        width = max(len(cell.name) for cell in self.cells)
        lines = []
        for cell in self.cells:
            trials = cell.study.listed() if cell.study else []
            counts = Counter(t["state"] for t in trials)
            words = [
                f"{len(trials)} of {self.plan.most} trials",
                *(f"{n} {state}" for state, n in sorted(counts.items())),
            ]
            best = cell.study.best() if cell.study else None
            if best is not None:
                values = ", ".join(f"{name} {value}" for name, value in cell.study.values(best).items())
                words.append(f"best {self.plan.metric} {best.value:.4f} at {values}")
            lines.append(f"{cell.name:<{width}}  {', '.join(words)}")
        return lines
