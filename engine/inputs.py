"""What a run trains and is evaluated on, in host memory: the data set, its split and the labels."""

from typing import NamedTuple

from torch import Tensor

import data
import models
from data import InputError, Source
from engine import sources
from engine.labels import ByEpoch, relabel, relabel_held_out


class Inputs(NamedTuple):
    """`indices` are those of the training split (n,) and of the validation split; `labels` (n,) are trained on.

    `ledger` says what was changed; `by_epoch` as of `labels.relabel`, `val_given` of `labels.relabel_held_out`.
    """

    source: Source
    indices: tuple[Tensor, Tensor]
    labels: Tensor
    ledger: dict
    by_epoch: ByEpoch | None
    val_given: Tensor | None


def read_inputs(args) -> Inputs:
    """Load and split the set and make its labels, as the options say. Raises `InputError` where they do not go together."""
    source = sources.load(args)
    index, held = data.split(len(source.x_train), args.val_frac, args.split_seed, args.subset)
    if args.bs > len(index):
        raise InputError(f"--bs {args.bs}: larger than the training split of {len(index)} examples")
    least = models.MODELS[args.model].least_side
    if source.x_train.shape[1] < least:
        raise InputError(f"--model {args.model}: needs images of at least {least} pixels, not {source.x_train.shape[1]}")
    labels, ledger, by_epoch = relabel(args, source, index)
    if args.fake_mask is not None and ledger["changed"]:
        raise InputError(
            f"--fake-mask {args.fake_mask}: only over clean labels, and {ledger['changed']} are changed here"
        )
    if args.examples and by_epoch:
        raise InputError(f"--examples: the labels of --noise-type {args.noise_type} are drawn anew each epoch: none to rank")
    val_given = relabel_held_out(args, source, (index, held), labels)
    return Inputs(source, (index, held), labels, ledger, by_epoch, val_given)
