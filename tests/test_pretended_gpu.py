"""Without a GPU: steps and measurements on tensors that only pretend to lie on one, to find what would mix devices
there and what would make the host wait. Values are not computed; gradients are zeros of the right shape."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import data
import epochwise
import train
from conftest import TINY, slow
from engine import options, sources
from engine.job import TrainingJob
from engine.labels import relabel
from test_metrics import default_dtype  # noqa: F401

GPU = torch.device("cuda", 0)
READS = {"item", "__float__", "__bool__", "__int__", "__index__", "equal", "cpu", "nonzero"}
MAKES = {"tensor", "as_tensor", "new_tensor"}


class PretendedGPU(TorchFunctionMode):
    """Whatever names the GPU, or takes tensors from there, is done on fakes, which refuse to meet tensors of the CPU.

    `waits` names the calls that read from it (they get ones) or copy to it, which waits as well unless it is from pinned
    memory and asked not to block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes, self.waits = FakeTensorMode(allow_non_fake_inputs=True), []
        self.pinned: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        given = tree_leaves((args, kwargs))
        tensors = [a for a in given if isinstance(a, torch.Tensor)]
        fakes = [a for a in tensors if isinstance(a, FakeTensor)]
        if name == "pin_memory":
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if fakes and name in READS:
            self.waits.append(name)
            if name == "nonzero":  # as if half of the mask were set
                with self.fakes:
                    return torch.zeros(max(1, args[0].numel() // 2), 1, dtype=torch.int64, device=GPU)
            stand_in = torch.ones(args[0].shape, dtype=args[0].dtype)
            return stand_in if name == "cpu" else func(stand_in, *args[1:], **kwargs)
        if fakes or any(a == "cuda" or a == GPU for a in given if isinstance(a, (str, torch.device))):
            if name == "_fused_sgd_":  # has no shape function
                assert len(fakes) == len(tensors)
                return None
            pinned = name == "to" and kwargs.get("non_blocking") and any(args[0] is t for t in self.pinned)
            if name in MAKES or any(t.dim() for t in tensors if not isinstance(t, FakeTensor)) and not pinned:
                self.waits.append(f"{name} of values on the CPU")
            with self.fakes:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def no_gradient(outputs, inputs, grad_outputs=None, create_graph=False, **_):
    """In the place of `torch.autograd.grad`, whose engine wants a real GPU."""
    if grad_outputs is not None:
        for out, g in zip([outputs] if torch.is_tensor(outputs) else outputs, tree_leaves(grad_outputs), strict=True):
            assert (g.shape, g.dtype, g.device) == (out.shape, out.dtype, out.device)
    assert all(p.device == GPU for p in inputs)
    return tuple(torch.zeros_like(p, requires_grad=create_graph) for p in inputs)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", no_gradient)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with PretendedGPU() as mode:
        yield mode


def pretended_job(*argv: str) -> TrainingJob:
    """A tiny job as on one GPU, the control families at every measured step."""
    args = options.parse([*TINY, "--noise", "0.5", *argv])
    args.accelerator = "cuda"
    torch.set_default_dtype(torch.float64 if args.precision == "64-true" else torch.float32)
    source = sources.load(args)
    indices = data.split(len(source.x_train), args.val_frac, args.split_seed)
    labels, _, by_epoch = relabel(args, source, indices[0])

    def backward(loss):
        for p in job.parameters:
            p.grad = torch.zeros_like(p)

    alone = {"world_size": 1, "global_rank": 0, "is_global_zero": True}
    fabric = SimpleNamespace(device=GPU, autocast=contextlib.nullcontext, backward=backward, **alone)
    fabric.setup = lambda module, optimizer: (module, optimizer)
    job = train.prepare(args, source, indices, labels, fabric, by_epoch=by_epoch)
    job.state.plan |= {"steps": 1} if args.measure == "full" else {}
    assert all(t.device == GPU for t in (*job.module.parameters(), *job.module.buffers()))
    return job


def steps(job, mode, measured: bool) -> list[str]:
    """What makes the host wait in two steps."""
    plan = job.train.epoch(0, 0)
    mode.waits.clear()
    for number in range(1 if job.state.plan and measured else 2):
        batch = job.train.batch(plan, number, job.args.bs)
        assert 0 < batch.n_noisy < batch.size
        train.train_step(job, batch, number, measured)
    return mode.waits


@pytest.mark.parametrize("words", ["", *slow("--norm gn --noise-type dynamic --no-augment")])
def test_steps_do_not_wait_for_the_device(gpu, words):
    """Neither plain ones, nor measured ones but for `--measure-bn separate` and the controls of `--measure full`."""
    job = pretended_job(*words.split())
    assert steps(job, gpu, measured=False) == []
    assert steps(job, gpu, measured=True) == []


FULL = ["--precision 64-true --stratify", "--measure-bn separate"]


@pytest.mark.slow
@pytest.mark.parametrize("words", FULL)
def test_measurements_stay_on_their_device(gpu, monkeypatch, words):
    for name, few in (("CURVATURE_PRODUCTS", 2), ("TRACE_PROBES", 2), ("ISOTROPY_PARTS", 3)):
        monkeypatch.setattr(epochwise, name, few)
    monkeypatch.setattr(epochwise, "ASYMMETRY", math.inf)  # every value that is read is a one
    job = pretended_job("--measure", "full", "--chunks", "2", "--permutations", "2", *words.split())
    assert steps(job, gpu, measured=False) == []
    assert "item" in steps(job, gpu, measured=True)  # the controls are read at once: a wait is seen
    for act in (epochwise.probe, epochwise.isotropy, epochwise.curvature):
        act(job.context)
    assert train.evaluate(job, *job.val)[1] == 1 / 40  # the ones that are read, over the examples
