"""Checkpoints and best weights of a run: written whole or not at all, read on all processes, and gone on from."""

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import epochwise
import models
import optim
from data import InputError, Source, one_line
from engine import files, fitting, identity, memory
from engine.hardware import on_rank_zero, sum_over_ranks
from engine.job import TrainingJob
from engine.record import (
    NotFinite,
    Record,
    config_if_readable,
    load_plain,
    load_state,
    size_of,
    status_if_readable,
    write_state,
)


def warn_of_room(job: TrainingJob, record: Record) -> None:
    """Say so where the file system has no room for a run's checkpoints: the last two, the one that is being written, and with
    `--best` as many of the weights alone."""
    args, weights = job.args, size_of(job.module.state_dict())
    kept = [name for name in optim.kept_state(args.optimizer, args.momentum, args.sched) if name != "step"]
    whole = weights + len(kept) * size_of(job.parameters)
    whole += size_of([job.examples.logits, job.examples.totals]) if job.examples else 0
    there = sum(path.stat().st_size for path in record.folder.glob("*.ckpt"))
    needed, free = 3 * whole + 3 * weights * args.best - there, files.free_bytes(record.folder)
    if needed > free:
        amounts = f"{memory.format_bytes(needed)} more of room, and {memory.format_bytes(free)} are free"
        record.say(f"warning: --runs {args.runs}: the checkpoints of this run take up to {amounts}")


def finite_weights(module: nn.Module) -> bool:
    """Whether all parameters and buffers are finite; the host waits for the device."""
    floats = [t.detach() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return bool(torch.stack(torch._foreach_norm(floats, math.inf)).isfinite().all())


def checkpoint(job: TrainingJob, record: Record, name: str = "last.ckpt") -> None:
    """Everything a run consists of, as plain values and tensors; a last.ckpt is written only if all is finite and the
    file system has refused nothing."""
    job.context.average_buffers()
    if name == "last.ckpt":
        record.flush()
        if not finite_weights(job.module):
            raise NotFinite(f"the weights are not finite after step {job.state.step - 1}")
    model = models.counted_state(job.module, job.state.step)
    state = {"model": model, "optimizer": job.optimizer.state_dict(), "config": record.config}
    if job.scaler:
        state["scaler"] = job.scaler.state_dict()
    if job.examples:
        state["examples"] = job.examples.saved()
    now = {"seconds": job.state.seconds + time.perf_counter() - record.began}
    record.checkpoint(state | job.state.saved() | now, name)
    record.saved = time.monotonic()
    job.best_is_saved |= name == "last.ckpt" and record.fault is None


BEST, BEST_BEFORE = "best.ckpt", "best-before.ckpt"


def keep_best(job: TrainingJob, record: Record) -> None:
    """Write the weights of the best validation accuracy so far as best.ckpt, whole or not at all. The one that
    last.ckpt knows of stays as best-before.ckpt, for a run that is resumed from there.

    All is finite, for the validation loss is. `evaluate` has averaged the buffers over the processes.
    """
    if not record.active:
        return
    content = {
        "model": models.counted_state(job.module, job.state.step),
        "step": job.state.step,
        "val_acc": job.state.best_val_acc,
        "config": record.config,
    }

    def replace() -> None:
        best = record.folder / BEST
        temporary = write_state(best, content)
        if best.exists() and job.best_is_saved:
            os.replace(best, record.folder / BEST_BEFORE)
        os.replace(temporary, best)
        job.best_is_saved = False

    record.guard(BEST, replace)


def drop_later_best(job: TrainingJob, record: Record) -> None:
    """Remove best weights that a resumed run does not know of yet. Those of an epoch's end it comes to again; those of a
    validation in mid-epoch, where --max-steps ended it, it does not if it is longer now."""
    if not record.active:
        return

    def later(name: str) -> bool:
        try:
            return load_plain(record.folder / name)["val_acc"] > job.state.best_val_acc
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


def restore(job: TrainingJob, record: Record, state: dict) -> None:
    """Go on from a checkpoint's content."""
    job.module.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    if job.scaler:
        job.scaler.load_state_dict(state["scaler"])
    if job.examples and "examples" in state:  # a checkpoint of a version or a start without them has none
        job.examples.restore(state["examples"], holds_table=job.fabric.is_global_zero)
    job.state.restore(state)
    job.state.plan = epochwise.kept_plan(state.get("plan") or {}, job.state.plan)
    record.restore(state)


def check_labels(config: dict, ledger: dict, folder: Path) -> None:
    """Raise `InputError` if the run in `folder` was started with other labels."""
    if config["noise"]["labels_sha256"] != ledger["labels_sha256"]:
        raise InputError(f"--resume: the labels are not those that {folder} was started with; has the data changed?")


def check_images(config: dict, source: Source, folder: Path) -> None:
    """Raise `InputError` if the run in `folder` was started with other images."""
    first = config.get("resolved", {}).get("data_digest")
    if first and first != source.digest:
        raise InputError(f"--resume: the images are not those that {folder} was started with; has the data changed?")


def check_matrix(config: dict, job: TrainingJob, folder: Path) -> None:
    """Raise `InputError` if the run in `folder` was started with another transition matrix in its loss."""
    first = config.get("resolved", {}).get("loss_matrix_sha256")
    if first and first != job.loss_matrix_sha256:
        raise InputError(f"--loss {job.args.loss}: its matrix is not the one that {folder} was started with")


def load_on_all_ranks(fabric, path: Path, check) -> dict:
    """A checkpoint on every process; where one of them cannot read it, or finds a wrong field, all raise `InputError`."""
    state, reason = None, "by another process"
    try:
        state = load_state(path)
        check(state, path)
    except Exception as e:  # rank 0 has read it once: now it cannot be read here
        state, reason = None, f"({one_line(e)})"
    if sum_over_ranks(fabric, torch.tensor(float(state is None), device=fabric.device)) > 0:
        raise InputError(f"--resume: {path} cannot be read {reason}; nothing was changed")
    return state


class Claimed(NamedTuple):
    """What lies in a run's folder, read under its lock."""

    checkpoint: dict  # content of the one to go on from; {} for a start at step 0
    config: dict  # config.json or, where that is lost, the checkpoint's; {} for a new run
    status: str | None  # in summary.json


def claim_folder(job: TrainingJob, record: Record, ledger: dict) -> Claimed:
    """Create or take over the run's folder and lock it; the same on all processes. Raises `InputError`."""
    args, folder = job.args, record.folder

    def check(state: dict, path: Path) -> None:
        """Raise `InputError` unless a checkpoint's content is of this run."""
        identity.continue_from(args, state["config"])
        check_labels(state["config"], ledger, folder)
        check_matrix(state["config"], job, folder)
        fitting.check_fits(state, job, path)

    def claim() -> tuple[str | None, dict | None, str | None]:
        name = record.claim(args.resume, check)
        return name, config_if_readable(folder), status_if_readable(folder)

    name, config, status = on_rank_zero(job.fabric, claim)
    state = load_on_all_ranks(job.fabric, folder / name, check) if name else {}
    if config:  # it may have changed since
        identity.continue_from(args, config)
        check_labels(config, ledger, folder)
        check_matrix(config, job, folder)
    return Claimed(state, config or state.get("config") or {}, status)
