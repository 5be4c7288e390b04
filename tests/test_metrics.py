"""Cotangents, pull-backs and the split's cosines against plain backward passes."""

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F

import data
import gradsplit
import metrics
import models
import noises
import train
from conftest import TINY, slow
from engine import options, sources
from engine.job import TrainingJob
from gradsplit import Forward, cut_graph


def job_for(*argv: str) -> TrainingJob:
    """A prepared tiny job under the options `argv`."""
    args = options.parse([*TINY, "--noise", "0.5", *argv])
    torch.set_default_dtype(torch.float64 if args.precision == "64-true" else torch.float32)
    source = sources.load(args)
    indices = data.split(len(source.x_train), args.val_frac, args.split_seed)
    labels = noises.apply("uniform", source.y_train[indices[0]], 10, args.noise, 0)
    return train.prepare(args, source, indices, labels, *train.make_fabric(args))


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def warm(job: TrainingJob, steps: int = 3) -> data.Batch:
    """A few plain steps, so that weights and running statistics are not the initial ones; then the next batch."""
    plan = job.train.epoch(0, 0)
    for step in range(steps):
        train.train_step(job, job.train.batch(plan, step, 32), step, measured=False)
    return job.train.batch(plan, steps, 32)


def reference(job: TrainingJob, batch: data.Batch, mode: str) -> dict[str, torch.Tensor]:
    """g_C, g_N and g as flat vectors, by three separate forward and backward passes of a copied network."""
    noisy = batch.y != batch.true
    found = {}
    for name, keep in (("clean", ~noisy), ("noisy", noisy), ("all", noisy | True)):
        net = copy.deepcopy(job.module)
        net.train(mode != "eval")
        if mode == "separate" and name != "all":
            F.cross_entropy(net(batch.x[keep]), batch.y[keep]).backward()
        else:
            F.cross_entropy(net(batch.x)[keep], batch.y[keep]).backward()
        found[name] = torch.cat([p.grad.flatten() for p in net.parameters()])
    return found


@pytest.mark.parametrize("mode", ["train", *slow("eval", "separate")])
@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-5), ("64-true", 1e-10)])
def test_split_equals_three_backward_passes(mode, precision, bound):
    job = job_for("--precision", precision, "--measure-bn", mode)
    batch = warm(job)
    assert 0 < batch.n_noisy < batch.size
    g = reference(job, batch, mode)
    want = {
        "grad/cos_clean_all": F.cosine_similarity(g["clean"], g["all"], dim=0),
        "grad/cos_clean_noisy": F.cosine_similarity(g["clean"], g["noisy"], dim=0),
        "grad/norm_clean": g["clean"].norm(),
        "grad/norm_noisy": g["noisy"].norm(),
        "grad/norm_all": g["all"].norm(),
    }
    got = train.train_step(job, batch, 3, measured=True)
    for tag, value in want.items():
        assert float(got[tag]) == pytest.approx(float(value), rel=bound, abs=bound), tag
    assert got["grad/clean_fraction"] == 1 - batch.n_noisy / 32


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-5), ("64-true", 1e-12), *slow(("bf16-mixed", 3e-2))])
def test_clean_plus_noisy_is_the_training_gradient(precision, bound):
    job = job_for("--precision", precision)
    batch = warm(job)
    buffers = copy.deepcopy(dict(job.module.named_buffers()))
    ahead = Forward(job.context, batch.x, batch.size)
    rows, logits = gradsplit.split_rows(job.context, batch, ahead), ahead.logits
    total = torch.cat([t.flatten() for t in gradsplit.add_rows(rows)])
    after = copy.deepcopy(dict(job.module.named_buffers()))
    job.module.load_state_dict(buffers, strict=False)
    again = train.plain_gradient(job, batch)
    plain = torch.cat([p.grad.flatten() for p in job.parameters])
    assert float((total - plain).norm() / plain.norm()) < bound
    assert torch.equal(logits.detach(), again)  # the one forward of a measured step is the plain step's forward ...
    assert all(torch.equal(after[k], v) for k, v in job.module.named_buffers())  # ... running statistics included


def test_measured_and_plain_step_update_alike():
    ends = []
    for measured in (False, True):
        job = job_for("--precision", "64-true")
        batch = warm(job)
        train.train_step(job, batch, 3, measured)
        ends.append(torch.cat([p.detach().flatten() for p in job.parameters]))
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 1e-13


@pytest.mark.slow
def test_an_oddly_laid_out_gradient_is_applied_in_place(monkeypatch):
    """Fused SGD walks weight and gradient in memory order; autograd.grad promises no layout. Same values, other
    strides, must give the same update."""
    split_rows, ends = gradsplit.split_rows, []
    for contiguous in (False, True):
        job = job_for("--precision", "64-true")
        batch = warm(job)

        def relaid(*a, **k):
            layout = torch.contiguous_format if contiguous else torch.channels_last
            return [
                [g.contiguous(memory_format=layout) if g.dim() == 4 else g for g in row] for row in split_rows(*a, **k)
            ]

        monkeypatch.setattr(gradsplit, "split_rows", relaid)
        train.train_step(job, batch, 3, measured=True)
        ends.append(torch.cat([p.detach().flatten() for p in job.parameters]))
    assert torch.equal(*ends)


def test_an_overflow_in_the_first_step_leaves_no_trace():
    """Under 16-mixed fused SGD makes its momentum in a step that it then leaves out."""
    job = job_for("--precision", "16-mixed")
    job.context.loss_scale()
    before = [p.detach().clone() for p in job.parameters]
    plan = job.train.epoch(0, 0)
    torch.use_deterministic_algorithms(True)  # what is not initialised is NaN
    try:
        for step, scale in enumerate((1e30, 64.0)):
            job.scaler.update(scale)
            train.train_step(job, job.train.batch(plan, step, 32), step, measured=False)
            if step == 0:
                assert all(torch.equal(p, b) for p, b in zip(job.parameters, before, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(job.parameters, before, strict=True))


@pytest.mark.parametrize("noisy", [0, 32])
@pytest.mark.parametrize("mode", ["train", "eval", "separate"])
def test_a_batch_all_clean_or_all_noisy_has_norms_but_no_cosine(noisy, mode):
    job = job_for("--measure-bn", mode)
    batch = warm(job)
    true = batch.y if not noisy else (batch.y + 1) % 10
    got = train.train_step(job, batch._replace(true=true, noisy=batch.y != true, n_noisy=noisy), 3, measured=True)
    present, absent = ("noisy", "clean") if noisy else ("clean", "noisy")
    assert {t for t in got if t.startswith("grad/")} == {"grad/clean_fraction", f"grad/norm_{present}", "grad/norm_all"}
    assert f"train/acc_{present}" in got and f"train/acc_{absent}" not in got
    assert all(math.isfinite(float(v)) for v in got.values())


def test_published_relation_of_the_cosines():
    """cos(g_C, g) = (f + e r c) / sqrt(f^2 + e^2 r^2 + 2 f e r c), e = 1 - f (docs/measurements.md)."""
    g = torch.Generator().manual_seed(0)
    clean, noisy = torch.randn(2, 50, generator=g, dtype=torch.float64)
    f, e = 0.3, 0.7
    got = gradsplit.split_measures(gradsplit.set_means(gradsplit.gram([[f * clean], [e * noisy]]), f))
    r, c = got["grad/norm_noisy"] / got["grad/norm_clean"], got["grad/cos_clean_noisy"]
    assert float(r) == pytest.approx(float(noisy.norm() / clean.norm()), rel=1e-12)
    want = (f + e * r * c) / (f**2 + e**2 * r**2 + 2 * f * e * r * c).sqrt()
    assert float(got["grad/cos_clean_all"]) == pytest.approx(float(want), rel=1e-12)


def test_gram_is_the_same_however_it_is_cut(monkeypatch):
    g = torch.Generator().manual_seed(0)
    rows = [[torch.randn(7, 3, generator=g), torch.randn(11, generator=g)] for _ in range(3)]
    flat = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows]).double()
    torch.testing.assert_close(gradsplit.gram(rows), flat @ flat.T)
    monkeypatch.setattr(gradsplit, "CHUNK", 4)
    monkeypatch.setattr(gradsplit, "CPU_CHUNK", 4)
    torch.testing.assert_close(gradsplit.gram(rows), flat @ flat.T)


@pytest.mark.parametrize("size", [1, 5, 64, 100, 1000])
def test_gram_in_buckets(monkeypatch, size):
    """Buckets that end within a tensor, at its end and beyond all of them; tensors in either memory format and in both."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, 4), (5,), (3, 2, 2, 2), (), (1, 1, 1, 1), (0, 3)]
    rows = [[torch.randn(shape, generator=g) for shape in shapes] for _ in range(4)]
    flat = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows]).double()
    monkeypatch.setattr(gradsplit, "CPU_CHUNK", size)
    for last in (1, 2, 4):  # of so many rows the four-dimensional tensors are in channels_last
        mixed = [
            [t.to(memory_format=torch.channels_last) if t.dim() == 4 and i < last else t for t in row]
            for i, row in enumerate(rows)
        ]
        torch.testing.assert_close(gradsplit.gram(mixed), flat @ flat.T, rtol=1e-12, atol=1e-12)
        cut = list(gradsplit.buckets(mixed, size))
        assert [sum(len(piece) for piece in bucket[0]) for bucket in cut] == [size] * (127 // size) + [127 % size] * (
            127 % size > 0
        )


@pytest.mark.parametrize("length", [5, gradsplit.SLICE, 3 * gradsplit.SLICE + 7])
def test_products_by_slices(length):
    """As on a GPU."""
    M = torch.randn(3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gradsplit.sliced_products(M), M @ M.T, rtol=1e-12, atol=1e-12 * length)


def test_gram_sums_in_float64():
    ones = torch.full((20_000_000,), 1.0)
    assert gradsplit.gram([[ones]]).item() == 2e7  # float32 would stop counting at 16,777,216


def test_cotangent_is_the_gradient_of_the_weighted_loss():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([0, 3, 1, 1, 2]), torch.tensor([0.5, 0, 1, 2, 0.25], dtype=torch.float64)
    loss = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
    (want,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradsplit.cotangent(logits, labels, weights), want)


def test_batch_measures_by_hand():
    logits = torch.tensor([[2.0, 0], [0, 2.0], [2.0, 0], [0, 2.0]])
    labels, true = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    counts = metrics.batch_counts(logits, labels, labels != true)
    got = metrics.batch_measures(counts, 4, 1)
    assert float(got["train/acc"]) == 0.5 and float(got["train/acc_clean"]) == pytest.approx(2 / 3)
    assert float(got["train/acc_noisy"]) == 0
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert float(got["train/loss"]) == pytest.approx((2 * right + 2 * wrong) / 4, rel=1e-6)
    assert metrics.temperature(0.1, 128, 0.9) == pytest.approx(0.1 / 12.8)


def test_dropout_mask_is_shared_by_both_rows_and_repeats():
    """torchvision's VGG has dropout: one forward serves clean and noisy, and the step number alone decides it."""
    job = job_for()
    job.context.module = job.model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3072, 10)
    ).to(job.fabric.device)
    job.context.parameters, job.context.has_dropout = list(job.module.parameters()), models.has_dropout(job.module)
    assert job.context.has_dropout
    batch = job.train.batch(job.train.epoch(0, 0), 0, 32)
    outs = []
    for step in (1, 1, 2):
        job.context.seed_dropout(step)
        rows = gradsplit.split_rows(job.context, batch, Forward(job.context, batch.x, batch.size))
        outs.append(torch.cat([t.flatten() for t in gradsplit.add_rows(rows)]))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def pulled(model: str, precision: torch.dtype, cut: bool, watch=None) -> list[list[torch.Tensor]]:
    """Rows of C and of N of a small batch, made whole or part by part."""
    net = models.build_model(model, 1, 10, 8, "bn", 0)
    g = torch.Generator().manual_seed(0)
    x, y, noisy = torch.randn(4, 1, 32, 32, generator=g), torch.arange(4), torch.tensor([1.0, 0.0, 1.0, 0.0])
    if watch:
        net.cuts[0].register_forward_hook(lambda module, args, out: watch(out))
    modules = net.cuts if cut else ()
    with cut_graph(modules) as (outputs, entries), torch.autocast("cpu", precision, enabled=precision.itemsize < 4):
        logits = net(x).float()
    U = [gradsplit.cotangent(logits, y, w) for w in (1 - noisy, noisy)]
    assert len(outputs) == len(entries) == len(modules) and len(net.cuts) >= 3
    return gradsplit.pull_backs([*outputs, logits], entries, list(net.parameters()), U, free=True)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["resnet18", pytest.param("vgg16-linear", marks=pytest.mark.slow)])
def test_rows_made_part_by_part_are_the_same_bits(model, precision):
    """Cutting the graph changes nothing, so a model's cuts are where everything passes."""
    whole, parts = (pulled(model, precision, cut) for cut in (False, True))
    assert all(torch.equal(a, b) for r, s in zip(whole, parts, strict=True) for a, b in zip(r, s, strict=True))
    assert all(float(part.norm()) > 0 for row in whole for part in row if part.dim() > 1)


@pytest.mark.parametrize("model", ["resnet18", "vgg16-linear"])
def test_rows_made_part_by_part_free_what_is_behind_them(model):
    """When the gradient reaches the earliest part of the network, what later parts saved must be gone."""
    alive = {}
    for cut in (False, True):
        saved, alive[cut] = weakref.WeakSet(), []

        class Saved:
            def __init__(self, tensor, saved=saved):
                self.tensor = tensor
                saved.add(self)

        def watch(h, saved=saved, seen=alive[cut]):
            h.register_hook(lambda grad: seen.append(sum(s.tensor.numel() for s in saved)))

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.tensor):
            pulled(model, torch.float32, cut, watch)
    assert len(alive[True]) == len(alive[False]) == 2  # once for each row
    assert max(alive[True]) < 0.8 * max(alive[False])


def test_a_weight_used_on_both_sides_of_a_cut_gets_both_gradients():
    w, unused = torch.tensor([1.5], requires_grad=True), torch.ones(2, requires_grad=True)
    h = w * 2
    entry = h.detach().requires_grad_()
    z = (entry**2 * w)[None]
    ((row, none),) = gradsplit.pull_backs([h, z], [entry], [w, unused], [torch.ones(1, 1)])
    assert row == 3 * 4 * 1.5**2 and none is None  # d(4 w^3)/dw
