"""Learning rate and momentum as pure functions of the step, so that nothing about them needs saving."""

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
