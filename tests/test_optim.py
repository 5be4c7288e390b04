"""Optimizers: the published updates, torch's own classes on the same gradients, and the state that a checkpoint brings back."""

import copy
import math

import pytest
import torch

import epochwise
import optim
from conftest import same_weights, series, slow, summary
from engine import options
from engine.tensorboard_views import will_log


def made(momentum: float = 0.9, sched: str = "constant", wd: float = 0.0):
    p = torch.nn.Parameter(torch.tensor([2.0]))
    return p, optim.build_optimizer("sgd", [p], 0.1, momentum, wd, sched)


def test_sgd_on_one_weight():
    """v <- m v + g + wd w; w <- w - lr v, the gradient being 1: 2 -> 1.88 -> 1.6532."""
    p, optimizer = made(wd=0.1)
    for want in (2 - 0.1 * 1.2, 1.88 - 0.1 * (0.9 * 1.2 + 1 + 0.188)):
        p.grad = torch.ones(1)
        optimizer.step()
        assert p.item() == pytest.approx(want, rel=1e-6)


def by_formula(name: str, w: float, gradients: list[float], lr: float, m: float, wd: float) -> float:
    """The weight after these gradients, by the formulas of the papers, in Python's floats."""
    v = mean = square = 0.0
    for t, g in enumerate(gradients, 1):
        d = g + (0 if name == "adamw" else wd * w)
        if name in ("sgd", "nesterov"):
            v = m * v + d
            w -= lr * (d + m * v if name == "nesterov" else v)
        elif name in ("adam", "adamw"):
            mean, square = m * mean + (1 - m) * d, 0.999 * square + 0.001 * d * d
            decayed = lr * wd * w if name == "adamw" else 0
            w -= decayed + lr * mean / (1 - m**t) / (math.sqrt(square / (1 - 0.999**t)) + 1e-8)
        else:
            square = 0.99 * square + 0.01 * d * d
            v = m * v + d / (math.sqrt(square) + 1e-8)
            w -= lr * v
    return w


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_each_follows_its_formula(name):
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer, gradients = optim.build_optimizer(name, [p], 0.1, 0.8, 0.05, "constant"), [1.0, -0.3, 0.7, 0.0, 2.0]
    for g in gradients:
        p.grad = torch.full_like(p, g)
        optimizer.step()
    assert p.item() == pytest.approx(by_formula(name, 2.0, gradients, 0.1, 0.8, 0.05), rel=1e-12)


TORCHS = {
    "sgd": lambda ps, **given: torch.optim.SGD(ps, lr=0.1, momentum=0.8, weight_decay=0.05, **given),
    "nesterov": lambda ps, **given: torch.optim.SGD(
        ps, lr=0.1, momentum=0.8, weight_decay=0.05, nesterov=True, **given
    ),
    "adam": lambda ps, **given: torch.optim.Adam(ps, lr=0.1, betas=(0.8, 0.999), weight_decay=0.05, **given),
    "adamw": lambda ps, **given: torch.optim.AdamW(ps, lr=0.1, betas=(0.8, 0.999), weight_decay=0.05, **given),
    "rmsprop": lambda ps, **given: torch.optim.RMSprop(ps, lr=0.1, momentum=0.8, weight_decay=0.05, **given),
}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_each_is_torchs_own_on_the_same_gradients(name):
    """With torch's cycled one-cycle rate and momentum; unfused to rounding, and bit for bit in the form that it is used in."""
    g = torch.Generator().manual_seed(0)
    mine, plain, same = ([torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (3, 40)] for _ in range(3))
    ours = optim.build_optimizer(name, mine, 0.1, 0.8, 0.05, "onecycle")
    theirs = TORCHS[name](plain)
    fused = TORCHS[name](same, **({} if name == "rmsprop" else {"fused": True}))
    cycles = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40) for o in (theirs, fused)]
    for step in range(40):
        optim.adjust(ours, *optim.SCHEDULES["onecycle"].values(step, 40, 0.1, 0.8))
        group, wanted = ours.param_groups[0], theirs.param_groups[0]
        assert (group["lr"], *group.get("betas", [group.get("momentum")])) == pytest.approx(
            (wanted["lr"], *wanted.get("betas", [wanted.get("momentum")])), abs=1e-12
        )
        for ps in zip(mine, plain, same, strict=True):
            gradient = torch.randn(ps[0].shape, generator=g, dtype=torch.float64)
            for p in ps:
                p.grad = gradient.clone()
        for optimizer in (ours, theirs, fused):
            optimizer.step()
        for cycle in cycles if step < 39 else ():
            cycle.step()
        for a, b, c in zip(mine, plain, same, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.9, 0])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_kept_state_is_what_a_step_leaves(name, momentum):
    if not momentum and optim.OPTIMIZERS[name].needs_momentum:
        pytest.skip("never without a momentum")
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.build_optimizer(name, [p], 0.1, momentum, 0, "constant")
    p.grad = torch.ones(2)
    optimizer.step()
    kept = {key for key, value in optimizer.state_dict()["state"].get(0, {}).items() if value is not None}
    assert kept == set(optim.kept_state(name, momentum, "constant"))


@pytest.mark.parametrize(
    ("momentum", "sched", "kept"), [(0.9, "constant", True), (0, "constant", False), (0, "onecycle", True)]
)
def test_sgd_keeps_a_momentum_of_zeros_where_there_will_be_one(momentum, sched, kept):
    p, optimizer = made(momentum, sched)
    state = optimizer.state_dict()["state"]
    assert optim.kept_state("sgd", momentum, sched) == tuple(state[0] if kept else ())
    assert bool(state) == kept and (not kept or torch.equal(state[0]["momentum_buffer"], torch.zeros(1)))


# ------------------------------------------------------------------------------------------------------------ in a run


@pytest.mark.parametrize("name", ["sgd", *slow(*(name for name in optim.OPTIMIZERS if name != "sgd"))])
def test_resumed_bit_for_bit(go, name):
    """Ended after step 3 and again before an epoch's end, gone on from there: the same weights and state as without."""
    given = f"--optimizer {name} --lr 0.01 --noise 0.4 --sched onecycle --sched-steps 9 --bs 40 --width 4".split()
    whole = go(*given, "--max-steps", "7", name="whole")
    for steps in ("3", "6", "7"):
        cut = go(*given, "--max-steps", steps, *["--resume"] * (steps != "3"), name="cut")
    assert same_weights(whole, cut)
    states = [torch.load(f / "last.ckpt", weights_only=True)["optimizer"]["state"] for f in (whole, cut)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 62
    for i, kept in states[0].items():
        assert kept.keys() == set(optim.OPTIMIZERS[name].state)
        assert all(torch.equal(value, states[1][i][key]) for key, value in kept.items())
    written = series(whole)
    assert ("optim/temperature" in written) == (name in ("sgd", "nesterov"))
    assert math.isfinite(summary(whole)["test_acc"])


def test_a_damaged_state_is_named(go, capsys):
    """Moments without their count, a count that is none, betas that are not the run's: one line, before any step."""
    given = "--optimizer adam --lr 0.01 --bs 40 --width 4 --measure off".split()
    folder = go(*given, "--max-steps", "2")
    good = torch.load(folder / "last.ckpt", weights_only=True)
    for result, harm in (
        ("state.0.step is null, not a 0-d tensor of floats", lambda o: o["state"][0].pop("step")),
        ("state.0.step is 1.5, not a whole number", lambda o: o["state"][0].update(step=torch.tensor(1.5))),
        ("state.0.exp_avg is null", lambda o: o["state"][0].pop("exp_avg")),
        ("state is empty after 2 steps", lambda o: o["state"].clear()),
        ("param_groups.0.betas.1 is 0.5, not 0.999", lambda o: o["param_groups"][0].update(betas=(0.9, 0.5))),
        ("param_groups.0.betas is", lambda o: o["param_groups"][0].update(betas=(0.9, 1.5))),
    ):
        bad = copy.deepcopy(good)
        harm(bad["optimizer"])
        for name in ("last.ckpt", "previous.ckpt"):
            torch.save(bad, folder / name)
        capsys.readouterr()
        go(*given, "--max-steps", "4", "--resume", status=2)
        assert result in capsys.readouterr().err


@pytest.mark.slow
def test_the_edge_of_stability_is_that_of_sgd_alone(go, monkeypatch):
    """2 / lr bounds the sharpness of gradient descent, and of no adaptive method."""
    monkeypatch.setattr(epochwise, "MEASURES", {"curvature": epochwise.MEASURES["curvature"]})
    for name, small in (("CURVATURE_EXAMPLES", 8), ("CURVATURE_PRODUCTS", 2), ("TRACE_PROBES", 2)):
        monkeypatch.setattr(epochwise, name, small)
    given = "--measure full --measure-budget 1e6 --max-steps 1 --epochs 1 --width 4 --noise 0.4 --lr 0.01".split()
    for name, there in (("sgd", True), ("adamw", False)):
        written = series(go(*given, "--optimizer", name, name=name))
        assert "curvature/trace" in written
        assert ("curvature/edge" in written) == there
        assert (
            will_log(
                "curvature/(edge|two_over_lr)",
                vars(options.parse(["--optimizer", name])) | {"measure": "full"},
                True,
                {},
            )
            == there
        )


@pytest.mark.parametrize(
    ("given", "result"),
    [
        ("--optimizer adamx", "--optimizer: invalid choice: 'adamx'"),
        ("--optimizer nesterov --momentum 0", "--momentum 0: --optimizer nesterov needs one above 0"),
        ("--optimizer adam --momentum 1", "'1' is not a number from 0 to below 1"),
    ],
)
def test_refused(go, capsys, given, result):
    go(*given.split(), status=2)
    error = capsys.readouterr().err
    assert result in error and error.count("\n") == 1


def test_a_rate_that_is_sgds_is_warned_about(go, capsys):
    go(*"--optimizer adam --max-steps 1 --width 4 --measure off".split())
    assert "--lr 0.1 is large for --optimizer adam, whose usual rate is about 0.001" in "".join(capsys.readouterr())
