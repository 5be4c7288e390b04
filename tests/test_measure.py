"""The full measurements against independent references, on planted data, and on real (small) training."""

import copy
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import data
import epochwise
import gradsplit
import measure
import metrics
import train
from conftest import TINY, same_weights, series, slow, summary, weights
from engine.job import JobState, TrainingJob
from engine.summary import describe_plan
from gradsplit import batchnorm_mode, sync_batchnorms
from test_metrics import job_for, warm

# All families, whenever they can be; a mask costs a backward pass at every measured step.
FULL = ("--measure", "full", "--measure-budget", "1000", "--permutations", "2")

AFFORDABLE = ("--measure", "full", "--measure-budget", "80")  # curvature once, all else more often
QUICK = """
import epochwise, train
epochwise.CURVATURE_EXAMPLES, epochwise.CURVATURE_PRODUCTS, epochwise.CURVATURE_RESOLVED = 4, 2, 1e9
assert train.main({argv}) == 0
"""  # in processes of their own


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def quick_curvature(request, monkeypatch):
    """A handful of Hessian products where their accuracy is not the question."""
    if "hessian" not in request.node.name and "budget" not in request.node.name:
        for name, value in (
            ("CURVATURE_PRODUCTS", 2),
            ("CURVATURE_RESOLVED", 1e9),
            ("TRACE_PROBES", 2),
            ("CURVATURE_EXAMPLES", 16),
        ):
            monkeypatch.setattr(epochwise, name, value)
    monkeypatch.setattr(epochwise, "SUSCEPTIBILITY_EXAMPLES", 8)
    monkeypatch.setattr(epochwise, "DISPARITY_EXAMPLES", 4)


def full_job(*argv: str) -> TrainingJob:
    job = job_for(*FULL, *argv)
    job.state.plan = {"steps": 1}
    return job


def test_an_evaluation_in_parts_is_that_of_the_whole(monkeypatch):
    """The last part is a short one; forwards are of no more examples than a CPU takes at a time."""
    job = job_for("--precision", "64-true")
    if job.context.device.type != "cpu":
        pytest.skip("parts are for CPUs")
    whole = train.evaluate(job, *job.val)
    monkeypatch.setattr(epochwise, "CPU_BATCH", 7)
    seen, logits = [], job.context.logits
    monkeypatch.setattr(job.context, "logits", lambda x: seen.append(len(x)) or logits(x))
    parts = train.evaluate(job, *job.val)
    n = job.val[0].n
    assert n % 7 and seen == [7] * (n // 7) + [n % 7]
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12) and parts.acc == whole.acc
    assert torch.equal(parts.predicted, whole.predicted)


def per_example(job: TrainingJob, batch, labels: torch.Tensor) -> torch.Tensor:
    """Loss gradients (B, P) of every example by itself, by torch.func: an independent reference."""
    params = {k: p.detach() for k, p in job.module.named_parameters()}
    buffers = dict(job.module.named_buffers())

    def loss(p, x, y):
        return F.cross_entropy(functional_call(job.module, (p, buffers), (x[None],)), y[None])

    grads = vmap(grad(loss), in_dims=(None, 0, 0))(params, batch.x, labels)
    return torch.cat([grads[k].reshape(len(labels), -1) for k in params], 1)


def test_every_value_from_brute_force_per_example_gradients():
    """GroupNorm in float64: per-example gradients are the batch's own, so all full values can be written out."""
    job = full_job("--precision", "64-true", "--norm", "gn", "--permutations", "2", "--window", "1")
    batch = warm(job)
    g = per_example(job, batch, batch.y)
    fresh = measure.fresh_labels(job.context, batch, 3)
    h, t = per_example(job, batch, fresh), per_example(job, batch, batch.true)
    got = train.train_step(job, batch, 3, measured=True)
    C, N, B, f = ~batch.noisy, batch.noisy, 32, 1 - batch.n_noisy / 32
    gC, gN, gA = g[C].mean(0), g[N].mean(0), g.mean(0)
    cos = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    want = {
        "grad/cos_clean_all": cos(gC, gA),
        "grad/cos_clean_noisy": cos(gC, gN),
        "fresh/ratio": float(h[N].mean(0).norm() / gC.norm()),
        "fresh/cos": cos(gC, h[N].mean(0)),
        "fresh/index": float(h[N].mean(0).norm() / gN.norm()),
        "truth/cos": cos(t.mean(0), gA),
        "truth/shift": float((gA - t.mean(0)).norm() / t.mean(0).norm()),
    }
    # Chunks by position: quarters of the batch, and their unbiased moments written out as sums over pairs of chunks.
    part = torch.arange(B, device=g.device) // 8

    def moments(mask, g=g):
        sums, n = (
            torch.stack([g[(part == i) & mask].sum(0) for i in range(4)]),
            [int(((part == i) & mask).sum()) for i in range(4)],
        )
        pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
        G2 = sum(float(sums[i] @ sums[j]) for i, j in pairs) / sum(n[i] * n[j] for i, j in pairs)
        return G2, (float((sums**2).sum()) - G2 * sum(x * x for x in n)) / sum(n)

    _, var_a = moments(C | N)
    (cc, _), (nn, _), e = moments(C), moments(N), g - t
    assert not e[C].any() and e[N].any(1).all()
    pairs = [(i, j) for i in C.nonzero()[:, 0] for j in N.nonzero()[:, 0] if part[i] != part[j]]
    across = sum(float(g[i] @ g[j]) for i, j in pairs) / len(pairs)
    want["grad/difference"] = (cc + nn - 2 * across) * B / var_a
    want["grad/difference_norm"] = (cc - nn) * B / var_a
    want["grad/label_share"] = moments(C | N, e)[1] / var_a
    want |= {tag: v for tag, v in gradsplit.null_cosines(float(gA @ gA), var_a, f, B).items()}
    masks = [gradsplit.random_mask(batch, False, data.generator(0, f"permutation{r}", 3)) for r in range(2)]
    want["null/permuted_cos_clean_all"] = sum(cos(g[~m].mean(0), gA) for m in masks) / 2
    want["null/permuted_cos_clean_noisy"] = sum(cos(g[~m].mean(0), g[m].mean(0)) for m in masks) / 2
    for tag, value in want.items():
        assert float(got[tag]) == pytest.approx(value, rel=1e-9), tag
    row = dict(zip(metrics.MOMENTS, job.state.window[-1], strict=True))
    for name, mask in (("c", C), ("n", N)):
        G2, var = moments(mask)
        assert row[name * 2] == pytest.approx(G2, rel=1e-9) and row[f"var_{name}"] == pytest.approx(var, rel=1e-9)
    assert row["cn"] == pytest.approx(float(gC @ gN), rel=1e-9)
    assert all(bool(m.sum() == batch.n_noisy) for m in masks)


def test_chunk_moments_are_unbiased_and_nulls_are_what_random_masks_give():
    """On per-example vectors: the mean over random partitions is the exact within-batch variance, and the closed forms
    are the mean cosines of random subsets."""
    gen = torch.Generator().manual_seed(0)
    B, P, f = 64, 400, 0.75
    g = torch.randn(B, P, generator=gen, dtype=torch.float64) + 0.2 * torch.randn(P, generator=gen, dtype=torch.float64)
    mean = g.mean(0)
    exact = float(((g - mean) ** 2).sum() / (B - 1))
    sizes, found, cosines = [10, 20, 30, 4], [], []
    for _ in range(2000):
        order = torch.randperm(B, generator=gen)
        S = torch.stack([part.sum(0) for part in g[order].split(sizes)])
        found.append(torch.stack(gradsplit.chunk_moments((S**2).sum(1), sizes, (S.sum(0) ** 2).sum())))
        s, rest = g[order[:48]].mean(0), g[order[48:]].mean(0)
        cosines.append([F.cosine_similarity(s, mean, dim=0), F.cosine_similarity(s, rest, dim=0)])
    found, cosines = torch.stack(found), torch.tensor(cosines)
    error = found.std(0) / math.sqrt(len(found))
    assert abs(float(found[:, 1].mean()) - exact) < 4 * float(error[1])
    assert abs(float(found[:, 0].mean()) - (float(mean @ mean) - exact / B)) < 4 * float(error[0])
    null = gradsplit.null_cosines(float(mean @ mean), exact, f, B)
    assert float(cosines[:, 0].mean()) == pytest.approx(null["null/cos_clean_all"], abs=0.005)
    assert float(cosines[:, 1].mean()) == pytest.approx(null["null/cos_clean_noisy"], abs=0.01)


def test_corrected_cosine_recovers_a_planted_one_and_says_when_it_cannot():
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 300, generator=gen, dtype=torch.float64)
    c, n = a / a.norm(), (0.6 * a / a.norm() + 0.8 * (b - (a @ b) / (a @ a) * a) / (b - (a @ b) / (a @ a) * a).norm())
    true = float(F.cosine_similarity(c, n, dim=0))

    def window(signal: float, count: int) -> list[list[float]]:
        rows = []
        for _ in range(count):
            C, N = (signal * v + torch.randn(40, 300, generator=gen, dtype=torch.float64) for v in (c, n))
            estimates = []
            for g in (C, N, torch.cat([C, N])):
                S = torch.stack([p.sum(0) for p in g.chunk(4)])
                sizes = [len(p) for p in g.chunk(4)]
                estimates.append(
                    [float(v) for v in gradsplit.chunk_moments((S**2).sum(1), sizes, (S.sum(0) ** 2).sum())]
                )
            (cc, vc), (nn, vn), (sq, va) = estimates
            cn = float(C.mean(0) @ N.mean(0))
            rows.append([cc, nn, cn, (cc + cn) / 2, (cc + 2 * cn + nn) / 4, vc, vn, va, sq])
        return rows

    found, missing = metrics.corrected(window(1.5, 200))
    assert missing == 0 and found["corrected/cos_clean_noisy"] == pytest.approx(true, abs=0.05)
    assert found["corrected/cos_clean_all"] == pytest.approx(math.sqrt((1 + true) / 2), abs=0.05)
    assert found["noise_scale/clean"] == pytest.approx(300 / 1.5**2, rel=0.15)
    found, missing = metrics.corrected(window(0.0, 20))  # no signal at all: nothing to divide by
    assert missing >= 4 and "corrected/cos_clean_noisy" not in found
    assert metrics.corrected(window(1.5, 2)) == ({}, 5)


@pytest.mark.slow
def test_raw_cosines_rise_with_the_batch_and_corrected_ones_do_not():
    """At fixed weights, evaluation-mode BatchNorm, probe batches of 16, 64 and 256 (docs/measurements.md)."""
    big = (
        "--synthetic-train",
        "3200",
        "--measure-bn",
        "eval",
        "--noise",
        "0.4",
        "--precision",
        "64-true",
        "--chunks",
        "4",
    )
    job = full_job(*big)
    torch.manual_seed(0)
    job.context.module = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 10))
    job.context.parameters = list(job.module.parameters())
    with torch.no_grad():
        job.module[3].bias[0] = 3.0  # all examples, clean and noisy, pull this class down: a common true gradient
    plan = job.train.epoch(0, 0)
    raw, corrected = {}, {}
    for B, batches in ((16, 160), (64, 40), (256, 10)):  # the same 2,560 examples
        job.state.window = []
        values = []
        for number in range(batches):
            batch = job.train.batch(plan, number, B)
            with batchnorm_mode(job.module, "eval"):
                ahead = measure.make_forward(job.context, batch)
                rows = gradsplit.split_rows(job.context, batch, ahead, free=False)
                values.append(float(gradsplit.split_values(rows, None, batch, 1.0)["grad/cos_clean_noisy"]))
                if len(rows) == 2:
                    products = gradsplit.inner_products(job.context, *rows, gradsplit.add_rows(rows))
                    found, _ = gradsplit.chunk_estimates(
                        job.context, batch, ahead, products, job.context.options.chunks
                    )
                    job.state.window.append(list(found.values()))
        raw[B] = sum(values) / len(values)
        corrected[B] = metrics.corrected(job.state.window)[0].get("corrected/cos_clean_noisy", math.nan)
    assert raw[16] + 0.15 < raw[64] < raw[256] - 0.1, raw
    assert max(corrected.values()) - min(corrected.values()) < 0.06, (raw, corrected)
    assert min(corrected.values()) > raw[256], (raw, corrected)


def test_participation_ratio_of_planted_noise():
    gen = torch.Generator().manual_seed(0)
    m, P = 16, 5000
    isotropic = torch.randn(m, P, generator=gen, dtype=torch.float64)
    one = torch.randn(m, 1, generator=gen, dtype=torch.float64) * torch.randn(P, generator=gen, dtype=torch.float64)
    PR = [float(metrics.participation(rows @ rows.T)) for rows in (isotropic, one, isotropic + 100)]
    assert PR[0] == pytest.approx(metrics.isotropic_participation(m, P), rel=0.01)
    assert PR[1] == pytest.approx(1, abs=1e-9)
    assert PR[2] == pytest.approx(PR[0], rel=1e-6)  # a common mean is not noise
    assert metrics.isotropic_participation(m, 10**9) == pytest.approx(m - 1)
    few = torch.randn(2000, 8, 4, generator=gen, dtype=torch.float64)  # and where P is small: (m - 1) P / (P + m)
    G = few @ few.transpose(1, 2)
    centred = G - G.mean(1, keepdim=True) - G.mean(2, keepdim=True) + G.mean((1, 2), keepdim=True)
    tr, tr2 = centred.diagonal(dim1=1, dim2=2).sum(1), (centred**2).sum((1, 2))
    assert float((tr.mean()) ** 2 / tr2.mean()) == pytest.approx(metrics.isotropic_participation(8, 4), rel=0.05)


@pytest.mark.slow
def test_isotropy_rows_are_the_label_noise_gradients():
    """The cotangent (onehot(y*) - onehot(y)) / size is g - g(y*) of the part, by two plain backward passes; a row of the null is
    one plain backward pass of as many clean examples."""
    job = full_job("--precision", "64-true", "--measure-bn", "eval", "--synthetic-train", "400", "--noise", "1")
    warm(job)
    seen = []
    gram = gradsplit.gram
    try:
        gradsplit.gram = lambda rows: seen.append(rows) or gram(rows)
        got = epochwise.isotropy(job.context)
    finally:
        gradsplit.gram = gram
    noisy, clean = epochwise.probe_indices(job.context)
    m = epochwise.ISOTROPY_PARTS
    size = min(epochwise.ISOTROPY_EXAMPLES, len(noisy) // m)
    mixed = noisy[torch.randperm(len(noisy), generator=data.generator(0, "isotropy"))][: m * size].view(m, size)
    job.module.eval()
    for part, row in zip(mixed, seen[0], strict=True):
        logits = job.module(job.train.images.plain(part))
        loss = F.cross_entropy(logits, job.train.labels[part]) - F.cross_entropy(logits, job.train.true[part])
        want = torch.autograd.grad(loss, job.parameters)
        torch.testing.assert_close(row, list(want), rtol=1e-9, atol=1e-12)
    size = len(clean) // m
    mixed = clean[torch.randperm(len(clean), generator=data.generator(0, "isotropy-clean"))][: m * size].view(m, size)
    for part, row in zip(mixed, seen[1], strict=True):
        loss = F.cross_entropy(job.module(job.train.images.plain(part)), job.train.true[part])
        torch.testing.assert_close(row, list(torch.autograd.grad(loss, job.parameters)), rtol=1e-9, atol=1e-12)
    assert got["isotropy/clean_dimension"] == pytest.approx(
        float(metrics.effective_dimension(gram(seen[1]))), nan_ok=True
    )
    assert 1 <= got["isotropy/participation"] <= m - 1 + 1e-9
    assert got["isotropy/isotropic"] == pytest.approx(m - 1, rel=0.01)


def test_hessian_of_a_tiny_net():
    job = full_job("--precision", "64-true")
    torch.manual_seed(0)
    job.context.module = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 10)
    ).to(job.fabric.device, torch.float64)
    job.context.parameters = list(job.module.parameters())
    sizes = [p.numel() for p in job.parameters]
    index = torch.randperm(len(job.train), generator=data.generator(0, "curvature"))[: epochwise.CURVATURE_EXAMPLES]
    x, y = job.train.images.plain(index), job.train.labels[index].to(job.fabric.device)
    names = [n for n, _ in job.module.named_parameters()]

    def loss(flat):
        parts = {n: v.view_as(p) for n, v, p in zip(names, flat.split(sizes), job.parameters)}
        return F.cross_entropy(functional_call(job.module, parts, (x,)), y)

    H = torch.func.hessian(loss)(torch.cat([p.detach().flatten() for p in job.parameters]))
    got = epochwise.curvature(job.context)
    assert got["curvature/top"] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=3e-3)
    assert got["curvature/top_residual"] < 0.1
    assert abs(got["curvature/trace"] - float(H.trace())) < 5 * got["curvature/trace_error"]
    assert got["curvature/edge"] == pytest.approx(2 * 1.9 / 0.1)
    # Every sign vector equally often: the mean is exactly the trace.
    A = torch.randn(3, 3, dtype=torch.float64)
    A = A + A.T
    signs = [torch.tensor([a, b, c], dtype=torch.float64) for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]
    trace, _, asymmetry = metrics.hutchinson(lambda v: A @ v, signs)
    assert float(trace) == pytest.approx(float(A.trace()), abs=1e-12) and float(asymmetry) < 1e-15


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


class TanhOnce(Tanh):
    backward = staticmethod(torch.autograd.function.once_differentiable(Tanh.backward))


class TanhOfConstants(Tanh):
    """Its backward takes what it has saved for constant: half of the second derivative, which is symmetric."""

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].detach().tanh() ** 2)


class Applied(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


@pytest.mark.parametrize("function", [Tanh, TanhOnce, TanhOfConstants])
def test_the_hessian_of_a_function_of_ones_own(function):
    """Is that of torch's, or left out where its second derivative is missing."""
    job, found = full_job("--precision", "64-true"), []
    for activation in (nn.Tanh(), Applied(function)):
        torch.manual_seed(0)
        job.context.module = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6), activation, nn.Linear(6, 10)
        ).to(job.fabric.device, torch.float64)
        job.context.parameters = list(job.module.parameters())
        if isinstance(activation, nn.Tanh) or function is Tanh:
            found.append(epochwise.curvature(job.context))
        else:
            with pytest.raises(epochwise.Undefined, match="no second derivative of its own"):
                epochwise.curvature(job.context)
    assert function is not Tanh or found[0] == pytest.approx(found[1], rel=1e-9)


def test_what_fails_on_a_network_is_left_out_and_said_once(monkeypatch):
    """But not what fails for want of memory, or because another process has ended."""
    job, said = full_job(), []

    def fails(error):
        def measure(context):
            with epochwise.undisturbed(context):
                context.module.training = False
                raise error

        return {"failing": epochwise.EpochMeasure(measure, cost=lambda P, n_probe: 1.0, share=0.1)}

    job.state.plan = {"failing": 1}
    after = lambda epoch: epochwise.measure_after_epoch(job.context, epoch, epoch, said.append, train.ends_the_run)  # noqa: E731
    monkeypatch.setattr(epochwise, "MEASURES", fails(NotImplementedError("no derivative\nat all")))
    assert after(1) == after(2) == {} and job.module.training
    assert said == ["warning: failing is left out: no derivative"]
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()):
        monkeypatch.setattr(epochwise, "MEASURES", fails(error))
        with pytest.raises(type(error)):
            after(3)


@pytest.mark.parametrize("spectrum", [(7, 3, -2, 0.5), (-9, 4, 1, 0), (-3, -1, -2, -5)])
def test_lanczos_finds_the_largest_eigenvalue(spectrum):
    gen = torch.Generator().manual_seed(1)
    Q, _ = torch.linalg.qr(torch.randn(4, 4, generator=gen, dtype=torch.float64))
    H = Q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ Q.T
    start = torch.randn(4, generator=gen, dtype=torch.float64)
    value, residual, products = metrics.lanczos(lambda v: H @ v, start, 1e-9, 50)
    assert value == pytest.approx(max(spectrum), abs=1e-9) and residual < 1e-6 and products == 4


def test_lanczos_beside_a_far_more_negative_eigenvalue():
    """A bulk at 0, one eigenvalue at -5000 and the wanted one at 3: as networks have it early in training."""
    gen = torch.Generator().manual_seed(0)
    spectrum = torch.cat([torch.tensor([-5000.0, 3.0]), 0.02 * torch.randn(498, generator=gen)]).double()
    start = torch.randn(500, generator=gen, dtype=torch.float64)
    value, residual, products = metrics.lanczos(lambda v: spectrum * v, start, 1e-2, 16)
    assert value == pytest.approx(3, rel=1e-3) and residual < 1e-2 and products <= 16
    assert metrics.lanczos(lambda v: spectrum * v, start, 0.0, 3)[1:] == (
        pytest.approx(0.3, abs=10),
        3,
    )  # the limit holds


def test_hessian_products_through_batchnorm_are_differences_of_gradients(monkeypatch):
    """The second derivative through train-mode BatchNorm, on the real network, against central differences."""
    monkeypatch.setattr(epochwise, "TRACE_PROBES", 2)
    monkeypatch.setattr(epochwise, "CURVATURE_EXAMPLES", 16)
    job = full_job("--precision", "64-true")
    warm(job)
    seen = {}

    def one_product(product, start, *_):
        seen["v"], seen["Hv"] = start, product(start)
        return 1.0, 0.0, 1

    original = metrics.lanczos
    try:
        metrics.lanczos = one_product
        epochwise.curvature(job.context)
    finally:
        metrics.lanczos = original
    index = torch.randperm(len(job.train), generator=data.generator(0, "curvature"))[: epochwise.CURVATURE_EXAMPLES]
    x, y = job.train.images.plain(index), job.train.labels[index].to(job.fabric.device)
    start = torch.cat([p.detach().flatten() for p in job.parameters])

    def gradient(flat):
        with torch.no_grad():
            for p, part in zip(job.parameters, flat.split([p.numel() for p in job.parameters])):
                p.copy_(part.view_as(p))
        with batchnorm_mode(job.module, "train"):
            return torch.cat(
                [g.flatten() for g in torch.autograd.grad(F.cross_entropy(job.module(x), y), job.parameters)]
            )

    step = 1e-10 / seen["v"].norm() * start.norm()  # so small that hardly one of the millions of ReLUs meets its kink
    difference = (gradient(start + step * seen["v"]) - gradient(start - step * seen["v"])) / (2 * step)
    assert float((difference - seen["Hv"]).norm() / seen["Hv"].norm()) < 1e-3


def test_auc_is_the_share_of_ordered_pairs():
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randint(6, (30,), generator=gen).float(), torch.randint(5, (40,), generator=gen).float()
    pairs = (a[:, None] > b).double() + 0.5 * (a[:, None] == b)
    assert metrics.auc(a, b) == pytest.approx(float(pairs.mean()), abs=1e-12)
    assert metrics.auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert math.isnan(metrics.auc(a[:0], b))


def test_fresh_labels_are_wrong_new_and_follow_the_law():
    job = full_job("--noise", "0.5", "--synthetic-train", "2000")
    batch = job.train.batch(job.train.epoch(0, 0), 0, 1600)
    fresh = measure.fresh_labels(job.context, batch, 0)
    assert torch.equal(fresh[~batch.noisy], batch.y[~batch.noisy])
    assert (fresh != batch.true)[batch.noisy].all() and (fresh != batch.y)[batch.noisy].all()
    assert not torch.equal(fresh, measure.fresh_labels(job.context, batch, 1))
    assert torch.bincount(fresh[batch.noisy], minlength=10).min() > 40  # 700 labels over ten classes
    job.context.transition = torch.eye(10, dtype=torch.float64) + torch.eye(10, dtype=torch.float64).roll(3, 1)
    job.context.transition[:, 7] += (
        1e-9  # k -> k + 3 and, hardly ever, 7: what is left once the given label is taken out
    )
    drawn = measure.fresh_labels(job.context, batch, 0)
    third = batch.noisy & (batch.y != (batch.true + 3) % 10) & (batch.true != 7)
    assert (drawn == (batch.true + 3) % 10)[third].double().mean() > 0.99
    assert job.context.transition.shape == (10, 10)


def test_stratified_masks_keep_each_labels_count():
    job = full_job("--noise", "0.5")
    batch = job.train.batch(job.train.epoch(0, 0), 0, 128)
    plain, strict = (gradsplit.random_mask(batch, s, torch.Generator().manual_seed(1)) for s in (False, True))
    assert int(plain.sum()) == int(strict.sum()) == batch.n_noisy
    per_label = [torch.bincount(batch.host_y[m], minlength=10).tolist() for m in (plain, strict, batch.host_noisy)]
    assert per_label[1] == per_label[2] != per_label[0]
    assert not torch.equal(strict, batch.host_noisy)


@pytest.mark.parametrize("mode", slow("train", "eval", "separate"))
def test_full_leaves_no_trace(go, mode):
    common = ("--noise", "0.5", "--measure-bn", mode)
    a = go(*common, "--permutations", "0", name="a")
    b = go(*common, *FULL, name="b")
    assert same_weights(a, b)
    plain, full = series(a), series(b)
    assert {tag: full[tag] for tag in plain} == plain
    assert {
        "null/cos_clean_all",
        "fresh/index",
        "truth/shift",
        "probe/auc",
        "optim/update_norm",
    } <= full.keys() - plain.keys()
    assert all(math.isfinite(v) for points in full.values() for _, v in points)


@pytest.mark.slow
def test_what_a_full_run_leaves(go):
    folder = go("--noise", "0.5", *FULL, "--epochs", "3")
    found, outcome = series(folder), summary(folder)
    for tag in (
        "probe/memorized",
        "probe/recovered",
        "probe/other",
        "probe/clean_acc",
        "probe/auc",
        "isotropy/participation",
    ):
        assert [s for s, _ in found[tag]] == [0, 5, 10, 15], tag
    assert [s for s, _ in found["curvature/top"]] == [0, 5, 10, 15]
    shares = zip(found["probe/memorized"], found["probe/recovered"], found["probe/other"], strict=True)
    assert all(a + b + c == pytest.approx(1, abs=1e-6) for (_, a), (_, b), (_, c) in shares)
    assert [s for s, _ in found["null/cos_clean_all"]] == list(range(0, 15, 2))
    assert set(outcome["measure_seconds"]) == {
        "chunks",
        "permutations",
        "fresh",
        "truth",
        "label_share",
        "probe",
        "isotropy",
        "curvature",
        "signals",
    }
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    assert [h.step for h in events.Histograms("grad/norm_per_layer")] == list(range(0, 15, 2))


def test_update_norm_is_the_distance_moved():
    job = full_job("--momentum", "0")
    batch = warm(job)
    before = torch.cat([p.detach().flatten() for p in job.parameters])
    got = train.train_step(job, batch, 3, measured=True)
    after = torch.cat([p.detach().flatten() for p in job.parameters])
    assert float(got["optim/update_norm"]) == pytest.approx(float((after - before).norm()), rel=1e-5)
    assert float(got["grad/norm_per_layer"].norm()) == pytest.approx(float(got["grad/norm_all"]), rel=1e-5)


@pytest.mark.slow
def test_memorization_is_noticed(go):
    """Trained to fit every label, a wide enough net memorizes: half of the noisy ones from some epoch on."""
    argv = "--noise 0.5 --synthetic-train 60 --synthetic-test 20 --no-augment --epochs 60 --bs 16 --width 16".split()
    folder = go(
        *argv, "--lr", "0.05", "--wd", "0", "--measure-every", "50", "--measure", "full", "--measure-budget", "0.4"
    )
    found, outcome = series(folder), summary(folder)
    memorized = found["probe/memorized"]
    first = next(step for step, v in memorized if v >= 0.5)
    assert outcome["half_memorized_step"] == first
    assert found["probe/half_memorized_step"] == [(first, first)]
    assert memorized[-1][1] > 0.9 and found["probe/recovered"][-1][1] < 0.1


@pytest.mark.slow
def test_a_fake_mask_over_clean_labels_gives_the_null(go):
    """The A/A run, on real training: the cosines differ from their random masks by no more than those among themselves."""
    argv = (
        "--fake-mask",
        "0.4",
        "--synthetic-train",
        "1000",
        "--epochs",
        "1",
        "--bs",
        "16",
        "--permutations",
        "8",
        "--measure-every",
        "2",
    )
    found = series(go(*FULL, *argv))
    assert "fresh/ratio" not in found and "isotropy/participation" not in found
    for name in ("cos_clean_all", "cos_clean_noisy"):
        raw, mean, std = (
            dict(found[f"{prefix}{name}{end}"])
            for prefix, end in (("grad/", ""), ("null/permuted_", ""), ("null/permuted_", "_std"))
        )
        z = torch.tensor(
            [(raw[s] - mean[s]) / (std[s] * math.sqrt(1 + 1 / 8)) for s in mean]
        )  # t, 7 degrees of freedom
        assert len(z) >= 25
        assert abs(float(z.mean())) < 4 / math.sqrt(len(z)), name
        assert float((z.abs() < 2.365).double().mean()) > 0.8, name  # 95 % expected
        closed = dict(found[f"null/{name}"])
        gap = torch.tensor([raw[s] - closed[s] for s in closed])
        assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap)) + 0.02, name
    last = {tag: found[f"probe/{tag}"][-1][1] for tag in ("memorized", "recovered", "clean_acc", "auc")}
    assert last["memorized"] == last["recovered"] == pytest.approx(last["clean_acc"], abs=0.1)
    assert last["auc"] == pytest.approx(0.5, abs=0.06)


@pytest.mark.slow
def test_bf16_and_float32_agree():
    """The same weights and batch under both precisions, within the bounds that docs/measurements.md states."""
    bounds = {"grad": 0.03, "null": 0.03, "fresh": 0.05, "truth": 0.03, "train": 0.03, "optim": 0.03}
    jobs = [full_job("--precision", p, "--width", "16", "--bs", "32") for p in ("32-true", "bf16-mixed")]
    batch = warm(jobs[0])
    jobs[1].module.load_state_dict(jobs[0].module.state_dict())
    jobs[1].optimizer.load_state_dict(copy.deepcopy(jobs[0].optimizer.state_dict()))
    a, b = (train.train_step(job, batch, 3, measured=True) for job in jobs)
    assert a.keys() == b.keys()
    for tag, value in a.items():
        group = tag.split("/")[0]
        loose = (
            "train/acc",
            "grad/norm_per_layer",
            "grad/difference",
        )  # the last is a difference of nearly equal numbers
        if group in bounds and not tag.startswith(loose):
            assert float(b[tag]) == pytest.approx(float(value), rel=bounds[group], abs=bounds[group]), tag


def planned(argv: str, budget: float, epochs: int = 64, steps_per_epoch: int | None = None, examples: int = 40_000):
    """(plan, cost of one time by name, cost of the run, times by name) of a run with four in five examples to train on."""
    args = train.options.parse(["--measure", "full", "--measure-budget", str(budget), *argv.split()])
    spe = steps_per_epoch or math.ceil(examples / args.bs)
    costs = epochwise.counted_costs(args, args.bs, 11_173_962, 4000)
    length = epochwise.RunLength(epochs * spe, spe, args.bs, examples, examples // 4)
    plan = epochwise.plan_full(args, costs, length)
    last = (epochs * spe - 1) // args.measure_every * args.measure_every
    times = {"steps": sum(measure.is_due(plan["steps"], at, last) for at in range(0, last + 1, args.measure_every))}
    for name in epochwise.MEASURES:
        times[name] = sum(measure.is_due(plan[name], at, epochs) for at in range(epochs + 1))
    return plan, costs, length.cost, times


@pytest.mark.parametrize(
    "argv", ["", "--bs 16", "--bs 512", "--permutations 32", "--measure-bn separate", "--measure-every 7"]
)
def test_the_counted_budget_holds(argv):
    """Counted as they fall due; each at least once, also where that is more than the budget, and of a large budget no more
    is left than one more would take."""
    for epochs in (3, 64):
        for budget in (0.001, 0.01, 0.05, 0.3, 1.0, 100.0):
            plan, costs, run, times = planned(argv, budget, epochs)
            spent, least = sum(costs[name] * n for name, n in times.items()), sum(costs.values())
            assert min(times.values()) >= 1 and plan["share"] == pytest.approx(spent / run)
            assert spent <= max(budget * run, least)
            whole = all(times[name] == epochs + 1 for name in epochwise.MEASURES)
            assert whole or spent + 2 * max(costs[name] * n for name, n in times.items()) > budget * run


def test_what_was_asked_for_is_measured_and_the_budget_spent():
    """In a run of 480 steps at B = 128 half of the budget was left, beside two measures that it would have paid for."""
    plan, costs, run, times = planned("", 0.9, epochs=12, steps_per_epoch=40, examples=5120)
    assert min(times.values()) >= 1 and 0.7 < plan["share"] <= 0.9
    assert describe_plan(plan, 40).startswith("steps every ")
    plan, *_ = planned("", 0.05)  # the report's runs: the probe after every epoch, and often enough
    assert plan["probe"] == 1 and 0 < plan["steps"] < 3500 and plan["curvature"] == 65
    assert "curvature once" in describe_plan(plan, 313)


def test_what_is_alike_everywhere_is_not_synchronised():
    """SyncBatchNorm has no second derivative; isotropy and curvature take the same examples on all processes."""
    job = full_job()
    module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(job.module)
    before = [b.clone() for b in module.buffers()]
    assert len(sync_batchnorms(module)) == 20
    with batchnorm_mode(module, "train"):
        assert len(sync_batchnorms(module)) == 20
    with batchnorm_mode(module, "train", same_on_all_ranks=True):
        assert sync_batchnorms(module) == []
        module(torch.randn(4, 3, 32, 32, device=job.fabric.device))
        assert not torch.equal(before[0], next(module.buffers()))
    assert len(sync_batchnorms(module)) == 20
    assert all(torch.equal(b, old) for b, old in zip(module.buffers(), before, strict=True))


@pytest.mark.parametrize(("kind", "shape"), [("BatchNorm1d", (6, 4)), ("BatchNorm3d", (6, 4, 2, 2, 2))])
def test_a_synchronised_batchnorm_of_any_kind_is_made_local(kind, shape):
    own = getattr(nn, kind)(4)
    module, x = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(own))), torch.randn(shape)
    with batchnorm_mode(module, "train", same_on_all_ranks=True):
        assert torch.equal(module(x), own(x))
    assert type(module[0]) is nn.SyncBatchNorm and not module[0].running_mean.any()


@pytest.mark.slow
def test_measurements_are_counted_back_from_the_end(go, monkeypatch):
    """A budget for one measurement is not spent on the untrained network. Two epochs of five steps, measured every 2."""
    plan = {"steps": 6, "probe": 2, "isotropy": 3, "curvature": 0, "share": 0.0, "total_steps": 10}
    monkeypatch.setattr(epochwise, "plan_full", lambda *_: plan)
    found = series(go("--noise", "0.5", *FULL))
    assert [step for step, _ in found["null/cos_clean_noisy"]] == [2, 8]
    assert [step for step, _ in found["probe/memorized"]] == [0, 10]
    assert [step for step, _ in found["isotropy/participation"]] == [10]
    assert "curvature/trace" not in found


def test_a_measure_is_one_function_and_one_entry(go, monkeypatch, capsys):
    """Added from outside, it is planned within the budget, announced, timed and logged."""

    def weight_norm(context) -> dict:
        return {"weights/norm": float(torch.stack(torch._foreach_norm(context.parameters)).norm())}

    entry = epochwise.EpochMeasure(weight_norm, cost=lambda P, n_probe: 1.0, share=0.1)
    monkeypatch.setattr(epochwise, "MEASURES", {"weights": entry})
    folder = go("--noise", "0.5", "--measure", "full", "--measure-budget", "2")
    assert "weights every epoch" in capsys.readouterr().out
    assert [step for step, _ in series(folder)["weights/norm"]] == [0, 5, 10]
    assert "weights" in summary(folder)["measure_seconds"] and summary(folder)["measure_share_counted"] <= 2


def test_the_state_is_saved_and_restored_as_one():
    names = "plan window not_resolved half_memorized_step measure_seconds step best_val_acc seconds steps_seconds steps_images"
    before, after = JobState(), JobState(plan={"steps": 4})
    before.window, before.step, before.measure_seconds["probe"] = [[0.5] * len(metrics.MOMENTS)], 7, 1.5
    saved = before.saved()
    assert set(saved) == set(names.split())  # as checkpoints of earlier versions have them
    before.window.append([])
    before.measure_seconds["probe"] = 2.0
    after.restore({k: v for k, v in saved.items() if k != "plan"})
    assert after.saved() == saved | {"plan": {"steps": 4}}


@pytest.mark.slow
def test_accumulators_survive_a_kill(zygote, tmp_path):
    argv = [
        *TINY,
        "--noise",
        "0.5",
        *AFFORDABLE,
        "--width",
        "4",
        "--epochs",
        "3",
        "--window",
        "4",
        "--checkpoint-minutes",
        "1e-6",
        "--runs",
        str(tmp_path),
    ]
    assert zygote.run([*argv, "--name", "whole"]) == [0]
    killed = zygote.run_and(lambda pid: os.kill(pid, signal.SIGKILL), [*argv, "--name", "cut"], at=6)
    assert killed == -signal.SIGKILL
    assert zygote.run([*argv, "--name", "cut", "--resume"]) == [0]
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert series(tmp_path / "whole") == series(tmp_path / "cut")
    assert summary(tmp_path / "whole")["not_resolved"] == summary(tmp_path / "cut")["not_resolved"]


@pytest.mark.slow
def test_full_measurements_on_two_processes(zygote, tmp_path):
    argv = [
        *TINY,
        "--norm",
        "gn",
        "--precision",
        "64-true",
        "--noise",
        "0.2",
        "--max-steps",
        "8",
        *AFFORDABLE,
        "--measure-budget",
        "12",
        "--runs",
        str(tmp_path),
    ]
    assert zygote.run(code=QUICK.format(argv=[*argv, "--name", "a"])) == [0], zygote.output()
    assert zygote.run(code=QUICK.format(argv=[*argv, "--name", "b"]), ranks=2) == [0, 0], zygote.output()
    a, b = series(tmp_path / "a"), series(tmp_path / "b")
    assert a.keys() == b.keys()
    for tag, points in a.items():
        assert [s for s, _ in b[tag]] == [s for s, _ in points], tag
        assert [v for _, v in b[tag]] == pytest.approx([v for _, v in points], rel=1e-6, abs=1e-8), tag
    for x, y in zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values()):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
