"""The schedules against torch's own, at every step."""

import pytest
import torch

from engine import options
from schedules import SCHEDULES, entry, schedule


def torchs(make, steps: int) -> list[tuple[float, float]]:
    """(lr, momentum) that torch's scheduler has in force at each of `steps` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    seen = []
    for step in range(steps):
        if step:
            optimizer.step()
            scheduler.step()
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["momentum"]))
    return seen


@pytest.mark.parametrize("T", [5000, 7, 2])
def test_cosine_is_torchs_to_the_end_and_then_holds(T):
    want = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=T), T + 1)
    got = [schedule("cosine", step, T, 0.1, 0.9) for step in range(T + 1)]
    assert [lr for lr, _ in got] == pytest.approx([lr for lr, _ in want], rel=1e-9, abs=1e-12)
    assert {m for _, m in got} == {0.9}
    assert got[0][0] == 0.1 and got[T][0] == pytest.approx(0, abs=1e-17)
    assert schedule("cosine", 10 * T, T, 0.1, 0.9) == got[T]


@pytest.mark.parametrize("T", [5000, 11, 4])
def test_onecycle_is_torchs_to_the_end_and_then_holds(T):
    want = torchs(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=T), T)
    got = [schedule("onecycle", step, T, 0.1, 0.9) for step in range(T)]
    for (lr, m), (lr_t, m_t) in zip(got, want, strict=True):
        assert lr == pytest.approx(lr_t, rel=1e-9, abs=1e-12) and m == pytest.approx(m_t, rel=1e-12)
    assert got[T - 1] == pytest.approx((4e-7, 0.95)) and got[0] == pytest.approx((0.004, 0.95))
    assert schedule("onecycle", T, T, 0.1, 0.9) == schedule("onecycle", 99 * T, T, 0.1, 0.9) == got[T - 1]


@pytest.mark.parametrize("T", [1, 2, 3])
def test_onecycle_of_few_steps_is_defined(T):
    assert schedule("onecycle", T - 1, T, 0.1, 0.9) == pytest.approx((4e-7, 0.95))


def test_constant():
    assert {schedule("constant", step, 5000, 0.1, 0.9) for step in (0, 1, 4999, 10**6)} == {(0.1, 0.9)}


def test_length_in_each_unit():
    def length(*argv):
        return options.sched_steps(options.parse(["--dataset", "synthetic", "--bs", "100", *argv]), steps_per_epoch=80)

    assert length() == 5000
    assert length("--sched-steps", "70") == 70
    assert length("--sched-epochs", "3") == 240
    assert length("--sched-examples", "201") == 3


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_entries_say_what_moves(name):
    """`moves` is what plots, memory and the optimizer go by."""
    values = [schedule(name, step, 100, 0.1, 0.9) for step in range(120)]
    changed = {what for what, column in zip(("lr", "momentum"), zip(*values, strict=True), strict=True) if len(set(column)) > 1}
    assert changed == set(SCHEDULES[name].moves)


def test_an_unknown_schedule_of_another_versions_runs_still_has_a_name_and_a_style():
    assert entry("warm").label == "warm" and entry("warm").marker
