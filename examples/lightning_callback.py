"""A callback that logs the meter's values into the logger of any Lightning Trainer (requirements-extra.txt).

    trainer = Trainer(callbacks=[GradientSplit(lambda batch: (batch[0], batch[1], batch[2]), every=20)])

`python examples/lightning_callback.py` trains a small network with it and writes lightning_logs/version_N/metrics.csv.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradsplit import Meter


class GradientSplit(Callback):
    """Every `every`-th training batch is measured before its step; `read` makes (x, y, noisy) of a batch. Options are Meter's.

    The module's forward must return the logits. Nothing of the training changes: `Meter.measure` leaves no trace.
    """

    def __init__(self, read: Callable[[Any], tuple], every: int = 20, **options: Any) -> None:
        self.read, self.every, self.options = read, every, options

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every:
            return
        with trainer.precision_plugin.forward_context():
            values = Meter(pl_module, **self.options).measure(*self.read(batch), step=trainer.global_step)
        for logger in trainer.loggers:  # here a GPU is waited for
            logger.log_metrics({tag: float(value) for tag, value in values.items()}, step=trainer.global_step)


class Example(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(folder: str = ".") -> None:
    torch.manual_seed(0)
    x = torch.randn(1024, 20)
    true = (x @ torch.randn(20, 5)).argmax(1)
    y = torch.where(torch.rand(1024) < 0.4, torch.randint(5, (1024,)), true)
    loader = DataLoader(TensorDataset(x, y, y != true), batch_size=64, shuffle=True)
    callback = GradientSplit(lambda batch: batch, every=4, masks=2)
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=CSVLogger(folder), callbacks=[callback], enable_progress_bar=False
    )
    trainer.fit(Example(), loader)


if __name__ == "__main__":
    main(*sys.argv[1:])
