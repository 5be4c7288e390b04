"""How fast it is, side by side in one run: writes a table for each part to benchmarks/RESULTS.md, with the hardware.

    python benchmarks/speed.py                       # all parts (on two CPU cores about half an hour)
    python benchmarks/speed.py run measured data     # some of them
    python benchmarks/speed.py steps --models resnet18-64 --ways eager,graph                       # quick on a GPU
    python benchmarks/speed.py steps --models resnet18-64 --ways compile,both --precisions bf16-mixed  # half a minute a cell

Every number comes from the code that training runs. Times are medians over blocks of steps after a warm-up, synchronised
at both ends, with the spread from the first to the ninth decile; what is compared is timed in turn, and ratios are those
of neighbours. A part that is run again with the same options replaces its table for this hardware and leaves all others as they are.
The table of steps grows on disk with every cell, so that a call that is cut short keeps what it measured.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from plain_loop import loader  # noqa: E402

import data  # noqa: E402
import epochwise  # noqa: E402
import train  # noqa: E402
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
        batch = job.train.batch(plan, next(number) % steps, job.args.bs)
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


COLUMNS = {  # of the table of steps: what `cell` prints
    **{"model": "model", "precision": "precision", "B": "B", "way": "way", "plain": "plain step, ms"},
    **{"rate": "images/s", "share": "of a matmul's rate", "ratio": "measured / plain"},
    **{"memory": "plain step's peak memory, MB", "off": "gradient off by (bound)", "ready": "made ready in, s"},
}


def part_steps(mine) -> str:
    """Plain and measured step by model, batch size, precision and way; each model and precision in its own process."""
    precisions = mine.precisions or (
        ["bf16-mixed", "32-true"] if ON_GPU or hardware.cpu_prefers_bf16() else ["32-true"]
    )
    cells = []
    for model in mine.models:
        for precision in precisions:
            batches = mine.batches if ON_GPU or precision != "32-true" else [B for B in mine.batches if B in (16, 128)]
            own = [sys.executable, __file__, "--cell", f"{model},{precision}", "--seconds", str(mine.seconds)]
            own += ["--ways", ",".join(mine.ways), "--batches", ",".join(map(str, batches))]
            with subprocess.Popen(own, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout:
                    if line.startswith("{"):
                        cells.append(json.loads(line))
                        mine.keep("steps", steps_table(cells))
            if process.returncode:
                status = f"ended with status {process.returncode}"
                cells.append({"model": model, "precision": precision, "plain": status})
    return steps_table(cells)


def steps_table(cells: list[dict]) -> str:
    """The table of steps, and from it the time for the report's grid once all of its batch sizes are there."""
    used = [name for name in COLUMNS if any(name in c for c in cells)]
    text = table([COLUMNS[name] for name in used], [[str(c.get(name, "")) for name in used] for c in cells])
    fastest = {}
    for c in cells:
        if c["model"] == "resnet18-64" and "seconds" in c:
            fastest[c["B"]] = min(fastest.get(c["B"], c["seconds"]), c["seconds"])
    sizes = (16, 32, 64, 128, 256, 512)
    if set(sizes) <= fastest.keys():  # 9 runs of 64 epochs at each size, every 50th step measured
        hours = sum(9 * 64 * -(-40_000 // B) * fastest[B] for B in sizes) / 3600
        text += (
            "\n\nThe steps of the report's grid (figures 4-12: 54 runs of 64 epochs, ResNet-18 of width 64, every 50th "
            f"step measured) would take {hours:.1f} hours, at each batch size the fastest way above, one run at a time."
        )
    return text


def cell(mine) -> None:
    """One model and precision: a JSON line for each batch size and way."""
    model, precision = mine.cell.split(",")
    peak = matmul_rate(precision)
    for B in mine.batches:
        for way in mine.ways:
            if not ON_GPU and (way in ("graph", "both") or way == "compile" and B not in (16, 128, 256, 512)):
                continue
            if not ON_GPU and way == "compile" and (not model.startswith("resnet18") or precision == "32-true"):
                continue  # compiling takes a minute there
            torch._dynamo.reset()
            words = [*model_options(model), "--bs", B, "--precision", precision, "--compile", "off", *WAYS[way]]
            said, began = {"model": model, "precision": precision, "B": B, "way": way}, time.perf_counter()
            try:
                job = make_job(*words)
            except (fast.Unfit, data.InputError) as e:
                print(json.dumps(said | {"plain": str(e)}), flush=True)
                continue
            if job.fast_error:
                said["ready"] = f"{time.perf_counter() - began:.0f}"
                said["off"] = "{error:.1e} ({bound:.1e})".format(**job.fast_error)
            flops = flops_of_image(job)
            if ON_GPU:
                hardware.reset_peak_memory(DEVICE)
                seconds(step_of(job), 3)
                said["memory"] = f"{hardware.peak_memory_mb(DEVICE):.0f}"
            plain, measured = in_turn([step_of(job), step_of(job, measured=True)], mine.seconds, least=3)
            rate, ratio = B / statistics.median(plain), ratios(measured, plain)
            said |= {"plain": spread(plain, 2, 1e3), "rate": f"{rate:.0f}", "share": f"{flops * rate / peak:.0%}"}
            said |= {"ratio": spread(ratio), "seconds": B / rate * (1 + (statistics.median(ratio) - 1) / 50)}
            print(json.dumps(said), flush=True)
            del job
            gc.collect()


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


def part_measured(mine) -> str:
    """The measured step, without and with a random mask, beside the plain one and beside the report's way."""
    rows = []
    for model in [m for m in mine.models if m.startswith("resnet18")]:
        for B in [B for B in mine.batches if B in (16, 128)]:
            job = make_job(*model_options(model), "--bs", B, "--compile", "off")
            acts = [step_of(job), step_of(job, True), step_of(job, True, masks=True), reports_way(job)]
            plain, measured, masked, theirs = in_turn(acts, 4 * mine.seconds)
            found = (measured, plain), (masked, plain), (theirs, plain), (measured, theirs)
            rows.append(
                [model, job.args.precision, str(B), spread(plain, 1, 1e3), *(spread(ratios(*f)) for f in found)]
            )
    head = ["model", "precision", "B", "plain step, ms", "measured / plain", "with a random mask / plain"]
    head += ["report's way / plain"]
    return table([*head, "measured / report's way"], rows)


def part_families(mine) -> str:
    """What each family of `--measure full` costs, in plain steps, and what it is counted at; width 16, B = 128."""
    job = make_job("--width", "16", "--bs", "128", "--measure", "full", "--compile", "off", images=9000)
    batch, F3 = job.train.batch(job.train.epoch(0, 0), 0, 128), 3 * 128  # a plain step in forwards of one image
    account, shares = job.state.measure_seconds, ("chunks", "label_share", "permutations", "fresh", "truth")

    def step(measured: bool, plan: dict) -> None:
        job.state.plan = plan
        train.train_step(job, batch, 1, measured)

    probed = sum(map(len, epochwise.probe_indices(job.context)))
    costs = epochwise.counted_costs(job.args, job.args.bs, sum(p.numel() for p in job.parameters), probed)
    families = {  # name: what is timed, its counted cost in plain steps
        "measured step, split": (lambda: step(True, {}), 5 / 3),
        "measured step, all controls": (lambda: step(True, {"steps": 1}), 5 / 3 + costs["steps"] / F3),
        f"probe, {probed:,} examples": (lambda: epochwise.probe(job.context), costs["probe"] / F3),
        "isotropy": (lambda: epochwise.isotropy(job.context), costs["isotropy"] / F3),
        "curvature": (lambda: epochwise.curvature(job.context), costs["curvature"] / F3),
    }
    rows = []
    for name, (act, counted) in families.items():
        plain, family = in_turn([lambda: step(False, {}), act], mine.seconds, 3 if name == "curvature" else 5)
        rows.append([name, spread(ratios(family, plain)), f"{counted:.2f}"])
        if name.startswith("measured"):
            rows[-1].append(f"{(statistics.median(ratios(family, plain)) - 1) / 50:.1%} of a run")
        else:
            rows[-1].append("")
    whole = sum(account[name] for name in shares)
    parts = ", ".join(f"{name} {account[name] / whole:.0%}" for name in shares)
    said = table(["family", "plain steps, measured", "counted", "at every 50 steps"], rows)
    return f"{said}\n\nOf all controls: {parts}. Plain step: {spread(plain, 1, 1e3)} ms."


def part_data(mine) -> str:
    """The data path alone: gather, crop, flip, normalise; beside a `DataLoader` with torchvision's transforms."""
    rows, workers = [], min(hardware.cores(), 8)
    batches = [B for B in mine.batches if B in (16, 128, 1024)]
    # As many as the largest batch needs for three times what all workers have ahead.
    args = parsed("--synthetic-train", max(20_000, 9 * workers * max(batches, default=0)), "--synthetic-test", 10)
    source = sources.load(args)
    everything = torch.arange(len(source.x_train))
    for B in batches:
        job = make_job("--width", "16", "--bs", B, "--compile", "off")
        own = data.TrainSet(source.x_train, source.y_train, source.y_train, source.mean, source.std, DEVICE, True)
        plan, steps = own.epoch(0, 0), len(everything) // B
        number = iter(range(1 << 60))
        acts = [lambda: own.batch(plan, next(number) % steps, B), step_of(job)]  # noqa: B023
        batch, step = in_turn(acts, mine.seconds)
        epoch = statistics.median(in_turn([lambda: own.epoch(0, 1)], 1.0)[0]) / steps  # noqa: B023
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
        share = spread(ratios(mean, step), 2, 100)
        speed = B / statistics.median(mean)
        rows.append(
            [str(B), spread(mean, 2, 1e3), f"{speed:.0f}", f"{loaded:.0f}", f"{speed / loaded:.0f}", f"{share} %"]
        )
    loader_name = f"DataLoader, {workers} workers, images/s"
    head = [
        "B",
        "batch with its part of the epoch's plan, ms",
        "images/s",
        loader_name,
        "times",
        "of a plain step, width 16",
    ]
    return table(head, rows)


def part_run(mine) -> str:
    """Whole commands in turn: train.py in 32-true and in bf16-mixed, otherwise with its defaults, and
    benchmarks/plain_loop.py (float32), on as many examples."""
    rows, precisions = [], mine.precisions or ["32-true", "bf16-mixed"]
    resolved = parsed()
    hardware.resolve(resolved)
    for model in [m for m in mine.models if m.startswith("resnet18")]:
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
            row = [model, precision + " (auto)" * (precision == resolved.precision), str(steps)]
            row += [spread(speed[0], 0), spread(speed[1], 0), spread(ratios(*speed))]
            row += [", ".join(f"{statistics.median(some):.0f}" for some in both) for both in (whole, memory)]
            rows.append(row)
    head = ["model, B = 128", "precision", "steps", "train.py, images/s", "plain loop, images/s", "times"]
    return table([*head, "whole command, s (ours, plain)", "peak memory, MB (ours, plain)"], rows)


def run_train(words: list[str], folder: Path) -> dict:
    """`python train.py ...`: its summary, and the seconds of the whole command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True, capture_output=True)
    return json.loads((folder / "summary.json").read_text()) | {"command_seconds": time.perf_counter() - began}


def run_plain(words: list[str]) -> dict:
    """`python benchmarks/plain_loop.py ...`: what it prints, and the seconds of the whole command."""
    began = time.perf_counter()
    own = [sys.executable, str(ROOT / "benchmarks" / "plain_loop.py"), *words]
    said = subprocess.run(own, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1]) | {"command_seconds": time.perf_counter() - began}


def part_memory(mine) -> str:
    """Peak memory of training at B = 1024, width 64, beside the plain loop in the same precision."""
    rows, B, steps = [], 1024, 3
    for precision in ("32-true", "bf16-mixed"):
        base = ["--width", "64", "--bs", str(B), "--synthetic-train", "2400", "--synthetic-test", "100"]
        for measuring in ("off", "split"):
            with tempfile.TemporaryDirectory() as folder:
                own = ["--dataset", "synthetic", "--noise", "0.5", "--val-frac", "0.1", "--max-steps", str(steps)]
                own += ["--precision", precision, "--measure", measuring, "--runs", folder, "--name", "r"]
                ours = run_train([*base, *own], Path(folder) / "r")["peak_memory_mb"]
            theirs = run_plain([*base, "--steps", str(steps), *(["--autocast"] if precision != "32-true" else [])])[
                "peak_memory_mb"
            ]
            rows.append([precision, measuring, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"])
    kind = "held on the GPU" if ON_GPU else "of the process, without the plain loop's workers"
    return table(["precision", "--measure", f"train.py, MB {kind}", "plain loop, MB", "times"], rows)


def part_logging(mine) -> str:
    """What writing one measured step's values costs, as a share of the 50 steps that lie between two of them."""
    rows = []
    for model in [m for m in mine.models if m.startswith("resnet18")]:
        for B in [B for B in mine.batches if B in (16, 128)]:
            job = make_job(*model_options(model), "--bs", B, "--compile", "off")
            batch = job.train.batch(job.train.epoch(0, 0), 0, B)
            values = train.train_step(job, batch, 0, measured=True)
            with tempfile.TemporaryDirectory() as folder:
                record = Record(Path(folder) / "r", active=True, began=0.0)
                record.claim(False)
                record.configure({"options": vars(job.args)})
                record.open_events({})

                def write() -> None:
                    record.log(0, values)  # noqa: B023
                    record.flush()  # noqa: B023

                plain, written = in_turn([step_of(job), write], mine.seconds)
                record.close()
            share = spread(ratios(written, plain), 3, 100 / 50)
            rows.append([model, str(B), spread(plain, 1, 1e3), spread(written, 2, 1e3), f"{share} %"])
    head = ["model", "B", "plain step, ms", "write and flush of a measured step, ms", "of 50 steps"]
    return table(head, rows)


def part_scaling(mine) -> str:
    """Cost as the training set and the model grow (as the batch grows: the table of steps)."""
    rows = []
    for n in (10_000, 50_000, 200_000):
        images, labels = torch.zeros(n, 32, 32, 3, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
        own = data.TrainSet(images, labels, labels, (0.5,) * 3, (0.2,) * 3, DEVICE, True)
        plan = statistics.median(in_turn([lambda: own.epoch(0, 0)], 1.0)[0])  # noqa: B023
        epoch = own.epoch(0, 0)
        batch = in_turn([lambda: own.batch(epoch, 3, 128)], 1.0)[0]  # noqa: B023
        held = own.images.rows.untyped_storage().nbytes() / 2**20
        rows.append([f"{n:,}", f"{1e3 * plan:.1f}", f"{1e9 * plan / n:.0f}", spread(batch, 2, 1e3), f"{held:.0f}"])
    sets = table(
        ["training images", "an epoch's plan, ms", "of it per image, ns", "batch of 128, ms", "images held, MB"], rows
    )
    rows = []
    for width in (8, 16, 32, 64):
        job = make_job("--width", width, "--bs", 128, "--compile", "off")
        plain, measured = in_turn([step_of(job), step_of(job, measured=True)], mine.seconds)
        P, flops = sum(p.numel() for p in job.parameters), flops_of_image(job)
        rate = flops * 128 / statistics.median(plain) / 1e9
        found = spread(plain, 1, 1e3), spread(ratios(measured, plain)), f"{flops / 1e9:.3f}", f"{rate:.0f}"
        rows.append([str(width), f"{P:,}", *found])
    head = ["width, B = 128", "parameters", "plain step, ms", "measured / plain", "GFLOP an image", "GFLOP/s"]
    return sets + "\n\n" + table(head, rows)


PARTS = {name.removeprefix("part_"): part for name, part in list(globals().items()) if name.startswith("part_")}


# --------------------------------------------------------------------------------------------------------------- results


def where() -> str:
    """Hardware and versions, in words."""
    if ON_GPU:
        name = torch.cuda.get_device_name()
    else:
        found = ()
        with contextlib.suppress(OSError):
            found = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = f"{found[0] if found else platform.processor() or platform.machine()}, {hardware.cores()} cores"
        name += f" with {(hardware.cpu_features() or ['no AVX2'])[0]}"  # each feature implies those below it
    return f"{name}; torch {torch.__version__}"


def about(part: str) -> str:
    """What a part measures, in one line."""
    return " ".join(PARTS[part].__doc__.split())


def keep(out: Path, part: str, place: str, text: str) -> None:
    """Write a part's text into `out`, in the place of the same part on the same hardware if it is there."""
    block = f"<!-- {part}: {place} -->\n{text}\n<!-- end -->"
    old = (
        out.read_text()
        if out.exists()
        else "# Results\n\nWritten by `python benchmarks/speed.py`; how, stands in it.\n"
    )
    pattern = re.compile(rf"<!-- {re.escape(part)}: {re.escape(place)} -->.*?<!-- end -->", re.DOTALL)
    new = pattern.sub(lambda _: block, old) if pattern.search(old) else old.rstrip() + "\n\n" + block + "\n"
    out.write_text(new)


def main() -> None:
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
    p.add_argument("--cell", help=argparse.SUPPRESS)
    mine = p.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if mine.cell:
        return cell(mine)
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

    mine.keep = save
    for name in mine.parts or PARTS:
        began = time.perf_counter()
        text = PARTS[name](mine)
        print(f"\n{about(name)}\n{save(name, text)}\n\n{text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except data.InputError as e:
        cmdline.complain(e, "speed.py")
        sys.exit(2)
