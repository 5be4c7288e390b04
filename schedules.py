"""Learning rate and momentum as pure functions of the step, so that nothing about them needs saving; and how much of a
schedule a run sees."""

import math


def schedule(name: str, step: int, sched_steps: int, lr: float, momentum: float) -> tuple[float, float]:
    """(lr, momentum) of the update made at 0-based `step`: a pure function of the step.

    constant; cosine: lr to 0 at step `sched_steps` (Loshchilov & Hutter 2017, no restarts); onecycle: lr from lr/25
    up to lr over 30 % of the steps and down to lr/25e4 at step sched_steps - 1, momentum 0.95 -> 0.85 -> 0.95
    (Smith & Topin 2018, torch's defaults). At every step up to the end the values are those of torch's
    `CosineAnnealingLR` and `OneCycleLR`; afterwards both keep their last value.
    """

    def anneal(start: float, end: float, part: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * part))

    if name == "cosine":
        return anneal(lr, 0.0, min(step, sched_steps) / sched_steps), momentum
    if name == "onecycle":
        step, last, top = min(step, sched_steps - 1), sched_steps - 1, 0.3 * sched_steps - 1
        if step <= top:
            part = step / top
            return anneal(lr / 25, lr, part), anneal(0.95, 0.85, part)
        part = (step - top) / (last - top)
        return anneal(lr, lr / 25e4, part), anneal(0.85, 0.95, part)
    return lr, momentum


def span(name: str, sched_steps: int, total_steps: int, steps_per_epoch: int) -> dict:
    """What a run of `total_steps` updates sees of its schedule, with the units in the names.

    `fraction_seen` of the schedule's `sched_steps` (1 where the run is at least as long), and `share_at_end`, the share
    of the run's updates made after the schedule has ended, at its last value. A constant rate has no length.
    """
    run = {"name": name, "run_steps": total_steps, "run_epochs": round(total_steps / steps_per_epoch, 4)}
    if name == "constant":
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

    if seen["name"] == "constant":
        return f"schedule: constant, lr {lr:g} for all {length('run')}", None
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
