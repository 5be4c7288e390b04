"""Optimizers: one function each, entered in `OPTIMIZERS`.

The loop calls `adjust` before each step with what the schedule says; an optimizer without a momentum leaves that alone.
P parameters in all.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from schedules import SCHEDULES


def sgd(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, wd: float, keeps: bool, nesterov: bool = False
) -> torch.optim.Optimizer:
    """torch's SGD, fused: v <- momentum v + g + wd w, w <- w - lr v (Sutskever et al. 2013).

    With `keeps` there are momentum buffers of zeros from the start: fused SGD leaves them uninitialised if 16-mixed
    overflows in the first step.
    """
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=wd, nesterov=nesterov, fused=True)
    if keeps:
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def nesterov(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, wd: float, keeps: bool
) -> torch.optim.Optimizer:
    """torch's SGD with Nesterov's momentum, fused: with d = g + wd w, v <- momentum v + d, w <- w - lr (d + momentum v)."""
    return sgd(parameters, lr, momentum, wd, keeps, nesterov=True)


def adam(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, wd: float, keeps: bool
) -> torch.optim.Optimizer:
    """torch's Adam, fused, with beta1 = `momentum`, beta2 = 0.999 and eps = 1e-8 (Kingma & Ba 2015); wd w is added to g."""
    return torch.optim.Adam(parameters, lr=lr, betas=(float(momentum), 0.999), weight_decay=wd, fused=True)


def adamw(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, wd: float, keeps: bool
) -> torch.optim.Optimizer:
    """`adam` with decoupled weight decay, w <- w - lr wd w (Loshchilov & Hutter 2019)."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(float(momentum), 0.999), weight_decay=wd, fused=True)


def rmsprop(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, wd: float, keeps: bool
) -> torch.optim.Optimizer:
    """torch's RMSprop, alpha = 0.99, eps = 1e-8, not centred (Hinton 2012, lecture 6e), which has no fused form.

    g, with wd w added to it, is divided by the root of its running mean square before `momentum` is applied.
    """
    return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum, weight_decay=wd)


@dataclass(frozen=True)
class Optimizer:
    """An optimizer and what others need of it.

    `make`: (parameters, lr, momentum, wd, keeps) -> torch's object, in one parameter group; `keeps`: whether it is to keep
    its state. `about`: what the option's help says. `state`: names of the tensors that it keeps for each parameter, each
    shaped like it but for a 0-d `step`; `state_name`: what these are called; `with_momentum`: those of them that it keeps
    only where there is a momentum. `needs_momentum`: whether a momentum of 0 is an error. `usual_lr`: a rate that it is
    commonly used with. `sgd`: whether its noise scale is that of SGD, lr / (B (1 - momentum)); `heavy_ball`: whether gradient
    descent with it is stable up to the sharpness that SGD's has as its bound, 2 / lr without momentum.
    """

    make: Callable[..., torch.optim.Optimizer]
    about: str
    state: tuple[str, ...] = ()
    state_name: str = "optimizer state"
    with_momentum: tuple[str, ...] = ()
    needs_momentum: bool = False
    usual_lr: float = 0.1
    sgd: bool = False
    heavy_ball: bool = False


BUFFER = "momentum_buffer"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
OPTIMIZERS = {  # a new optimizer is one function, entered here
    "sgd": Optimizer(
        sgd, "momentum, L2 weight decay", (BUFFER,), "momentum", with_momentum=(BUFFER,), sgd=True, heavy_ball=True
    ),
    "nesterov": Optimizer(
        nesterov,
        "SGD with Nesterov's momentum",
        (BUFFER,),
        "momentum",
        with_momentum=(BUFFER,),
        needs_momentum=True,
        sgd=True,
    ),
    "adam": Optimizer(adam, "beta1 = --momentum, L2 weight decay", MOMENTS, "moments", usual_lr=1e-3),
    "adamw": Optimizer(adamw, "Adam with decoupled weight decay", MOMENTS, "moments", usual_lr=1e-3),
    "rmsprop": Optimizer(
        rmsprop,
        "g / root of its mean square, then momentum",
        ("step", "square_avg", BUFFER),
        with_momentum=(BUFFER,),
        usual_lr=1e-3,
    ),
}


def kept_state(name: str, momentum: float, sched: str) -> tuple[str, ...]:
    """Names of the tensors that optimizer `name` keeps for each parameter at this momentum and schedule."""
    entry = OPTIMIZERS[name]
    if momentum or "momentum" in SCHEDULES[sched].moves:
        return entry.state
    return tuple(kept for kept in entry.state if kept not in entry.with_momentum)


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, momentum: float, wd: float, sched: str
) -> torch.optim.Optimizer:
    """Optimizer `name` over `parameters`, before its first step under schedule `sched`."""
    return OPTIMIZERS[name].make(parameters, lr, momentum, wd, bool(kept_state(name, momentum, sched)))


def adjust(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Set the learning rate and the momentum of the next step: as in torch's schedulers the first of its betas where the
    optimizer has those, else what it calls momentum, if anything."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (float(momentum), *group["betas"][1:])
        elif "momentum" in group:
            group["momentum"] = momentum
