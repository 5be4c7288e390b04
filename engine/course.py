"""How a run's options become the course of its learning rate: lengths in optimizer steps, whatever unit they are given in."""

import argparse
import math
import re

from data import InputError
from schedules import SCHEDULES, Course

DEFAULT_STEPS = 5000  # of a schedule, the report's
WARMUPS = ("warmup_steps", "warmup_epochs")


def milestones(text: str) -> str:
    """An argparse type: ascending shares of the schedule between 0 and 1, joined by commas or by +."""
    try:
        shares = [float(part) for part in re.split("[,+]", text)]  # grids divide at commas
    except ValueError:
        shares = []
    ascending = all(a < b for a, b in zip([0.0, *shares], [*shares, 1.0], strict=True))
    if not shares or not ascending or not re.fullmatch(r"[0-9.,+e-]+", text):  # Python takes 1_0 and other digits too
        raise argparse.ArgumentTypeError(f"'{text}' is not ascending shares between 0 and 1, as in 0.5,0.75")
    return ",".join(f"{share:.12g}" for share in shares)


def problems(args: argparse.Namespace, defaults: argparse.Namespace) -> list[str]:
    """What the schedule does not take, and what is given twice."""
    wrong, own = [], SCHEDULES[args.sched]
    for key in ("sched_milestones", "sched_factor", "sched_cycles"):
        value, takes = getattr(args, key), key.removeprefix("sched_")
        if value != getattr(defaults, key) and takes not in own.takes:
            others = " and ".join(name for name, entry in SCHEDULES.items() if takes in entry.takes)
            wrong.append(f"--{key.replace('_', '-')} {value}: only for --sched {others}, not {args.sched}")
    if args.sched_delay and not own.moves:
        wrong.append(f"--sched-delay {args.sched_delay}: --sched {args.sched} has nothing to put off")
    if args.warmup_steps and args.warmup_epochs:
        wrong.append("--warmup-steps and --warmup-epochs: give the warm-up's length once")
    return wrong


def in_steps(args: argparse.Namespace, steps_per_epoch: int) -> tuple[int, int, int]:
    """Optimizer steps of the warm-up, of the delay and of the schedule itself, which come in this order."""

    def steps(unit: str, n: int) -> int:
        return {"steps": n, "epochs": n * steps_per_epoch, "examples": math.ceil(n / args.bs)}[unit]

    unit = next((unit for unit in ("epochs", "examples") if getattr(args, f"sched_{unit}")), "steps")
    length = steps(unit, getattr(args, f"sched_{unit}") or DEFAULT_STEPS)
    warmup = args.warmup_steps or steps("epochs", args.warmup_epochs or 0)
    return warmup, steps(unit, args.sched_delay or 0), length


def course(args: argparse.Namespace, steps_per_epoch: int) -> Course:
    """The course that the options ask for. Raises `InputError` where the schedule is too short for what it takes."""
    warmup, delay, length = in_steps(args, steps_per_epoch)
    takes = SCHEDULES[args.sched].takes
    given = {name: getattr(args, f"sched_{name}") for name in takes}
    if "milestones" in takes:
        given["milestones"] = tuple(float(share) for share in given["milestones"].split(","))
    if "cycles" in takes and length < 2 * given["cycles"]:
        raise InputError(f"--sched-cycles {given['cycles']}: the schedule of {length} steps has less than two for each")
    return Course(args.sched, length, args.lr, args.momentum, warmup, delay, given)
