"""What measuring needs of a run, and measuring on a step: which forward, rows and random draws each measure takes, and when.

A `MeasuringContext` is filled in by a run (engine/job.py); nothing here knows of options on a command line, of Fabric or
of a run's folder.

The rows themselves, the split, its random masks and the estimates from parts of a batch are in gradsplit.py.

A measure is a row, `Forward.row(labels, weights)`, and a formula on inner products of rows. A row is dropped as soon as
its products are taken, so that at most five gradients are held beside the training's own.

`--measure split` brings random masks along as its null: a raw cosine of the clean and the noisy gradient means little
without the cosine that a random split of the same batch into parts of the same sizes gives. One such mask costs one more
vector-Jacobian product (2F, F a forward of the batch; a plain step is 3F), so masks are taken on every `--null-every`-th
measured step only.

Shapes: B examples of the global batch, b of them on this process, K classes, P parameters, R masks.
"""

import dataclasses
import math
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import gradsplit
import metrics
from data import Batch
from gradsplit import Context, Forward, Row, batchnorm_mode, inner_products, stream_seed, sum_rows, summed_row

# ------------------------------------------------------------------------------------------- what measuring needs of a run


@dataclass(frozen=True)
class MeasuringOptions:
    """What is measured, when and how: the options of the same names."""

    measure: str  # "off", "split" or "full"
    measure_every: int  # optimizer steps between measured steps
    measure_bn: str  # "train", "eval" or "separate"
    measure_budget: float  # share of the run's cost
    chunks: int  # parts of C and of N
    window: int  # measurements, at most, over which a quarter's corrected estimates are summed
    permutations: int  # random masks
    null_every: int  # measured steps between random masks, with "split"
    stratify: bool  # masks keep each given label's count


@dataclass
class MeasuringState:
    """What measurements carry from one step to the next: plain values, which a checkpoint holds under these names."""

    plan: dict = field(default_factory=dict)  # how far apart the measures of the budget stand, and their counted share
    window: list[list[float]] = field(default_factory=list)  # `metrics.MOMENTS` of this quarter's full measurements
    not_resolved: int = 0  # corrected estimates that were left out
    half_memorized_step: int | None = None  # updates made when first half of the noisy probe examples were fitted
    measure_seconds: dict[str, float] = field(default_factory=dict)  # that each family of the full measurements took

    def saved(self) -> dict:
        """All fields, for a checkpoint."""
        return dataclasses.asdict(self)

    def restore(self, saved: dict) -> None:
        """Take over what `saved` returned, but for the plan: that depends on the length of the run, which may have grown."""
        for f in dataclasses.fields(self):
            if f.name != "plan":
                setattr(self, f.name, saved[f.name])


@dataclass(kw_only=True)
class MeasuringContext(Context):
    """All that measuring takes from a run: `module` is the bare network, `loss` the one that trains, None for cross-entropy."""

    train: data.TrainSet  # the training examples that epoch-wise measures draw from
    transition: Tensor  # (K, K) float64 on the CPU: counts of (true, given) label in the training split
    options: MeasuringOptions
    learning_rate: Callable[[], float]
    state: MeasuringState
    total_steps: int  # optimizer steps until the end, from which measurements are counted back
    steps_per_epoch: int
    batch_size: int = 1  # examples of a training step
    rank: int = 0
    seed: int = 0  # of masks, dropout and curvature
    noise_seed: int = 0  # of fresh labels and of the examples that are probed
    fake_mask: bool = False  # an A/A run: labels are true, and who is called noisy is drawn
    has_dropout: bool = False
    momentum: Callable[[], float] = lambda: 0.0
    left_out: set[str] = field(default_factory=set)  # measures after epochs that could not be had, as has been said
    held_out: data.Images | None = None  # images that are never trained on: those of the validation split
    confusion: Tensor | None = (
        None  # (K, K) float64 on the CPU: counts of (true, predicted) class on these, at these weights
    )

    def training_loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The loss that trains, of `logits` (b, K) against `labels` (b,) int64: "none" (b,), or their "sum" or "mean"."""
        if self.loss is None:
            return F.cross_entropy(logits, labels, reduction=reduction)
        each = gradsplit.example_losses(self.loss, logits, labels)
        return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()

    def seed_dropout(self, step: int) -> None:
        """Give what the network draws, from global generators, a seed that depends on the run's, step and rank."""
        if self.has_dropout:
            seed = stream_seed(self.seed, f"dropout{self.rank}", step)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Give all processes the mean of their running statistics, where BatchNorm is not synchronised."""
        if self.world_size == 1:
            return
        for buffer in self.module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.sum_over_ranks(buffer.clone()).div_(self.world_size))

    @contextmanager
    def timed(self, family: str):
        """Add the seconds that the block takes, on the device too, to the family's account."""
        data.synchronize(self.device)
        began = time.perf_counter()
        yield
        data.synchronize(self.device)
        account = self.state.measure_seconds
        account[family] = account.get(family, 0.0) + time.perf_counter() - began


def batch_gradient(context: MeasuringContext, batch: Batch, full_precision: bool = False) -> tuple[Row, Forward]:
    """The batch's mean loss gradient times the loss scale, and the forward of the bare network that it was pulled back from."""
    forward = Forward(context, batch.x, batch.size, full_precision=full_precision)
    (row,) = sum_rows(context, [forward.row(batch.y, torch.ones_like(batch.noisy), free=True)])
    return row, forward


# --------------------------------------------------------------------------------------------------- a measured step


def measure_batch(
    context: MeasuringContext, batch: Batch, step: int, forward: Forward, own: Row | None = None
) -> tuple[list[Row], dict]:
    """Rows and values of a measured step on `forward`: the split, its null, and the controls where they are due.

    `own` is a g that is not the sum of the rows of C and of N. The rows are those of `split_rows`; values by tag.
    """
    controls = controls_due(context, step)
    rows, values = measure_split(context, batch, step, forward, own, free=not controls)
    if controls:
        values |= control_values(context, batch, step, forward, rows, own)
    return rows, values


def measure_apart(context: MeasuringContext, batch: Batch, step: int, own: Row | None = None) -> dict:
    """Values of a measured step by a forward of its own, beside the step's: `--measure-bn` eval and separate."""
    context.seed_dropout(step)
    with batchnorm_mode(context.module, context.options.measure_bn):
        return measure_batch(context, batch, step, make_forward(context, batch), own)[1]


def make_forward(context: MeasuringContext, batch: Batch) -> Forward:
    """The forward that the measures of `--measure-bn` need: joint, or one of C and one of N."""
    return gradsplit.make_forward(context, batch, context.options.measure_bn)


def is_due(every: int | None, at: int, last: int) -> bool:
    """Whether what is measured every `every`-th time, the last time at `last`, is due `at` this one."""
    return every is not None and every > 0 and (last - at) % every == 0


def controls_due(context: MeasuringContext, step: int) -> bool:
    """Whether this measured step brings the controls of `--measure full`."""
    every, plan = context.options.measure_every, context.state.plan
    if context.options.measure != "full":
        return False
    return is_due(plan.get("steps"), step, (plan.get("total_steps", context.total_steps) - 1) // every * every)


# --------------------------------------------------------------------------------------------------------- the split


def measure_split(
    context: MeasuringContext, batch: Batch, step: int, forward: Forward, own: Row | None, free: bool
) -> tuple[list[Row], dict]:
    """As `gradsplit.measure_split`, with random masks where they are due."""
    masks = draw_masks(context, batch, step) if masks_due(context.options, step, batch) else []
    return gradsplit.measure_split(context, batch, forward, own, masks, free)


# ------------------------------------------------------------------------------------------------------ random masks


def masks_due(options: MeasuringOptions, step: int, batch: Batch) -> bool:
    """Whether this measured step of `--measure split` takes random masks. None are defined where C or N is empty."""
    if options.measure != "split" or not options.permutations or batch.n_noisy in (0, batch.size):
        return False
    return step // options.measure_every % options.null_every == 0


def draw_masks(context: MeasuringContext, batch: Batch, step: int) -> list[Tensor]:
    """The run's random masks of a step, as `gradsplit.draw_masks`: those of `--measure split` are the first of `full`."""
    return gradsplit.draw_masks(batch, context.options.permutations, context.seed, step, context.options.stratify)


def permuted_values(context: MeasuringContext, batch: Batch, step: int, forward: Forward, g: Row) -> dict:
    """`null/permuted_*` of the run's random masks of a step, as `gradsplit.permuted_values`."""
    return gradsplit.permuted_values(context, batch, forward, g, draw_masks(context, batch, step))


def split_share(options: MeasuringOptions) -> float:
    """Cost of `--measure split` with its masks as a share of the plain steps: 3F each, a product 2F; nothing is timed."""
    split = 2.0 + (options.measure_bn != "train")  # one more product, and a forward of its own in the other modes
    mask = 2.0 + (options.measure_bn == "separate")
    masks = mask * options.permutations / options.null_every if options.permutations else 0.0
    return (split + masks) / (3.0 * options.measure_every)


# ------------------------------------------------------------------------------------------- controls of `--measure full`


def control_values(
    context: MeasuringContext, batch: Batch, step: int, forward: Forward, rows: list[Row], own: Row | None
) -> dict:
    """`null/*`, `grad/difference*`, `grad/label_share`, `fresh/*`, `truth/*` of a batch with both sets, `corrected/*` and
    `noise_scale/*` at the end of a quarter of the run; waits for the device.

    `rows` are those of `split_rows` on `forward`, `own` a g that is not their sum. Nothing of this batch where a set is empty.
    """
    values: dict[str, float] = {}
    if len(rows) == 2:
        base = [*rows, gradsplit.add_rows(rows)]
        products = inner_products(context, *base)
        values |= chunk_values(context, batch, forward, products, own)
        with context.timed("permutations"):
            values |= permuted_values(context, batch, step, forward, own or base[2])
        if not context.fake_mask:  # under a fake mask all labels are true: there is no other label to compare with
            values |= relabelled_values(context, batch, step, forward, base, products)
    return values | quarter_values(context, step)


def chunk_values(
    context: MeasuringContext, batch: Batch, forward: Forward, products: list[list[float]], own: Row | None
) -> dict:
    """What disjoint parts of the batch give: `null/cos_*`, `grad/difference*`, `grad/label_share`; adds to the window.

    `products` are the inner products of the rows of C, of N and of their sum, `own` a g that is not the sum.
    """
    state, chunks = context.state, context.options.chunks
    with context.timed("chunks"):
        named, across = gradsplit.chunk_estimates(context, batch, forward, products, chunks)
        moments = [named[name] for name in metrics.MOMENTS]
        values = gradsplit.part_values(context, batch, products, own, named, across)
        if all(map(math.isfinite, moments)):  # a set of one example has no variance
            state.window = [*state.window, moments][-context.options.window :]
    if not context.fake_mask and named["var_a"] > 0:
        with context.timed("label_share"):
            values["grad/label_share"] = gradsplit.label_variance(context, batch, forward, chunks) / named["var_a"]
    return values


def relabelled_values(
    context: MeasuringContext, batch: Batch, step: int, forward: Forward, base: list[Row], products: list[list[float]]
) -> dict:
    """`fresh/*` and `truth/*`: the same forward under other labels. `base` are the rows of C, of N and their sum, `products`
    their inner products."""
    values, f = dict[str, float](), 1 - batch.n_noisy / batch.size
    with context.timed("fresh"):
        labels = fresh_labels(context, batch, step)
        if labels is not None:
            h = summed_row(context, forward, labels, batch.noisy)
            (hh, hc), (_, cc) = inner_products(context, h, base[0])
            values["fresh/ratio"] = gradsplit.norm_ratio(hh, cc) * f / (1 - f)
            values["fresh/cos"] = gradsplit.cosine_of_products(hc, hh, cc)
            values["fresh/index"] = gradsplit.norm_ratio(hh, products[1][1])
            del h
    with context.timed("truth"):
        values |= gradsplit.truth_values(context, batch, forward, base[2])
    return values


# ------------------------------------------------------------------------------------------- estimates of a quarter


def ends_quarter(context: MeasuringContext, step: int) -> bool:
    """Whether the full measurement at `step` is the last in its quarter of the run, of the length planned at its first start."""
    plan = context.state.plan
    total = plan.get("total_steps", context.total_steps)
    return 4 * step // total < 4 * (step + plan["steps"]) // total


def quarter_values(context: MeasuringContext, step: int) -> dict:
    """`corrected/*` and `noise_scale/*` from the window's measurements, which it empties, at the end of a quarter; else {}.

    A quarter of fewer than three measurements is joined with the next one.
    """
    state, values = context.state, dict[str, float]()
    if not ends_quarter(context, step):
        return {}
    if len(state.window) >= metrics.LEAST_MEASUREMENTS:
        values, missing = metrics.corrected(state.window)
        state.not_resolved, state.window = state.not_resolved + missing, []
    return values | {"corrected/not_resolved": float(state.not_resolved)}


# ------------------------------------------------------------------------------------------------------ fresh labels


def fresh_labels(context: MeasuringContext, batch: Batch, step: int) -> Tensor | None:
    """Labels (b,) int64 with another wrong one for every noisy example, never trained on; None if there are but two
    classes. Drawn by the run's own law: the realised transition matrix of the true class, less its given label, or
    evenly where the law leaves nothing else (a class that is only ever mistaken for one other)."""
    K = len(context.transition)
    if K < 3:
        return None
    g = data.generator(context.noise_seed, "fresh", step)
    draws = torch.rand(batch.size, K, generator=g, dtype=torch.float64)  # of the global batch, on any rank
    draws = draws[batch.first : batch.first + len(batch.y)].to(batch.y.device)
    law = context.transition.to(batch.y.device).index_select(0, batch.true).to_dense()  # (b, K)
    at = torch.stack([batch.true, batch.y], 1)
    law = law.scatter(1, at, 0.0)
    evenly = torch.ones_like(law).scatter(1, at, 0.0)
    law = torch.where(law.sum(1, keepdim=True) > 0, law, evenly)
    drawn = (law.log() - (-draws.clamp_min(1e-300).log()).log()).argmax(1)  # Gumbel's trick: one draw from each row
    return torch.where(batch.noisy, drawn, batch.y)
