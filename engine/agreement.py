"""What the processes of a run agree on, at the same step: to stop, to save, and that the file system refuses to write;
and how each of them reports an error."""

import os
import sys
import time

import torch

from data import printable
from engine import cmdline, launchers
from engine.checkpoints import checkpoint
from engine.hardware import sum_over_ranks
from engine.interrupts import Signals
from engine.job import TrainingJob
from engine.record import Record

POLL_EVERY = 10  # steps between agreements of several processes on stopping and saving


class Stopped(Exception):
    """A signal asked the run to end; its state is saved."""


class Fault(RuntimeError):
    """The run's folder cannot be written any more."""


def any_rank(job: TrainingJob, *wants: bool) -> list[bool]:
    """Which of `wants` hold on any process; all of them must call it, and it makes their hosts wait for the device."""
    if job.fabric.world_size == 1:
        return list(wants)
    flags = torch.tensor(wants, dtype=torch.float32, device=job.fabric.device)
    return [n > 0 for n in sum_over_ranks(job.fabric, flags).tolist()]


def fault_on_any_rank(job: TrainingJob, record: Record) -> str | None:
    """What the file system has refused, the same answer on all processes; all of them must call it."""
    return (record.fault or "rank 0 cannot write the run's folder") if any_rank(job, bool(record.fault))[0] else None


def agree(job: TrainingJob, record: Record, signals: Signals) -> bool:
    """Whether a checkpoint is due; raises `Stopped` or `Fault`, on all processes at the same step.

    One process decides for itself after every step. Several ask each other, every `POLL_EVERY` steps, after each epoch and
    at the end; when `--checkpoint-minutes` have passed is for the clock of rank 0 to say.
    """
    step, minutes = job.state.step, job.args.checkpoint_minutes
    epoch_ended, run_ended = step % job.steps_per_epoch == 0, step == job.total_steps
    if job.fabric.world_size > 1 and step % POLL_EVERY and not (epoch_ended or run_ended):
        return False
    due = time.monotonic() - record.saved >= 60 * minutes if minutes else epoch_ended
    due = run_ended or record.active and due
    stop, fault, due = any_rank(job, bool(signals.received), bool(record.fault), due)
    if stop and not fault:
        checkpoint(job, record)
    if stop or fault:
        raise_if_fault(job, record)
        raise Stopped(signals.received or "a signal to another process")
    return due


def raise_if_fault(job: TrainingJob, record: Record) -> None:
    """Raise `Fault` on all processes if the file system has refused anything."""
    fault = fault_on_any_rank(job, record)
    if fault:
        raise Fault(fault)


def complain_on_any_rank(line: str) -> None:
    """The error's line, with the rank before it unless that is 0."""
    if launchers.rank_zero():
        cmdline.complain(line)
    else:
        rank = os.environ.get("RANK") or os.environ["LOCAL_RANK"]
        print(f"train.py: rank {rank}: {printable(line)}", file=sys.stderr, flush=True)
