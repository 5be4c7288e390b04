"""Train a classifier under label noise and measure what the noise does to the gradient. One script, one run's folder.

    python train.py --dataset synthetic --width 16 --noise 0.5 --epochs 3         # CPU, no data needed
    python train.py --noise 0.5 --sched onecycle --bs 1024                        # one GPU if there is one
    fabric run --accelerator=gpu --devices=4 train.py --noise 0.5 --sched onecycle --bs 1024

Shapes: B examples of the global batch, b of them on this process, K classes.
"""

import os
import signal

if __name__ == "__main__":  # the imports below take seconds, and nothing has been written yet
    for _name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, _name), lambda *_: os._exit(3))

import logging
import math
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import datasets
import epochwise
import measure
import metrics
from context import batch_gradient
from data import Batch, Images, InputError, synchronize
from engine import fast, memory, noisefile, options, pace, schema
from engine.agreement import Fault, Stopped, agree, fault_on_any_rank, raise_if_fault
from engine.checkpoints import check_labels, checkpoint, drop_later_best, keep_best, load_on_all_ranks, restore
from engine.hardware import lost_process, make_fabric, on_rank_zero, sum_over_ranks
from engine.interrupts import Interrupted, Signals, say_ended
from engine.job import TrainingJob, prepare
from engine.labels import relabel
from engine.record import NotFinite, Record, check_folder, first_config, read_config, read_status
from engine.summary import announce, describe, print_table, summarize
from epochwise import EVAL_BATCH
from schedules import schedule

WARMUP = 10  # steps not counted in images_per_second
FLUSH_EVERY = 10  # measured steps whose values wait on a GPU before they are brought over together
STATUS = {"finished": 0, "failed": 1, "stopped": 3}  # exit status


# ------------------------------------------------------------------------------------------------------------ step


def plain_gradient(job: TrainingJob, batch: Batch) -> Tensor:
    """Put the batch's mean loss gradient into `.grad`; returns the logits (b, K), detached."""
    short = batch.size != job.args.bs  # it would be compiled for its own shape
    if job.args.compile == "on" and (short or job.refused):
        row, logits = batch_gradient(job.context, batch)
        set_grads(job, row)
        return logits
    logits = job.model(batch.x)
    loss = F.cross_entropy(logits, batch.y, reduction="sum")
    job.fabric.backward(loss * (job.fabric.world_size / batch.size))  # DDP averages over the processes
    return logits.detach()


def measured_gradient(job: TrainingJob, batch: Batch, step: int) -> tuple[Tensor, dict]:
    """Put the sum of the clean and the noisy gradient into `.grad`; returns the logits (b, K) and what was measured."""
    forward = measure.make_forward(job.context, batch)
    rows, values = measure.measure_batch(job.context, batch, step, forward)
    set_grads(job, metrics.add_rows(rows))
    return forward.logits, values


def set_grads(job: TrainingJob, row: list[Tensor]) -> None:
    """Put a gradient into `.grad`, laid out like its weight: fused SGD walks both in memory order."""
    for p, g in zip(job.parameters, row, strict=True):
        p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)


def train_step(job: TrainingJob, batch: Batch, step: int, measured: bool) -> dict:
    """One optimizer step; on a `measured` one returns its values by tag: floats, 0-d tensors, (m,) ones as histograms.

    The values belong to the weights before the update. In `--measure-bn train` the update is made with the sum of
    the clean and the noisy gradient; in the other modes, and on plain steps, by one backward of the mean loss. What
    `--measure full` adds comes from the same forward and leaves no trace.
    """
    args, values = job.args, {}
    split_mode = args.measure_bn if measured and args.measure != "off" else None
    full = measured and args.measure == "full"
    lr, momentum = schedule(args.sched, step, job.sched_steps, args.lr, args.momentum)
    for group in job.optimizer.param_groups:
        group["lr"], group["momentum"] = lr, momentum

    # Forward and gradient
    if split_mode == "eval":  # before the step moves the running statistics
        values = measure.measure_apart(job.context, batch, step)
    job.context.seed_dropout(step)
    if split_mode == "train":
        logits, values = measured_gradient(job, batch, step)
    elif job.graph and batch.size == args.bs:
        logits = job.graph(job, batch)
    else:
        logits = plain_gradient(job, batch)

    # Measures
    if split_mode == "separate":
        values = measure.measure_apart(job.context, batch, step, own=[p.grad for p in job.parameters])
    if measured:
        counts = sum_over_ranks(job.fabric, metrics.batch_counts(logits.detach(), batch.y, batch.noisy))
        values |= metrics.batch_measures(counts, batch.size, batch.n_noisy)
        values |= {"optim/lr": lr, "optim/momentum": momentum}
        values["optim/temperature"] = metrics.temperature(lr, batch.size, momentum)
    if full:
        norms = torch._foreach_norm([p.grad for p in job.parameters])
        values["grad/norm_per_layer"] = torch.stack(norms) / job.context.loss_scale()
        before = [p.detach().clone() for p in job.parameters]

    # Update
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if full:
        moved = torch._foreach_sub([p.detach() for p in job.parameters], before)
        values["optim/update_norm"] = torch.stack(torch._foreach_norm(moved)).norm()
    return values


@torch.no_grad()
def evaluate(job: TrainingJob, images: Images, labels: Tensor) -> tuple[float, float]:
    """(mean loss, accuracy) on a whole set in eval mode, each example counted once however many processes there are."""
    job.context.average_buffers()
    a, b = data.shard(images.n, job.fabric.global_rank, job.fabric.world_size)
    sums = torch.zeros(3, dtype=torch.float64, device=labels.device)
    job.module.eval()
    for i in range(a, b, EVAL_BATCH):
        at = torch.arange(i, min(i + EVAL_BATCH, b), device=labels.device)
        y = labels[i : i + len(at)]
        sums += metrics.batch_counts(job.context.logits(images.plain(at)), y, torch.zeros_like(y, dtype=torch.bool))
    job.module.train()
    loss, hit, _ = sum_over_ranks(job.fabric, sums).tolist()  # here the host waits for the device
    return loss / images.n, hit / images.n


# ------------------------------------------------------------------------------------------------------------- run


def validate(job: TrainingJob, record: Record) -> None:
    """`val/*` at x = updates made, the best accuracy so far, and what else stands after an epoch."""
    step, (loss, acc) = job.state.step, evaluate(job, *job.val)
    record.log(step, {"val/loss": loss, "val/acc": acc})
    record.flush()
    if step and acc > job.state.best_val_acc:  # an untrained network's is chance
        job.state.best_val_acc = acc
        if job.args.best:
            keep_best(job, record)
    if job.state.plan:
        epoch, rest = divmod(step, job.steps_per_epoch)
        record.log(step, epochwise.measure_after_epoch(job.context, epoch + bool(rest), step))
        record.flush()


def fit(job: TrainingJob, record: Record, signals: Signals) -> None:
    """Train from `job.state` to the end."""
    args, state, device, fabric = job.args, job.state, job.fabric.device, job.fabric
    flush_every = args.measure_every * (1 if device.type == "cpu" else FLUSH_EVERY)
    warmup = state.step + (WARMUP if job.total_steps - state.step > 2 * WARMUP else 0)
    bar = tqdm(total=job.total_steps, initial=state.step, unit="step", disable=not record.active)
    bar.mininterval = 0.2 if sys.stderr.isatty() else 20  # seconds between lines in a log file
    try:
        fast.make_ready(job, plain_gradient)
    except fast.Unfit as e:
        if not job.auto:
            raise
        record.say(f"warning: {e}; this run goes on without")
        job.refused = True
    profile = fast.profiler(args.profile, record.folder, record.active, WARMUP, device.type == "cuda")
    clock, images, plan = time.perf_counter(), 0, None
    speed = pace.Pace(args.threads, watch=record.active and device.type == "cpu")
    with bar, profile as tracing:
        if state.step == 0:
            if "val/acc" not in record.latest:  # else a signal stopped the run here
                validate(job, record)
            agree(job, record, signals)
        while state.step < job.total_steps:
            step, epoch, number = state.step, *divmod(state.step, job.steps_per_epoch)
            if plan is None or number == 0:
                bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
                plan = job.train.epoch(args.seed, epoch)
                clock, images = time.perf_counter(), 0
                speed.go_on()
            if step == warmup:
                synchronize(device)
                clock, images = time.perf_counter(), 0
                speed.restart()

            batch = job.train.batch(plan, number, args.bs, fabric.global_rank, fabric.world_size)
            values = train_step(job, batch, step, measured=step % args.measure_every == 0)
            state.step += 1
            images += batch.size
            speed.step(batch.size)
            bar.update()
            if tracing:
                tracing.step()

            if values:
                record.log(step, values)
                if step % flush_every == 0:
                    record.flush()  # here the host waits for the device
                    show_progress(bar, record)
                    slow = speed.check() if step > warmup else None
                    if slow:
                        record.say(slow)
            epoch_ended = number + 1 == job.steps_per_epoch
            if epoch_ended or state.step == job.total_steps:
                record.flush()
                synchronize(device)
                speed.pause()
                if state.step > warmup:
                    state.steps_seconds += time.perf_counter() - clock
                    state.steps_images += images
            if epoch_ended:
                validate(job, record)
                show_progress(bar, record)
                checkpoint(job, record)
            if agree(job, record, signals) and not epoch_ended:
                synchronize(device)
                speed.pause()
                paused = time.perf_counter()
                checkpoint(job, record)
                clock += time.perf_counter() - paused
                speed.go_on()
        if state.step % job.steps_per_epoch:  # --max-steps within an epoch: saved first, for it may grow
            checkpoint(job, record)
            validate(job, record)


def show_progress(bar: tqdm, record: Record) -> None:
    """Loss and validation accuracy behind the progress bar."""
    loss, acc = record.latest.get("train/loss", math.nan), record.latest.get("val/acc", math.nan)
    bar.set_postfix(loss=f"{loss:.3f}", val_acc=f"{acc:.4f}", refresh=False)


def run(args, signals: Signals) -> int:
    """One run from checked options to its finished folder; returns the exit status. Raises `InputError`."""
    began = time.perf_counter()
    folder = Path(args.runs, args.name)
    if args.resume:
        check_folder(folder)
    earlier = first_config(folder) if args.resume else None
    if earlier:
        options.continue_from(args, earlier)
    if args.precision == "64-true":
        torch.set_default_dtype(torch.float64)  # Fabric alone would hand back float32 logits
    memory.check(args, on_gpu=args.accelerator != "cpu" and torch.cuda.device_count() > 0)
    source = datasets.load(args)
    indices = index, held = data.split(len(source.x_train), args.val_frac, args.split_seed, args.subset)
    if args.bs > len(index):
        raise InputError(f"--bs {args.bs}: larger than the training split of {len(index)} examples")
    if args.model != "resnet18" and source.x_train.shape[1] < 32:
        raise InputError(f"--model {args.model}: needs images of at least 32 pixels, not {source.x_train.shape[1]}")
    labels, ledger, by_epoch = relabel(args, source, index)
    if args.fake_mask is not None and ledger["changed"]:
        raise InputError(
            f"--fake-mask {args.fake_mask}: only over clean labels, and {ledger['changed']} are changed here"
        )
    if earlier:
        check_labels(earlier, ledger, folder)

    fabric, scaler = make_fabric(args)
    with memory.explained(args, source):
        job = prepare(args, source, indices, labels, fabric, scaler, by_epoch)
    record = Record(folder, active=fabric.is_global_zero, began=began)

    def check(state: dict, path: Path) -> None:
        """Raise `InputError` unless a checkpoint's content is of this run."""
        options.continue_from(args, state["config"])
        check_labels(state["config"], ledger, folder)
        schema.check_fits(state, job, path)

    def claim() -> tuple[str | None, dict | None, str | None]:
        """The checkpoint, the config.json and the status of the run, all read under its lock."""
        saved = record.claim(args.resume, check)
        return saved, read_config(folder), read_status(folder)

    signals.hold()  # from here on there is a folder, and a run that can be saved
    saved, now, ended = on_rank_zero(fabric, claim)
    state = load_on_all_ranks(fabric, folder / saved, check) if saved else {}
    if now:  # it may have changed since
        options.continue_from(args, now)
        check_labels(now, ledger, folder)
    earlier = now or state.get("config") or {}
    if fabric.world_size > 1 and args.sync_bn == "on" and any(type(m) is nn.BatchNorm2d for m in job.module.modules()):
        record.say(
            "warning: torch has no SyncBatchNorm on CPUs, so each process normalises by its own part of the batch and the "
            "run depends on the number of processes; --norm gn does not (--sync-bn off silences this)"
        )
    if args.precision == "16-mixed" and fabric.device.type == "cpu":
        record.say("warning: --precision 16-mixed is slow on a CPU; 32-true is usually faster there")
    if saved:
        restore(job, record, state)
        if ended == "finished" and job.state.step >= job.total_steps:
            record.say(f"{folder} has finished already: {job.state.step} steps")
            record.close()
            return 0
        drop_later_best(job, record)
        record.say(f"resuming {args.name} at step {job.state.step} of {job.total_steps}")

    status, reason, summary = "failed", None, {}
    try:
        config = describe(job, source, held, ledger)
        segment = {
            "step": job.state.step,
            **{k: config["options"][k] for k in options.HARDWARE},
            **config["versions"],
            **{k: config["resolved"][k] for k in ("device", "cpu_features")},
        }
        config["segments"] = [*earlier.get("segments", []), segment]
        record.configure(config)
        record.open_events(state["events"] if saved else {})
        record.session_started()
        if not saved:
            record.start(ledger, index, source.y_train[index], labels, source, job.state.plan)
            record.log(0, {"noise/nominal": ledger["nominal"], "noise/realised": ledger["realised"]})
        summarize(job, record, "running")
        raise_if_fault(job, record)
        announce(job, record, noisefile.describe(ledger, source.classes))
        fit(job, record, signals)
        _, acc = evaluate(job, *job.test)
        record.log(job.state.step, {"test/acc": acc})
        record.flush()
        record.session_ended("finished")
        raise_if_fault(job, record)  # a signal comes too late now, a full disk does not
        status = "finished"
    except Stopped as e:
        status, reason = "stopped", str(e)
        where = f"after step {job.state.step - 1}" if job.state.step else "before the first step"
        record.say(f"stopped by {e} {where}; --resume goes on from there")
    except (NotFinite, Fault, fast.Unfit) as e:
        reason = str(e)
        checkpoint(job, record, "failed.ckpt")
        options.complain(f"{e}" + "; the state is in failed.ckpt" * (record.fault is None))
    except BaseException as e:
        expected = memory.message(args, e, source) if memory.asked(e) is not None else lost_process(e)
        reason = expected or f"{type(e).__name__}: {e}"
        if fabric.is_global_zero and not expected:
            raise
        complain_on_any_rank(expected or "".join(traceback.format_exception_only(e)))
    finally:
        if status == "failed":
            record.session_ended("failed")
        record.close_events()
        summary = summarize(job, record, status, reason)
        late = fault_on_any_rank(job, record) if status != "failed" else None  # in the last that was written
        if late:
            status = "failed"
            options.complain(late)
            summarize(job, record, status, late)
        record.close()
    if record.active and status == "finished":
        print_table(ledger, summary, folder)
    if fabric.world_size > 1 and status != "failed":
        fabric.barrier()  # a launcher kills rank 0 as soon as another one has left with a status of its own
    return STATUS[status]


def complain_on_any_rank(line: str) -> None:
    """The error's line, with the rank before it unless that is 0."""
    if options.rank_zero():
        options.complain(line)
    else:
        rank = os.environ.get("RANK") or os.environ["LOCAL_RANK"]
        print(f"train.py: rank {rank}: {' '.join(line.split())}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn bad input into one line and status 2."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    options.show_anything()
    before, signals = torch.get_default_dtype(), Signals()
    try:
        with signals.caught():
            args = options.parse(argv)
            return run(args, signals)
    except InputError as e:
        options.complain(options.shortened(str(e), argv or ()))
        return 2
    except Interrupted as e:
        say_ended(str(e))
        return STATUS["stopped"]
    except (RuntimeError, MemoryError) as e:
        expected = lost_process(e)
        if memory.asked(e) is not None:
            expected = memory.message(args, e)
        if not expected and not isinstance(e, memory.NotEnough):
            raise
        complain_on_any_rank(expected or str(e))
        return STATUS["failed"]
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    sys.exit(main())
