"""Loss and accuracy on a whole set, and what every example of it is predicted as."""

from typing import NamedTuple

import torch
from torch import Tensor

import data
import metrics
from data import Images
from engine.hardware import sum_over_ranks
from engine.job import TrainingJob
from epochwise import EVAL_BATCH, eval_logits


class Evaluation(NamedTuple):
    """Mean loss and accuracy; `predicted` (n,) int64 on the CPU is the class that each example is taken for."""

    loss: float
    acc: float
    predicted: Tensor


@torch.no_grad()
def evaluate(job: TrainingJob, images: Images, labels: Tensor) -> Evaluation:
    """A whole set in eval mode, each example counted once however many processes there are."""
    job.context.average_buffers()
    a, b = data.shard(images.n, job.fabric.global_rank, job.fabric.world_size)
    sums = torch.zeros(3, dtype=torch.float64, device=labels.device)
    predicted = torch.zeros(images.n, dtype=torch.int64, device=labels.device)
    job.module.eval()
    for i in range(a, b, EVAL_BATCH):
        at = torch.arange(i, min(i + EVAL_BATCH, b), device=labels.device)
        y, logits = labels[i : i + len(at)], eval_logits(job.context, images.plain(at))
        sums += metrics.batch_counts(logits, y, torch.zeros_like(y, dtype=torch.bool))
        predicted[i : i + len(at)] = logits.argmax(1)
    job.module.train()
    loss, hit, _ = sum_over_ranks(job.fabric, sums).tolist()  # here the host waits for the device
    return Evaluation(loss / images.n, hit / images.n, sum_over_ranks(job.fabric, predicted).cpu())
