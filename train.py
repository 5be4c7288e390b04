"""Train a classifier under label noise and measure what the noise does to the gradient. One script, one run's folder.

    python train.py --dataset synthetic --width 16 --noise 0.5 --epochs 3         # CPU, no data needed
    python train.py --noise 0.5 --sched onecycle --bs 1024                        # one GPU if there is one
    fabric run --accelerator=gpu --devices=4 train.py --noise 0.5 --sched onecycle --bs 1024

Shapes: B examples of the global batch, b of them on this process, K classes.
"""

import math
import os
import platform
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

import data
import metrics
import models
import noise
import options
from data import Batch, Images, InputError, TrainSet
from record import NotFinite, Record, picture, versions

EVAL_BATCH = 1000  # examples of an evaluation forward
WARMUP = 10  # steps not counted in images_per_second
FLUSH_EVERY = 10  # measured steps whose values wait on a GPU before they are brought over together


# ------------------------------------------------------------------------------------------------------- schedules


def schedule(name: str, step: int, sched_steps: int, lr: float, momentum: float) -> tuple[float, float]:
    """(lr, momentum) of the update made at 0-based `step`: a pure function of the step.

    constant; cosine: lr to 0 at step `sched_steps` (Loshchilov & Hutter 2017, no restarts); onecycle: lr from lr/25
    up to lr over 30 % of the steps and down to lr/25e4 at step sched_steps - 1, momentum 0.95 -> 0.85 -> 0.95
    (Smith & Topin 2018, torch's defaults). At every step up to the end the values are those of torch's
    `CosineAnnealingLR` and `OneCycleLR`; afterwards both keep their last value.
    """

    def anneal(start: float, end: float, part: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * part))

    if name == "cosine":
        return anneal(lr, 0.0, min(step, sched_steps) / sched_steps), momentum
    if name == "onecycle":
        step, last, top = min(step, sched_steps - 1), sched_steps - 1, 0.3 * sched_steps - 1
        if step <= top:
            part = step / top
            return anneal(lr / 25, lr, part), anneal(0.95, 0.85, part)
        part = (step - top) / (last - top)
        return anneal(lr, lr / 25e4, part), anneal(0.85, 0.95, part)
    return lr, momentum


# -------------------------------------------------------------------------------------------------------- hardware


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX or AVX512-BF16)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def make_fabric(args) -> Fabric:
    """Fabric on the hardware that `args` asks for; `args` then holds what was resolved. Raises `InputError`.

    What `fabric run` was given it keeps to itself (its LT_* variables); everything it left open is resolved here, so
    that `fabric run train.py` and `python train.py` are the same run.
    """
    gpus = torch.cuda.device_count()
    if args.accelerator == "auto":
        args.accelerator = "cuda" if gpus else "cpu"
    elif args.accelerator != "cpu" and not gpus:
        raise InputError(f"--accelerator {args.accelerator}: there is no CUDA GPU here; use cpu or auto")
    on_gpu = args.accelerator != "cpu"
    if args.devices == "auto":
        args.devices = gpus if on_gpu else 1
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not options.under_fabric_run():  # torchrun has started the processes
        args.devices = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        args.num_nodes = world_size // args.devices
    per_machine = int(args.devices) if str(args.devices).isdigit() else len(str(args.devices).split(","))
    args.num_nodes = int(args.num_nodes)
    if on_gpu and per_machine > gpus:
        raise InputError(f"--devices {args.devices}: this machine has {gpus} GPU{'s' * (gpus != 1)}")
    if args.strategy == "auto" and per_machine * args.num_nodes > 1:
        args.strategy = "ddp"
    if args.precision == "auto":
        bf16 = torch.cuda.get_device_capability()[0] >= 8 if on_gpu else cpu_has_bf16()
        args.precision = "bf16-mixed" if bf16 else "32-true"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    args.threads = args.threads or max(1, cores // per_machine)
    torch.set_num_threads(args.threads)  # `fabric run` gives each process all cores or one
    # Float32 means float32, and the same command the same bits, on GPUs too.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    chosen = {name: getattr(args, name) for name in options.FABRIC}
    try:
        return Fabric(**{k: v for k, v in chosen.items() if f"LT_{k.upper()}" not in os.environ})
    except (ValueError, RuntimeError, TypeError) as e:
        raise InputError(f"--devices {args.devices}, --strategy {args.strategy}: {e}") from e


# ------------------------------------------------------------------------------------------------------------- job


@dataclass
class Job:
    """Everything a step needs; the counters in `state` and the weights are all that training changes."""

    args: object
    fabric: Fabric
    module: nn.Module  # the bare network: measurements and evaluation
    model: nn.Module  # Fabric's wrapper (precision, DDP): plain steps
    optimizer: torch.optim.Optimizer
    train: TrainSet
    val: tuple[Images, Tensor]
    test: tuple[Images, Tensor]
    sched_steps: int
    steps_per_epoch: int
    total_steps: int
    dropout: bool
    state: dict = field(default_factory=lambda: {"step": 0, "best_val_acc": 0.0})

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]


def prepare(args, source: data.Source, indices: tuple[Tensor, Tensor], labels: Tensor, fabric: Fabric) -> Job:
    """Put data, model and optimizer on the device. `labels` (n,) are those of the training split to train on."""
    index, held = indices
    device, K, C = fabric.device, len(source.classes), source.x_train.shape[-1]
    stats = source.mean, source.std
    true = source.y_train[index]
    train = TrainSet(source.x_train[index], labels, true, *stats, device, augment=not args.no_augment)
    val = Images(source.x_train[held], *stats, device), source.y_train[held].to(device)
    test = Images(source.x_test, *stats, device), source.y_test.to(device)
    module = models.build(args.model, C, K, args.width, args.norm, data.stream_seed(args.seed, "init"))
    module = module.to(device, torch.get_default_dtype(), memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.wd, fused=True
    )
    model, optimizer = fabric.setup(module, optimizer)
    steps_per_epoch = math.ceil(len(train) / args.bs)
    return Job(
        args,
        fabric,
        module,
        model,
        optimizer,
        train,
        val,
        test,
        options.sched_steps(args, steps_per_epoch),
        steps_per_epoch,
        min(args.epochs * steps_per_epoch, args.max_steps or math.inf),
        models.has_dropout(module),
    )


def forward(job: Job, x: Tensor) -> Tensor:
    """Logits (b, K) of the bare module under the run's precision, in the default dtype."""
    with job.fabric.autocast():
        logits = job.module(x)
    return logits.to(torch.get_default_dtype())


def total(fabric: Fabric, t: Tensor) -> Tensor:
    """Sum of `t` over all processes."""
    return t if fabric.world_size == 1 else fabric.all_reduce(t, reduce_op="sum")


# ------------------------------------------------------------------------------------------------------------ step


@contextmanager
def batchnorm_mode(module: nn.Module, mode: str):
    """For a measurement's forward: `eval` mode, or training mode with running statistics left as they are."""
    tracking = [m for m in module.modules() if getattr(m, "track_running_stats", False)]
    module.train(mode != "eval")
    for m in tracking if mode == "separate" else ():
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True
        module.train()


def plain_gradient(job: Job, batch: Batch) -> Tensor:
    """Leave the batch's mean loss gradient in `.grad`; returns the logits (b, K), detached."""
    logits = job.model(batch.x)
    loss = F.cross_entropy(logits, batch.y, reduction="sum")
    job.fabric.backward(loss * (job.fabric.world_size / batch.size))  # DDP averages over the processes
    return logits.detach()


def split_rows(job: Job, batch: Batch) -> tuple[list[list[Tensor]], Tensor | None]:
    """Gradients of the loss of C and of N, each (1/B) sum over the set and of the global batch; empty sets left out.

    Returns them with the logits (b, K) of the one forward (none under `--measure-bn separate`, which makes two).
    """
    noisy = batch.y != batch.true  # (b,)
    sets = [s for s, size in ((~noisy, batch.size - batch.n_noisy), (noisy, batch.n_noisy)) if size]
    rows, logits = [], None
    if job.args.measure_bn == "separate":
        for s in sets:
            part = s.nonzero().squeeze(1)  # here the host waits for the device
            z = forward(job, batch.x[part])
            weights = torch.full_like(z[:, 0], 1 / batch.size)
            rows += metrics.pull_back(z, job.parameters, [metrics.cotangent(z, batch.y[part], weights)])
    else:
        logits = forward(job, batch.x)
        cotangents = [metrics.cotangent(logits, batch.y, s.to(logits.dtype) / batch.size) for s in sets]
        rows = metrics.pull_back(logits, job.parameters, cotangents)
        logits = logits.detach()
    if job.fabric.world_size > 1:  # one collective for all rows, whatever this process held of each set
        flat = total(job.fabric, torch.cat([part.reshape(-1) for row in rows for part in row]))
        parts = iter(flat.split([p.numel() for p in job.parameters] * len(rows)))
        rows = [[next(parts).view_as(p) for p in job.parameters] for _ in rows]
    return rows, logits


def split_values(rows: list[list[Tensor]], batch: Batch) -> dict:
    """`grad/*` from the rows of `split_rows` (and, as a third, a g that is not their sum)."""
    f = 1 - batch.n_noisy / batch.size
    G = metrics.gram(rows)
    measured = metrics.one_sided_measures(G[0, 0], batch.n_noisy)
    if 0 < batch.n_noisy < batch.size:
        measured = metrics.split_measures(metrics.set_means(G, f))
    return {"grad/clean_fraction": f, **measured}


def train_step(job: Job, batch: Batch, step: int, measured: bool) -> dict:
    """One optimizer step; on a `measured` one returns its values, 0-d tensors and floats by tag.

    The values belong to the weights before the update. In `--measure-bn train` the update is made with the sum of
    the clean and the noisy gradient; in the other modes, and on plain steps, by one backward of the mean loss.
    """
    args = job.args
    lr, momentum = schedule(args.sched, step, job.sched_steps, args.lr, args.momentum)
    for group in job.optimizer.param_groups:
        group["lr"], group["momentum"] = lr, momentum
    rows, logits = [], None
    split = measured and args.measure == "split"
    if split and args.measure_bn != "train":
        seed_dropout(job, step)
        with batchnorm_mode(job.module, args.measure_bn):
            rows, _ = split_rows(job, batch)
    seed_dropout(job, step)
    if split and args.measure_bn == "train":
        rows, logits = split_rows(job, batch)
        for p, g in zip(job.parameters, metrics.add_rows(rows), strict=True):
            p.grad = g
    else:
        logits = plain_gradient(job, batch)
    values = {}
    if measured:
        counts = total(job.fabric, metrics.batch_counts(logits, batch.y, batch.true))
        values = metrics.batch_measures(counts, batch.size, batch.n_noisy)
        if split:
            own = [[p.grad for p in job.parameters]] if args.measure_bn == "separate" and len(rows) == 2 else []
            values |= split_values(rows + own, batch)
        values |= {"optim/lr": lr, "optim/momentum": momentum}
        values["optim/temperature"] = metrics.temperature(lr, batch.size, momentum)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return values


def seed_dropout(job: Job, step: int) -> None:
    """Give dropout, which draws from the device's global generator, a mask that depends on seed, step and rank."""
    if job.dropout:
        torch.manual_seed(data.stream_seed(job.args.seed, f"dropout{job.fabric.global_rank}", step))


@torch.no_grad()
def evaluate(job: Job, images: Images, labels: Tensor) -> tuple[float, float]:
    """(mean loss, accuracy) on a whole set in eval mode, each example counted once however many processes there are."""
    a, b = data.shard(images.n, job.fabric.global_rank, job.fabric.world_size)
    sums = torch.zeros(3, dtype=torch.float64, device=labels.device)
    job.module.eval()
    for i in range(a, b, EVAL_BATCH):
        j = min(i + EVAL_BATCH, b)
        sums += metrics.batch_counts(forward(job, images.plain(i, j)), labels[i:j], labels[i:j])
    job.module.train()
    loss, hit, _ = total(job.fabric, sums).tolist()  # here the host waits for the device
    return loss / images.n, hit / images.n


# ------------------------------------------------------------------------------------------------------------- run


def finite_weights(module: nn.Module) -> bool:
    """Whether all parameters and buffers are finite; the host waits for the device."""
    floats = [t.detach() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return bool(torch.stack(torch._foreach_norm(floats, math.inf)).isfinite().all())


def checkpoint(job: Job, record: Record, name: str = "last.ckpt") -> None:
    """Everything a run consists of, as plain values and tensors; a last.ckpt is written only if it is finite."""
    if name == "last.ckpt" and not finite_weights(job.module):
        raise NotFinite(f"the weights are not finite after step {job.state['step']}")
    state = {"model": job.module.state_dict(), "optimizer": job.optimizer.state_dict(), "config": record.config}
    record.checkpoint(state | job.state, name)


def validate(job: Job, record: Record) -> None:
    """`val/*` at x = updates made, and the best accuracy so far."""
    loss, acc = evaluate(job, *job.val)
    record.log(job.state["step"], {"val/loss": loss, "val/acc": acc})
    record.flush()
    job.state["best_val_acc"] = max(acc, job.state["best_val_acc"])


def fit(job: Job, record: Record) -> dict:
    """Train to the end; returns what the training steps alone took: {"steps_seconds", "steps_images"}."""
    args, state, device = job.args, job.state, job.fabric.device
    flush_every = args.measure_every * (1 if device.type == "cpu" else FLUSH_EVERY)
    warmup = WARMUP if job.total_steps > 2 * WARMUP else 0
    timed = {"steps_seconds": 0.0, "steps_images": 0}
    bar = tqdm(total=job.total_steps, unit="step", disable=not record.active, mininterval=0.2 if sys.stderr.isatty() else 20)
    validate(job, record)
    with bar:
        while state["step"] < job.total_steps:
            epoch = state["step"] // job.steps_per_epoch
            bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
            plan = job.train.epoch(args.seed, epoch)
            clock, images = time.perf_counter(), 0
            for number in range(job.steps_per_epoch):
                step = state["step"]
                if step == job.total_steps:
                    break
                if step == warmup:
                    synchronize(device)
                    clock, images = time.perf_counter(), 0
                batch = job.train.batch(plan, number, args.bs, job.fabric.global_rank, job.fabric.world_size)
                measured = step % args.measure_every == 0
                values = train_step(job, batch, step, measured)
                state["step"] = step + 1
                images += batch.size
                if measured:
                    record.log(step, values)
                    if step % flush_every == 0:
                        record.flush()  # here the host waits for the device
                        show(bar, record)
                bar.update()
            record.flush()
            synchronize(device)
            if state["step"] > warmup:
                timed["steps_seconds"] += time.perf_counter() - clock
                timed["steps_images"] += images
            validate(job, record)
            show(bar, record)
            checkpoint(job, record)
    return timed


def show(bar: tqdm, record: Record) -> None:
    """Loss and validation accuracy behind the progress bar."""
    loss, acc = record.latest.get("train/loss", math.nan), record.latest.get("val/acc", math.nan)
    bar.set_postfix(loss=f"{loss:.3f}", val_acc=f"{acc:.4f}", refresh=False)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: by torch on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB here


def run(args) -> int:
    """One run from checked options to its finished folder; returns the exit status. Raises `InputError`."""
    began = time.perf_counter()
    source = data.load(args)
    indices = index, held = data.split(len(source.x_train), args.val_frac, args.split_seed, args.subset)
    if args.bs > len(index):
        raise InputError(f"--bs {args.bs}: larger than the training split of {len(index)} examples")
    if args.model != "resnet18" and source.x_train.shape[1] < 32:
        raise InputError(f"--model {args.model}: needs images of at least 32 pixels, not {source.x_train.shape[1]}")
    labels, ledger = noise.relabel(args, source, index)
    fabric = make_fabric(args)
    if Path(args.runs, args.name).exists():
        raise InputError(f"--name {args.name}: {Path(args.runs, args.name)} exists already; give another --name")
    if not options.under_fabric_run():
        fabric.launch()
    job = prepare(args, source, indices, labels, fabric)
    record = Record(Path(args.runs, args.name), active=fabric.is_global_zero)
    status, reason, done = "running", None, {}

    def summarize() -> dict:
        steps = job.state["step"]
        epochs, rest = divmod(steps, job.steps_per_epoch)
        took = done.get("steps_seconds")
        noisy = record.recent_noisy
        summary = {
            "status": status,
            "reason": reason,
            "val_acc": record.latest.get("val/acc"),
            "best_val_acc": job.state["best_val_acc"],
            "test_acc": record.latest.get("test/acc"),
            "train_acc_noisy": sum(noisy) / len(noisy) if noisy else None,
            "steps": steps,
            "examples": epochs * len(job.train) + rest * args.bs,
            "seconds": round(time.perf_counter() - began, 2),
            "images_per_second": round(done["steps_images"] / took, 1) if took else None,
            "peak_memory_mb": round(peak_memory_mb(fabric.device), 1),
        }
        record.summary(**summary)
        return summary

    try:
        resolved = {
            "device": torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else platform.processor() or platform.machine(),
            "world_size": fabric.world_size,
            "sched_steps": job.sched_steps,
            "steps_per_epoch": job.steps_per_epoch,
            "total_steps": job.total_steps,
            "parameters": sum(p.numel() for p in job.parameters),
            "train_examples": len(index),
            "val_examples": len(held),
            "test_examples": len(source.x_test),
        }
        config = {"options": vars(args) | {"noise": ledger["nominal"]}, "resolved": resolved, "noise": ledger, "versions": versions()}
        config["segments"] = [{"step": 0, "threads": args.threads, **config["versions"]}]
        shown = index[:32]
        figure = picture(source.x_train[shown], source.y_train[shown], labels[:32], source.classes) if record.active else None
        record.start(config, ledger, index, source.y_train[index], labels, figure)
        summarize()
        record.log(0, {"noise/nominal": ledger["nominal"], "noise/realised": ledger["realised"]})
        announce(job, record, ledger)
        done = fit(job, record)
        loss, acc = evaluate(job, *job.test)
        record.log(job.state["step"], {"test/acc": acc})
        record.flush()
        status = "finished"
        record.hyperparameters({tag: record.latest[tag] for tag in ("val/acc", "test/acc")})
    except NotFinite as e:
        status, reason = "failed", str(e)
        checkpoint(job, record, "failed.ckpt")
        options.complain(f"{e}; the state is in {record.folder / 'failed.ckpt'}")
    except BaseException as e:
        status, reason = "failed", f"{type(e).__name__}: {e}"
        raise
    finally:
        summary = summarize()
        record.close()
    if record.active and status == "finished":
        print_table(args, ledger, summary, record.folder)
    return 0 if status == "finished" else 1


def announce(job: Job, record: Record, ledger: dict) -> None:
    """The lines before the progress bar: what will run, and on which labels."""
    if record.active:
        args = job.args
        print(
            f"{args.model} on {args.dataset}: {len(job.train)} training examples, {job.total_steps} steps of {args.bs}, "
            f"{args.precision} on {job.fabric.device} with {args.threads} threads -> {record.folder}\n"
            f"label noise {ledger['type']}: nominal {ledger['nominal']:.4f}, realised {ledger['realised']:.4f} "
            f"({ledger['changed']} labels changed), labels sha256 {ledger['labels_sha256'][:16]}",
            flush=True,
        )


def print_table(args, ledger: dict, summary: dict, folder: Path) -> None:
    """What was reached."""
    shown = {
        "validation accuracy": f"{summary['val_acc']:.4f} (best {summary['best_val_acc']:.4f})",
        "test accuracy": f"{summary['test_acc']:.4f}",
        "noise, nominal / realised": f"{ledger['nominal']:.4f} / {ledger['realised']:.4f}",
    }
    if summary["train_acc_noisy"] is not None:
        shown["accuracy on noisy examples"] = f"{summary['train_acc_noisy']:.4f} (last ten measured steps)"
    shown["steps / examples"] = f"{summary['steps']} / {summary['examples']}"
    speed = f", {summary['images_per_second']:.0f} images/s" if summary["images_per_second"] else ""
    shown["time"] = f"{summary['seconds']:.1f} s{speed}, peak memory {summary['peak_memory_mb']:.0f} MB"
    shown["folder"] = str(folder)
    width = max(map(len, shown))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in shown.items()), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn bad input into one line and status 2."""
    warnings.filterwarnings("ignore", module="lightning_fabric")
    before = torch.get_default_dtype()
    try:
        args = options.parse(argv)
        if args.precision == "64-true":
            torch.set_default_dtype(torch.float64)  # Fabric alone would hand back float32 logits
        return run(args)
    except InputError as e:
        options.complain(e)
        return 2
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    sys.exit(main())
