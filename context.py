"""What measuring needs to know of the run beyond what a forward takes (`gradsplit.Context`).

A `MeasuringContext` is filled in by a run (engine/job.py); nothing here knows of options on a command line, of Fabric or
of a run's folder. Which rows and formulas a measure takes is in measure.py and epochwise.py, how rows are made in gradsplit.py.

Shapes: B examples of the global batch, b of them on this process, K classes, P parameters.
"""

import dataclasses
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

import data
from gradsplit import Batch, Context, Forward, Row, stream_seed, sum_rows


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
    """All that measuring takes from a run: `module` is the bare network, `loss` stays the cross-entropy."""

    train: data.TrainSet  # the training examples that epoch-wise measures draw from
    transition: Tensor  # (K, K) float64 on the CPU: counts of (true, given) label in the training split
    options: MeasuringOptions
    learning_rate: Callable[[], float]
    state: MeasuringState
    total_steps: int  # optimizer steps until the end, from which measurements are counted back
    steps_per_epoch: int
    rank: int = 0
    seed: int = 0  # of masks, dropout and curvature
    noise_seed: int = 0  # of fresh labels and of the examples that are probed
    fake_mask: bool = False  # an A/A run: labels are true, and who is called noisy is drawn
    has_dropout: bool = False
    momentum: Callable[[], float] = lambda: 0.0
    held_out: data.Images | None = None  # images that are never trained on: those of the validation split
    confusion: Tensor | None = None  # (K, K) float64 on the CPU: counts of (true, predicted) class on these, at these weights

    def seed_dropout(self, step: int) -> None:
        """Give dropout, which draws from the device's global generator, a mask that depends on seed, step and rank."""
        if self.has_dropout:
            torch.manual_seed(stream_seed(self.seed, f"dropout{self.rank}", step))

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


def batch_gradient(context: MeasuringContext, batch: Batch, full_precision: bool = False) -> tuple[Row, Tensor]:
    """The batch's mean loss gradient times the loss scale, and its logits (b, K) detached, by the bare network."""
    forward = Forward(context, batch.x, batch.size, full_precision=full_precision)
    (row,) = sum_rows(context, [forward.row(batch.y, torch.ones_like(batch.noisy), free=True)])
    return row, forward.logits
