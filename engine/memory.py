"""Memory: what a run needs at least, and the one line for when it is not there."""

import math
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import models
import optim
from data import PAD, InputError, Source
from datasets import DATASETS, Shape, known_shape
from engine.sources import own_shape

REFUSED = re.compile(r"DefaultCPUAllocator|bad_alloc|out of memory|can't allocate memory", re.IGNORECASE)
AMOUNT = re.compile(r"allocate (\d+\.?\d*) ?(bytes|[KMGT]iB)", re.IGNORECASE)
UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class NotEnough(RuntimeError):
    """There is too little memory for the run. The message is one line."""


def requested_bytes(e: BaseException) -> int | None:
    """Bytes of the allocation whose failure `e` is, 0 if its message does not tell how many; None if it is another exception."""
    refused = isinstance(e, RuntimeError) and REFUSED.search(str(e))
    if not refused and not isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return None
    amount = AMOUNT.search(str(e))
    return int(float(amount[1]) * UNITS[amount[2].lower()]) if amount else 0


def needed(args, source: Source | None = None) -> dict[str, int]:
    """Bytes of what a run holds from its first step to its last, by what they are for; on a GPU these lie there.

    A lower bound: activations, which grow with the batch, and libraries come on top. The data set is left out where
    its size is not known before it is loaded (`source`).
    """
    if source is not None:
        n_val = 0 if source.x_val is None else len(source.x_val)
        size = Shape(len(source.x_train), len(source.x_test), *source.x_train.shape[1:], len(source.classes), n_val)
    else:
        own = args.dataset not in DATASETS
        size = own_shape(args.dataset, args.image_size, args.subset) if own else known_shape(args)
    parts = {}
    if size:
        n, n_test, H, W, C, _, n_val = size
        used = min(n, args.subset or n)
        held = 0 if n_val else round(args.val_frac * used)
        copies, pad = (1, 0) if args.no_augment else (2, PAD)  # a padded copy and its mirror image
        stored = copies * (used - held) * (H + 2 * pad) * (W + 2 * pad) * C
        parts["data set"] = stored + (n + held + 2 * n_test + 2 * n_val) * H * W * C  # with the set as it was loaded
    if models.is_own(args.model):
        return parts  # it is not known before it is made
    _, _, H, W, C, K = (size or Shape(0, 0, 32, 32, 3, 10))[:6]
    try:
        with torch.device("meta"):
            module = models.build_model(args.model, C, K, args.width, args.norm, 0, (H, W))
    except Exception:  # not for images of this size, as will be said when they are read
        return parts
    P = sum(p.numel() for p in module.parameters())
    state = optim.kept_state(args.optimizer, args.momentum, args.sched)
    what = f"weights, gradient and {optim.OPTIMIZERS[args.optimizer].state_name}" if state else "weights and gradient"
    parts[what] = (2 + len(state)) * P * (8 if args.precision == "64-true" else 4)
    return parts


def format_bytes(size: float) -> str:
    """Bytes as people read them, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size /= 1024
    else:
        unit = "TiB"
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def message(args, e: BaseException, source: Source | None = None) -> str:
    """One line for an allocation that failed: how much it wanted, and how much the run needs."""
    parts = needed(args, source)
    listed = ", ".join(f"{what} {format_bytes(size)}" for what, size in parts.items())
    wanted = f" for {format_bytes(requested_bytes(e))} more" if requested_bytes(e) else ""
    return (
        f"not enough memory{wanted}; without activations the run needs {format_bytes(sum(parts.values()))} ({listed}); "
        "a smaller --bs, --width, or --subset needs less"
    )


@contextmanager
def explain_out_of_memory(args, source: Source):
    """Turn a failed allocation within the context into `NotEnough`."""
    try:
        yield
    except Exception as e:
        if requested_bytes(e) is None:
            raise
        raise NotEnough(message(args, e, source)) from e


def total() -> float:
    """Bytes of memory that this process may use: the machine's, or its control group's if that is less."""
    limit = math.inf
    with suppress(OSError, ValueError, AttributeError):
        limit = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # "max" is no number
        limit = min(limit, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return limit


def listed(args) -> str:
    """What the run needs at least, in words."""
    parts = needed(args)
    return (
        f"{format_bytes(sum(parts.values()))} ({', '.join(f'{what} {format_bytes(n)}' for what, n in parts.items())})"
    )


def require_memory(args, on_gpu: bool) -> None:
    """Raise `InputError` for a run that cannot fit: the system would kill it, without a word. Where it goes to a GPU that
    is own data that cannot be read into this machine's memory."""
    small = args.synthetic_train + args.synthetic_test < 10**6 and args.width <= 128
    if args.dataset in DATASETS and (on_gpu or small and args.model in models.MODELS):
        return  # what cannot be too much is not counted
    parts, limit = needed(args), total()
    if on_gpu:
        shape = own_shape(args.dataset, args.image_size, args.subset)
        parts = (
            {"data set": (shape.train + shape.test + shape.val) * shape.height * shape.width * shape.channels}
            if shape
            else {}
        )
    if sum(parts.values()) <= limit:
        return
    of_data = parts.get("data set", 0) > sum(parts.values()) / 2
    option = f"--synthetic-train {args.synthetic_train}" if args.dataset == "synthetic" else f"--dataset {args.dataset}"
    of_width = f", --width {args.width}" * models.entry(args.model).adjustable
    option = option if of_data else f"--model {args.model}{of_width}"
    amounts = ", ".join(f"{what} {format_bytes(size)}" for what, size in parts.items())
    raise InputError(
        f"{option}: needs {format_bytes(sum(parts.values()))} of memory ({amounts}) and more for activations; "
        f"there are {format_bytes(limit)} here"
    )
