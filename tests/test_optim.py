"""Optimizers: the published update on one weight, and the state that a checkpoint must bring back."""

import pytest
import torch

import optim


def made(momentum: float = 0.9, sched: str = "constant", wd: float = 0.0):
    p = torch.nn.Parameter(torch.tensor([2.0]))
    return p, optim.build("sgd", [p], 0.1, momentum, wd, sched)


def test_sgd_on_one_weight():
    """v <- m v + g + wd w; w <- w - lr v, the gradient being 1: 2 -> 1.88 -> 1.6532."""
    p, optimizer = made(wd=0.1)
    for want in (2 - 0.1 * 1.2, 1.88 - 0.1 * (0.9 * 1.2 + 1 + 0.188)):
        p.grad = torch.ones(1)
        optimizer.step()
        assert p.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("momentum", "sched", "kept"), [(0.9, "constant", True), (0, "constant", False), (0, "onecycle", True)])
def test_sgd_keeps_a_momentum_of_zeros_where_there_will_be_one(momentum, sched, kept):
    p, optimizer = made(momentum, sched)
    state = optimizer.state_dict()["state"]
    assert optim.kept_state("sgd", momentum, sched) == tuple(state[0] if kept else ())
    assert bool(state) == kept and (not kept or torch.equal(state[0]["momentum_buffer"], torch.zeros(1)))
