"""Losses: the papers' formulas, gradients at the logits, limits; a run's measures follow the loss that trains it."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import data
import epochwise
import losses
import report
import sweep
import train
from conftest import same_weights, series, weights
from engine import checks, labels, options
from engine.noisefile import shares, transitions
from gradsplit import Meter
from noises import NOISES, Noise
from study import figures, gallery, results, settings, sidebyside, verdicts
from study.grids import expand
from study.runfolders import Run
from test_metrics import job_for, warm
from test_report import plant

CHOICES = ["ce", "smooth:0.1", "mae", "gce:0.7", "sce:0.1,1", "forward"]
K = 4
T = torch.tensor(
    [[0.6, 0.4, 0, 0], [0, 0.7, 0.3, 0], [0.1, 0.1, 0.7, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64
)


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def drawn(scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return scale * torch.randn(9, K, generator=g, dtype=torch.float64), torch.arange(9) % K


def by_the_paper(text: str, z: list[float], y: int, matrix=T) -> float:
    """A loss of one example as its paper writes it, in Python's floats."""
    name, _, given = text.partition(":")
    numbers = [float(x) for x in given.split(",")] if given else []
    e = [math.exp(v - max(z)) for v in z]
    p = [v / sum(e) for v in e]
    target = [float(k == y) for k in range(len(z))]
    if name == "smooth":  # Szegedy et al. 2016: q'(k) = (1 - eps) delta_ky + eps u(k)
        target = [(1 - numbers[0]) * t + numbers[0] / len(z) for t in target]
    entropy = -sum(t * math.log(v) for t, v in zip(target, p, strict=True))
    if name in ("ce", "smooth"):
        return entropy
    if name == "mae":  # Ghosh et al. 2017: ||e_j - f(x)||_1
        return sum(abs(t - v) for t, v in zip(target, p, strict=True))
    if name == "gce":  # Zhang & Sabuncu 2018: (1 - f_j(x)^q) / q
        return (1 - p[y] ** numbers[0]) / numbers[0]
    if name == "sce":  # Wang et al. 2019: -sum_k p(k|x) log q(k|x), log 0 = A = -4
        reverse = -sum(v * (0.0 if t else -4.0) for t, v in zip(target, p, strict=True))
        return numbers[0] * entropy + numbers[1] * reverse
    return -math.log(sum(float(matrix[k, y]) * v for k, v in enumerate(p)))  # Patrini et al. 2017: T^T p


def loss_of(text: str, matrix=T) -> losses.ExampleLoss:
    """Also of the cross-entropy, for which a run has none."""
    return losses.build_loss(text, matrix if text == "forward" else None) or losses.ExampleLoss(losses.LOSSES["ce"])


# ---------------------------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("text", [*CHOICES, "smooth:0.6", "gce:1", "gce:0.001", "sce:6,0.1"])
def test_values_are_those_of_the_papers(text):
    logits, y = drawn()
    got = loss_of(text)(logits, y)
    want = [by_the_paper(text, z, int(k)) for z, k in zip(logits.tolist(), y, strict=True)]
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(want, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("scale", [2.0, 60.0])  # far out a probability is 0 or 1 in float64
@pytest.mark.parametrize("text", [*CHOICES, "gce:0.01", "sce:6,0.1"])
def test_gradients_at_the_logits_are_autograds(text, scale):
    """In closed form, and the second derivative, which the curvature takes, is finite."""
    logits, y = drawn(scale)
    loss, z = loss_of(text), logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(z, y).sum(), z, create_graph=True)
    torch.testing.assert_close(loss.gradient(logits, y), want.detach(), rtol=1e-12, atol=1e-12)
    (second,) = torch.autograd.grad(want.square().sum(), z)
    assert second.isfinite().all()


def test_limits():
    logits, y = drawn()
    ce = loss_of("ce")(logits, y)
    torch.testing.assert_close(losses.gce(logits, y, 1e-9), ce, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(losses.gce(logits, y, 1.0), losses.mae(logits, y) / 2, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(losses.smooth(logits, y, 0.0), ce, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(losses.forward(logits, y, torch.eye(K)), ce, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(losses.sce(logits, y, 0.3, 0.0), 0.3 * ce, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(losses.sce(logits, y, 0.0, 0.5), losses.mae(logits, y), rtol=1e-13, atol=1e-14)


def test_a_label_that_no_class_has_says_nothing():
    matrix = T.clone()
    matrix[:, 3] = 0
    logits, y = drawn()
    loss, z = loss_of("forward", matrix), logits.clone().requires_grad_()
    each = loss(z, y)
    assert each[y == 3].tolist() == pytest.approx([math.log(K)] * 2)
    (gradient,) = torch.autograd.grad(each.sum(), z)
    for found in (gradient, loss.gradient(logits, y)):
        assert found[y == 3].abs().max() < 1e-15 and found[y != 3].abs().min() > 0


@pytest.mark.parametrize("text", CHOICES)
def test_sixteen_bits_are_computed_in_float32(text):
    logits, y = drawn()
    half = logits.bfloat16()
    got = loss_of(text)(half, y)
    assert got.dtype == torch.float32 and loss_of(text).gradient(half, y).dtype == torch.float32
    assert torch.equal(got, loss_of(text)(half.float(), y))
    torch.testing.assert_close(got.double(), loss_of(text)(half.double(), y), rtol=1e-5, atol=1e-6)


def test_the_meter_takes_a_closed_form_in_place_of_autograd():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, K)).double()
    x, y, noisy = torch.randn(24, 5, dtype=torch.float64), torch.arange(24) % K, torch.arange(24) % 3 == 1
    true = torch.where(noisy, (y + 1) % K, y)
    for text in CHOICES[1:]:
        loss = loss_of(text)
        plain = lambda z, y, loss=loss: loss(z, y)  # noqa: E731 # which has no gradient of its own
        a, b = (Meter(net, loss=given, chunks=3, masks=2).measure(x, y, noisy, true) for given in (loss, plain))
        assert a.keys() == b.keys() and len(a) > 10
        assert all(float(a[tag]) == pytest.approx(float(b[tag]), rel=1e-10) for tag in a), text


# ------------------------------------------------------------------------------------------------------------- a run's


def independent(text: str, matrix: torch.Tensor):
    """The loss (b,) written out with probabilities: another way to the same numbers, differentiated by autograd."""
    name, _, given = text.partition(":")
    a = [float(x) for x in given.split(",")] if given else []

    def each(z, y):
        p = z.softmax(1)
        py = p[torch.arange(len(y)), y]
        if name == "smooth":
            return -((1 - a[0]) * py.log() + a[0] * p.log().mean(1))
        known = {"ce": lambda: -py.log(), "mae": lambda: (F.one_hot(y, z.shape[1]) - p).abs().sum(1)}
        known |= {"gce": lambda: (1 - py ** a[0]) / a[0], "sce": lambda: -a[0] * py.log() + 4 * a[1] * (1 - py)}
        known |= {"forward": lambda: -(p @ matrix)[torch.arange(len(y)), y].log()}
        return known[name]()

    return each


def realised(job) -> torch.Tensor:
    return shares(job.context.transition)


def flat(rows) -> torch.Tensor:
    return torch.cat([r.flatten() for r in rows])


@pytest.mark.parametrize(
    ("text", "mode"), [(text, "train") for text in CHOICES] + [("gce:0.7", "eval"), ("forward", "separate")]
)
def test_series_of_a_step_are_three_backward_passes_with_the_loss(text, mode):
    job = job_for("--loss", text, "--precision", "64-true", "--measure-bn", mode, "--width", "4")
    batch, each, found = warm(job, 1), independent(text, realised(job)), []
    for keep in (~batch.noisy, batch.noisy, batch.noisy | True):
        net = copy.deepcopy(job.module).train(mode != "eval")
        if mode == "separate" and not keep.all():
            each(net(batch.x[keep]), batch.y[keep]).mean().backward()
        else:
            each(net(batch.x), batch.y)[keep].mean().backward()
        found.append(flat(p.grad for p in net.parameters()))
    net, cos = copy.deepcopy(job.module), lambda a, b: float(a @ b / (a.norm() * b.norm()))
    mean = each(net(batch.x), batch.y).mean()
    mean.backward()
    want = {"cos_clean_noisy": cos(*found[:2]), "cos_clean_all": cos(found[0], found[2])}
    want |= {f"norm_{name}": float(g.norm()) for name, g in zip(("clean", "noisy", "all"), found, strict=True)}
    job.optimizer.step = lambda: None  # the gradient stays to be looked at
    job.optimizer.zero_grad = lambda **_: None
    got = train.train_step(job, batch, 4, measured=True)
    for tag, value in want.items():
        assert float(got[f"grad/{tag}"]) == pytest.approx(value, rel=1e-9, abs=1e-12), tag
    assert float(got["train/loss"]) == pytest.approx(float(mean.detach()), rel=1e-12)
    torch.testing.assert_close(
        flat(p.grad for p in job.parameters), flat(p.grad for p in net.parameters()), rtol=1e-8, atol=1e-13
    )


@pytest.mark.slow
def test_all_full_measurements_are_those_of_the_loss(monkeypatch):
    """The controls of a step and the measures after an epoch, with the loss given to the measurements from outside, written
    out and differentiated by autograd; the probe looks at the cross-entropy whatever the loss."""
    small = {"CURVATURE_PRODUCTS": 2, "CURVATURE_RESOLVED": 1e9, "TRACE_PROBES": 2, "ISOTROPY_PARTS": 4, "PROBE": 16}
    for name in ("CURVATURE_EXAMPLES", "SUSCEPTIBILITY_EXAMPLES", "DISPARITY_EXAMPLES", "ISOTROPY_EXAMPLES"):
        small[name] = 4
    for name, value in small.items():
        monkeypatch.setattr(epochwise, name, value)
    text, found = "forward", {}
    for given in (text, "outside", "ce"):
        full = "--precision 64-true --measure full --measure-budget 1000 --permutations 1 --chunks 2 --width 4".split()
        job = job_for(*full, "--loss", text if given == text else "ce")
        if given == "outside":
            job.context.loss = independent(text, realised(job))
        job.state.plan = {"steps": 1} | dict.fromkeys(epochwise.MEASURES, 1)
        batch = warm(job, 1)
        values = epochwise.measure_after_epoch(job.context, 1, 3)
        values |= train.train_step(job, batch, 3, measured=True)
        found[given] = {tag: float(v) for tag, v in values.items() if not isinstance(v, torch.Tensor) or v.dim() == 0}
    own, outside, ce = found[text], found["outside"], found["ce"]
    assert own.keys() == outside.keys() == ce.keys()
    for tag, value in own.items():
        assert value == pytest.approx(outside[tag], rel=1e-6, abs=1e-10, nan_ok=True), tag
    follow = [
        "train/loss",
        "grad/norm_noisy",
        "grad/difference",
        "grad/label_share",
        "null/cos_clean_all",
        "fresh/ratio",
    ]
    follow += ["truth/shift", "null/permuted_cos_clean_noisy", "isotropy/participation", "curvature/top"]
    follow += ["curvature/trace", "probe/susceptibility", "probe/disparity"]
    assert [tag for tag in follow if own[tag] == pytest.approx(ce[tag], rel=1e-5)] == []


def test_at_the_same_weights_the_probe_does_not_depend_on_the_loss():
    found = []
    for text in ("ce", "mae"):
        job = job_for("--loss", text, "--precision", "64-true", "--width", "4")
        found.append(epochwise.probe(job.context))
    assert found[0] == found[1] and {"probe/memorized", "probe/auc"} <= found[0].keys()


def test_the_hessian_is_that_of_the_loss():
    job = job_for("--precision", "64-true", "--loss", "gce:0.7")
    torch.manual_seed(0)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 10)).double()
    job.context.module, job.context.parameters = net, list(net.parameters())
    sizes = [p.numel() for p in net.parameters()]
    index = torch.randperm(len(job.train), generator=data.generator(0, "curvature"))[: epochwise.CURVATURE_EXAMPLES]
    x, y, names = job.train.images.plain(index), job.train.labels[index], [n for n, _ in net.named_parameters()]

    def loss(flat):
        parts = {n: v.view_as(p) for n, v, p in zip(names, flat.split(sizes), net.parameters(), strict=True)}
        return independent("gce:0.7", T)(functional_call(net, parts, (x,)), y).mean()

    H = torch.func.hessian(loss)(flat(p.detach() for p in net.parameters()))
    got = epochwise.curvature(job.context)
    assert got["curvature/top"] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=3e-3)
    assert abs(got["curvature/trace"] - float(H.trace())) < 5 * got["curvature/trace_error"]


# --------------------------------------------------------------------------------------------------- forward's matrix


def test_the_matrix_is_the_runs_own(go):
    folder = go(*"--loss forward --noise 0.5 --noise-type pair --max-steps 2 --width 4".split())
    config = json.loads((folder / "config.json").read_text())
    assert len(config["resolved"]["loss_matrix_sha256"]) == 64
    with np.load(folder / "noise.npz") as drawn:
        true, given = (torch.from_numpy(drawn[name]) for name in ("true", "label"))
    want = torch.zeros(10, 10, dtype=torch.float64)
    for k, j in zip(true, given, strict=True):
        want[k, j] += 1
    want /= want.sum(1, keepdim=True)
    args = options.parse(["--loss", "forward"])
    assert torch.equal(labels.loss_matrix(args, true, given, 10), want)
    torch.testing.assert_close(torch.tensor(config["noise"]["matrix"], dtype=torch.float64), want)
    job = job_for("--loss", "forward", "--precision", "64-true")
    assert torch.equal(job.context.loss.matrix, realised(job)) and realised(job).diagonal().min() < 1
    assert job_for("--loss", "forward").context.loss.matrix.dtype == torch.float32


def test_a_class_without_an_example_keeps_its_labels():
    args = options.parse(["--loss", "forward"])
    matrix = labels.loss_matrix(args, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 3)
    assert matrix.tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]


def test_labels_drawn_anew_have_the_matrix_of_their_law():
    n, args = 4000, options.parse(["--loss", "forward"])
    true = torch.arange(n) % 5
    anew = labels.ByEpoch(NOISES["dynamic"], 0.4, 0, true, 5)
    matrix = labels.loss_matrix(args, true, anew(0), 5, anew)
    mean = torch.stack([shares(transitions(true, anew(epoch), 5)) for epoch in range(40)]).mean(0)
    assert matrix.sum(1).tolist() == pytest.approx([1] * 5)
    torch.testing.assert_close(mean, matrix, rtol=0, atol=4 * math.sqrt(0.25 / 800 / 40))
    unknown = labels.ByEpoch(Noise(None, by_epoch=NOISES["dynamic"].by_epoch), 0.4, 0, true, 5)
    with pytest.raises(
        data.InputError, match="--loss forward: the matrix of .* is not known; give --loss forward:FILE"
    ):
        labels.loss_matrix(args, true, anew(0), 5, unknown)


def test_a_run_of_dynamic_noise_has_it(go):
    go(*"--loss forward --noise 0.5 --noise-type dynamic --max-steps 2 --width 4".split())


@pytest.mark.slow
def test_with_an_identity_from_a_file_it_is_the_cross_entropy(go, tmp_path):
    np.save(tmp_path / "I.npy", np.eye(10))
    given = "--noise 0.5 --max-steps 3 --width 4 --precision 64-true --measure-every 1".split()
    a = go(*given, name="a")
    b = go(*given, "--loss", f"forward:{tmp_path / 'I.npy'}", name="b")
    found = series(a), series(b)
    assert found[0].keys() == found[1].keys()
    for tag in found[0]:
        assert [v for _, v in found[0][tag]] == pytest.approx([v for _, v in found[1][tag]], rel=1e-6, abs=1e-9), tag
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------- names, resuming, bad input


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("ce", "ce"),
        ("smooth", "smooth:0.1"),
        ("gce", "gce:0.7"),
        ("gce:.70", "gce:0.7"),
        ("gce:1", "gce:1"),
        ("sce", "sce:0.1,1"),
        ("sce:0.1+1.0", "sce:0.1,1"),
        ("sce:6,1e-1", "sce:6,0.1"),
        ("forward", "forward"),
    ],
)
def test_one_spelling_each(given, canonical):
    assert checks.loss(given) == canonical == checks.loss(canonical)


def test_a_grid_over_losses():
    grid = "loss=ce,smooth:0.1,mae,gce:0.7,sce:0.1+1,forward noise=0.4"
    jobs = expand([grid], ["--dataset", "synthetic"], "--grid")
    assert [job.args.loss for job in jobs] == CHOICES
    assert [job.name.removeprefix("synthetic_noise0.4_") for job in jobs] == [
        "loss-ce",
        "loss-smooth-0.1",
        "loss-mae",
        "loss-gce-0.7",
        "loss-sce-0.1-1",
        "loss-forward",
    ]
    assert options.parse(["--noise", "0.4"]).name == "noise0.4"


@pytest.mark.slow
def test_resumed_bit_for_bit(go):
    given = "--loss forward --noise 0.4 --sched onecycle --sched-steps 9 --bs 40 --width 4".split()
    whole = go(*given, "--max-steps", "7", name="whole")
    for steps in ("3", "7"):
        cut = go(*given, "--max-steps", steps, *["--resume"] * (steps != "3"), name="cut")
    assert same_weights(whole, cut)
    a, b = series(whole), series(cut)
    shared = [tag for tag in a if not tag.startswith(("val/", "test/", "probe/"))]  # those stand at the ends, too
    assert [tag for tag in shared if a[tag] != b[tag]] == [] and "train/loss" in shared


def test_a_run_keeps_its_loss_and_its_matrix(go, capsys, tmp_path):
    given, file = "--noise 0.4 --bs 40 --width 4 --measure off".split(), tmp_path / "T.csv"
    go(*given, "--loss", "gce", "--max-steps", "2", name="g")
    go(*given, "--loss", "gce:0.5", "--max-steps", "4", "--resume", name="g", status=2)
    assert "--loss was gce:0.7 and is gce:0.5 now" in capsys.readouterr().err
    np.savetxt(file, 0.7 * np.eye(10) + 0.03, delimiter=",")
    go(*given, "--loss", f"forward:{file}", "--max-steps", "2", name="f")
    go(*given, "--loss", f"forward:{file}", "--max-steps", "3", "--resume", name="f")
    np.savetxt(file, 0.8 * np.eye(10) + 0.02, delimiter=",")
    capsys.readouterr()
    go(*given, "--loss", f"forward:{file}", "--max-steps", "4", "--resume", name="f", status=2)
    error = capsys.readouterr().err
    assert "its matrix is not the one that" in error and sum("error: " in line for line in error.splitlines()) == 1


BAD = {
    "huber": "'huber' is not one of ce, smooth:share, mae, gce:q, sce:alpha,beta, forward:FILE",
    "": "'' is not one of",
    "ce:1": "'ce:1' is not ce",
    "mae:": "'mae:' is not mae",
    "gce:0": "'gce:0' is not gce:q, q a number above 0, at most 1",
    "gce:1.01": "q a number above 0, at most 1",
    "gce:1_0": "q a number above 0, at most 1",
    "gce:nan": "q a number above 0, at most 1",
    "gce:": "q a number above 0, at most 1",
    "smooth:1": "share a number from 0 to below 1",
    "sce:0.1": "alpha a number from 0 and beta a number from 0 (in a grid joined by +)",
    "sce:0.1,-1": "beta a number from 0",
    "sce:0.1,1e999": "beta a number from 0",
    "forward:": "'forward:' is not forward:FILE",
    "forward:none.npy": "--loss forward:none.npy: there is no such file",
}


@pytest.mark.parametrize("text", BAD)
def test_refused(go, capsys, text):
    go(f"--loss={text}", status=2)
    error = capsys.readouterr().err
    assert BAD[text] in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("matrix", "result"),
    [
        (np.eye(3), "is of shape (3, 3), the data set has 10 classes: (10, 10)"),
        (np.eye(10)[:, ::-1] * 0.9, "row 0 sums to 0.9, not to 1"),
        (np.tile(np.eye(10)[0], (10, 1)), "column 1 is 0, and"),
        (np.array(["x"]), "is of <U1, not of real numbers"),
    ],
)
def test_a_matrix_that_does_not_fit(go, capsys, tmp_path, matrix, result):
    np.save(tmp_path / "T.npy", matrix)
    go("--loss", f"forward:{tmp_path / 'T.npy'}", status=2)
    error = capsys.readouterr().err
    assert f"--loss forward:{tmp_path / 'T.npy'}: {result}" in error and error.count("\n") == 1


def test_a_bad_grid_says_how_numbers_are_joined(capsys, tmp_path):
    assert sweep.main(["--grid", "loss=sce:0.1,1.0", "--runs", str(tmp_path)]) == 2
    assert "(in a grid joined by +)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- reports


def planted(folder, extra: str, seed: int, cosine: float, ratio: float) -> None:
    argv = f"--dataset synthetic --noise 0.4 --bs 64 --sched onecycle --sched-epochs 4 --epochs 4 --seed {seed} {extra}"
    steps = range(0, 100, 10)
    late = lambda s: 0.5 * (s >= 50)  # noqa: E731
    plant(
        folder,
        argv,
        {
            "grad/cos_clean_noisy": [(s, cosine - late(s) + 0.01 * seed) for s in steps],
            "null/permuted_cos_clean_noisy": [(s, 0.7) for s in steps[::2]],
            "grad/norm_clean": [(s, 2.0) for s in steps],
            "grad/norm_noisy": [(s, 2.0 * ratio * (1 + late(s))) for s in steps],
            "probe/memorized": [(0, 0.1), (100, 0.5)],
            "val/acc": [(0, 0.1), (100, 0.6)],
            "test/acc": [(100, 0.55)],
        },
    )


def test_a_report_sets_losses_side_by_side_and_judges_them_apart(tmp_path, monkeypatch):
    """In the registry's order, in halves of the run; the verdicts of one loss take no runs of another."""
    monkeypatch.setattr(gallery, "save_styled", lambda *_, **__: False)  # drawing takes long, and is not in question
    for seed in (0, 1):
        planted(tmp_path / "runs", "--loss mae", seed, 0.3, 0.5)
        planted(tmp_path / "runs", "", seed, 0.6, 1.5)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    at = next(i for i, row in enumerate(rows) if row[0] == "loss")
    header, ce, mae = rows[at], *(row for row in rows[at + 1 :] if row[0] in ("ce", "mae"))
    assert header[-3:] == ["memorized", "val/acc", "test/acc"] and len(header) == len(ce) == len(mae)
    assert ce[5] == "2" and ce[6] == "0.605 ± 0.007" and ce[7] == "0.700 ± 0.000" and ce[8] == "1.500 ± 0.000"
    assert ce[9] == "0.105 ± 0.007" and ce[11] == "2.250 ± 0.000" and ce[12] == "0.500 ± 0.000"
    assert mae[0] == "mae" and mae[6] == "0.305 ± 0.007" and mae[8] == "0.500 ± 0.000"
    assert page.count("## Results: ") == 2 and "loss mae" in page


def test_losses_are_compared_with_the_cross_entropy_seed_by_seed(tmp_path):
    for seed in (0, 1, 2):
        planted(tmp_path, "--loss mae", seed, 0.3 + 0.1 * seed, 0.5)
        planted(tmp_path, "", seed, 0.6, 1.5)
    columns, (row,) = sidebyside.compared_rows(
        sidebyside.COMPARISONS[0], results.load_runs([str(tmp_path)], progress=False)
    )
    of = dict(zip(columns, row[-len(columns) :], strict=True))
    assert row[0] == "mae" and row[-len(columns) - 1] == "3"
    # -0.3, -0.2 and -0.1: 0.1 is their deviation, 4.303 the quantile of t with two degrees of freedom
    assert of["cosine minus null, first half"] == of["cosine minus null, second half"] == "-0.200 [-0.448, +0.048]"
    assert of["norm, noisy / clean, first half"] == "0.33 times [0.33, 0.33]"
    assert of["memorized"] == "+0.000 [+0.000, +0.000]"


def test_settings_of_other_losses_and_optimizers_are_judged_apart():
    """And the finding about SGD's noise scale with momentum of SGD alone."""
    runs = []
    for extra in ("", "--loss gce", "--optimizer adam", "--momentum 0.5"):
        args = options.parse(f"--dataset synthetic --noise 0.4 --sched cosine {extra}".split())
        runs.append(Run("r", vars(args), {}, {"status": "finished"}, {}, ""))
    two_momenta = [runs[0], runs.pop()]
    grouped = settings.group_settings(runs)
    assert len(grouped) == 3
    judged = verdicts.judge_settings([s for s in grouped if "adam" in s.label])
    assert {"4", "5"} <= {r.hypothesis.id for _, r in judged} and "4m" not in {r.hypothesis.id for _, r in judged}
    judged = verdicts.judge_settings([s for s in grouped if "adam" not in s.label])
    assert "4m" not in {r.hypothesis.id for _, r in judged}  # with one momentum it is 4, and counted once
    assert any(verdicts.ONE_MOMENTUM in r.notes for _, r in judged if r.hypothesis.id == "4")
    judged = verdicts.judge_settings(settings.group_settings(two_momenta))
    assert "4m" in {r.hypothesis.id for _, r in judged}
    assert not any(verdicts.ONE_MOMENTUM in r.notes for _, r in judged)
    plain, gce, _ = runs
    assert figures.comparable(plain, plain) and not figures.comparable(gce, plain)  # beside the report's own curves


def test_the_registry_is_complete():
    for name, entry in losses.LOSSES.items():
        assert checks.loss(name).startswith(name) and entry.about and entry.gradient
        assert all(value.holds(value.default) for value in entry.values) and not (entry.values and entry.matrix)
    assert losses.build_loss("ce") is None
