"""Loss and accuracy on a whole set."""

import torch
from torch import Tensor

import data
import metrics
from data import Images
from engine.hardware import sum_over_ranks
from engine.job import TrainingJob
from epochwise import EVAL_BATCH


@torch.no_grad()
def evaluate(job: TrainingJob, images: Images, labels: Tensor) -> tuple[float, float]:
    """(mean loss, accuracy) on a whole set in eval mode, each example counted once however many processes there are."""
    job.context.average_buffers()
    a, b = data.shard(images.n, job.fabric.global_rank, job.fabric.world_size)
    sums = torch.zeros(3, dtype=torch.float64, device=labels.device)
    job.module.eval()
    for i in range(a, b, EVAL_BATCH):
        at = torch.arange(i, min(i + EVAL_BATCH, b), device=labels.device)
        y = labels[i : i + len(at)]
        sums += metrics.batch_counts(job.context.logits(images.plain(at)), y, torch.zeros_like(y, dtype=torch.bool))
    job.module.train()
    loss, hit, _ = sum_over_ranks(job.fabric, sums).tolist()  # here the host waits for the device
    return loss / images.n, hit / images.n
