"""Learning rate and momentum as pure functions of the step, so that nothing about them needs saving; and how much of a
schedule a run sees. `SCHEDULES` names the schedules: a new one is one function and one entry."""

import math
from collections.abc import Callable
from dataclasses import dataclass


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


def anneal(start: float, end: float, part: float) -> float:
    """Half a cosine from `start` (`part` 0) to `end` (`part` 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class Schedule:
    """A schedule and what others need of it.

    `values`: (0-based step, sched_steps, lr, momentum) -> (lr, momentum) of the update made at that step, a pure function;
    after its end it keeps its last value. `label` names it in figures, where it has a `colour` (any of matplotlib's), a
    `line` style and a `marker`. `moves`: which of "lr" and "momentum" change over a run; nothing for a rate without length.
    """

    values: Callable[[int, int, float, float], tuple[float, float]]
    label: str
    moves: tuple[str, ...] = ("lr",)
    colour: str = "#CC79A7"
    line: str = "-."
    marker: str = "D"

    @property
    def help(self) -> str:
        """What the option's help says of it; nothing where nothing moves."""
        return " and ".join(self.moves)


SCHEDULES = {  # colours: Okabe and Ito's blue, vermilion and green, told apart with every common colour vision deficiency
    "constant": Schedule(constant, "constant learning rate", (), "#009E73", ":", "s"),
    "cosine": Schedule(cosine, "cosine annealing", ("lr",), "#D55E00", "--", "^"),
    "onecycle": Schedule(onecycle, "one-cycle", ("lr", "momentum"), "#0072B2", "-", "o"),
}


def entry(name: str) -> Schedule:
    """The schedule `name`; for one that is not known here, which another version's runs may have, what figures need."""
    return SCHEDULES.get(name) or Schedule(constant, name)


def schedule(name: str, step: int, sched_steps: int, lr: float, momentum: float) -> tuple[float, float]:
    """(lr, momentum) of the update made at 0-based `step`: a pure function of the step."""
    return SCHEDULES[name].values(step, sched_steps, lr, momentum)


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


def describe(seen: dict, lr: float, last_lr: float) -> tuple[str, str | None]:
    """(line, warning or None) on what `span` found: `lr` is the largest rate, `last_lr` that of the run's last update."""

    def length(of: str) -> str:
        epochs = seen[f"{of}_epochs"]
        return f"{seen[f'{of}_steps']:,} steps ({epochs:g} epoch{'s' * (epochs != 1)})"

    if not entry(seen["name"]).moves:
        return f"schedule: {seen['name']}, lr {lr:g} for all {length('run')}", None
    line, warning = f"schedule: {seen['name']} over {length('sched')}; the run makes {length('run')}: ", None
    if seen["fraction_seen"] < 1:
        line += f"{percent(seen['fraction_seen'])} of the schedule"
        epochs = seen["run_epochs"]
        fits = f"--sched-epochs {epochs:g}" if epochs == int(epochs) else f"--sched-steps {seen['run_steps']}"
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
