"""The null that `--measure split` brings along: random masks pulled back from the measured step's own forward.

A raw cosine of the clean and the noisy gradient means little without the cosine that a random split of the same batch
into parts of the same sizes gives. One such mask costs one more vector-Jacobian product (2F, F a forward of the batch;
a plain step is 3F), so masks are taken on every `--null-every`-th measured step only.

Shapes: B examples of the global batch, b of them on this process, R masks.
"""

import torch
from torch import Tensor

import data
import measure
from data import Batch
from engine.hardware import copy_to


def due(args, step: int, batch: Batch) -> bool:
    """Whether this measured step of `--measure split` takes random masks. None are defined where C or N is empty."""
    if args.measure != "split" or not args.permutations or batch.n_noisy in (0, batch.size):
        return False
    return step // args.measure_every % args.null_every == 0


def draw(job, batch: Batch, step: int) -> list[Tensor]:
    """R masks (b,) bool on the device, true for what stands in for the clean examples. The host does not wait.

    They come from CPU generators keyed by (seed, mask, step), the streams that `--measure full` uses too: its first
    masks of a step are these.
    """
    args = job.args
    streams = (data.generator(args.seed, f"permutation{r}", step) for r in range(args.permutations))
    stand_ins = torch.stack([~measure.random_mask(batch, args.stratify, g) for g in streams])  # (R, B)
    here = stand_ins[:, batch.first : batch.first + len(batch.y)].contiguous()
    return list(copy_to(here, batch.y.device).unbind())


def measure_split(
    job, batch: Batch, step: int, ahead: measure.Forward, own: list[Tensor] | None, free: bool
) -> tuple[list[list[Tensor]], dict]:
    """The rows of the clean and the noisy part (`measure.split_rows`), and `grad/*` with, where due, `null/permuted_*`.

    `own` is a g that is not the rows' sum, or None; `free` as in `measure.split_rows`.
    """
    wanted, separate = due(job.args, step, batch), len(ahead.pieces) > 1
    masks = draw(job, batch, step) if wanted and not separate else []
    rows = measure.split_rows(job, batch, ahead, free, masks)
    rows, of_masks = rows[: len(rows) - len(masks)], rows[len(rows) - len(masks) :]
    values = measure.split_values(rows, own, batch, measure.loss_scale(job), of_masks)
    if wanted and separate:  # each mask takes two forwards of its own, and the host waits for the device
        values |= measure.permuted(job, batch, step, ahead, own)
    return rows, values


def counted_share(args) -> float:
    """Cost of `--measure split` with its masks as a share of the plain steps: 3F each, a product 2F; nothing is timed."""
    split = 2.0 + (args.measure_bn != "train")  # one more product, and a forward of its own in the other modes
    mask = 2.0 + (args.measure_bn == "separate")
    masks = mask * args.permutations / args.null_every if args.permutations else 0.0
    return (split + masks) / (3.0 * args.measure_every)
