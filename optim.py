"""Optimizers: one function each, entered in `OPTIMIZERS`.

The loop sets `lr` and `momentum` of every parameter group before each step, as the schedule says; an optimizer without a
momentum leaves the second alone. P parameters in all.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from schedules import SCHEDULES


def sgd(parameters: Iterable[nn.Parameter], lr: float, momentum: float, wd: float, keeps: bool) -> torch.optim.Optimizer:
    """torch's SGD, fused: v <- momentum v + g + wd w, w <- w - lr v (Sutskever et al. 2013).

    With `keeps` there are momentum buffers of zeros from the start: fused SGD leaves them uninitialised if 16-mixed
    overflows in the first step.
    """
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=wd, fused=True)
    if keeps:
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


@dataclass(frozen=True)
class Optimizer:
    """An optimizer and what others need of it.

    `make`: (parameters, lr, momentum, wd, keeps) -> torch's object, in one parameter group; `keeps`: whether it is to keep
    its state. `about`: what the option's help says. `state`: names of the tensors that it keeps for each parameter, each
    shaped like it but for a 0-d `step`; `state_name`: what these are called; `only_with_momentum`: whether it keeps them
    only where there is a momentum.
    """

    make: Callable[..., torch.optim.Optimizer]
    about: str
    state: tuple[str, ...] = ()
    state_name: str = "optimizer state"
    only_with_momentum: bool = False


OPTIMIZERS = {  # a new optimizer is one function, entered here
    "sgd": Optimizer(sgd, "momentum, L2 weight decay", ("momentum_buffer",), "momentum", only_with_momentum=True),
}


def kept_state(name: str, momentum: float, sched: str) -> tuple[str, ...]:
    """Names of the tensors that optimizer `name` keeps for each parameter at this momentum and schedule."""
    entry = OPTIMIZERS[name]
    has_momentum = bool(momentum) or "momentum" in SCHEDULES[sched].moves
    return entry.state if has_momentum or not entry.only_with_momentum else ()


def build(
    name: str, parameters: Iterable[nn.Parameter], lr: float, momentum: float, wd: float, sched: str
) -> torch.optim.Optimizer:
    """Optimizer `name` over `parameters`, before its first step under schedule `sched`."""
    return OPTIMIZERS[name].make(parameters, lr, momentum, wd, bool(kept_state(name, momentum, sched)))
