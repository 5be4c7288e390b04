"""How fast it is, side by side in one run: writes a table for each part to benchmarks/RESULTS.md, with the hardware.

    python benchmarks/speed.py                       # all parts (on two CPU cores about half an hour)
    python benchmarks/speed.py run measured data     # some of them
    python benchmarks/speed.py steps --models resnet18-64 --batches 16,128,512   # on a GPU: eager, compiled, replayed, both

Every number comes from the code that training runs. Times are medians over blocks of steps after a warm-up, synchronised
at both ends, with the spread from the first to the ninth decile; what is compared is timed in turn, and ratios are those
of neighbours. A part that is run again with the same options replaces its table for this hardware and leaves all others as they are.
Each table grows on disk with every cell, so that a call that is cut short keeps what it measured, and an error, such as too
little memory, costs one cell.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine import machine  # noqa: E402

machine.wait_briefly()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import data  # noqa: E402
import epochwise  # noqa: E402
import train  # noqa: E402
from benchmarks.plain_loop import loader  # noqa: E402
from engine import cmdline, fast, hardware, options, sources  # noqa: E402
from engine.job import TrainingJob  # noqa: E402
from engine.labels import relabel  # noqa: E402
from engine.record import Record  # noqa: E402
from gradsplit import keep_buffers  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
SETTINGS_OF_MODELS = ("resnet18-64", "resnet18-16", "vgg16", "vgg16-linear")
WAYS = {"eager": (), "compile": ("--compile",), "graph": ("--graph",), "both": ("--compile", "--graph")}
BLOCK = 0.05 if ON_GPU else 0.0  # seconds of a block at least: on a GPU single steps would be timed with their launch
BROKEN = 4  # exit status of a process whose GPU may be unusable
SOURCES: dict[tuple, data.Source] = {}


# ---------------------------------------------------------------------------------------------------------------- timing


def parsed(*words: str):
    """Options of a run on the drawn set with half of the labels noisy."""
    return options.parse(["--dataset", "synthetic", "--noise", "0.5", *map(str, words)])


def model_options(model: str) -> list[str]:
    """`resnet18-16` is ResNet-18 of width 16; both VGGs have their own names."""
    name, _, width = model.partition("-")
    return ["--model", name, "--width", width] if name == "resnet18" else ["--model", model]


def make_job(*words: str, images: int = 2000) -> TrainingJob:
    """A run's job, ready to step, on `images` drawn ones, 90 % of them to train on."""
    args = parsed(*words)
    args.synthetic_train, args.synthetic_test, args.val_frac = images, 10, 0.1
    key = args.dataset, args.synthetic_train
    source = SOURCES[key] = SOURCES.get(key) or sources.load(args)
    indices = data.split(len(source.x_train), args.val_frac, args.split_seed)
    labels, *_ = relabel(args, source, indices[0])
    job = train.prepare(args, source, indices, labels, *train.make_fabric(args))
    fast.make_ready(job, train.plain_gradient)
    return job


def step_of(job: TrainingJob, measured: bool = False, masks: bool = False):
    """A whole step as the loop makes it, with its batch; `measured` with the split, with `masks` one that takes random masks."""
    at = 0 if masks else job.args.measure_every  # every second measured step takes some, from the first on
    plan, steps = job.train.epoch(0, 0), len(job.train) // job.args.bs
    number = iter(range(1 << 60))

    def step() -> None:
        batch = fast.next_batch(job, plan, next(number) % steps, measured)
        train.train_step(job, batch, at, measured)

    return step


def seconds(act, times: int = 1) -> float:
    """Of one call, the mean of `times` calls without a wait between them."""
    data.synchronize(DEVICE)
    began = time.perf_counter()
    for _ in range(times):
        act()
    data.synchronize(DEVICE)
    return (time.perf_counter() - began) / times


def in_turn(acts: list, budget: float, least: int = 5, most: int = 40) -> list[list[float]]:
    """Seconds a call of each act, timed in turn until `budget` seconds are spent: as many samples of each."""
    for act in acts:
        act()
    times = [max(1, round(BLOCK / max(seconds(act, 2), 1e-6))) if BLOCK else 1 for act in acts]
    samples, began = [[] for _ in acts], time.perf_counter()
    while len(samples[0]) < least or (time.perf_counter() - began < budget and len(samples[0]) < most):
        for act, n, collected in zip(acts, times, samples, strict=True):
            collected.append(seconds(act, n))
    return samples


def spread(values: list[float], digits: int = 2, scale: float = 1.0) -> str:
    """Median (first to ninth decile)."""
    values = sorted(v * scale for v in values)
    cut = len(values) // 10
    return f"{statistics.median(values):.{digits}f} ({values[cut]:.{digits}f}-{values[-1 - cut]:.{digits}f})"


def ratios(over: list[float], under: list[float]) -> list[float]:
    """Of neighbours."""
    return [a / b for a, b in zip(over, under, strict=True)]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


# ----------------------------------------------------------------------------------------------------------------- parts


@functools.cache
def matmul_rate(precision: str) -> float:
    """FLOP/s of a large matrix product here: what "share of peak" is a share of."""
    size, kind = (8192 if ON_GPU else 2048), (torch.float32 if precision == "32-true" else torch.bfloat16)
    a = torch.randn(size, size, device=DEVICE).to(kind)
    return 2 * size**3 / statistics.median(in_turn([lambda: a @ a], 1.0)[0])


def flops_of_image(job: TrainingJob) -> float:
    """FLOP of a forward and a backward of one image, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, *job.train.images.plain(torch.zeros(1, dtype=torch.int64)).shape[1:], device=DEVICE)
    with FlopCounterMode(display=False) as counter, keep_buffers(job.module):
        job.module(x).sum().backward()
    job.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 2


def part_steps(mine, model: str, precision: str, B: int, way: str) -> list[dict]:
    """Plain and measured step by model, batch size, precision and way; on a GPU also with cuDNN's other choices of kernels,
    and in 16-mixed."""
    torch._dynamo.reset()
    words = [*model_options(model), "--bs", B, "--precision", precision, "--compile", "off", *WAYS[way]]
    row, began = {"model": model, "precision": precision, "B": B, "way": way}, time.perf_counter()
    job = make_job(*words)
    ready = time.perf_counter() - began
    flops, memory = flops_of_image(job), None
    if ON_GPU:
        hardware.reset_peak_memory(DEVICE)
        seconds(step_of(job), 3)
        memory = f"{hardware.peak_memory_mb(DEVICE):.0f}"
    others = variants(job, words, ON_GPU and way == "eager")
    acts = [step_of(job), step_of(job, measured=True), *others.values()]
    plain, measured, *varied = in_turn(acts, mine.seconds * (1 + len(others) / 2), least=3)
    rate, ratio = B / statistics.median(plain), ratios(measured, plain)
    row |= {"plain step, ms": spread(plain, 2, 1e3), "images/s": f"{rate:.0f}"}
    row |= {"of a matmul's rate": f"{flops * rate / matmul_rate(precision):.0%}", "measured / plain": spread(ratio)}
    row |= {f"{name} / plain": spread(ratios(values, plain)) for name, values in zip(others, varied, strict=True)}
    row |= {"plain step's peak memory, MB": memory} if memory else {}
    if job.fast_error:
        row["gradient off by (bound)"] = "{error:.1e} ({bound:.1e})".format(**job.fast_error)
        row["made ready in, s"] = f"{ready:.0f}"
    # of a step of a run that measures every 50th; hidden from the table
    row[".seconds"] = statistics.median(plain) * (1 + (statistics.median(ratio) - 1) / 50)
    return [row]


def cells_steps(mine) -> list[list]:
    """Those that can be had here; on a CPU no graphs, and few that are compiled, which takes a minute."""
    usual = ["bf16-mixed", "32-true"] if ON_GPU or hardware.cpu_prefers_bf16() else ["32-true"]
    cells = []
    for model, precision in itertools.product(mine.models, mine.precisions or usual):
        double = precision == "32-true"
        batches = mine.batches if ON_GPU or not double else [B for B in mine.batches if B in (16, 128)]
        for B, way in itertools.product(batches, mine.ways):
            narrow = model.startswith("resnet18") and not double and B in (16, 128, 256, 512)
            if ON_GPU or way == "eager" or way == "compile" and narrow:
                cells.append([model, precision, B, way])
    return cells


def variants(job: TrainingJob, words: list, on_gpu: bool) -> dict:
    """{what is different: a plain step}, to be timed beside the usual one; none but on a GPU.

    The usual step takes cuDNN's deterministic kernels (`--deterministic on`).
    """
    if not on_gpu:
        return {}
    step = step_of(job)

    def chosen(benchmark: bool) -> None:
        flags = torch.backends.cudnn
        before = flags.benchmark, flags.deterministic
        flags.benchmark, flags.deterministic = benchmark, False
        try:
            step()
        finally:
            flags.benchmark, flags.deterministic = before

    acts = {"cudnn.benchmark": lambda: chosen(True), "without cudnn.deterministic": lambda: chosen(False)}
    if job.args.precision == "bf16-mixed":
        acts["16-mixed"] = step_of(make_job(*words, "--precision", "16-mixed"))
    return acts


def after_steps(rows: list[dict]) -> str:
    """The time for the report's grid, once all of its batch sizes are there."""
    fastest: dict[int, float] = {}
    for row in rows:
        if row["model"] == "resnet18-64" and ".seconds" in row:
            fastest[row["B"]] = min(fastest.get(row["B"], math.inf), row[".seconds"])
    sizes = (16, 32, 64, 128, 256, 512)
    if not set(sizes) <= fastest.keys():
        return ""
    hours = sum(9 * 64 * -(-40_000 // B) * fastest[B] for B in sizes) / 3600  # 9 runs of 64 epochs at each size
    return (
        "\n\nThe steps of the report's grid (figures 4-12: 54 runs of 64 epochs, ResNet-18 of width 64, every 50th "
        f"step measured) would take {hours:.1f} hours, at each batch size the fastest way above, one run at a time."
    )


def reports_way(job: TrainingJob):
    """A measured step as the report made it: three passes in eval mode beside the step (section 4.2 of the report)."""
    step, plan = step_of(job), job.train.epoch(0, 0)
    batch = job.train.batch(plan, 0, job.args.bs)

    def act() -> None:
        step()
        job.module.eval()
        rows = []
        for keep in (~batch.noisy, batch.noisy, torch.ones_like(batch.noisy)):
            loss = F.cross_entropy(job.context.logits(batch.x[keep]), batch.y[keep])
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, job.parameters)]))
        job.module.train()
        F.cosine_similarity(rows[0], rows[2], dim=0), F.cosine_similarity(rows[0], rows[1], dim=0)

    return act


def wide_and_narrow(mine) -> list[list]:
    """ResNet-18s at the smallest and at the usual batch size."""
    models = [m for m in mine.models if m.startswith("resnet18")]
    return [[m, B] for m in models for B in mine.batches if B in (16, 128)]


def part_measured(mine, model: str, B: int) -> list[dict]:
    """The measured step, without and with a random mask, beside the plain one and beside the report's way."""
    job = make_job(*model_options(model), "--bs", B, "--compile", "off")
    acts = [step_of(job), step_of(job, True), step_of(job, True, masks=True), reports_way(job)]
    plain, measured, masked, theirs = in_turn(acts, 4 * mine.seconds)
    row = {"model": model, "B": B, "precision": job.args.precision, "plain step, ms": spread(plain, 1, 1e3)}
    pairs = {"measured / plain": (measured, plain), "with a random mask / plain": (masked, plain)}
    pairs |= {"report's way / plain": (theirs, plain), "measured / report's way": (measured, theirs)}
    return [row | {name: spread(ratios(*both)) for name, both in pairs.items()}]


FAMILIES = "measured step, split", "measured step, all controls", "probe", "isotropy", "curvature"


@functools.cache
def families_job() -> TrainingJob:
    return make_job("--width", "16", "--bs", "128", "--measure", "full", "--compile", "off", images=9000)


def part_families(mine, family: str) -> list[dict]:
    """What each family of `--measure full` costs, in plain steps, and what it is counted at; width 16, B = 128."""
    job = families_job()
    batch, F3 = job.train.batch(job.train.epoch(0, 0), 0, 128), 3 * 128  # a plain step in forwards of one image
    account, shares = job.state.measure_seconds, ("chunks", "label_share", "permutations", "fresh", "truth")

    def step(measured: bool, plan: dict) -> None:
        job.state.plan = plan
        train.train_step(job, batch, 1, measured)

    probed = sum(map(len, epochwise.probe_indices(job.context)))
    costs = epochwise.counted_costs(job.args, job.args.bs, sum(p.numel() for p in job.parameters), probed)
    acts = {  # family: what is timed, its counted cost in plain steps
        FAMILIES[0]: (lambda: step(True, {}), 5 / 3),
        FAMILIES[1]: (lambda: step(True, {"steps": 1}), 5 / 3 + costs["steps"] / F3),
        "probe": (lambda: epochwise.probe(job.context), costs["probe"] / F3),
        "isotropy": (lambda: epochwise.isotropy(job.context), costs["isotropy"] / F3),
        "curvature": (lambda: epochwise.curvature(job.context), costs["curvature"] / F3),
    }
    act, counted = acts[family]
    plain, measured = in_turn([lambda: step(False, {}), act], mine.seconds, 3 if family == "curvature" else 5)
    in_words = f"{family}, {probed:,} examples" if family == "probe" else family
    row = {"family": in_words, "plain steps, measured": spread(ratios(measured, plain)), "counted": f"{counted:.2f}"}
    row["at every 50 steps"] = row["of it"] = ""
    if family in FAMILIES[:2]:
        row["at every 50 steps"] = f"{(statistics.median(ratios(measured, plain)) - 1) / 50:.1%} of a run"
    if family == FAMILIES[1]:
        whole = sum(account[name] for name in shares)
        row["of it"] = ", ".join(f"{name} {account[name] / whole:.0%}" for name in shares)
    return [row | {"plain step, ms": spread(plain, 1, 1e3)}]


def part_data(mine, B: int) -> list[dict]:
    """The data path alone: gather, crop, flip, normalise; beside a `DataLoader` with torchvision's transforms."""
    workers = min(hardware.cores(), 8)
    # As many as the largest batch needs for three times what all workers have ahead.
    args = parsed("--synthetic-train", max(20_000, 9 * workers * B), "--synthetic-test", 10)
    source = sources.load(args)
    job = make_job("--width", "16", "--bs", B, "--compile", "off")
    own = data.TrainSet(source.x_train, source.y_train, source.y_train, source.mean, source.std, DEVICE, True)
    plan, steps = own.epoch(0, 0), len(source.x_train) // B
    number = iter(range(1 << 60))
    acts = [lambda: own.batch(plan, next(number) % steps, B), step_of(job)]
    batch, step = in_turn(acts, mine.seconds)
    epoch = statistics.median(in_turn([lambda: own.epoch(0, 1)], 1.0)[0]) / steps
    mean = [t + epoch for t in batch]
    theirs, images, began = loader(source, B, workers, ON_GPU), 0, 0.0
    for number_of, (x, y) in enumerate(theirs):
        x, y = x.to(DEVICE), y.to(DEVICE)
        images += len(y)
        if number_of == 3 * workers:  # the first ones were made ahead, as up to 2 a worker are at any time
            data.synchronize(DEVICE)
            began, images = time.perf_counter(), 0
    data.synchronize(DEVICE)
    loaded = images / (time.perf_counter() - began)
    speed = B / statistics.median(mean)
    row = {"B": B, "batch with its part of the epoch's plan, ms": spread(mean, 2, 1e3), "images/s": f"{speed:.0f}"}
    row |= {f"DataLoader, {workers} workers, images/s": f"{loaded:.0f}", "times": f"{speed / loaded:.0f}"}
    return [row | {"of a plain step, width 16": f"{spread(ratios(mean, step), 2, 100)} %"}]


def part_run(mine, model: str) -> list[dict]:
    """Whole commands in turn: train.py in 32-true and in bf16-mixed, otherwise with its defaults, and
    benchmarks/plain_loop.py (float32), on as many examples."""
    rows, precisions = [], mine.precisions or ["32-true", "bf16-mixed"]
    resolved = parsed()
    hardware.resolve(resolved)
    narrow = model == "resnet18-16"
    steps, train_images = (1500 if ON_GPU else 150, 25_600) if narrow or ON_GPU else (30, 5_120)
    base = [*model_options(model), "--bs", "128", "--synthetic-train", str(train_images), "--synthetic-test", "100"]
    ours, theirs = {precision: [] for precision in precisions}, []
    for _ in range(mine.repeats):
        for precision, runs in ours.items():
            with tempfile.TemporaryDirectory() as folder:
                own = ["--dataset", "synthetic", "--noise", "0.5", "--val-frac", "0.01", "--max-steps", str(steps)]
                own += ["--precision", precision, "--runs", folder, "--name", "r"]
                runs.append(run_train([*base, *own], Path(folder) / "r"))
        theirs.append(run_plain([*base, "--steps", str(steps), "--workers", str(min(hardware.cores(), 8))]))
    for precision, runs in ours.items():
        speed, whole, memory = (
            [[run[name] for run in some] for some in (runs, theirs)]
            for name in ("images_per_second", "command_seconds", "peak_memory_mb")
        )
        row = {"model, B = 128": model, "precision": precision + " (auto)" * (precision == resolved.precision)}
        row |= {"steps": steps, "train.py, images/s": spread(speed[0], 0), "plain loop, images/s": spread(speed[1], 0)}
        row["times"] = spread(ratios(*speed))
        for name, both in (("whole command, s (ours, plain)", whole), ("peak memory, MB (ours, plain)", memory)):
            row[name] = ", ".join(f"{statistics.median(some):.0f}" for some in both)
        rows.append(row)
    return rows


def run_train(words: list[str], folder: Path) -> dict:
    """`python train.py ...`: its summary, and the seconds of the whole command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True, capture_output=True)
    return json.loads((folder / "summary.json").read_text()) | {"command_seconds": time.perf_counter() - began}


def run_plain(words: list[str]) -> dict:
    """`python benchmarks/plain_loop.py ...`: what it prints, and the seconds of the whole command."""
    began = time.perf_counter()
    own = [sys.executable, str(ROOT / "benchmarks" / "plain_loop.py"), *words]
    printed = subprocess.run(own, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1]) | {"command_seconds": time.perf_counter() - began}


def part_memory(mine, precision: str, measuring: str) -> list[dict]:
    """Peak memory of training at B = 1024, width 64, beside the plain loop in the same precision."""
    steps, base = 3, "--width 64 --bs 1024 --synthetic-train 2400 --synthetic-test 100".split()
    with tempfile.TemporaryDirectory() as folder:
        own = ["--dataset", "synthetic", "--noise", "0.5", "--val-frac", "0.1", "--max-steps", str(steps)]
        own += ["--precision", precision, "--measure", measuring, "--runs", folder, "--name", "r"]
        ours = run_train([*base, *own], Path(folder) / "r")["peak_memory_mb"]
    cast = ["--autocast"] if precision != "32-true" else []
    theirs = run_plain([*base, "--steps", str(steps), *cast])["peak_memory_mb"]
    kind = "held on the GPU" if ON_GPU else "of the process, without the plain loop's workers"
    row = {"precision": precision, "--measure": measuring, f"train.py, MB {kind}": f"{ours:.0f}"}
    return [row | {"plain loop, MB": f"{theirs:.0f}", "times": f"{ours / theirs:.2f}"}]


def part_logging(mine, model: str, B: int) -> list[dict]:
    """What writing one measured step's values costs, as a share of the 50 steps that lie between two of them."""
    job = make_job(*model_options(model), "--bs", B, "--compile", "off")
    batch = job.train.batch(job.train.epoch(0, 0), 0, B)
    values = train.train_step(job, batch, 0, measured=True)
    with tempfile.TemporaryDirectory() as folder:
        record = Record(Path(folder) / "r", active=True, began=0.0)
        record.claim(False)
        record.configure({"options": vars(job.args)})
        record.open_events({})

        def write() -> None:
            record.log(0, values)
            record.flush()

        plain, written = in_turn([step_of(job), write], mine.seconds)
        record.close()
    row = {"model": model, "B": B, "plain step, ms": spread(plain, 1, 1e3)}
    row["write and flush of a measured step, ms"] = spread(written, 2, 1e3)
    return [row | {"of 50 steps": f"{spread(ratios(written, plain), 3, 100 / 50)} %"}]


def part_scaling(mine, of: str, n: int) -> list[dict]:
    """Cost as the training set and the model grow (as the batch grows: the table of steps)."""
    if of == "training images":
        images, labels = torch.zeros(n, 32, 32, 3, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
        own = data.TrainSet(images, labels, labels, (0.5,) * 3, (0.2,) * 3, DEVICE, True)
        plan = statistics.median(in_turn([lambda: own.epoch(0, 0)], 1.0)[0])
        epoch = own.epoch(0, 0)
        batch = in_turn([lambda: own.batch(epoch, 3, 128)], 1.0)[0]
        held = own.images.rows.untyped_storage().nbytes() / 2**20
        row = {of: f"{n:,}", "an epoch's plan, ms": f"{1e3 * plan:.1f}", "of it per image, ns": f"{1e9 * plan / n:.0f}"}
        return [row | {"batch of 128, ms": spread(batch, 2, 1e3), "images held, MB": f"{held:.0f}"}]
    job = make_job("--width", n, "--bs", 128, "--compile", "off")
    plain, measured = in_turn([step_of(job), step_of(job, measured=True)], mine.seconds)
    P, flops = sum(p.numel() for p in job.parameters), flops_of_image(job)
    row = {of: n, "parameters": f"{P:,}", "plain step, ms": spread(plain, 1, 1e3)}
    row |= {"measured / plain": spread(ratios(measured, plain)), "GFLOP an image": f"{flops / 1e9:.3f}"}
    return [row | {"GFLOP/s": f"{flops * 128 / statistics.median(plain) / 1e9:.0f}"}]


class Part(NamedTuple):
    """A table. Each of its cells is timed by itself: an error costs that one alone."""

    measure: Callable[..., list[dict]]  # (options, *cell) -> rows {heading: text}; what begins with a dot is not shown
    names: tuple[str, ...]  # headings of what names a cell
    cells: Callable[[argparse.Namespace], list[list]]
    after: Callable[[list[dict]], str] = lambda rows: ""  # what stands below the table


SIZES_OF_SETS, WIDTHS = (10_000, 50_000, 200_000), (8, 16, 32, 64)
PARTS = {
    "steps": Part(part_steps, ("model", "precision", "B", "way"), cells_steps, after_steps),
    "measured": Part(part_measured, ("model", "B"), wide_and_narrow),
    "families": Part(part_families, ("family",), lambda mine: [[name] for name in FAMILIES]),
    "data": Part(part_data, ("B",), lambda mine: [[B] for B in mine.batches if B in (16, 128, 1024)]),
    "run": Part(part_run, ("model, B = 128",), lambda mine: [[m] for m in mine.models if m.startswith("resnet18")]),
    "memory": Part(
        part_memory,
        ("precision", "--measure"),
        lambda mine: [[p, m] for p in ("32-true", "bf16-mixed") for m in ("off", "split")],
    ),
    "logging": Part(part_logging, ("model", "B"), wide_and_narrow),
    "scaling": Part(
        part_scaling,
        ("", ""),
        lambda mine: [["training images", n] for n in SIZES_OF_SETS] + [["width, B = 128", w] for w in WIDTHS],
    ),
}


# --------------------------------------------------------------------------------------------------- one cell at a time


def measure_cells(mine) -> int:
    """In a process of its own: the rows of each cell as a line of JSON. After an error that may have left the GPU unusable
    the process ends, with status `BROKEN`, for the others to be timed in a fresh one."""
    name, cells = json.loads(mine.cells)
    for cell in cells:
        try:
            rows = PARTS[name].measure(mine, *cell)
        except Exception as e:  # of any library
            memory = isinstance(e, (torch.OutOfMemoryError, MemoryError))
            known = memory or isinstance(e, (fast.Unfit, data.InputError)) and not isinstance(e, fast.CaptureFailed)
            words = "out of memory" if memory else str(e) if known else f"{type(e).__name__}: {data.one_line(e)}"
            print(json.dumps([failed(name, cell, words)]), flush=True)
            if not known:
                return BROKEN
            e.__traceback__ = None  # whose frames hold the tensors
        else:
            print(json.dumps(rows), flush=True)
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    return 0


def failed(name: str, cell: list, why: str) -> dict:
    """The row of a cell that could not be timed."""
    named = {heading or str(cell[0]): value for heading, value in zip(PARTS[name].names, cell, strict=False)}
    return named | {"failed": data.one_line(why)}


def child(name: str, cells: list[list], mine) -> list[str]:
    """The command that times these cells of a part."""
    words = ["--cells", json.dumps([name, cells]), "--seconds", str(mine.seconds), "--repeats", str(mine.repeats)]
    return [sys.executable, __file__, *words, *(["--precisions", ",".join(mine.precisions)] if mine.precisions else [])]


def end_with_parent() -> None:
    """In a process just started: be killed when its parent has ended, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_cells(name: str, cells: list[list], mine) -> Iterator[tuple[list, list[dict]]]:
    """Each cell with its rows, as soon as they are there, timed in another process, and in a fresh one after an error."""
    left = list(cells)
    while left:
        process = subprocess.Popen(
            child(name, left, mine), stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent
        )
        try:
            for line in process.stdout:
                if line.startswith("["):
                    yield left.pop(0), json.loads(line)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if left and status not in (0, BROKEN):  # the process has died of this one
            cell = left.pop(0)
            yield cell, [failed(name, cell, f"its process ended with status {status}")]


def tables(rows: list[dict]) -> str:
    """A table of the rows, or several: one for each heading that a first column has."""
    blocks = []
    for first in dict.fromkeys(next(iter(row)) for row in rows):
        own = [row for row in rows if next(iter(row)) == first]
        head = list(dict.fromkeys(name for row in own for name in row if not name.startswith(".")))
        head.sort(key="failed".__eq__)  # it comes last
        blocks.append(table(head, [[str(row.get(name, "")) for name in head] for row in own]))
    return "\n\n".join(blocks)


# --------------------------------------------------------------------------------------------------------------- results


def where() -> str:
    """Hardware and versions, in words."""
    if ON_GPU:
        name = torch.cuda.get_device_name()
    else:
        models = ()
        with contextlib.suppress(OSError):
            models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = f"{models[0] if models else platform.processor() or platform.machine()}, {hardware.cores()} cores"
        name += f" with {(hardware.cpu_features() or ['no AVX2'])[0]}"  # each feature implies those below it
    return f"{name}; torch {torch.__version__}"


def about(part: str) -> str:
    """What a part measures, in one line."""
    return " ".join(PARTS[part].measure.__doc__.split())


def keep(out: Path, part: str, place: str, text: str) -> None:
    """Write a part's text into `out`, in the place of the same part on the same hardware if it is there."""
    block = f"<!-- {part}: {place} -->\n{text}\n<!-- end -->"
    old = (
        out.read_text("utf-8")
        if out.exists()
        else "# Results\n\nWritten by `python benchmarks/speed.py`; how, stands in it.\n"
    )
    pattern = re.compile(rf"<!-- {re.escape(part)}: {re.escape(place)} -->.*?<!-- end -->", re.DOTALL)
    new = pattern.sub(lambda _: block, old) if pattern.search(old) else old.rstrip() + "\n\n" + block + "\n"
    out.write_text(new, "utf-8")


def main() -> int:
    p = argparse.ArgumentParser(description="Measure how fast it is.", allow_abbrev=False)
    p.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    listed = lambda text: text.split(",")  # noqa: E731
    sizes = lambda text: [cmdline.count(B) for B in text.split(",")]  # noqa: E731
    p.add_argument(
        "--models", type=listed, default=list(SETTINGS_OF_MODELS), help="resnet18-WIDTH, vgg16, vgg16-linear"
    )
    p.add_argument("--batches", type=sizes, default=list(BATCHES))
    p.add_argument("--ways", type=listed, default=list(WAYS), help=f"of {', '.join(WAYS)}")
    p.add_argument("--precisions", type=listed)
    p.add_argument(
        "--seconds", type=float, default=1.0 if ON_GPU else 4.0, help="of timing for what is compared, at least"
    )
    p.add_argument("--repeats", type=int, default=5, help="of whole commands")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "RESULTS.md")
    p.add_argument("--cells", help=argparse.SUPPRESS)
    mine = p.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if mine.cells:
        return measure_cells(mine)
    if set(mine.ways) - WAYS.keys():
        raise data.InputError(f"--ways {','.join(mine.ways)}: not among {', '.join(WAYS)}")
    for model, precision in itertools.product(mine.models, mine.precisions or ["auto"]):
        parsed(*model_options(model), "--precision", precision)  # raises for what train.py does not know
    place, words = where(), [word for word in sys.argv[1:] if word not in PARTS]
    if "--out" in words:  # does not change what is measured
        del words[words.index("--out") : words.index("--out") + 2]

    def save(name: str, text: str) -> str:
        """Into the file, with its heading; returns the line that says where and when."""
        took = f"{time.strftime('%Y-%m-%d')}, {time.perf_counter() - began:.0f} s"
        what = " ".join([name, *words])
        line = f"{place} ({took}): `python benchmarks/speed.py {what}`"
        keep(mine.out, what, place, f"## {name.capitalize()}: {about(name)}\n\n{line}\n\n{text}")
        return f"{place} ({took})"

    for name in mine.parts or PARTS:
        began, rows = time.perf_counter(), []
        for _, more in run_cells(name, PARTS[name].cells(mine), mine):
            rows += more
            place_and_date = save(name, tables(rows) + PARTS[name].after(rows))
        if rows:
            print(f"\n{about(name)}\n{place_and_date}\n\n{tables(rows)}{PARTS[name].after(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except data.InputError as e:
        cmdline.complain(e, "speed.py")
        sys.exit(2)
