"""A run as it can be read, and how it is read from its folder.

Only what docs/running.md promises is read: event files, config.json, summary.json. A run that is still being written
reads as far as it has come.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

import schedules
from data import InputError
from engine import options, roles, schema
from study.events import scalars

Series = tuple[np.ndarray, np.ndarray]  # steps int64, values float64, in order of step
# Options in which runs of one setting may differ: axes of the grid, seeds, where and how a run was made and measured, and
# whether it goes on after its schedule.
SEEDS = roles.having(roles.SEED)
NOT_SETTING = roles.having(roles.AXIS, roles.SEED, roles.PLACE, roles.HARDWARE, roles.MEASURING, roles.ENDING)


class Cell(NamedTuple):
    """What a run is, apart from its seed and its budget."""

    sched: str
    noise: float
    B: int
    lr: float = 0.1
    momentum: float = 0.9


@dataclass
class Run:
    """A run as it can be read: options and summary as in its folder, `series` {tag: (steps, values)}."""

    name: str
    options: dict
    resolved: dict
    summary: dict
    series: dict[str, Series]
    source: str
    versions: dict = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.summary.get("status") == "finished"

    @property
    def steps_per_epoch(self) -> int | None:
        return self.resolved.get("steps_per_epoch")

    @property
    def left_out(self) -> int:
        """Steps after the schedule's end that a finished run would make without `--end schedule`; 0 where there are none."""
        whole, made = (self.resolved.get(name) or 0 for name in ("whole_steps", "total_steps"))
        return max(0, whole - made) if self.finished else 0

    @property
    def cell(self) -> Cell:
        o = self.options
        return Cell(o["sched"], float(o.get("noise") or 0), int(o["bs"]), float(o["lr"]), float(o["momentum"]))

    @property
    def seed(self) -> str:
        return "/".join(str(self.options.get(name, 0)) for name in SEEDS)

    @property
    def fake(self) -> float:
        """The share of an A/A run's fake noisy mask, 0 for any other run."""
        return float(self.options.get("fake_mask") or 0)

    @property
    def budget(self) -> str:
        """In what the schedule's length is given: steps, epochs, examples; `any` where there is no schedule."""
        if not schedules.entry(self.options["sched"]).moves:
            return "any"
        return next((unit for unit in ("epochs", "examples") if self.options.get(f"sched_{unit}")), "steps")

    @property
    def length(self) -> int:
        """The schedule's length in the unit of `budget`; 0 without one."""
        return 0 if self.budget == "any" else self.options.get(f"sched_{self.budget}") or 5000

    @property
    def identity(self) -> tuple:
        """What makes two runs copies of one: the name, and every option that decides the result."""
        length = roles.having(roles.SCHED_LENGTH)
        decides = (str(self.options.get(k)) for k in roles.having(roles.RESULT) if k not in length)
        return self.name, self.budget, self.length, *decides

    @property
    def setting(self) -> tuple:
        """Everything that must be equal for two runs to be compared, as sorted (option, value) pairs."""
        return tuple(sorted((k, str(v)) for k, v in self.options.items() if k not in NOT_SETTING and v is not None))


def read_events(folder: Path) -> dict[str, Series]:
    """Every series of a run's folder. Of two values at one step the later one counts; none that is not finite."""
    by_step: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for tag, step, value in scalars(path):
            if math.isfinite(value):
                by_step.setdefault(tag, {})[step] = value
    return {tag: as_series(points) for tag, points in sorted(by_step.items())}


def as_series(points: dict[int, float]) -> Series:
    steps = np.array(sorted(points), dtype=np.int64)
    return steps, np.array([points[s] for s in steps.tolist()], dtype=np.float64)


def read_folder(folder: Path, with_series: bool = True) -> Run:
    """A run from its folder, or all but its series, which take nearly all of the time and memory.

    Raises `InputError` where config.json or summary.json is damaged or has a wrong field.
    """
    config, summary = schema.read_config(folder / "config.json"), schema.read_summary(folder / "summary.json") or {}
    if config is None:
        raise InputError(f"{folder}: no config.json in it")
    opts = vars(options.parser().parse_args([])) | config["options"]
    opts["model"] = opts["model"] or "resnet18"
    opts["noise"] = config.get("noise", {}).get("nominal", opts["noise"])  # a file's noise has no --noise
    return Run(
        folder.name,
        opts,
        config.get("resolved", {}),
        summary,
        read_events(folder) if with_series else {},
        str(folder),
        config.get("versions", {}),
    )


def is_run(folder: Path) -> bool:
    return os.path.isfile(folder / "config.json")  # unlike `Path.is_file` also where the folder cannot be read
