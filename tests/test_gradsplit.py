"""The meter against plain backward passes, against a run's own series, alone and under two processes, and from elsewhere."""

import copy
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

import gradsplit
import train
from conftest import ROOT, slow
from gradsplit import Meter
from test_metrics import job_for, warm


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


class Transformer(nn.Module):
    """Logits (B, 3), or (B, T, 3) one for each token, of tokens (B, T) and a mask of those to be left out."""

    def __init__(self, each_token: bool = False) -> None:
        super().__init__()
        self.each_token = each_token
        self.embed = nn.Embedding(11, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens, padding):
        h = self.head(self.layer(self.embed(tokens), src_key_padding_mask=padding))
        return h if self.each_token else h.mean(1)


def squared(output, y):
    return (output - y).square().sum(1)


def conv_net(norm) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        norm(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def case(name: str, dtype=torch.float64):
    """(network, x, y, noisy, loss= of the meter, the same loss (b,) written out) in `dtype`."""
    torch.manual_seed(0)
    noisy = torch.arange(24) % 3 == 1
    entropy = lambda z, y: F.cross_entropy(z, y, reduction="none")  # noqa: E731
    if name in ("conv", "batchnorm"):
        net = conv_net(nn.BatchNorm2d if name == "batchnorm" else lambda C: nn.GroupNorm(2, C)).to(dtype)
        return net, torch.randn(24, 3, 8, 8, dtype=dtype), torch.arange(24) % 4, noisy, None, entropy
    if name == "regression":
        net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
        return net, torch.randn(24, 5, dtype=dtype), torch.randn(24, 2, dtype=dtype), noisy, squared, squared
    x = torch.randint(11, (24, 6)), torch.zeros(24, 6, dtype=torch.bool)
    if name == "tokens":
        mean = lambda z, y: F.cross_entropy(z.transpose(1, 2), y, reduction="none").mean(1)  # noqa: E731
        return Transformer(True).to(dtype), x, torch.randint(3, (24, 6)), noisy, None, mean
    return Transformer().to(dtype), x, torch.arange(24) % 3, noisy, None, entropy


CASES = ["conv", "batchnorm", "transformer", "tokens", "regression"]


def forward(net, x):
    return net(*x) if isinstance(x, tuple) else net(x)


def flat(grads) -> torch.Tensor:
    return torch.cat([g.flatten() for g in grads]).double()


def three_passes(net, x, y, noisy, each, mode="train"):
    """g_C, g_N and g by three forward and backward passes of a copy."""
    found = []
    for keep in (~noisy, noisy, noisy | True):
        own = copy.deepcopy(net).train(mode != "eval")
        if mode == "separate" and not keep.all():
            index = keep.nonzero().squeeze(1)
            each(forward(own, gradsplit.select(x, index)), y[index]).mean().backward()
        else:
            each(forward(own, x), y)[keep].mean().backward()
        found.append(flat(p.grad for p in own.parameters()))
    return found


def expected(gC, gN, g) -> dict[str, float]:
    cos = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    want = {"cos_clean_all": cos(gC, g), "cos_clean_noisy": cos(gC, gN)}
    want |= {"norm_clean": float(gC.norm()), "norm_noisy": float(gN.norm()), "norm_all": float(g.norm())}
    return {f"grad/{tag}": value for tag, value in want.items()}


# ------------------------------------------------------------------------------------------------ against plain passes


@pytest.mark.parametrize("mode", ["train", "eval", "separate"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_the_meter_equals_three_backward_passes(name, mode, dtype, bound):
    net, x, y, noisy, loss, each = case(name, dtype)
    want = expected(*three_passes(net, x, y, noisy, each, mode))
    plain = copy.deepcopy(net)
    mean = each(forward(plain, x), y).mean()
    mean.backward()
    meter = Meter(net, loss=loss, masks=2, batchnorm=mode)
    ahead = meter.measure(x, y, noisy)
    assert all(p.grad is None for p in net.parameters())
    got = meter.step(x, y, noisy)
    for tag, value in want.items():
        assert float(got[tag]) == pytest.approx(value, rel=bound, abs=bound), tag
    assert float(got["train/loss"]) == pytest.approx(float(mean.detach()), rel=1e-6)
    assert {tag: float(v) for tag, v in ahead.items()} == {tag: float(v) for tag, v in got.items() if tag in ahead}
    assert ahead.keys() == got.keys() - {"train/loss"} and len([t for t in ahead if t.startswith("null/permuted")]) == 4
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad,
            q.grad,
            rtol=1e-4 if dtype == torch.float32 else 1e-10,
            atol=1e-6 if dtype == torch.float32 else 1e-14,
        )
    for b, c in zip(net.buffers(), plain.buffers(), strict=True):  # running statistics moved once
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("name", CASES)
def test_a_mask_stands_for_the_clean_examples(name):
    """`null/permuted_*` of one mask are the cosines that the same mask gives as `noisy`."""
    net, x, y, noisy, loss, _ = case(name)
    meter = Meter(net, loss=loss)
    null = meter.measure(x, y, noisy, step=5)
    mask = ~gradsplit.draw_masks(meter._batch(x, y, noisy, None), 1, 0, 5)[0]
    assert mask.sum() == noisy.sum() and not torch.equal(mask, noisy)
    as_noisy = meter.measure(x, y, mask)
    for tag in ("cos_clean_all", "cos_clean_noisy"):
        assert float(null[f"null/permuted_{tag}"]) == pytest.approx(float(as_noisy[f"grad/{tag}"]), rel=1e-10)
    again = meter.measure(x, y, noisy, step=5), meter.measure(x, y, noisy, step=6)
    assert [float(a["null/permuted_cos_clean_all"]) == float(null["null/permuted_cos_clean_all"]) for a in again] == [
        True,
        False,
    ]


def test_parts_give_the_exact_within_batch_variance():
    """With as many chunks as examples tr Sigma is that of the gradients of single examples, one by one."""
    net, x, y, noisy, loss, each = case("regression")
    rows = torch.stack(
        [
            flat(torch.autograd.grad(each(net(x[i : i + 1]), y[i : i + 1]).sum(), list(net.parameters())))
            for i in range(24)
        ]
    )
    variance, g, f = float(rows.var(0).sum()), rows.mean(0), float((~noisy).double().mean())
    got = Meter(net, loss=loss, chunks=24, masks=0).measure(x, y, noisy)
    want = math.sqrt(float(g @ g) / (float(g @ g) + variance * (1 - f) / (f * 24)))
    assert got["null/cos_clean_all"] == pytest.approx(want, rel=1e-10)
    C, N = rows[~noisy], rows[noisy]
    off = lambda A: (float(A.sum(0).square().sum()) - float(A.square().sum())) / (len(A) * (len(A) - 1))  # noqa: E731
    assert got["grad/difference_norm"] == pytest.approx((off(C) - off(N)) * 24 / variance, rel=1e-9)
    cross = float(C.mean(0) @ N.mean(0))
    assert got["grad/difference"] == pytest.approx((off(C) + off(N) - 2 * cross) * 24 / variance, rel=1e-9)


def test_true_labels_by_a_loss_of_ones_own_are_those_of_the_closed_form():
    net, x, y, noisy, _, each = case("conv")
    true = torch.where(noisy, (y + 1) % 4, y)
    a, b = (Meter(net, loss=loss, chunks=3).measure(x, y, noisy, true) for loss in (None, each))
    assert a.keys() == b.keys() and {"truth/cos", "truth/shift", "grad/label_share"} <= a.keys()
    for tag in a:
        assert float(a[tag]) == pytest.approx(float(b[tag]), rel=1e-9), tag
    shift = [flat(torch.autograd.grad(F.cross_entropy(net(x), t), list(net.parameters()))) for t in (y, true)]
    assert a["truth/shift"] == pytest.approx(float((shift[0] - shift[1]).norm() / shift[1].norm()), rel=1e-9)


# ------------------------------------------------------------------------------------------------- against a run's own


@pytest.mark.parametrize("mode", ["train", *slow("eval", "separate")])
@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-6), *slow(("64-true", 1e-12))])
def test_the_meter_equals_a_runs_series(mode, precision, bound):
    job = job_for("--precision", precision, "--measure-bn", mode, "--permutations", "3")
    batch = warm(job)
    meter = Meter(copy.deepcopy(job.module), masks=3, batchnorm=mode)
    got = meter.step(batch.x, batch.y, batch.noisy, step=4)
    want = train.train_step(job, batch, 4, measured=True)
    shared = [tag for tag in want if tag.startswith(("grad/", "null/")) or tag == "train/loss"]
    assert len(shared) == 11 and set(shared) == set(got)
    for tag in shared:
        assert float(got[tag]) == pytest.approx(float(want[tag]), rel=bound, abs=bound), tag


# --------------------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("mode", ["train", "eval", "separate"])
def test_measuring_leaves_no_trace(mode):
    torch.manual_seed(0)
    net = nn.Sequential(conv_net(nn.BatchNorm2d), nn.Dropout(0.5), nn.Linear(4, 4))
    net[0][1].eval()  # frozen by its owner
    x, y, noisy = torch.randn(16, 3, 8, 8), torch.arange(16) % 4, torch.arange(16) < 5
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    tensors = lambda: [*net.state_dict().values(), *(p.grad for p in net.parameters()), torch.get_rng_state()]  # noqa: E731
    before, modes = [t.clone() for t in tensors()], [m.training for m in net.modules()]
    with torch.no_grad():  # as in a validation loop
        values = Meter(net, masks=2, chunks=2, batchnorm=mode).measure(x, y, noisy, (y + 1) % 4)
    assert len(values) > 12
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True))
    assert modes == [m.training for m in net.modules()]


class Growing(nn.Module):
    """Keeps running means that its first forward in training makes, and the inputs of one more example with each."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.began = nn.Linear(5, 4), False
        self.register_buffer("seen", torch.zeros(0, 5))

    def forward(self, x):
        if not self.began:
            self.register_buffer("mean", x.mean(0))
            self.began = True
        self.mean.lerp_(x.mean(0), 0.1)
        with torch.no_grad():
            self.seen.resize_(len(self.seen) + 1, 5)[-1] = x[0]
        return self.head(x - self.mean)


def test_buffers_that_a_forward_makes_or_grows_are_given_back():
    torch.manual_seed(0)
    net, plain, x, y = Growing(), Growing(), torch.randn(8, 5), torch.arange(8) % 4
    plain.load_state_dict(net.state_dict())
    meter, noisy = Meter(net, masks=2), torch.arange(8) < 3
    for _ in range(2):
        meter.measure(x, y, noisy)
        assert torch.equal(net(x), plain(x))
        assert net.state_dict().keys() == plain.state_dict().keys() and len(net.seen) == len(plain.seen)


class Scaled(nn.Module):
    """Divides by a running scale, which its forward changes in place before it is saved for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        self.scale.lerp_(x.detach().abs().mean(), 0.1)
        return x / self.scale


def test_measuring_between_a_forward_and_its_backward():
    """BatchNorm has saved its running statistics by then, in eval mode, and must find them as they were."""
    net, x, y, noisy, _, _ = case("batchnorm")
    net[1].eval()
    net.append(Scaled())
    wanted = copy.deepcopy(net)
    loss = F.cross_entropy(net(x), y)
    Meter(net, chunks=2).measure(x, y, noisy)
    loss.backward()
    F.cross_entropy(wanted(x), y).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), wanted.parameters(), strict=True))


def test_gradients_accumulate():
    net, x, y, noisy, _, each = case("conv")
    meter, want = Meter(net), copy.deepcopy(net)
    for part in (slice(0, 12), slice(12, 24)):
        meter.step(x[part], y[part], noisy[part], scale=0.5)
        (each(want(x[part]), y[part]).mean() / 2).backward()
    for p, q in zip(net.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)
    assert meter.steps == 2


@pytest.mark.parametrize("given", ["number", "tensor", "function"])
def test_a_loss_scale_is_on_the_gradient_and_not_on_the_values(given):
    net, x, y, noisy, _, _ = case("conv")
    scale = {"number": 64.0, "tensor": torch.tensor(64.0), "function": lambda t: t * 64}[given]
    plain, scaled = copy.deepcopy(net), net
    a = Meter(plain, chunks=2).step(x, y, noisy)
    b = Meter(scaled, chunks=2).step(x, y, noisy, scale=scale)
    assert a.keys() == b.keys() and all(float(a[t]) == pytest.approx(float(b[t]), rel=1e-9) for t in a)
    torch.testing.assert_close(flat(p.grad for p in scaled.parameters()), 64 * flat(p.grad for p in plain.parameters()))


@pytest.mark.parametrize("autocast", [torch.bfloat16, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_autocast_is_that_of_the_meter_or_around_it(autocast):
    net, x, y, noisy, _, _ = case("transformer", torch.float32)
    within = Meter(net, autocast=autocast).measure(x, y, noisy)
    with torch.autocast("cpu", torch.bfloat16):
        around = Meter(net).measure(x, y, noisy)
    full = Meter(net).measure(x, y, noisy)
    assert {t: float(v) for t, v in within.items()} == {t: float(v) for t, v in around.items()}
    assert 0 < abs(float(within["grad/norm_all"]) - float(full["grad/norm_all"])) < 0.05 * float(full["grad/norm_all"])


# ------------------------------------------------------------------------------------------------- as one backward does


class Idle(nn.Module):
    """Logits of `body`, with a head that nothing uses and a block that every second call skips."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.block, self.head, self.calls = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) + (self.block(x) if self.calls % 2 else 0)


@pytest.mark.parametrize("mode", ["train", "eval", "separate"])
def test_what_a_step_does_not_use_is_left_alone(mode):
    """By weight decay and momentum, too, which an optimizer applies to a gradient of zeros and not to None."""
    torch.manual_seed(0)
    net, x, y = Idle().double(), torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 4
    plain = copy.deepcopy(net)
    nets = (net, plain)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for n in nets]
    meter, start = Meter(net, batchnorm=mode, masks=2, chunks=2), [p.clone() for p in net.head.parameters()]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        plain.calls = net.calls = step
        meter.step(x, y, torch.arange(12) < 5)
        net.calls = plain.calls + 1
        F.cross_entropy(plain(x), y).backward()
        assert [p.grad is None for p in net.parameters()] == [p.grad is None for p in plain.parameters()]
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(p, q) for p, q in zip(net.head.parameters(), start, strict=True))


class Counting(nn.Module):
    """A hidden layer with BatchNorm, and a count of its calls in a buffer and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.calls = nn.Linear(6, 6), nn.BatchNorm1d(6), 0
        self.register_buffer("counted", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.counted += 1
        return torch.relu(self.norm(self.linear(x)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.BatchNorm1d(6), nn.ModuleList([Counting(), Counting()]), nn.Linear(6, 3)
        self.cuts = [self.blocks[0]]

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize("more", [{"masks": 0}, {"masks": 3, "chunks": 3}])
def test_what_a_checkpoint_runs_again_runs_as_often_as_in_a_plain_step(more):
    torch.manual_seed(0)
    net, x, y = Checkpointed().double(), torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3
    plain = copy.deepcopy(net)
    true = (y + 1) % 3 if more["masks"] else None
    Meter(net, **more).step(x, y, torch.arange(12) < 5, true)
    F.cross_entropy(plain(x), y).backward()
    assert [b.calls for b in net.blocks] == [b.calls for b in plain.blocks] == [2, 2]
    for (name, b), c in zip(net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)
    torch.testing.assert_close(flat(p.grad for p in net.parameters()), flat(p.grad for p in plain.parameters()))


def test_hooks_on_a_parameters_gradient_see_the_whole_once():
    """Clipping in a hook, and an optimizer that steps in the backward."""
    net, x, y, noisy, _, each = case("conv")
    plain, calls, ends = copy.deepcopy(net), {}, []
    for model in (net, plain):
        first, last = next(iter(model.parameters())), list(model.parameters())[-1]
        seen = calls[model] = []
        first.register_hook(lambda g, seen=seen: seen.append("tensor") or g.clamp(-0.01, 0.01))
        optimizer = torch.optim.SGD([last], lr=0.5)
        last.register_post_accumulate_grad_hook(lambda p, seen=seen, o=optimizer: seen.append("after") or o.step())
    want = expected(*three_passes(net, x, y, noisy, each))
    got = Meter(net, chunks=2).step(x, y, noisy)
    each(plain(x), y).mean().backward()
    assert sorted(calls[net]) == sorted(calls[plain]) == ["after", "tensor"]
    ends = [(flat(m.parameters()), flat(p.grad for p in m.parameters())) for m in (net, plain)]
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-14)
    assert float(net[0].weight.grad.abs().max()) == 0.01
    assert float(got["grad/cos_clean_noisy"]) == pytest.approx(want["grad/cos_clean_noisy"], rel=1e-10)  # before hooks
    first = next(iter(net.parameters()))
    assert len(first._backward_hooks) == 1  # they are still there


def test_other_hooks_on_gradients_are_refused():
    net, x, y, noisy, _, _ = case("conv")
    handle = net[3].register_full_backward_hook(lambda m, i, o: None)
    with pytest.raises(ValueError, match="the module 3 has a backward hook"):
        Meter(net).step(x, y, noisy)
    handle.remove()
    handle = net[3].register_forward_hook(lambda m, i, o: o.register_hook(lambda g: g.clamp(-1, 1)) and None)
    with pytest.raises(ValueError, match=r"a hook on the gradient of a tensor of shape \(24, 8, 4, 4\)"):
        Meter(net).measure(x, y, noisy)
    handle.remove()
    Meter(net).step(x, y, noisy)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(5, 4, dtype=torch.complex128))
        self.outer = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

    def forward(self, x):
        return (x.to(self.inner.dtype) @ self.inner).abs() @ self.outer


def test_complex_parameters():
    """Their gradient is as long as those of their real and their imaginary part are together."""
    torch.manual_seed(0)
    net, x, y, noisy = Complex(), torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3, torch.arange(12) < 5
    rows = []
    for keep in (~noisy, noisy, noisy | True):
        re, im, outer = (t.detach().clone().requires_grad_() for t in (net.inner.real, net.inner.imag, net.outer))
        loss = F.cross_entropy(
            (torch.complex(re, im).mT @ x.to(re.dtype).mT.to(torch.complex128)).mT.abs() @ outer, y, reduction="none"
        )
        rows.append(flat(torch.autograd.grad(loss[keep].mean(), (re, im, outer))))
    got = Meter(net, chunks=2).step(x, y, noisy)
    for tag, value in expected(*rows).items():
        assert float(got[tag]) == pytest.approx(value, rel=1e-12), tag
    inner, size = net.inner.grad, net.inner.numel()
    torch.testing.assert_close(flat([inner.real, inner.imag]), rows[2][: 2 * size])


# ----------------------------------------------------------------------------------------------- labels that are left out


@pytest.mark.parametrize("mode", ["train", "eval", "separate"])
def test_examples_without_a_label_are_not_of_the_batch(mode):
    """Labels (B,) of -100: torch's mean over the others. They take part in BatchNorm's statistics as in a plain step."""
    net, x, y, noisy, _, each = case("batchnorm")
    y = y.clone()
    y[[0, 1, 7, 20]] = -100
    kept = y != -100
    plain = copy.deepcopy(net)
    loss = F.cross_entropy(plain(x), y)
    loss.backward()
    got = Meter(net, batchnorm=mode, masks=2).step(x, y, noisy, torch.where(kept, (y + 1) % 4, y))
    assert float(got["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(flat(p.grad for p in net.parameters()), flat(p.grad for p in plain.parameters()))
    for b, c in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c)
    assert got["grad/clean_fraction"] == pytest.approx(14 / 20)
    if mode != "separate":
        of_sets = []
        for part in (~noisy & kept, noisy & kept, kept):
            own = copy.deepcopy(case("batchnorm")[0]).train(mode == "train")
            F.cross_entropy(own(x)[part], y[part]).backward()
            of_sets.append(flat(p.grad for p in own.parameters()))
        for tag, value in expected(*of_sets).items():
            assert float(got[tag]) == pytest.approx(value, rel=1e-10), tag


def test_positions_without_a_label_are_not_of_their_example():
    """Labels (B, T) of -100: of each example the mean over its other positions, as torch's cross-entropy of it alone."""
    net, x, y, noisy, _, _ = case("tokens")
    y = y.clone()
    y[torch.rand(24, 6, generator=torch.Generator().manual_seed(0)) < 0.4] = -100
    y[3] = -100
    output = net(*x)
    each = torch.stack([F.cross_entropy(z, t) for z, t in zip(output, y, strict=True) if (t != -100).any()])
    got = Meter(net).step(x, y, noisy)
    assert len(each) == 23 and float(got["train/loss"]) == pytest.approx(float(each.detach().mean()), rel=1e-12)
    want = flat(torch.autograd.grad(each.mean(), list(net.parameters())))
    torch.testing.assert_close(flat(p.grad for p in net.parameters()), want)
    nothing = torch.full_like(y, -100)
    with pytest.raises(ValueError, match="no example whose label is not -100"):
        Meter(net).measure(x, nothing, noisy)
    with pytest.raises(ValueError, match="true is -100 elsewhere than y"):
        Meter(net).measure(x, y, noisy, nothing)


# --------------------------------------------------------------------------------------------------------------- errors


class Reentrant(nn.Sequential):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))

    def forward(self, x):
        return x[:, 0, :4, :4] @ self.weight


def test_what_does_not_fit_is_said():
    net, x, y, noisy, _, each = case("conv")
    tokens = torch.arange(48).view(24, 2) % 9
    measure, frozen = Meter(net).measure, copy.deepcopy(net).requires_grad_(False)
    wrong = [
        (TypeError, "noisy is torch.int64; it must be a tensor of torch.bool", lambda: measure(x, y, noisy.long())),
        (TypeError, "noisy is list", lambda: measure(x, y, noisy.tolist())),
        (ValueError, r"noisy of shape \(23,\) for y of shape \(24,\)", lambda: measure(x, y, noisy[1:])),
        (ValueError, "is not of 20 examples", lambda: measure(x, y[4:], noisy[4:])),
        (ValueError, r"true of shape \(23,\)", lambda: measure(x, y, noisy, y[1:])),
        (
            ValueError,
            r"loss= returned shape \(\);.*reduction=\"none\"",
            lambda: Meter(net, loss=F.cross_entropy).measure(x, y, noisy),
        ),
        (
            ValueError,
            "do not depend on the network's output",
            lambda: Meter(net, loss=lambda z, y: each(z.detach(), y)).measure(x, y, noisy),
        ),
        (ValueError, "give loss=", lambda: measure(x, y.double(), noisy)),
        (ValueError, "depends on no parameter", lambda: Meter(frozen).step(x, y, noisy)),
        (TypeError, "the network returned tuple", lambda: Meter(nn.LSTM(3, 4)).step(torch.randn(24, 2, 3), y, noisy)),
        (ValueError, "batchnorm='batch'", lambda: Meter(net, batchnorm="batch")),
        (ValueError, "masks=-1", lambda: Meter(net, masks=-1)),
        (ValueError, "chunks=1", lambda: Meter(net, chunks=1)),
        (TypeError, "autocast is str", lambda: Meter(net, autocast="bf16")),
        (TypeError, "model is function", lambda: Meter(forward)),
        (ValueError, "no example", lambda: measure(x[:0], y[:0], noisy[:0])),
        (
            ValueError,
            r"an output of shape \(24, 4, 4\) may have its classes in the second or in the last dimension",
            lambda: Meter(Square()).measure(x, y[:, None].expand(24, 4), noisy),
        ),
        (ValueError, "use_reentrant=False", lambda: Meter(Reentrant(net)).measure(x, y, noisy)),
        (
            ValueError,
            "the gradient of the parameter 0.weight is sparse: build its layer with sparse=False",
            lambda: Meter(nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True))).step(tokens, y, noisy),
        ),
        (ValueError, "ran under torch.inference_mode", lambda: torch.inference_mode()(measure)(x, y, noisy)),
        (ValueError, "ran under torch.no_grad", lambda: torch.no_grad()(Meter(net).step)(x, y, noisy)),
    ]
    for kind, message, act in wrong:
        with pytest.raises(kind, match=message):
            act()
    assert all(p.grad is None for p in net.parameters())


def test_a_set_of_one_example_is_noticed_before_anything_moves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, y, before = torch.randn(8, 3), torch.arange(8) % 2, copy.deepcopy(net.state_dict())
    for value in (True, False):
        with pytest.raises(ValueError, match="one of the sets has a single example, which BatchNorm"):
            Meter(net, batchnorm="separate").step(x, y, (torch.arange(8) == 3) == value)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    conv, x, y, _, _, _ = case("batchnorm")  # one image has many pixels
    Meter(conv, batchnorm="separate").step(x, y, torch.arange(24) == 3)


def test_a_network_in_fabrics_wrapper_is_measured_in_its_precision():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net, x, y, noisy, _, each = case("conv", torch.float32)
    plain, optimizer = fabric.setup(copy.deepcopy(net), torch.optim.SGD(net.parameters(), lr=0.1))
    wrapped = fabric.setup_module(net)
    got = Meter(wrapped).step(x, y, noisy)
    loss = each(plain(x), y).mean()
    fabric.backward(loss)
    assert float(got["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(
        flat(p.grad for p in net.parameters()), flat(p.grad for p in plain.parameters()), rtol=0.02, atol=1e-4
    )


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "separate"])
def test_of_a_batch_all_noisy_or_all_clean_the_norms_alone_are_given(mode, value):
    net, x, y, noisy, _, _ = case("batchnorm")
    got = Meter(net, chunks=2, batchnorm=mode).step(x, y, torch.full_like(noisy, value), y)
    assert set(got) == {
        "grad/clean_fraction",
        "grad/norm_noisy" if value else "grad/norm_clean",
        "grad/norm_all",
        "train/loss",
    }


# -------------------------------------------------------------------------------------------------------- two processes

TWO = """
import sys
sys.path[:0] = {paths!r}
import torch, torch.distributed as dist
import test_gradsplit
from gradsplit import Meter
torch.set_num_threads(1)
if {ranks} > 1:
    dist.init_process_group("gloo")
values = {{}}
for name in ("conv", "regression"):
    net, x, y, noisy, loss, _ = test_gradsplit.case(name)
    share = slice(None) if {ranks} == 1 else (slice(0, 15), slice(15, 24))[rank]
    model = torch.nn.parallel.DistributedDataParallel(net) if {ranks} > 1 else net
    meter = Meter(model, loss=loss, masks=2, chunks=3)
    for part, mask in (("some", noisy), ("one process", torch.arange(24) < 4)):
        values[name, part] = {{k: float(v) for k, v in meter.step(x[share], y[share], mask[share]).items()}}
    values[name, "grad"] = {{str(i): p.grad for i, p in enumerate(net.parameters())}}
net, x, y, noisy = test_gradsplit.case("conv")[:4]
if {ranks} > 1:  # a linear head of the whole is `shared` there and `own` on the process of the last examples; `idle` is on none
    skipping = test_gradsplit.Skipping(net[:-1])
    Meter(skipping).step(x[share], torch.where(torch.arange(24) % 5 > 0, y, -100)[share], noisy[share])
    values["grads"] = {{name: p.grad for name, p in skipping.named_parameters()}}
torch.save(values, {file!r} + str(rank))
if {ranks} > 1:
    dist.destroy_process_group()
"""


class Skipping(nn.Module):
    """Uses a head more for the second process's nine examples, and one for nobody's."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.shared, self.own, self.idle = (nn.Linear(8, 4, dtype=torch.float64) for _ in range(3))
        with torch.no_grad():
            for head in (self.shared, self.own):
                head.weight.copy_(torch.linspace(-1, 1, 32).view(4, 8))

    def forward(self, x):
        h = self.body(x)
        return self.shared(h) + (self.own(h) if len(x) == 9 else 0)


def test_two_processes_are_one(zygote, tmp_path):
    paths, found = [str(ROOT), str(ROOT / "tests")], {}
    for ranks in (1, 2):
        file = str(tmp_path / f"{ranks}-")
        code = TWO.format(paths=paths, file=file, ranks=ranks)
        assert zygote.run(code=code, ranks=ranks) == [0] * ranks, zygote.output()
        found[ranks] = [torch.load(f"{file}{rank}") for rank in range(ranks)]
    net, x, y, _, _, _ = case("conv")
    whole = Skipping(net[:-1])
    y = torch.where(torch.arange(24) % 5 > 0, y, -100)
    F.cross_entropy(torch.cat([whole(x[:15]), whole(x[15:])]), y).backward()
    (want,) = found[1]
    for got in found[2]:
        grads = got.pop("grads")
        for name, p in whole.named_parameters():
            assert (grads[name] is None) == (p.grad is None) == name.startswith("idle"), name
            if p.grad is not None:
                torch.testing.assert_close(grads[name], p.grad)
        assert got.keys() == want.keys() and len(want) == 6
        for key, values in want.items():
            assert values.keys() == got[key].keys()
            for tag, value in values.items():
                torch.testing.assert_close(
                    torch.as_tensor(got[key][tag]), torch.as_tensor(value), rtol=1e-10, atol=1e-12
                )


# ------------------------------------------------------------------------------------------------------------ elsewhere


@pytest.mark.slow
def test_it_is_installed_alone(tmp_path):
    pytest.importorskip("setuptools", reason="pip install . without a network needs setuptools in this environment")
    source, there = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("*.md"),
        *ROOT.glob("requirements*.txt"),
        ROOT / "pyproject.toml",
        ROOT / "LICENSE",
    ]:
        shutil.copy(path, source)
    for folder in ("engine", "study", "benchmarks", "examples"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
    ]
    ended = subprocess.run([*pip, str(there), str(source)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    names = {p.name for p in there.iterdir() if p.suffix != ".dist-info"} - {"__pycache__"}
    assert names == {"gradsplit.py"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import gradsplit, torch; print(gradsplit.__file__); m = torch.nn.Linear(2, 3); x = torch.randn(4, 2)\n"
    code += "print(sorted(gradsplit.Meter(m).step(x, torch.arange(4) % 3, torch.arange(4) < 2)))"
    environment = {"PYTHONPATH": str(there), "PATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert (
        Path(ended.stdout.splitlines()[0]) == there / "gradsplit.py" and "null/permuted_cos_clean_noisy" in ended.stdout
    )


@pytest.mark.parametrize("page", ["README.md", "docs/meter.md"])
def test_the_lines_of_the_documentation_run(page, capsys):
    """As they stand, with a network, an optimizer and a loader of the reader's."""
    lines = (ROOT / page).read_text().splitlines()
    first = lines.index("    from gradsplit import Meter")
    block = []
    for line in lines[first:]:
        if line and not line.startswith("    "):
            break
        block.append(line.removeprefix("    "))
    model, _, _, _, _, _ = case("conv", torch.float32)
    x, y, noisy = torch.randn(12, 3, 8, 8), torch.arange(12) % 4, torch.arange(12) % 2 == 0
    scope = {"model": model, "x": x, "y": y, "noisy": noisy, "loader": [(x, y, noisy)] * 2}
    scope["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec("\n".join(block), scope)
    assert {"grad/cos_clean_noisy", "null/permuted_cos_clean_noisy"} <= scope["values"].keys()
    assert scope["meter"].steps == (1 if page == "README.md" else 2) and all(
        p.grad is not None for p in model.parameters()
    )


def test_every_series_of_the_meter_has_its_row():
    """In the table of docs/meter.md, no other, and by what the table says."""
    net, x, y, noisy, _, _ = case("conv")
    true = torch.where(noisy, (y + 1) % 4, y)
    written = set(Meter(net, masks=2, chunks=2).step(x, y, noisy, true))
    text = (ROOT / "docs" / "meter.md").read_text()
    table = text[text.index("| series | when |") : text.index("[Measurements]")]
    described = set(re.findall(r"`((?:grad|null|truth|train)/\w+)`", table))
    assert {tag.removesuffix("_std") for tag in written} == described
