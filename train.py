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

from engine import machine

machine.wait_briefly()
if __name__ == "__main__":
    machine.explain_loading("train.py")

import logging
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import epochwise
import measure
import metrics
import models
from data import Batch, InputError, one_line
from engine import cmdline, examples, fast, identity, launchers, memory, noisefile, options, roles
from engine.agreement import Fault, Stopped, agree, complain_on_any_rank, fault_on_any_rank, raise_if_fault
from engine.checkpoints import (
    Claimed,
    check_images,
    check_labels,
    checkpoint,
    claim_folder,
    drop_later_best,
    keep_best,
    restore,
    warn_of_room,
)
from engine.evaluation import evaluate
from engine.hardware import lost_process, make_fabric, sum_over_ranks
from engine.inputs import Inputs, read_inputs
from engine.interrupts import Interrupted, Signals, print_ended
from engine.job import TrainingJob, prepare
from engine.record import NotFinite, Record, check_folder, first_config
from engine.stepclock import StepClock
from engine.summary import print_plan, print_results_table, run_config, summarize
from gradsplit import add_rows, get_grads, set_grads
from measure import batch_gradient
from optim import OPTIMIZERS, adjust
from series import LR, MOMENTUM, TEST_ACC, TRAIN_LOSS, VAL_ACC, VAL_LOSS

WARMUP = 10  # steps not counted in images_per_second
FLUSH_EVERY = 10  # measured steps whose values wait on a GPU before they are brought over together
GPU_ERRORS = getattr(torch, "AcceleratorError", ())  # of later versions of torch
STATUS = {"finished": 0, "failed": 1, "stopped": 3}  # exit status


# ------------------------------------------------------------------------------------------------------------ step


def plain_gradient(job: TrainingJob, batch: Batch) -> Tensor:
    """Put the batch's mean loss gradient into `.grad`; returns the logits (b, K), detached."""
    args = job.args
    by_compiler = (
        args.compile == "on" and not job.refused and batch.size == args.bs
    )  # which would compile a short one anew
    # DDP waits for gradients that a network of one's own may leave out: at random, by what it sees, from some step on.
    if not by_compiler and (args.compile == "on" or job.fabric.world_size > 1 and models.is_own(args.model)):
        row, forward = batch_gradient(job.context, batch)
        set_grads(job.parameters, forward.for_grads(row))
        return forward.logits
    logits = job.model(batch.x)
    loss = job.context.training_loss(logits, batch.y, "sum")
    job.fabric.backward(loss * (job.fabric.world_size / batch.size))  # DDP averages over the processes
    return logits.detach()


def measured_gradient(job: TrainingJob, batch: Batch, step: int) -> tuple[Tensor, dict]:
    """Put the sum of the clean and the noisy gradient into `.grad`; returns the logits (b, K) and what was measured."""
    forward = measure.make_forward(job.context, batch)
    rows, values = measure.measure_batch(job.context, batch, step, forward)
    set_grads(job.parameters, forward.for_grads(add_rows(rows)))
    return forward.logits, values


def train_step(job: TrainingJob, batch: Batch, step: int, measured: bool) -> dict:
    """One optimizer step; on a `measured` one returns its values by tag: floats, 0-d tensors, (m,) ones as histograms.

    The values belong to the weights before the update. In `--measure-bn train` the update is made with the sum of
    the clean and the noisy gradient; in the other modes, and on plain steps, by one backward of the mean loss. What
    `--measure full` adds comes from the same forward and leaves no trace.
    """
    args, values = job.args, {}
    split_mode = args.measure_bn if measured and args.measure != "off" else None
    full = measured and args.measure == "full"
    lr, momentum = job.course.at(step)
    adjust(job.optimizer, lr, momentum)

    # Forward and gradient
    if split_mode == "eval":  # before the step moves the running statistics
        values = measure.measure_apart(job.context, batch, step)
    job.context.seed_dropout(step)
    if split_mode == "train":
        logits, values = measured_gradient(job, batch, step)
    elif fast.is_replayed(job, batch):
        logits = job.graph(job, batch)
    else:
        logits = plain_gradient(job, batch)

    # Measures
    if split_mode == "separate":
        values = measure.measure_apart(job.context, batch, step, own=get_grads(job.parameters))
    if job.examples:
        job.examples.add(batch, logits)
    if measured:
        loss = job.context.training_loss(logits.detach(), batch.y, "sum")
        counts = sum_over_ranks(job.fabric, metrics.batch_counts(logits.detach(), batch.y, batch.noisy, loss))
        values |= metrics.batch_measures(counts, batch.size, batch.n_noisy)
        values |= {LR: lr, MOMENTUM: momentum}
        if OPTIMIZERS[args.optimizer].sgd:
            values["optim/temperature"] = metrics.temperature(lr, batch.size, momentum)
    if full:
        norms = torch._foreach_norm([p.grad for p in job.parameters if p.grad is not None])
        values["grad/norm_per_layer"] = torch.stack(norms) / job.context.loss_scale()
        before = [p.detach().clone() for p in job.parameters]

    # Update
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if full:
        moved = torch._foreach_sub([p.detach() for p in job.parameters], before)
        values["optim/update_norm"] = torch.stack(torch._foreach_norm(moved)).norm()
    return values


# ------------------------------------------------------------------------------------------------------------- run


def validate(job: TrainingJob, record: Record) -> None:
    """`val/*` at x = updates made, the best accuracy so far, and what else stands after an epoch."""
    step, (loss, acc, predicted) = job.state.step, evaluate(job, *job.val)
    true, K = job.val[1].cpu(), len(job.context.transition)
    job.context.confusion = metrics.confusion(true, predicted, K)
    record.log(step, {VAL_LOSS: loss, VAL_ACC: acc})
    if job.val_given is not None:
        record.log(step, {"val/acc_noisy": float((predicted == job.val_given).double().mean())})
    if job.examples and step and step % job.steps_per_epoch == 0:
        record.log(step, job.examples.end_epoch(job.train.labels, job.train.noisy))
    record.flush()
    if step and acc > job.state.best_val_acc:  # an untrained network's is chance
        job.state.best_val_acc = acc
        if job.args.best:
            keep_best(job, record)
    if job.state.plan:
        epoch, rest = divmod(step, job.steps_per_epoch)
        values = epochwise.measure_after_epoch(job.context, epoch + bool(rest), step, record.say, ends_the_run)
        record.log(step, values)
        record.flush()


def fit(job: TrainingJob, record: Record, signals: Signals) -> None:
    """Train from `job.state` to the end."""
    args, state, device = job.args, job.state, job.fabric.device
    flush_every = args.measure_every * (1 if device.type == "cpu" else FLUSH_EVERY)
    warmup = state.step + (WARMUP if job.total_steps - state.step > 2 * WARMUP else 0)
    bar = tqdm(total=job.total_steps, initial=state.step, unit="step", disable=not record.active)
    bar.mininterval = 0.2 if sys.stderr.isatty() else 20  # seconds between lines in a log file
    fast.make_ready_or_go_without(job, plain_gradient, record.say)
    profile = fast.profiler(args.profile, record.folder, record.active, WARMUP, device.type == "cuda")
    plan, clock = None, StepClock(device, state, warmup)
    with bar, profile as tracing:
        if state.step == 0:
            if VAL_ACC not in record.latest:  # else a signal stopped the run here
                validate(job, record)
            agree(job, record, signals)
        while state.step < job.total_steps:
            step, epoch, number = state.step, *divmod(state.step, job.steps_per_epoch)
            if plan is None or number == 0:
                bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
                plan = job.train.epoch(args.seed, epoch)
                clock.start()
            if step == warmup:
                clock.start()

            measured = step % args.measure_every == 0
            batch = fast.next_batch(job, plan, number, measured)
            values = train_step(job, batch, step, measured)
            state.step += 1
            clock.count(batch.size)
            bar.update()
            if tracing:
                tracing.step()

            if values:
                record.log(step, values)
                if step % flush_every == 0:
                    record.flush()  # here the host waits for the device
                    show_progress(bar, record)
            epoch_ended = number + 1 == job.steps_per_epoch
            if epoch_ended or state.step == job.total_steps:
                record.flush()
                clock.stop()
            if epoch_ended:
                validate(job, record)
                show_progress(bar, record)
            if agree(job, record, signals):
                clock.stop()
                checkpoint(job, record)
                clock.start()
        if state.step % job.steps_per_epoch:  # the run ends within an epoch: saved before, for it may grow
            validate(job, record)


def ends_the_run(e: Exception) -> bool:
    """Whether an exception is of the memory, the GPU or another process, and not of what is measured on this network."""
    return memory.requested_bytes(e) is not None or isinstance(e, GPU_ERRORS) or lost_process(e) is not None


def show_progress(bar: tqdm, record: Record) -> None:
    """Loss and validation accuracy behind the progress bar."""
    loss, acc = record.latest.get(TRAIN_LOSS, math.nan), record.latest.get(VAL_ACC, math.nan)
    bar.set_postfix(loss=f"{loss:.3f}", val_acc=f"{acc:.4f}", refresh=False)


def run(args, signals: Signals) -> int:
    """One run from checked options to its finished folder; returns the exit status. Raises `InputError`."""
    began = time.perf_counter()
    folder = Path(args.runs, args.name)
    if args.resume:
        check_folder(folder)
    earlier = first_config(folder) if args.resume else None
    if earlier:
        identity.continue_from(args, earlier)
    if args.precision == "64-true":
        torch.set_default_dtype(torch.float64)  # Fabric alone would hand back float32 logits
    # What reads and draws the data shares the cores with other runs, too.
    torch.set_num_threads(args.threads or min(torch.get_num_threads(), machine.cores()))
    memory.require_memory(args, on_gpu=args.accelerator != "cpu" and torch.cuda.device_count() > 0)
    inputs = read_inputs(args)
    if earlier:
        check_labels(earlier, inputs.ledger, folder)
        check_images(earlier, inputs.source, folder)

    fabric, scaler = make_fabric(args)
    job = prepare(args, inputs.source, inputs.indices, inputs.labels, fabric, scaler, inputs.by_epoch, inputs.val_given)
    inputs = inputs.without_images()  # `job` has its own
    record = Record(folder, active=fabric.is_global_zero, began=began)
    signals.hold()  # from here on there is a folder, and a run that can be saved
    claimed = claim_folder(job, record, inputs.ledger)
    if fabric.world_size > 1 and args.sync_bn == "on" and any(type(m) is nn.BatchNorm2d for m in job.module.modules()):
        record.say(
            "warning: torch has no SyncBatchNorm on CPUs, so each process normalises by its own part of the batch and the "
            "run depends on the number of processes; --norm gn does not (--sync-bn off silences this)"
        )
    if args.precision == "16-mixed" and fabric.device.type == "cpu":
        record.say("warning: --precision 16-mixed is slow on a CPU; 32-true is usually faster there")
    if claimed.checkpoint:
        restore(job, record, claimed.checkpoint)
        if claimed.status == "finished" and job.state.step >= job.total_steps:
            record.say(f"{folder} has finished already: {cmdline.counted(job.state.step, 'step')}")
            record.close()
            return 0
        drop_later_best(job, record)
        record.say(f"resuming {args.name} at step {job.state.step} of {job.total_steps}")
    for note in inputs.source.notes:
        record.say(note)
    status = train_and_record(job, record, inputs, claimed, signals)
    if fabric.world_size > 1 and status != "failed":
        fabric.barrier()  # a launcher kills rank 0 as soon as another one has left with a status of its own
    return STATUS[status]


def train_and_record(job: TrainingJob, record: Record, inputs: Inputs, claimed: Claimed, signals: Signals) -> str:
    """Train to the end, test, and write in the folder how the run ended; returns its status."""
    status, reason, ledger = "failed", None, inputs.ledger
    try:
        start_record(job, record, inputs, claimed)
        summarize(job, record, "running")
        raise_if_fault(job, record)
        if record.active:
            warn_of_room(job, record)
        print_plan(job, record, noisefile.describe_labels(ledger, inputs.source.classes))
        fit(job, record, signals)
        record.log(job.state.step, {TEST_ACC: evaluate(job, *job.test).acc})
        record.flush()
        if job.args.examples:
            write_ranking(job, record, inputs)
        record.session_ended("finished")
        raise_if_fault(job, record)  # a signal comes too late now, a full disk does not
        status = "finished"
    except Stopped as e:
        status, reason = "stopped", str(e)
        where = f"after step {job.state.step - 1}" if job.state.step else "before the first step"
        record.say(f"stopped by {e} {where}; --resume goes on from there")
    except (NotFinite, Fault, fast.Unfit) as e:
        reason = str(e)
        if isinstance(e, fast.CaptureFailed) and fast.is_own_process():
            status = "stopped"
            record.say(f"warning: {e}; the run goes on in a fresh process, without --graph")
            raise
        checkpoint(job, record, "failed.ckpt")
        cmdline.complain(f"{e}" + "; the state is in failed.ckpt" * (record.fault is None))
    except BaseException as e:
        expected = memory.message(e) if memory.requested_bytes(e) is not None else lost_process(e)
        reason = expected or f"{type(e).__name__}: {one_line(e)}"
        if job.fabric.is_global_zero and not expected:
            raise
        complain_on_any_rank(reason)
    finally:
        if status == "failed":
            record.session_ended("failed")
        record.close_events()
        summary = summarize(job, record, status, reason)
        late = fault_on_any_rank(job, record) if status != "failed" else None  # in the last that was written
        if late:
            status = "failed"
            cmdline.complain(late)
            summarize(job, record, status, late)
        record.close()
    if record.active and status == "finished":
        print_results_table(ledger, summary, record.folder)
    return status


def write_ranking(job: TrainingJob, record: Record, inputs: Inputs) -> None:
    """Write examples.npz, or say why there is none."""
    if not job.examples.epochs:
        record.say(f"{examples.NAME} is not written: no epoch was followed from its start to its end")
    elif record.active:
        index = inputs.indices[0]
        columns = index, inputs.labels, inputs.source.y_train[index], inputs.source.names
        record.guard(examples.NAME, job.examples.write, record.folder / examples.NAME, *columns)


def start_record(job: TrainingJob, record: Record, inputs: Inputs, claimed: Claimed) -> None:
    """Write what is known before the first step, with one more segment in config.json, and open the event file."""
    source, index = inputs.source, inputs.indices[0]
    config = run_config(job, source, inputs.ledger)
    segment = {
        "step": job.state.step,
        **{k: config["options"][k] for k in roles.having(roles.HARDWARE)},
        **config["versions"],
        **{k: config["resolved"][k] for k in ("device", "cpu_features")},
    }
    config["segments"] = [*claimed.config.get("segments", []), segment]
    record.configure(config)
    record.open_events(claimed.checkpoint["events"] if claimed.checkpoint else {})
    if not claimed.checkpoint:
        ledger = inputs.ledger
        first = job.train.images.whole(torch.arange(min(16, len(job.train)))).permute(0, 2, 3, 1).cpu()
        record.start(ledger, index, source.y_train[index], inputs.labels, first, source.classes, job.state.plan)
        record.log(0, {"noise/nominal": ledger["nominal"], "noise/realised": ledger["realised"]})


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn bad input into one line and status 2."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    cmdline.show_anything()
    before, signals = torch.get_default_dtype(), Signals()
    try:
        with signals.caught():
            args = options.parse(argv)
            launchers.settle(args.devices, args.num_nodes)
            return run(args, signals)
    except InputError as e:
        cmdline.complain(cmdline.shortened(str(e), argv or ()))
        return 2
    except Interrupted as e:
        print_ended(str(e))
        return STATUS["stopped"]
    except fast.CaptureFailed:
        fast.start_again_without_graph()
    except (RuntimeError, MemoryError) as e:
        expected = lost_process(e)
        if memory.requested_bytes(e) is not None:
            expected = memory.message(e)
        if not expected:
            raise
        complain_on_any_rank(expected)
        return STATUS["failed"]
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    sys.exit(main())
