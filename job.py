"""What a run consists of: data, network and optimizer on their device, and the counters; made, saved, restored."""

import math
import os
import time
from dataclasses import dataclass, field

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

import data
import fast
import measure
import models
import noise
import options
from data import Images, TrainSet
from hardware import average_buffers
from measure import synchronised
from record import NotFinite, Record, load_plain, written


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
    transition: Tensor  # (K, K) float64 on the CPU: counts of (true, given) label in the training split
    scaler: torch.amp.GradScaler | None = None  # of 16-mixed
    graph: fast.Graph | None = None  # --graph: the captured step
    fast_error: dict | None = None  # of --compile and --graph: how far off their gradient is, and how far it may be
    auto: bool = False  # nobody asked for --compile or --graph: a run goes on without where they cannot be had
    refused: bool = False  # and does
    state: dict = field(
        default_factory=lambda: {
            "step": 0,  # updates made
            "best_val_acc": 0.0,  # of the trained network
            "seconds": 0.0,  # of earlier segments
            "steps_seconds": 0.0,  # training steps alone, after warm-up
            "steps_images": 0,  # in that time
            "plan": {},  # of --measure full: how far apart its families stand, and the counted share of the run
            "window": [],  # the last full measurements' moments
            "not_resolved": 0,  # corrected estimates that were left out
            "half_memorized_step": None,  # updates made when first half of the noisy probe examples were fitted
            "measure_seconds": {},  # that each family of --measure full took
        }
    )

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]


def prepare(
    args,
    source: data.Source,
    indices: tuple[Tensor, Tensor],
    labels: Tensor,
    fabric: Fabric,
    scaler=None,
    by_epoch=None,
) -> Job:
    """Put data, model and optimizer on the device. `labels` (n,) and `by_epoch` are those of `noise.relabel`."""
    index, held = indices
    device, K, C = fabric.device, len(source.classes), source.x_train.shape[-1]
    stats = source.mean, source.std
    true = source.y_train[index]
    mask = None
    if args.fake_mask is not None:
        mask = noise.fake_mask(len(index), args.fake_mask, data.generator(args.noise_seed, "fake-mask"))
    train = TrainSet(source.x_train[index], labels, true, *stats, device, not args.no_augment, mask, by_epoch)
    val = Images(source.x_train[held], *stats, device), source.y_train[held].to(device)
    test = Images(source.x_test, *stats, device), source.y_test.to(device)
    module = models.build(args.model, C, K, args.width, args.norm, data.stream_seed(args.seed, "init"))
    module = module.to(device, torch.get_default_dtype(), memory_format=torch.channels_last)
    if fabric.world_size > 1 and args.sync_bn == "on" and device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        for m in synchronised(module):
            m.register_forward_pre_hook(empty_as_float)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.wd, fused=True
    )
    if args.momentum or args.sched == "onecycle":
        for p in module.parameters():  # fused SGD leaves it uninitialised if 16-mixed overflows in the first step
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    steps_per_epoch = math.ceil(len(train) / args.bs)
    total_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    dropout, auto = models.has_dropout(module), args.compile == "auto" and args.graph != "on"
    fast.choose(args, device.type == "cuda", fabric.world_size, dropout, total_steps * args.bs)
    model, optimizer = fabric.setup(fast.compiled(module) if args.compile == "on" else module, optimizer)
    job = Job(
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
        total_steps,
        dropout,
        torch.bincount(true * K + labels, minlength=K * K).view(K, K).double(),
        scaler,
        auto=auto,
    )
    if args.measure != "off":
        noisy, clean = measure.probe_indices(job)
        P, n_probe = sum(p.numel() for p in job.parameters), len(noisy) + len(clean)
        sizes = job.total_steps, steps_per_epoch, len(train), len(held)
        if args.measure == "full":
            job.state["plan"] = measure.schedule_full(args, P, n_probe, *sizes)
        elif len(noisy):
            job.state["plan"] = measure.schedule_probe(args, n_probe, *sizes)
    return job


def empty_as_float(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Before SyncBatchNorm: a process without examples sends its statistics in its input's dtype, all others in float32."""
    return (args[0].to(module.weight.dtype),) if args[0].numel() == 0 else None


def finite_weights(module: nn.Module) -> bool:
    """Whether all parameters and buffers are finite; the host waits for the device."""
    floats = [t.detach() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return bool(torch.stack(torch._foreach_norm(floats, math.inf)).isfinite().all())


def checkpoint(job: Job, record: Record, name: str = "last.ckpt") -> None:
    """Everything a run consists of, as plain values and tensors; a last.ckpt is written only if all is finite and the
    file system has refused nothing."""
    average_buffers(job.fabric, job.module)
    if name == "last.ckpt":
        record.flush()
        if not finite_weights(job.module):
            raise NotFinite(f"the weights are not finite after step {job.state['step'] - 1}")
    state = {"model": job.module.state_dict(), "optimizer": job.optimizer.state_dict(), "config": record.config}
    if job.scaler:
        state["scaler"] = job.scaler.state_dict()
    now = {"seconds": job.state["seconds"] + time.perf_counter() - record.began}
    record.checkpoint(state | job.state | now, name)
    record.saved = time.monotonic()


BEST, BEST_BEFORE = "best.ckpt", "best-before.ckpt"


def keep_best(job: Job, record: Record) -> None:
    """Write the weights of the best validation accuracy so far as best.ckpt, whole or not at all. The one before stays
    as best-before.ckpt, for a run that is resumed from an earlier step.

    All is finite, for the validation loss is. `evaluate` has averaged the buffers over the processes.
    """
    if not record.active:
        return
    content = {
        "model": job.module.state_dict(),
        "step": job.state["step"],
        "val_acc": job.state["best_val_acc"],
        "config": record.config,
    }

    def replace() -> None:
        best = record.folder / BEST
        temporary = written(best, lambda f: torch.save(content, f))
        if best.exists():
            os.replace(best, record.folder / BEST_BEFORE)
        os.replace(temporary, best)

    record.guard(BEST, replace)


def drop_later_best(job: Job, record: Record) -> None:
    """Remove best weights that a resumed run does not know of yet. Those of an epoch's end it comes to again; those of a
    validation in mid-epoch, where --max-steps ended it, it does not if it is longer now."""
    if not record.active:
        return

    def later(name: str) -> bool:
        try:
            return load_plain(record.folder / name)["val_acc"] > job.state["best_val_acc"]
        except FileNotFoundError:
            return False
        except Exception:  # damaged: worth nothing
            return True

    def drop() -> None:
        for name in (BEST_BEFORE, BEST):
            if later(name):
                (record.folder / name).unlink()
        best, before = record.folder / BEST, record.folder / BEST_BEFORE
        if before.exists() and not best.exists():
            os.replace(before, best)

    record.guard(BEST, drop)


def restore(job: Job, record: Record, state: dict) -> None:
    """Go on from a checkpoint's content."""
    job.module.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    if job.scaler:
        job.scaler.load_state_dict(state["scaler"])
    job.state.update({key: state[key] for key in job.state if key != "plan"})  # it is that of the run's new length
    record.restore(state)
