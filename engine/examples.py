"""What every training example did in the epochs so far, by the forwards that training makes anyway, and how well that
tells wrong labels from right ones.

A step leaves its logits in a table on the device, one copy and no wait. When the epoch has ended the table is summed over
the processes, of which each holds other rows, and margins, losses and predictions are taken from it on the CPU: the same
numbers on any number of processes. The logits are those of training, in train mode and with augmentation.

Shapes: n examples of the training split, b of a batch on this process, K classes.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import metrics
from data import Batch
from engine import files

NAME = "examples.npz"  # in the run's folder
TOTALS = {  # (n,) each, over the epochs so far
    "margin": torch.float64,  # sum
    "loss": torch.float64,  # sum
    "forgotten": torch.int32,  # epochs in which a label that was predicted in the one before was not
    "learned": torch.bool,  # whether the label was ever predicted
    "predicted": torch.int32,  # class predicted in the last epoch
}
DETECTORS = {"detect/aum": "aum", "detect/forgetting": "forgetting", "detect/loss": "loss"}  # series: score


BLOCK = 1000  # examples brought over from the device at a time, and held in float64


def by_example(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Margin and loss (b,) float64 and predicted class (b,) int64, on the CPU, of `logits` (b, K) on any device."""
    logits = logits.to("cpu", torch.float64)
    return metrics.margins(logits, labels), F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1)


class Examples:
    """The table of the epoch that is under way, and totals over those that are whole."""

    def __init__(self, n: int, K: int, steps_per_epoch: int, device: torch.device, sum_over_ranks: Callable) -> None:
        """`sum_over_ranks` as in `MeasuringContext`."""
        self.logits = torch.zeros(n, K, device=device)
        self.steps_per_epoch, self.sum_over_ranks = steps_per_epoch, sum_over_ranks
        self.epochs = self.steps = 0  # whole epochs; steps of the one under way
        self.totals = {name: torch.zeros(n, dtype=dtype) for name, dtype in TOTALS.items()}

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Keep this process's logits (b, K) of a step."""
        self.logits.index_copy_(0, batch.index, logits.detach().to(self.logits.dtype))
        self.steps += 1

    def end_epoch(self, labels: Tensor, noisy: Tensor) -> dict[str, float]:
        """Add the epoch to the totals; returns `train/prediction_changes` and `detect/*`. Here the host waits.

        `labels` (n,) int64 are those trained on, `noisy` (n,) bool says which are wrong, both on the CPU. An epoch of which
        steps are missing, because this began within it, is dropped.
        """
        whole, self.steps = self.steps == self.steps_per_epoch, 0
        table = self.sum_over_ranks(self.logits)
        parts = [by_example(part, y) for part, y in zip(table.split(BLOCK), labels.split(BLOCK))] if whole else []
        self.logits.zero_()
        if not whole:
            return {}
        margin, loss, predicted = map(torch.cat, zip(*parts))
        total, values = self.totals, {}
        if self.epochs:
            values["train/prediction_changes"] = float((predicted != total["predicted"]).double().mean())
            total["forgotten"] += (total["predicted"] == labels) & (predicted != labels)
        total["margin"] += margin
        total["loss"] += loss
        total["learned"] |= predicted == labels
        total["predicted"] = predicted.int()
        self.epochs += 1
        score = self.scores()
        return values | {tag: metrics.auc(score[name][noisy], score[name][~noisy]) for tag, name in DETECTORS.items()}

    def scores(self) -> dict[str, Tensor]:
        """{detector: (n,) float64}, higher where the label is more likely wrong.

        The area under the margin, with its sign turned (Pleiss et al. 2020, 2001.10528); how often the label was forgotten,
        above all others if it was never learned (Toneva et al. 2019, 1812.05159); the mean loss. Of one epoch at least.
        """
        total = self.totals
        forgotten = torch.where(total["learned"], total["forgotten"], self.epochs + 1)
        return {
            "aum": -total["margin"] / self.epochs,
            "forgetting": forgotten.double(),
            "loss": total["loss"] / self.epochs,
        }

    def saved(self) -> dict:
        """What a checkpoint holds; all processes call it. The table only within an epoch."""
        table = self.sum_over_ranks(self.logits.clone()).cpu() if self.steps else None
        return {"epochs": self.epochs, "steps": self.steps, "logits": table} | self.totals

    def restore(self, saved: dict, holds_table: bool) -> None:
        """Take over what `saved` returned; of several processes one holds the table."""
        self.epochs, self.steps = saved["epochs"], saved["steps"]
        self.totals = {name: saved[name].clone() for name in TOTALS}
        self.logits.zero_()
        if saved["logits"] is not None and holds_table:
            self.logits.copy_(saved["logits"])

    def write(
        self, path: Path, index: Tensor, labels: Tensor, true: Tensor, names: Sequence[str] | None = None
    ) -> None:
        """Write the ranking, the label most likely wrong first, whole or not at all; not before an epoch is whole.

        Arrays (n,): `index` into the data set's training set, `label` trained on, `true` the set's own, `aum`, `forgetting`
        (int32), `learned` (bool), `loss`, and `name` where the examples of the training set have `names`.
        """
        score = self.scores()
        order = score["aum"].argsort(descending=True, stable=True)
        columns = {"index": index, "label": labels, "true": true, "aum": -score["aum"], "loss": score["loss"]}
        columns |= {"forgetting": self.totals["forgotten"], "learned": self.totals["learned"]}
        arrays = {name: column[order].numpy() for name, column in columns.items()}
        if names is not None:
            arrays["name"] = np.array([names[i] for i in arrays["index"].tolist()])
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files.replace(path, buffer.getvalue())
