"""Whether two runs are the same one: which options decide that, and what a resumed run keeps from its first start."""

import argparse
import math
import os
import shlex
from pathlib import Path

from data import InputError
from datasets import DATASETS, default_model
from engine import roles
from engine.options import MEASURE_DEFAULTS, parser


def compared(given: dict) -> dict:
    """Options that decide what a run computes, in one spelling each, for two runs to be compared.

    Without where the run happens, and without files of labels: the labels themselves are compared. Without `--measure
    full` the masks and the budget leave no trace in training, and are left out too.
    """
    left_out = roles.having(roles.PLACE, roles.FILE)
    if given.get("measure") != "full":
        left_out += tuple(MEASURE_DEFAULTS["split"])
    kept = {key: value for key, value in given.items() if key not in left_out}
    if "noise" in kept:
        kept["noise"] = kept["noise"] or 0
    if "sched_steps" in kept and not (kept.get("sched_epochs") or kept.get("sched_examples")):
        kept["sched_steps"] = kept["sched_steps"] or 5000
    if kept.get("dataset", "cifar10") not in DATASETS:
        kept["dataset"] = os.path.realpath(kept["dataset"])
    return kept


def differences(first: dict, now: dict) -> dict[str, str]:
    """{option: how it differs} of two runs' options; one that only one of them knows is left out."""
    first, now = compared(first), compared(now)
    return {
        key: f"--{key.replace('_', '-')} was {first[key]} and is {value} now"
        for key, value in now.items()
        if key in first and value != first[key]
    }


def continue_from(args: argparse.Namespace, config: dict) -> None:
    """Take over what a resumed run keeps from its first start, and refuse what differs, by name, in one `InputError`.

    `config` is the run's config.json. Where the run happens and where its files lie may differ; epochs, max-steps and
    end may grow.
    """
    first = {**vars(parser().parse_args([])), **config["options"]}  # an option newer than the run has its default
    if args.precision == "auto":
        args.precision = first["precision"]
    args.threads = args.threads or first["threads"]
    wrong, left_out = keep_masks(args, config["options"]), []
    usual = compared({**vars(parser().parse_args([])), "model": default_model(args.dataset)})
    for key, difference in differences(first, vars(args)).items():
        grows = roles.GROWS in roles.ROLES[key]
        if not grows or shrinks(key, first[key], getattr(args, key)):
            given = compared(vars(args))[key] != usual.get(key)
            (wrong if given else left_out).append(difference + " (it may only grow)" * grows)
    file = Path(args.runs, args.name, "config.json")
    if len(left_out) > 1 and file.is_file():
        words = ["--config", str(file), "--resume", "--name", args.name]
        words += ["--runs", args.runs] * (args.runs != parser().get_default("runs"))
        left_out = [f"{file.parent} was started with other options: {shlex.join(words)} goes on with those"]
    if wrong or left_out:
        raise InputError("; ".join([*wrong, *left_out]) + "; a resumed run keeps its options")


def shrinks(option: str, was: object, now: object) -> bool:
    """Whether an option that may grow has become a shorter run's. `--end schedule` is at most as long as `--end epochs`."""
    if option == "end":
        return now == "schedule"
    return (now or math.inf) < (was or math.inf)


def keep_masks(args: argparse.Namespace, first: dict) -> list[str]:
    """Without `--measure full`: take over a resumed run's masks and probe, unless others than the default are asked for;
    returns what is wrong. A run started by a version without them goes on without."""
    if args.measure == "full" or first.get("measure") != args.measure:
        return []
    if "null_every" not in first:
        first = {"permutations": 0, "measure_budget": 0.0}
    wrong = []
    for name, default in MEASURE_DEFAULTS[args.measure].items():
        was, now = first.get(name, default), getattr(args, name)
        if now not in (was, default):
            wrong.append(f"--{name.replace('_', '-')} was {was} and is {now} now")
        setattr(args, name, was)
    return wrong
