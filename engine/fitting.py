"""Whether the content of a checkpoint fits a run: its length, network, optimizer, scaler and what it keeps of each example."""

import sys

import torch
from torch import Tensor

import models
import optim
from data import InputError, one_line
from engine.jsonfiles import describe_value, wrong_value
from engine.schema import BELOW_ONE, NOT_NEGATIVE, OBJECT, Kind, check_fields, real, whole

BETAS = Kind(
    "two numbers from 0 to below 1", lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(BELOW_ONE.holds, v))
)


def check_tensor(given: object, like: Tensor, where: object, field: str) -> None:
    """Raise `InputError` unless `given` has the shape and dtype of `like` and finite values."""
    if not isinstance(given, Tensor) or given.layout != torch.strided:
        raise wrong_value(where, field, given, "a dense tensor")
    if given.shape != like.shape or given.dtype != like.dtype:
        raise wrong_value(where, field, given, describe_value(like))
    if given.is_floating_point() and not bool(torch.isfinite(given).all()):
        raise InputError(f"{where}: {field} has values that are not finite")


def check_count(given: object, where: object, field: str) -> None:
    """Raise `InputError` unless `given` is a 0-d tensor of floats that holds a whole number from 0."""
    if not isinstance(given, Tensor) or given.shape != () or not given.is_floating_point():
        raise wrong_value(where, field, given, "a 0-d tensor of floats")
    if not (given >= 0 and given == given.floor() and given < 2**53):
        raise InputError(f"{where}: {field} is {float(given):g}, not a whole number from 0")


def check_fits(state: dict, job, where: object) -> None:
    """Raise `InputError` unless a checkpoint's content is of the run `job`: its length, network, optimizer and scaler."""
    if state["step"] > job.total_steps:
        raise wrong_value(where, "step", state["step"], f"within the run's {job.total_steps} steps")
    own = models.counted_state(job.module, state["step"])
    for name in sorted(own.keys() ^ state["model"].keys()):
        raise InputError(f"{where}: model.{one_line(name)} is {'missing' if name in own else 'not in this model'}")
    for name, mine in own.items():
        check_tensor(state["model"][name], mine, where, f"model.{name}")
    names, args = optim.OPTIMIZERS[job.args.optimizer].state, job.args
    kept = optim.kept_state(args.optimizer, args.momentum, args.sched)
    draws = models.is_own(args.model) and models.has_dropout(job.module)  # and may not have used a parameter so far
    check_optimizer(
        state["optimizer"], job.optimizer.state_dict(), job.parameters, names, kept, f"{where}: optimizer", draws
    )
    if kept and not state["optimizer"]["state"] and state["step"] and not job.scaler:  # which skips steps that overflow
        raise InputError(f"{where}: optimizer: state is empty after {state['step']} steps")
    if job.examples and "examples" in state:
        check_examples(state["examples"], job.examples, where)
    if job.scaler:
        scaler = job.scaler.state_dict()
        positive = real(sys.float_info.min, what="a positive number")
        table = dict.fromkeys(scaler, positive) | {"_growth_tracker": whole(), "growth_interval": whole(1)}
        check_fields(state, {"scaler": table}, where, required=["scaler"] if scaler else [])
        check_fields(state.get("scaler", {}), {}, where, "scaler.", scaler)


def check_examples(given: object, own, where: object) -> None:
    """Raise `InputError` unless `given` is what `own`, the run's `Examples`, can go on from."""
    if not isinstance(given, dict):
        raise wrong_value(where, "examples", given, "an object")
    table = {"epochs": whole(), "steps": whole(0, own.steps_per_epoch - 1)}
    check_fields(given, table, where, "examples.", required=(*table, "logits", *own.totals))
    for name, like in own.totals.items():
        check_tensor(given[name], like, where, f"examples.{name}")
    if given["steps"]:
        check_tensor(given["logits"], own.logits, where, "examples.logits")
    elif given["logits"] is not None:
        raise wrong_value(where, "examples.logits", given["logits"], "null between two epochs")


def check_optimizer(
    given: dict, own: dict, parameters: list[Tensor], names, kept, where: object, may_lack: bool = False
) -> None:
    """Raise `InputError` unless `given` is the state of an optimizer like the one of `own`, which may have tensors of these
    `names` for each parameter and has those `kept` once there is any state, with `may_lack` unless it has none of a
    parameter; rate and momentum may differ."""
    check_fields(given, {"state": OBJECT}, where, required=("state", "param_groups"))
    groups = given["param_groups"]
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise wrong_value(where, "param_groups", groups, "a list of one object")
    (group,), (mine,) = groups, own["param_groups"]
    moved = {"lr": NOT_NEGATIVE, "momentum": NOT_NEGATIVE, "betas": BETAS}
    check_fields(group, moved, where, "param_groups.0.", mine)
    if "betas" in mine and group["betas"][1:] != mine["betas"][1:]:
        raise wrong_value(where, "param_groups.0.betas.1", group["betas"][1], describe_value(mine["betas"][1]))
    for name in mine.keys() - moved.keys():
        if type(group[name]) is not type(mine[name]) or group[name] != mine[name]:
            raise wrong_value(where, f"param_groups.0.{name}", group[name], describe_value(mine[name]))
    for i in given["state"]:
        if type(i) is not int or not 0 <= i < len(parameters):
            raise InputError(f"{where}: state.{describe_value(i)} belongs to no parameter")
    for i, parameter in enumerate(parameters):
        entry, field = given["state"].get(i, {}), f"state.{i}"
        if not isinstance(entry, dict) or entry.keys() - {*names}:
            raise wrong_value(where, field, entry, f"an object with a {' and a '.join(names) or 'state of no name'}")
        begun = (given["state"] or own["state"]) and not (
            may_lack and not entry
        )  # some make their state in the first step
        for name in names:
            if not (begun and name in kept or entry.get(name) is not None):
                continue
            if name == "step":  # of Adam and the like
                check_count(entry.get(name), where, f"{field}.{name}")
            else:
                check_tensor(entry.get(name), parameter, where, f"{field}.{name}")
