"""Loss and accuracy on a whole set, and what every example of it is predicted as."""

from typing import NamedTuple

import torch
from torch import Tensor

import metrics
from data import Images
from engine.hardware import sum_over_ranks
from engine.job import TrainingJob
from epochwise import eval_batches


class Evaluation(NamedTuple):
    """Mean loss and accuracy; `predicted` (n,) int64 on the CPU is the class that each example is taken for."""

    loss: float
    acc: float
    predicted: Tensor


@torch.no_grad()
def evaluate(job: TrainingJob, images: Images, labels: Tensor) -> Evaluation:
    """A whole set in eval mode, each example counted once however many processes there are."""
    job.context.average_buffers()
    sums = torch.zeros(3, dtype=torch.float64, device=labels.device)
    predicted = torch.zeros(images.n, dtype=torch.int64, device=labels.device)
    job.module.eval()
    for logits, at in eval_batches(job.context, images, torch.arange(images.n)):
        y = labels[at]
        sums += metrics.batch_counts(logits, y, torch.zeros_like(y, dtype=torch.bool))
        predicted[at] = logits.argmax(1)
    job.module.train()
    loss, hit, _ = sum_over_ranks(job.fabric, sums).tolist()  # here the host waits for the device
    return Evaluation(loss / images.n, hit / images.n, sum_over_ranks(job.fabric, predicted).cpu())
