"""Compiled and graph-replayed steps: when they are chosen, that they change no result, and the profile."""

import contextlib
import gzip
import json
import os
import random
import sys
from types import SimpleNamespace

import pytest
import torch

import gradsplit
import measure
import train
from benchmarks import speed
from conftest import ROOT, SIXTEEN, TINY, accelerator, same_weights, series, slow, summary, weights
from data import InputError
from engine import fast, options
from test_metrics import default_dtype, job_for  # noqa: F401

compiler = pytest.mark.skipif(not fast.has_compiler(), reason="no C++ compiler here: torch.compile cannot be had")
ON_CPU = "--accelerator", "cpu", "--graph", "off"  # whatever `--with` adds
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture
def uncompiled(monkeypatch):
    """`--compile on` without the compiler's minutes: everything around it, and the eager network inside."""
    monkeypatch.setattr(fast, "compiled", lambda module: module)
    monkeypatch.setattr(fast, "has_compiler", lambda: True)


def chosen(monkeypatch, *words, images=10**6, on_gpu=False, world_size=1, there=True):
    monkeypatch.setattr(fast, "has_compiler", lambda: there)
    args = options.parse([*TINY, "--compile", "auto", "--graph", "auto", *words])  # whatever `--with` adds
    fast.choose(args, on_gpu, world_size, images)
    return args.compile, args.graph


def test_auto_follows_the_written_rule(monkeypatch):
    paying = "--bs", str(fast.COMPILE_FROM_BATCH), "--width", str(fast.COMPILE_TO_WIDTH)
    assert chosen(monkeypatch, *paying) == ("on", "off")
    assert chosen(monkeypatch, *paying, there=False) == ("off", "off")
    assert chosen(monkeypatch, *paying, images=fast.COMPILE_FROM_IMAGES - 1) == ("off", "off")
    assert chosen(monkeypatch, *paying, "--bs", str(fast.COMPILE_FROM_BATCH - 1)) == ("off", "off")
    assert chosen(monkeypatch, *paying, "--width", str(fast.COMPILE_TO_WIDTH + 8)) == ("off", "off")
    assert chosen(monkeypatch, *paying, world_size=2) == ("off", "off")
    assert chosen(monkeypatch, *paying, on_gpu=True) == ("off", "on")
    assert chosen(monkeypatch, *paying, "--compile", "off") == ("off", "off")
    assert chosen(monkeypatch, "--compile") == ("on", "off")
    assert chosen(monkeypatch, "--graph", on_gpu=True) == ("off", "on")
    on_gpu = {"on_gpu": True, "images": 64 * fast.GRAPH_FROM_STEPS}
    assert chosen(monkeypatch, "--bs", "64", **on_gpu) == ("off", "on")
    assert chosen(monkeypatch, "--bs", "65", **on_gpu) == ("off", "off")
    other = SimpleNamespace(model="vgg16", width=64, bs=64, compile="auto", graph="auto", strategy="auto")
    fast.choose(other, True, 1, 10**9)
    assert (other.compile, other.graph) == ("off", "off")
    for words in (["--strategy", "ddp"], ["--graph", "off"]):
        assert chosen(monkeypatch, "--bs", "64", *words, **on_gpu) == ("off", "off")
    assert chosen(monkeypatch, "--bs", "64", "--compile", "on", **on_gpu) == ("on", "on")
    assert chosen(monkeypatch, "--bs", "64", world_size=2, **on_gpu) == ("off", "off")


def test_what_cannot_be_had_is_named(monkeypatch, go, capsys):
    with pytest.raises(InputError, match="--compile on: .*compiler"):
        chosen(monkeypatch, "--compile", there=False)
    with pytest.raises(InputError, match="--graph on: .*one process"):
        chosen(monkeypatch, "--graph", on_gpu=True, world_size=2)
    go("--accelerator", "cpu", "--graph", status=2)
    assert (
        capsys.readouterr().err.strip()
        == "train.py: error: --graph on: needs one CUDA GPU and one process, without ddp"
    )


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_check_leaves_no_trace(go, uncompiled, precision):
    words = *SIXTEEN, "--epochs", "1", "--noise", "0.5", "--precision", precision
    a, b = go(*words, name="a"), go(*words, "--compile", name="b")
    assert same_weights(a, b) and series(a) == series(b)
    result = summary(b)["fast_gradient"]
    assert result["error"] <= result["bound"] < 0.5 and "fast_gradient" not in summary(a)
    if precision == "16-mixed":  # the loss scale is part of a run
        a, b = (torch.load(folder / "last.ckpt", weights_only=True)["scaler"] for folder in (a, b))
        assert a == b and a["scale"] > 0


def test_a_fast_path_that_is_wrong_ends_the_run(go, uncompiled, monkeypatch, capsys):
    right = train.plain_gradient

    def wrong(job, batch):
        logits = right(job, batch)
        job.parameters[-2].grad.mul_(3)
        return logits

    monkeypatch.setattr(train, "plain_gradient", wrong)
    for precision in ("32-true", "bf16-mixed"):
        folder = go(*SIXTEEN, "--compile", "--precision", precision, name=precision, status=1)
        assert summary(folder)["status"] == "failed" and summary(folder)["steps"] == 0
        assert "--compile on: the gradient is off by" in capsys.readouterr().err


def test_a_graph_that_is_wrong_is_not_replayed(monkeypatch):
    """And who asked for it gets no run without it, though `--compile` was left at auto."""

    class Wrong:
        def __init__(self, job, batch, gradient) -> None:
            self.gradient = gradient

        def __call__(self, job, batch):
            logits = self.gradient(job, batch._replace(x=job.train.pixels(batch.x)))
            job.parameters[-2].grad.mul_(3)
            return logits

    monkeypatch.setattr(fast, "choose", lambda *_: None)
    monkeypatch.setattr(fast, "Graph", Wrong)
    job = job_for("--graph", "--bs", "48")
    with pytest.raises(fast.Unfit, match="--graph on: the gradient is off"):
        fast.make_ready(job, train.plain_gradient)
    assert job.graph is None and not job.auto and job_for().auto and job_for("--compile", "off").auto


@pytest.mark.slow
def test_where_nobody_asked_the_run_goes_on_without(go, uncompiled, monkeypatch, capsys):
    """A compiler that breaks: `--compile on` ends in one line, `auto` warns and trains as if there were none."""

    class Broken(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            raise OSError("no space for kernels")

    words = "--noise", "0.5", "--precision", "64-true"
    eager = weights(go(*words, name="a"))
    monkeypatch.setattr(fast, "compiled", Broken)
    go(*words, "--compile", name="b", status=1)
    wrong = "--compile on: failed here (OSError: no space for kernels)"
    assert f"train.py: error: {wrong}" in capsys.readouterr().err
    for name, value in (("COMPILE_FROM_BATCH", 1), ("COMPILE_FROM_IMAGES", 1)):
        monkeypatch.setattr(fast, name, value)
    c = weights(go(*words, name="c"))
    assert f"warning: {wrong}; this run goes on without" in "".join(capsys.readouterr())
    for name in eager:
        torch.testing.assert_close(c[name], eager[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_short_last_batch_takes_the_eager_network(go, uncompiled):
    """160 examples in batches of 48: the last has 16. In float64 both ways give the same run."""
    words = "--noise", "0.5", "--bs", "48", "--precision", "64-true"
    a, b = weights(go(*words, name="a")), weights(go(*words, "--compile", name="b"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)


def test_full_batches_are_replayed_and_only_plain_ones():
    job, replayed = job_for("--bs", "48", *ON_CPU), []

    def replay(job, batch):
        replayed.append(batch.size)
        return train.plain_gradient(job, batch._replace(x=job.train.pixels(batch.x)))

    job.graph, plan = replay, job.train.epoch(0, 0)
    for number in range(4):
        measured = number == 1
        train.train_step(job, fast.next_batch(job, plan, number, measured), number, measured)
    assert replayed == [48, 48]  # not the measured one, not the last of 16
    job.args.measure = "off"  # then only losses and accuracies are logged, from the logits
    train.train_step(job, fast.next_batch(job, plan, 1, measured=True), 1, measured=True)
    assert replayed == [48, 48, 48]


class StandIn:
    """For a CUDA graph, without a GPU: its replay computes again, in place, what was captured."""

    def __init__(self, job) -> None:
        self.job, self.batch, self.capturing = job, None, False

    def gradient(self, job, batch):
        """What is captured."""
        self.batch = batch
        return train.plain_gradient(job, batch)

    def replay(self) -> None:
        job, graph = self.job, self.job.graph
        kept = [(p, p.grad) for p in job.parameters]
        for p in job.parameters:
            p.grad = None
        graph.logits.copy_(train.plain_gradient(job, self.batch._replace(x=job.train.pixels(graph.starts), y=graph.y)))
        for static, (p, grad) in zip(graph.gradients, kept, strict=True):
            static.copy_(p.grad)
            p.grad = grad


class Stream:
    def wait_stream(self, other) -> None:
        pass


@pytest.fixture
def captured(monkeypatch):
    """captured(job) gives the job a graph, as on a GPU, around a `StandIn`."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())

    def capture(job) -> StandIn:
        stand_in = StandIn(job)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: stand_in)
        first = job.train.batch(job.train.epoch(0, 0), 0, job.args.bs, cut=False)
        job.graph = fast.Graph(job, first, stand_in.gradient)
        assert all(p.grad is None for p in job.parameters)
        return stand_in

    return capture


def replayed_and_eager(captured, *words: str) -> None:
    """That eight steps of both jobs, of two epochs with short last batches, two of them measured, end in the same bits."""
    jobs = [job_for("--bs", "48", *words, *ON_CPU) for _ in range(2)]
    captured(jobs[1])
    for job in jobs:
        for step in range(8):
            plan, measured = job.train.epoch(0, step // 4), step in (1, 5)
            train.train_step(job, fast.next_batch(job, plan, step % 4, measured), step, measured)
    for (name, a), b in zip(jobs[0].module.state_dict().items(), jobs[1].module.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("precision", slow("32-true", "16-mixed"))
def test_the_graph_around_its_replay(captured, precision):
    """Batches get in, gradients get out, running statistics and the short batch are right: the same bits."""
    replayed_and_eager(captured, "--precision", precision)


DROPPING = """
from torch import nn
def net(C, K):
    return nn.Sequential(nn.Conv2d(C, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, K))
"""


def test_dropout_in_a_graph_draws_what_the_eager_step_draws(captured, tmp_path):
    """Its seed is set before each replay, so that steps differ, and each is that of the eager run."""
    (tmp_path / "nets.py").write_text(DROPPING)
    replayed_and_eager(captured, "--model", f"{tmp_path / 'nets.py'}:net", "--width", "64")


def test_a_replayed_step_is_given_positions_alone(captured):
    """Its images are cut out and normalised within the graph."""
    job = job_for("--bs", "48", *ON_CPU)
    plan = job.train.epoch(0, 0)
    eager = job.train.batch(plan, 1, 48)
    stand_in = captured(job)
    batch = fast.next_batch(job, plan, 1, measured=False)
    assert fast.is_replayed(job, batch) and batch.x.shape == (48,) and batch.x.dtype == torch.int64
    job.graph(job, batch)
    assert torch.equal(job.train.pixels(job.graph.starts), eager.x) and torch.equal(job.graph.y, eager.y)
    assert stand_in.batch.x.shape == eager.x.shape


def test_what_a_failed_capture_breaks_does_not_hide_it(monkeypatch):
    """Errors of a GPU come late: while things are put back, or when the gradients are compared."""

    def refuse(*_) -> None:
        raise RuntimeError("capture refused")

    @contextlib.contextmanager
    def broken(module):
        yield
        raise RuntimeError("unusable")

    @contextlib.contextmanager
    def broken_at_last(module):
        try:
            yield
        finally:
            raise RuntimeError("unusable")

    monkeypatch.setattr(fast, "choose", lambda *_: None)
    job = job_for("--graph", "on", "--compile", "off", "--accelerator", "cpu")
    for graph, buffers, message in (
        (refuse, fast.keep_buffers, "capture refused"),
        (refuse, broken_at_last, "capture refused"),
        (lambda *_: None, broken, "unusable"),
    ):
        monkeypatch.setattr(fast, "Graph", graph)
        monkeypatch.setattr(fast, "keep_buffers", buffers)
        with pytest.raises(fast.CaptureFailed, match=rf"--graph on: failed here \(RuntimeError: {message}\)"):
            fast.make_ready(job, train.plain_gradient)
        assert job.graph is None


def test_a_capture_that_fails_is_left_to_a_fresh_process(go, monkeypatch, capsys):
    """The run's folder stays as it was made, and what goes on with it, without the graph, is the eager run."""
    eager, choose = go("--noise", "0.5", name="a"), fast.choose

    def refuse(*_) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def on_a_gpu(args, *_) -> None:
        if args.graph == "off":
            choose(args, False, 1, 0)

    class Replaced(BaseException):
        """This process, by another."""

    asked = []

    def replace(program: str, argv: list[str]) -> None:
        asked.append(argv)
        raise Replaced

    monkeypatch.setattr(fast, "choose", on_a_gpu)
    monkeypatch.setattr(fast, "Graph", refuse)
    words = "--noise", "0.5", "--graph", "on", "--compile", "off"
    folder = go(*words, name="c", status=1)  # within somebody else's process
    assert summary(folder)["status"] == "failed"
    monkeypatch.setattr(fast, "is_own_process", lambda: True)
    monkeypatch.setattr(fast.os, "execv", replace)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    capsys.readouterr()
    with pytest.raises(Replaced):
        go(*words, name="b")
    err = capsys.readouterr().err
    assert "--graph on: failed here (RuntimeError: CUDA error: operation not permitted" in err
    assert "the run goes on in a fresh process, without --graph" in err
    folder = eager.with_name("b")
    assert summary(folder)["status"] == "stopped"
    assert asked == [[sys.executable, str(ROOT / "train.py"), *words, "--graph=off", "--resume"]]
    go(*asked[0][2:], name="b")
    assert same_weights(eager, folder) and series(eager) == series(folder)
    assert json.loads((folder / "config.json").read_text())["segments"][-1]["graph"] == "off"


BLOCK = """
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    def forward(self, x):
        return torch.relu(x + self.layers(x))
def net(C, K):
    first = nn.Conv2d(C, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*first, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K))
"""


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_compiled_steps_give_the_eager_run(go, precision, tmp_path):
    """A measured step every other one, a short last batch: one graph is compiled, and clean + noisy = its gradient.

    In float64 of a ResNet-18, whose kernels are a minute's work to the C++ compiler; under autocast of one of its blocks.
    """
    torch._dynamo.reset()
    words = "--noise", "0.5", "--bs", "48", "--precision", precision, "--epochs", "2"
    if precision == "bf16-mixed":
        (tmp_path / "nets.py").write_text(BLOCK)
        words += "--model", f"{tmp_path / 'nets.py'}:net", "--width", "64"  # the default, for it is not used
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    b = go(*words, "--compile", name="b")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    result = summary(b)["fast_gradient"]
    assert 0 < result["error"] <= result["bound"]
    a = go(*words, name="a")
    at = {tag: (series(a)[tag], series(b)[tag]) for tag in ("train/loss", "val/loss", "grad/norm_all")}
    for tag, (eager, other) in at.items():
        assert [step for step, _ in eager] == [step for step, _ in other]
        if precision == "64-true":
            assert [v for _, v in other] == pytest.approx([v for _, v in eager], rel=1e-8), tag
    assert at["train/loss"][1][0] == at["train/loss"][0][0]  # step 0 is measured, hence eager
    if precision == "64-true":
        a, b = weights(a), weights(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@compiler
def test_clean_and_noisy_add_up_to_the_compiled_gradient():
    job = job_for("--precision", "64-true", "--compile", "--bs", "48")  # the graph of the test above, from its cache
    batch = job.train.batch(job.train.epoch(0, 0), 0, 48)
    rows = gradsplit.split_rows(job.context, batch, measure.make_forward(job.context, batch))
    train.plain_gradient(job, batch)
    assert fast.distance([p.grad for p in job.parameters], gradsplit.add_rows(rows)) < 1e-12


@pytest.mark.slow
def test_a_profile_is_written_and_changes_nothing(go):
    a, b = go(name="a"), go("--profile", "3", "--epochs", "3", name="b")
    assert series(a)["train/loss"] == series(b)["train/loss"][:5]
    (trace,) = (b / "profile").glob("*.pt.trace.json.gz")
    with gzip.open(trace) as f:
        names = {event.get("name") for event in json.load(f)["traceEvents"]}
    assert {f"ProfilerStep#{step}" for step in (10, 11, 12)} <= names
    longest = "aten::convolution_backward" if accelerator() == "cpu" else "conv"  # kernels have names of their own
    assert longest in (b / "profile" / "table.txt").read_text()


@pytest.fixture
def one_core():
    """Processes that a test starts have one thread: two at work on tiny tensors, beside other tests, mostly wait."""
    if not hasattr(os, "sched_setaffinity"):
        return (yield)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {random.choice(sorted(before))})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.slow
def test_the_benchmarks_run(tmp_path, monkeypatch, one_core):
    """The cells of a part are timed by `python benchmarks/speed.py --cells`, from this process."""
    out = tmp_path / "R.md"
    same = "--models resnet18-4 --batches 16 --seconds 0.01".split()
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    for words in (["measured", "logging", *same], ["logging", *same]):  # the second replaces what the first wrote
        monkeypatch.setattr(sys, "argv", ["speed.py", *words, "--out", str(out)])
        assert speed.main() == 0
    text = out.read_text()
    assert text.count("<!-- measured --models") == text.count("<!-- logging --models") == 1
    assert text.count("| resnet18-4 |") == 2


# ------------------------------------------------------------------------------------------------------------- on a GPU


def gpu_job(*words):
    return job_for("--accelerator", "cuda", "--precision", "32-true", *words)


@cuda
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_no_plain_step_waits_for_the_gpu(precision):
    for words in ((), ("--graph",)):
        job = gpu_job("--precision", precision, *words)
        fast.make_ready(job, train.plain_gradient)
        plan = job.train.epoch(0, 0)
        for number in range(4):
            if number == 2:  # the first ones may still choose and allocate
                torch.cuda.set_sync_debug_mode("error")
            try:
                train.train_step(job, fast.next_batch(job, plan, number, False), number, measured=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("way", [("--graph",), ("--compile",), ("--compile", "--graph")])
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed"])
def test_fast_steps_on_a_gpu_give_the_eager_run(go, way, precision):
    if "--compile" in way and not fast.has_compiler():
        pytest.skip("no C++ compiler here")
    torch._dynamo.reset()
    words = "--noise", "0.5", "--bs", "48", "--accelerator", "cuda", "--precision", precision
    a, b = go(*words, name="a"), go(*words, *way, name="b")
    result = summary(b)["fast_gradient"]
    assert result["error"] <= result["bound"]
    if precision == "64-true":
        for (step, x), (other, y) in zip(series(a)["train/loss"], series(b)["train/loss"], strict=True):
            assert step == other and y == pytest.approx(x, rel=1e-7)
        for name, w in weights(a).items():
            torch.testing.assert_close(weights(b)[name], w, rtol=1e-6, atol=1e-8)


@cuda
def test_a_graph_keeps_running_statistics_and_learning_rates():
    """Replayed steps move running statistics once a step, and the optimizer outside takes each step's learning rate."""
    eager, replayed = gpu_job("--sched", "onecycle"), gpu_job("--sched", "onecycle", "--graph")
    fast.make_ready(replayed, train.plain_gradient)
    assert replayed.graph is not None
    for job in (eager, replayed):
        plan = job.train.epoch(0, 0)
        for number in range(4):
            train.train_step(job, fast.next_batch(job, plan, number, False), number, measured=False)
    for (name, a), b in zip(eager.module.state_dict().items(), replayed.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@cuda
def test_dropout_in_a_captured_graph(tmp_path):
    """A replay draws what the eager step draws: torch sets the captured generator's seed and offset before each."""
    (tmp_path / "nets.py").write_text(DROPPING)
    words = "--model", f"{tmp_path / 'nets.py'}:net", "--width", "64"
    eager, replayed = gpu_job(*words, "--graph", "off"), gpu_job(*words, "--graph")
    fast.make_ready(replayed, train.plain_gradient)
    losses: list[list[float]] = [[], []]
    for job, found in zip((eager, replayed), losses, strict=True):
        plan = job.train.epoch(0, 0)
        for number in range(4):
            batch = fast.next_batch(job, plan, number, False)
            job.context.seed_dropout(number)
            logits = job.graph(job, batch) if job.graph else train.plain_gradient(job, batch)
            found.append(float(torch.nn.functional.cross_entropy(logits, batch.y)))
            job.optimizer.zero_grad(set_to_none=True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(set(losses[0])) == 4
