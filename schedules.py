"""Learning rate and momentum as pure functions of the step, so that nothing about them needs saving; and how much of a
schedule a run sees. `SCHEDULES` names the schedules: a new one is one function and one entry."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


def constant(step: int, sched_steps: int, lr: float, momentum: float) -> tuple[float, float]:
    """(lr, momentum) as given, at every step."""
    return lr, momentum


def cosine(step: int, sched_steps: int, lr: float, momentum: float) -> tuple[float, float]:
    """(lr, momentum): lr to 0 at step `sched_steps` (Loshchilov & Hutter 2017, no restarts), where it stays.

    Up to there the values of torch's `CosineAnnealingLR`.
    """
    return anneal(lr, 0.0, min(step, sched_steps) / sched_steps), momentum


def onecycle(step: int, sched_steps: int, lr: float, momentum: float) -> tuple[float, float]:
    """(lr, momentum): lr from lr/25 up to lr over 30 % of the steps and down to lr/25e4 at step sched_steps - 1, momentum
    0.95 -> 0.85 -> 0.95 (Smith & Topin 2018, torch's defaults), where both stay.

    Up to there the values of torch's `OneCycleLR`.
    """
    step, last, top = min(step, sched_steps - 1), sched_steps - 1, 0.3 * sched_steps - 1
    if step <= top:
        part = step / top
        return anneal(lr / 25, lr, part), anneal(0.95, 0.85, part)
    part = (step - top) / (last - top)
    return anneal(lr, lr / 25e4, part), anneal(0.85, 0.95, part)


def linear(step: int, sched_steps: int, lr: float, momentum: float) -> tuple[float, float]:
    """(lr, momentum): lr in a straight line to 0 at step `sched_steps`, where it stays.

    Up to there the values of torch's `LinearLR` from 1 to 0.
    """
    return lr * (1 - min(step, sched_steps) / sched_steps), momentum


def step_decay(
    step: int,
    sched_steps: int,
    lr: float,
    momentum: float,
    milestones: tuple[float, ...] = (0.5, 0.75),
    factor: float = 0.1,
) -> tuple[float, float]:
    """(lr, momentum): lr times `factor` from each of the `milestones` on, shares of `sched_steps`, in whole steps.

    The values of torch's `MultiStepLR`.
    """
    return lr * factor ** sum(step >= round(share * sched_steps) for share in milestones), momentum


def cyclic(
    step: int, sched_steps: int, lr: float, momentum: float, cycles: int = 4, factor: float = 0.1
) -> tuple[float, float]:
    """(lr, momentum): `cycles` triangles from `factor` lr up to lr and back (Smith 2017, "triangular"), the last of which
    ends at step `sched_steps`; lr then stays at `factor` lr.

    Up to there the values of torch's `CyclicLR` with `cycle_momentum=False`.
    """
    place = (cycles * min(step, sched_steps) / sched_steps) % 1  # within a triangle
    return lr * (factor + (1 - factor) * (1 - abs(2 * place - 1))), momentum


def anneal(start: float, end: float, part: float) -> float:
    """Half a cosine from `start` (`part` 0) to `end` (`part` 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class Schedule:
    """A schedule and what others need of it.

    `values`: (0-based step, sched_steps, lr, momentum) -> (lr, momentum) of the update made at that step, a pure function;
    after its end it keeps its last value. `takes`: what else it is given by name, of the options --sched-NAME. `label` names it in figures, where it has a `colour` (any of matplotlib's), a
    `line` style and a `marker`. `moves`: which of "lr" and "momentum" change over a run; nothing for a rate without length.
    """

    values: Callable[[int, int, float, float], tuple[float, float]]
    label: str
    moves: tuple[str, ...] = ("lr",)
    colour: str = "#CC79A7"
    line: str | tuple[int, tuple[float, ...]] = "-."
    marker: str = "D"
    takes: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        """What the option's help says of it; nothing where nothing moves."""
        return " and ".join(self.moves)


SCHEDULES = {  # colours: Okabe and Ito's, told apart with every common colour vision deficiency
    "constant": Schedule(constant, "constant learning rate", (), "#009E73", ":", "s"),
    "cosine": Schedule(cosine, "cosine annealing", ("lr",), "#D55E00", "--", "^"),
    "onecycle": Schedule(onecycle, "one-cycle", ("lr", "momentum"), "#0072B2", "-", "o"),
    "linear": Schedule(linear, "linear decay", ("lr",), "#E69F00", (0, (9, 2)), "v"),
    "step": Schedule(step_decay, "step decay", ("lr",), "#56B4E9", (0, (5, 1, 1, 1)), "P", ("milestones", "factor")),
    "cyclic": Schedule(cyclic, "cyclic, triangular", ("lr",), "#000000", (0, (2, 1)), "X", ("cycles", "factor")),
}


def entry(name: str) -> Schedule:
    """The schedule `name`; for one that is not known here, which another version's runs may have, what figures need."""
    return SCHEDULES.get(name) or Schedule(constant, name)


def schedule(name: str, step: int, sched_steps: int, lr: float, momentum: float) -> tuple[float, float]:
    """(lr, momentum) of the update made at 0-based `step`: a pure function of the step."""
    return SCHEDULES[name].values(step, sched_steps, lr, momentum)


@dataclass(frozen=True)
class Course:
    """A schedule of a run, with what comes before it: a pure function of the step.

    `warmup` steps, in which the rate rises in equal parts to the schedule's first value, as of torch's `LinearLR` from
    1 / (warmup + 1); `delay` steps at that value; and `sched_steps` of the schedule. `given` is what it takes by name.
    """

    name: str
    sched_steps: int
    lr: float
    momentum: float
    warmup: int = 0
    delay: int = 0
    given: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Steps until the last value is reached."""
        return self.warmup + self.delay + self.sched_steps

    def at(self, step: int) -> tuple[float, float]:
        """(lr, momentum) of the update made at 0-based `step`."""
        inside = max(0, step - self.warmup - self.delay)
        lr, momentum = SCHEDULES[self.name].values(inside, self.sched_steps, self.lr, self.momentum, **self.given)
        return lr * min(1, (step + 1) / (self.warmup + 1)), momentum

    def span(self, total_steps: int, steps_per_epoch: int) -> dict:
        """`span` of a run of this course, and the steps of the warm-up and of the delay, where there are any."""
        before = {"warmup_steps": self.warmup, "delay_steps": self.delay}
        seen = span(self.name, self.length, total_steps, steps_per_epoch)
        return seen | {name: steps for name, steps in before.items() if steps}


def span(name: str, sched_steps: int, total_steps: int, steps_per_epoch: int) -> dict:
    """What a run of `total_steps` updates sees of its schedule, with the units in the names.

    `fraction_seen` of the schedule's `sched_steps` (1 where the run is at least as long), and `share_at_end`, the share
    of the run's updates made after the schedule has ended, at its last value. A constant rate has no length.
    """
    run = {"name": name, "run_steps": total_steps, "run_epochs": round(total_steps / steps_per_epoch, 4)}
    if not entry(name).moves:
        return run
    return run | {
        "sched_steps": sched_steps,
        "sched_epochs": round(sched_steps / steps_per_epoch, 4),
        "fraction_seen": min(1.0, total_steps / sched_steps),
        "share_at_end": max(0.0, (total_steps - sched_steps) / total_steps),
    }


BEFORE = {"warmup": "warm-up", "delay": "delay"}


def describe_span(seen: dict, lr: float, last_lr: float) -> tuple[str, str | None]:
    """(line, warning or None) on what `span` found: `lr` is the largest rate, `last_lr` that of the run's last update."""

    def length(of: str) -> str:
        epochs = seen[f"{of}_epochs"]
        return f"{seen[f'{of}_steps']:,} steps ({epochs:g} epoch{'s' * (epochs != 1)})"

    before = [f"{seen[f'{what}_steps']:,} of {name}" for what, name in BEFORE.items() if f"{what}_steps" in seen]
    first = f" with {' and '.join(before)} first" * bool(before)
    if not entry(seen["name"]).moves:
        return f"schedule: {seen['name']}, lr {lr:g} for all {length('run')}{first}", None
    line, warning = f"schedule: {seen['name']} over {length('sched')}{first}; the run makes {length('run')}: ", None
    if seen["fraction_seen"] < 1:
        line += f"{percent(seen['fraction_seen'])} of the schedule"
        epochs, steps = seen["run_epochs"], seen["run_steps"] - sum(seen.get(f"{what}_steps", 0) for what in BEFORE)
        fits = (
            f"--sched-epochs {epochs:g}" if epochs == int(epochs) and not before else f"--sched-steps {max(1, steps)}"
        )
        warning = (
            f"warning: --sched {seen['name']} is cut short: the run ends after {percent(seen['fraction_seen'])} of the "
            f"schedule, at lr {last_lr:.3g} ({percent(last_lr / lr)} of the largest); {fits} fits the run"
        )
    elif seen["share_at_end"] > 0:
        line += f"all of the schedule, then {percent(seen['share_at_end'])} of the run at its last lr, {last_lr:.3g}"
    else:
        line += "exactly the schedule"
    return line, warning


def percent(share: float) -> str:
    """A share in whole percents, in tenths where whole ones would read 0 % or 100 %."""
    return f"{share:.0%}" if 0.01 <= share < 0.995 or share in (0, 1) else f"{min(share, 0.999):.1%}"
