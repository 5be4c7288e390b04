"""Memory: what the data set takes, known before it is read, and one line for an allocation that failed."""

import re

import torch

from data import PAD, InputError
from datasets import DATASETS, known_shape
from engine import machine
from engine.sources import own_shape

REFUSED = re.compile(r"DefaultCPUAllocator|bad_alloc|out of memory|can't allocate memory", re.IGNORECASE)
AMOUNT = re.compile(r"allocate (\d+\.?\d*) ?(bytes|[KMGT]iB)", re.IGNORECASE)
UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def requested_bytes(e: BaseException) -> int | None:
    """Bytes of the allocation whose failure `e` is, 0 if its message does not tell how many; None if it is another exception."""
    refused = isinstance(e, RuntimeError) and REFUSED.search(str(e))
    if not refused and not isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return None
    amount = AMOUNT.search(str(e))
    return int(float(amount[1]) * UNITS[amount[2].lower()]) if amount else 0


def format_bytes(size: float) -> str:
    """Bytes as people read them, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):  # noqa: B007
        if size < 1024:
            break
        size /= 1024
    else:
        unit = "TiB"
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def message(e: BaseException) -> str:
    """One line for an allocation that failed."""
    wanted = f" for {format_bytes(requested_bytes(e))} more" if requested_bytes(e) else ""
    return f"not enough memory{wanted}; a smaller --bs, --width or --subset needs less"


def of_data(args) -> tuple[int, int] | None:
    """Bytes of the data set's images as they are read, and as they are kept for training and evaluation (on the GPU, if
    there is one); both are held at once while the second are made. None where their sizes are not known beforehand."""
    own = args.dataset not in DATASETS
    shape = own_shape(args.dataset, args.image_size, args.subset) if own else known_shape(args)
    if shape is None:
        return None
    n, n_test, H, W, C, _, n_val = shape
    used = min(n, args.subset or n)
    held = 0 if n_val else round(args.val_frac * used)
    copies, pad = (1, 0) if args.no_augment else (2, PAD)  # a padded copy and its mirror image
    train = copies * (used - held) * (H + 2 * pad) * (W + 2 * pad) * C
    return (n + n_test + n_val) * H * W * C, train + (held + n_test + n_val) * H * W * C


def require_memory(args, on_gpu: bool) -> None:
    """Raise `InputError` for a data set that cannot be held: the system would kill the run, without a word."""
    sizes, limit = of_data(args), machine.memory()
    needed = 0 if sizes is None else sizes[0] if on_gpu else sum(sizes)
    if needed > limit:
        synthetic = args.dataset == "synthetic"
        option = f"--synthetic-train {args.synthetic_train}" if synthetic else f"--dataset {args.dataset}"
        raise InputError(
            f"{option}: the images take {format_bytes(needed)} of memory, and this process may use {format_bytes(limit)}"
        )
