"""Faster ways to make the same plain step: compiled, or replayed from a captured CUDA graph. When they pay, the check
that they change no result, and a profile that shows where the time goes.

Measured steps and a short last batch take the eager network, so nothing is compiled or captured for them.
"""

import gc
import os
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from data import Batch, Epoch, InputError, one_line
from engine import files
from engine.hardware import reset_peak_memory
from gradsplit import get_grads, keep_buffers
from measure import batch_gradient

# When `--compile auto` compiles on a CPU, and `--graph auto` captures on a GPU: measured, see benchmarks/RESULTS.md. On a GPU
# a first compilation takes half a minute, which 10,000 (B = 512) to 60,000 (B = 16) compiled steps save.
COMPILE_FROM_BATCH, COMPILE_TO_WIDTH = 128, 16
COMPILE_FROM_IMAGES = 500_000  # of a whole run
GRAPH_FROM_STEPS = 1_000  # a capture takes two seconds, and saves 0.5 ms (B = 512) to 8 ms (B = 16) a step
# A fast path's gradient may be this far from the eager one, as |difference| / |gradient|: in float32 a unit whose sign
# rounding turns changes it by 1e-3 to 1e-2 (one of N active units: 1 / sqrt N). In mixed precision, where the eager one is
# itself far off, it may instead be TIMES as far from the gradient in full precision as that is.
BOUND, TIMES = {"64-true": 1e-9, "32-true": 0.05}, 1.5
SMALL_SCALE = 256.0  # of the loss, at which the check's float16 gradients neither overflow nor vanish
TRAIN = Path(__file__).resolve().parents[1] / "train.py"
GRAPH_WARMUP = 3  # steps before a capture, in which libraries choose and allocate what they need


class Unfit(RuntimeError):
    """A fast path that cannot be had here, or that would change results."""


class CaptureFailed(Unfit):
    """A CUDA graph could not be captured. What the process has on the GPU may be unusable after that."""


def has_compiler() -> bool:
    """Whether the C++ compiler is there that torch.compile needs on a CPU, and on a GPU for what launches its kernels."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def choose(args, on_gpu: bool, world_size: int, images: int) -> None:
    """Replace "auto" in `args.compile` and `args.graph`, for a run of `images` training images in all.

    `--compile auto` is on for a ResNet-18 of at most COMPILE_TO_WIDTH channels on one CPU process, at batches of at least
    COMPILE_FROM_BATCH and for at least COMPILE_FROM_IMAGES images; `--graph auto` for a ResNet-18 on one GPU and one
    process, compiled or not, and at least GRAPH_FROM_STEPS steps. Raises `InputError` where what was asked for cannot be had.
    """
    one_gpu = on_gpu and world_size == 1 and args.strategy != "ddp"
    if args.compile == "auto":
        narrow = args.model == "resnet18" and args.width <= COMPILE_TO_WIDTH
        pays = narrow and args.bs >= COMPILE_FROM_BATCH and images >= COMPILE_FROM_IMAGES
        args.compile = "on" if pays and not on_gpu and world_size == 1 and has_compiler() else "off"
    elif args.compile == "on" and not has_compiler():
        raise InputError("--compile on: torch.compile needs a C++ compiler, and there is no g++ or clang++ here")
    if args.graph == "auto":
        pays = args.model == "resnet18" and images >= GRAPH_FROM_STEPS * args.bs
        args.graph = "on" if pays and one_gpu else "off"
    elif args.graph == "on" and not one_gpu:
        raise InputError("--graph on: needs one CUDA GPU and one process, without ddp")


def compiled(module: nn.Module) -> nn.Module:
    """`module`, to be compiled at its first call, for the one shape that full batches have. Before `fabric.setup`."""
    return torch.compile(module, dynamic=False, options={"fallback_random": True})  # dropout draws as in eager mode


@contextmanager
def small_scale(job):
    """Under 16-mixed a loss scale at which nothing overflows; training may begin with steps that do, and skips them."""
    if job.scaler is None:
        yield
        return
    job.context.loss_scale()  # makes the scale, if no step has been made yet
    before = job.scaler.get_scale()
    job.scaler.update(SMALL_SCALE)
    try:
        yield
    finally:
        job.scaler.update(before)


def next_batch(job, plan: Epoch, number: int, measured: bool) -> Batch:
    """Batch `number` of an epoch as its step takes it: for one that is replayed not cut out of the images, which the
    captured graph does itself. Measured steps and a short last batch take the eager network."""
    args, size = job.args, min(job.args.bs, len(job.train) - number * job.args.bs)
    replayed = job.graph is not None and size == args.bs and not (measured and args.measure != "off")
    return job.train.batch(plan, number, args.bs, job.fabric.global_rank, job.fabric.world_size, cut=not replayed)


def is_replayed(job, batch: Batch) -> bool:
    """Whether `next_batch` made this batch for the captured graph."""
    return job.graph is not None and batch.x.dim() == 1


class Graph:
    """Cutting out a full batch, its forward and backward, captured once as a CUDA graph and replayed; the optimizer stays
    outside, for a captured learning rate would be frozen.

    What draws random numbers within, dropout, draws the eager step's: torch has a replay begin with the seed that its
    generator has then, at offset 0, and `seed_dropout` sets it before each step.
    """

    def __init__(self, job, batch: Batch, gradient) -> None:
        """`gradient(job, batch)` puts the gradient into `.grad` and returns the logits; `batch`, without cut images, gives
        the shapes."""
        self.starts, self.y = batch.x.clone(), batch.y.clone()

        def forward_and_backward() -> Tensor:
            return gradient(job, batch._replace(x=job.train.pixels(self.starts), y=self.y))

        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast made outside the graph must not be used inside
        side = torch.cuda.Stream()
        gc.collect()  # a backward graph of another stream that is still alive would spoil the capture
        try:
            with keep_buffers(job.module):
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(GRAPH_WARMUP):
                        forward_and_backward()
                        job.optimizer.zero_grad(set_to_none=True)
                torch.cuda.current_stream().wait_stream(side)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):  # with .grad unset, backward makes it in the graph's own memory
                    self.logits = forward_and_backward()
        finally:
            torch.set_autocast_cache_enabled(caching)
        self.gradients = [p.grad for p in job.parameters]
        job.optimizer.zero_grad(set_to_none=True)

    def __call__(self, job, batch: Batch) -> Tensor:
        """Put the gradient of `batch` into `.grad`; returns the logits. Both are overwritten by the next call."""
        self.starts.copy_(batch.x)
        self.y.copy_(batch.y)
        self.graph.replay()
        for p, g in zip(job.parameters, self.gradients, strict=True):
            p.grad = g
        return self.logits


def make_ready(job, gradient) -> None:
    """Compile and capture on a full batch, and compare the gradient with the eager one; changes nothing of the run.

    `gradient` as for `Graph`. Raises `Unfit` if a path cannot be had or differs by more than `BOUND` and `TIMES` allow.
    """
    args = job.args
    if args.compile == args.graph == "off":
        return
    asked = " ".join(f"--{name} on" for name in ("compile", "graph") if getattr(args, name) == "on")
    try:
        compare_with_eager(job, gradient, asked)
    except Exception as e:
        job.graph = None
        if args.graph == "off" or isinstance(e, Unfit):
            raise
        if isinstance(e.__context__, Unfit):  # putting things back has failed after it
            raise e.__context__ from e
        raise CaptureFailed(failure(asked, e)) from e  # errors of a GPU are noticed late


def failure(asked: str, e: Exception) -> str:
    return f"{asked}: failed here ({type(e).__name__}: {one_line(e)})"


def compare_with_eager(job, gradient, asked: str) -> None:
    """The work of `make_ready`, with what was `asked` for in words."""
    args = job.args
    plan = job.train.epoch(args.seed, 0)
    batch = next_batch(job, plan, 0, measured=False)
    mixed = args.precision not in BOUND
    with keep_buffers(job.module), small_scale(job):
        job.context.seed_dropout(0)
        eager, _ = batch_gradient(job.context, batch)
        if mixed:
            job.context.seed_dropout(0)
            exact, _ = batch_gradient(job.context, batch, full_precision=True)
        try:
            if args.graph == "on":
                starts = job.train.batch(plan, 0, args.bs, cut=False)
                job.graph = Graph(job, starts, gradient)
            job.context.seed_dropout(0)
            job.graph(job, starts) if job.graph else gradient(job, batch)
        except Exception as e:  # a compiler and its back ends raise all sorts
            job.optimizer.zero_grad(set_to_none=True)
            raise (CaptureFailed if args.graph == "on" else Unfit)(failure(asked, e)) from e
        fast_row = get_grads(job.parameters)
        job.optimizer.zero_grad(set_to_none=True)
    error, bound = distance(fast_row, exact if mixed else eager), BOUND.get(args.precision)
    if mixed:
        bound = TIMES * distance(eager, exact)
        del exact
    del fast_row, eager
    reset_peak_memory(job.fabric.device)  # the check's passes are not the run's
    job.fast_error = {"of": "full precision" if mixed else "eager", "error": error, "bound": bound}
    if not error <= bound:
        raise Unfit(f"{asked}: the gradient is off by {error:.2g} of its norm, more than {bound:.2g}")


def make_ready_or_go_without(job, gradient, say) -> None:
    """`make_ready`; where nobody asked for a fast path and it cannot be had, `say` so and go on without."""
    try:
        make_ready(job, gradient)
    except Unfit as e:
        if not job.auto:
            raise
        say(f"warning: {e}; this run goes on without")
        job.refused = True


def is_own_process() -> bool:
    """Whether this process is that of `python train.py`, and nobody else's, such as a test's."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return main is not None and Path(main).resolve() == TRAIN


def start_again_without_graph() -> NoReturn:
    """Put a fresh process in the place of this one, under its id, that goes on with the run without `--graph`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, str(TRAIN), *sys.argv[1:], "--graph=off", "--resume"])


def distance(row: list[Tensor], other: list[Tensor]) -> float:
    """|row - other| / |other|; 0 where both are zero."""
    apart, size = (torch.stack(torch._foreach_norm(r)).norm() for r in (torch._foreach_sub(row, other), other))
    return float(apart / size) if apart > 0 else 0.0


def profiler(steps: int | None, folder: Path, active: bool, after: int, on_gpu: bool):
    """A context whose `step()` is to be called after each step; of the `steps` steps that follow the first `after` ones
    a trace is written to `folder`/profile, for TensorBoard's profile plugin or ui.perfetto.dev, and a table as text."""
    if not steps or not active:
        return nullcontext()  # whose value is None
    target = folder / "profile"

    def write(profile) -> None:
        torch.profiler.tensorboard_trace_handler(str(target), use_gzip=True)(profile)
        by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        files.replace(target / "table.txt", profile.key_averages().table(sort_by=by, row_limit=40).encode())

    when = torch.profiler.schedule(wait=max(0, after - 1), warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(schedule=when, on_trace_ready=write, acc_events=True)
