"""Signals of when to stop training that need no clean label: what a step on random labels does, and how far the gradients
of batches lie apart. Both look at the same few examples after every epoch, so that epochs differ by the network alone.

Shapes: m examples, K classes.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

import data
import gradsplit
import metrics
from context import MeasuringContext
from gradsplit import Forward, batchnorm_mode

SUSCEPTIBILITY_EXAMPLES = 64  # held-out images that are given random labels
DISPARITY_BATCHES = 5  # as in the paper
DISPARITY_EXAMPLES = 32  # of a batch
SIGNALS_COST = 4.0 * SUSCEPTIBILITY_EXAMPLES + 3.0 * DISPARITY_BATCHES * DISPARITY_EXAMPLES  # of one time, in F


def signals(context: MeasuringContext) -> dict:
    """`probe/susceptibility` and `probe/disparity`; weights, running statistics and random streams stay as they are.

    Every process computes the same; waits for the device.
    """
    with undisturbed(context):
        return susceptibility(context) | disparity(context)


@contextmanager
def undisturbed(context: MeasuringContext):
    """For forwards of the same examples on all processes: BatchNorm's mode as the run measures in, no dropout."""
    with batchnorm_mode(context.module, context.options.measure_bn, same_on_all_ranks=True):
        for m in context.module.modules():
            if isinstance(m, nn.Dropout):
                m.eval()
        yield


def susceptibility(context: MeasuringContext) -> dict:
    """How far one step on randomly labelled held-out images lowers their own loss: L(w) - L(w - lr dL/dw).

    The mean of these values up to an epoch is the paper's susceptibility of that epoch (Forouzesh, Sedghi & Thiran, ICLR
    2023, 2212.04461). The step is of plain SGD at the rate of the last update, without momentum or weight decay. Labels are
    uniform over the classes, drawn once. Empty without held-out images or at a learning rate of 0.
    """
    held, lr, K = context.held_out, context.learning_rate(), len(context.transition)
    if held is None or not lr > 0:
        return {}
    g = data.generator(context.seed, "susceptibility")
    index = torch.randperm(held.n, generator=g)[:SUSCEPTIBILITY_EXAMPLES]
    labels = torch.randint(K, index.shape, generator=g).to(context.device)
    x, everyone = held.plain(index), torch.ones_like(labels, dtype=torch.bool)
    forward = Forward(context, x, len(index))
    before = F.cross_entropy(forward.logits, labels)
    row = forward.row(labels, everyone, free=True)
    weights = [p.detach() for p in context.parameters]
    kept = [w.clone() for w in weights]
    try:
        torch._foreach_add_(weights, row, alpha=-lr / float(context.loss_scale()))
        with torch.no_grad():
            after = F.cross_entropy(context.logits(x), labels)
    finally:
        torch._foreach_copy_(weights, kept)
    return {"probe/susceptibility": float(before - after)}


def disparity(context: MeasuringContext) -> dict:
    """Mean distance of the gradients of five fixed batches of training examples under their given labels, each that of the
    batch's mean loss over the standard deviation of its losses (Forouzesh & Thiran 2021, 2107.06665).

    Empty with too few examples, undefined where all losses of a batch are alike.
    """
    size = min(DISPARITY_EXAMPLES, len(context.train) // DISPARITY_BATCHES)
    if size < 2:
        return {}
    index = torch.randperm(len(context.train), generator=data.generator(context.seed, "disparity"))
    rows = []
    for part in index[: DISPARITY_BATCHES * size].view(DISPARITY_BATCHES, size):
        forward, y = (
            Forward(context, context.train.images.plain(part), 1),
            context.train.labels[part].to(context.device),
        )
        losses = F.cross_entropy(forward.logits, y, reduction="none")
        rows.append(forward.row(y, metrics.rescaled_weights(losses), free=True))
    distance = float(metrics.mean_distance(gradsplit.gram(rows))) / float(context.loss_scale())
    return {"probe/disparity": distance if math.isfinite(distance) else math.nan}
