"""What measuring needs to know of whoever trains, and forwards of the network to be pulled back along any cotangent.

A `MeasuringContext` is filled in by a run (engine/job.py); nothing here knows of options on a command line, of Fabric or
of a run's folder. Which rows and formulas a measure takes is in measure.py and epochwise.py.

Shapes: B examples of the global batch, b of them on this process, K classes, P parameters.
"""

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import data
import metrics
from data import Batch

Row = list[Tensor]  # one gradient, shaped as the parameters


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


@dataclass
class MeasuringContext:
    """All that measuring takes from a run. Callables are asked anew each time, for what they return may change."""

    module: nn.Module  # the bare network
    device: torch.device
    train: data.TrainSet  # the training examples that epoch-wise measures draw from
    transition: Tensor  # (K, K) float64 on the CPU: counts of (true, given) label in the training split
    options: MeasuringOptions
    autocast: Callable[[], AbstractContextManager]  # the precision that the network is trained in
    sum_over_ranks: Callable[[Tensor], Tensor]  # over all processes, which must all call it
    loss_scale: Callable[[], Tensor | float]  # the factor on every gradient (16-mixed; a tensor on the device), else 1
    learning_rate: Callable[[], float]
    state: MeasuringState
    total_steps: int  # optimizer steps until the end, from which measurements are counted back
    steps_per_epoch: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0  # of masks, dropout and curvature
    noise_seed: int = 0  # of fresh labels and of the examples that are probed
    fake_mask: bool = False  # an A/A run: labels are true, and who is called noisy is drawn
    has_dropout: bool = False
    momentum: Callable[[], float] = lambda: 0.0
    held_out: data.Images | None = None  # images that are never trained on: those of the validation split
    confusion: Tensor | None = None  # (K, K) float64 on the CPU: counts of (true, predicted) class on these, at these weights

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]

    def logits(self, x: Tensor) -> Tensor:
        """Logits (b, K) of the bare network in the precision of training, returned in the default dtype."""
        with self.autocast():
            logits = self.module(x)
        return logits.to(torch.get_default_dtype())

    def seed_dropout(self, step: int) -> None:
        """Give dropout, which draws from the device's global generator, a mask that depends on seed, step and rank."""
        if self.has_dropout:
            torch.manual_seed(data.stream_seed(self.seed, f"dropout{self.rank}", step))

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


# ------------------------------------------------------------------------------------------------------------ BatchNorm


def sync_batchnorms(module: nn.Module) -> list[nn.SyncBatchNorm]:
    """Its BatchNorms that take their statistics over all processes."""
    return [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]


@contextmanager
def keep_buffers(module: nn.Module):
    """Give running statistics back the values they had, in place: a captured graph knows them by their address."""
    before = [b.clone() for b in module.buffers()]
    try:
        yield
    finally:
        for b, old in zip(module.buffers(), before, strict=True):
            b.copy_(old)


@contextmanager
def batchnorm_mode(module: nn.Module, mode: str, same_on_all_ranks: bool = False):
    """For a measurement's forward: `eval` mode, or training mode with running statistics left as they are.

    `same_on_all_ranks`: all processes forward the same examples, so BatchNorm has nothing to synchronise; where it did, a
    second derivative could not be had. Gradients are to be taken within the context.
    """
    local = sync_batchnorms(module) if same_on_all_ranks else []
    module.train(mode != "eval")
    for m in local:
        m.__class__ = nn.BatchNorm2d
    try:
        with keep_buffers(module):
            yield
    finally:
        for m in local:
            m.__class__ = nn.SyncBatchNorm
        module.train()


# ------------------------------------------------------------------------------------------------------------ forwards


@contextmanager
def cut_graph(modules):
    """Within the block, end the graph behind each of `modules` and begin another: (outputs, entries) of
    `metrics.pull_backs`, but for the logits. What needs no gradient is not cut."""
    outputs: list[Tensor] = []
    entries: list[Tensor] = []

    def begin(module, args, out: Tensor) -> Tensor:
        if not out.requires_grad:
            return out
        outputs.append(out)
        entries.append(out.detach().requires_grad_())
        return entries[-1]

    handles = [m.register_forward_hook(begin) for m in modules]
    try:
        yield outputs, entries
    finally:
        for handle in handles:
            handle.remove()


class Forward:
    """One forward of examples, to be pulled back along any cotangent; of several parts, one forward of each."""

    def __init__(
        self,
        context: MeasuringContext,
        x: Tensor,
        size: int,
        parts: list[Tensor] | None = None,
        full_precision: bool = False,
    ) -> None:
        """`x` (b, C, H, W) is this process's share of `size` = B examples. `parts` are masks (b,) bool that together
        cover it (`--measure-bn separate`); `full_precision`: without autocast."""
        self.context, self.unit = context, context.loss_scale() / size
        # Of each part its examples and its logits, detached; and (outputs, entries) of `metrics.pull_backs`.
        self.pieces: list[tuple[Tensor | None, Tensor]] = []
        self.graphs: list[tuple[list[Tensor], list[Tensor]]] = []
        indices: list[Tensor | None] = [None]
        if parts is not None:  # here the host waits for the device
            indices = [part.nonzero().squeeze(1) for part in parts]
        for index in indices:
            some = x if index is None else x[index]
            with cut_graph(getattr(context.module, "cuts", ())) as (outputs, entries):
                logits = context.module(some) if full_precision else context.logits(some)
            self.pieces.append((index, logits.detach()))
            self.graphs.append(([*outputs, logits], entries))

    @property
    def is_joint(self) -> bool:
        """Whether this was one forward of all examples."""
        return len(self.pieces) == 1

    @property
    def logits(self) -> Tensor:
        """Logits (b, K) of a joint forward, detached."""
        ((_, logits),) = self.pieces
        return logits

    def rows(self, labels: Tensor, weights: list[Tensor], free: bool = False, true: Tensor | None = None) -> list[Row]:
        """For each w of `weights` (b,): (1/B) sum_i w_i dL_i/dtheta against `labels` (b,) over this process's examples,
        times the loss scale; with `true` (b,) less the same against these, the label-noise part. With `free` they are the
        last ones of this forward, and take less memory."""
        context = self.context
        of_pieces: list[list[Row]] = [[] for _ in weights]
        for (index, logits), graph in zip(self.pieces, self.graphs, strict=True):
            own = [(w if index is None else w[index]).to(logits.dtype) * self.unit for w in weights]
            y = labels if index is None else labels[index]
            t = true if index is None or true is None else true[index]
            wanted = list(range(len(own)))
            if index is not None:  # the same on all processes, whose SyncBatchNorm meets in every pull-back
                used = context.sum_over_ranks(torch.stack([w.any() for w in own]).float()).tolist()
                wanted = [i for i in wanted if used[i]]
            U = [
                metrics.cotangent(logits, y, own[i]) if t is None else metrics.label_cotangent(logits, y, t, own[i])
                for i in wanted
            ]
            for i, row in zip(wanted, metrics.pull_backs(*graph, context.parameters, U, free), strict=True):
                of_pieces[i].append(row)
        return [metrics.add_rows(r) if r else [torch.zeros_like(p) for p in context.parameters] for r in of_pieces]

    def row(self, labels: Tensor, weights: Tensor, free: bool = False, true: Tensor | None = None) -> Row:
        """The row of one w (b,), as in `rows`."""
        return self.rows(labels, [weights], free, true)[0]


def sum_rows(context: MeasuringContext, rows: list[Row]) -> list[Row]:
    """Rows summed over all processes in one collective, whatever each held of the batch."""
    if context.world_size == 1:
        return rows
    flat = context.sum_over_ranks(torch.cat([part.reshape(-1) for row in rows for part in row]))
    parts = iter(flat.split([p.numel() for p in context.parameters] * len(rows)))
    return [[next(parts).view_as(p) for p in context.parameters] for _ in rows]


def batch_gradient(context: MeasuringContext, batch: Batch, full_precision: bool = False) -> tuple[Row, Tensor]:
    """The batch's mean loss gradient times the loss scale, and its logits (b, K) detached, by the bare network."""
    forward = Forward(context, batch.x, batch.size, full_precision=full_precision)
    (row,) = sum_rows(context, [forward.row(batch.y, torch.ones_like(batch.noisy), free=True)])
    return row, forward.logits
