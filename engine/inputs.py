"""What a run trains and is evaluated on, in host memory: the data set, its split and the labels."""

from typing import NamedTuple

import torch
from torch import Tensor

import data
import models
from data import InputError, Source
from engine import sources
from engine.labels import ByEpoch, relabel, relabel_held_out


class Inputs(NamedTuple):
    """`indices` are those of the training split (n,) and of the examples held out for validation, none where the set
    brings a validation set (`Source.validation`); `labels` (n,) are trained on.

    `ledger` says what was changed; `by_epoch` as of `labels.relabel`, `val_given` of `labels.relabel_held_out`.
    """

    source: Source
    indices: tuple[Tensor, Tensor]
    labels: Tensor
    ledger: dict
    by_epoch: ByEpoch | None
    val_given: Tensor | None

    def without_images(self) -> "Inputs":
        """The same without the set's images, whose memory is given back once nothing else holds them."""
        none = torch.empty(0, dtype=torch.uint8)
        return self._replace(source=self.source._replace(x_train=none, x_test=none, x_val=None))


def check_network(args, source: Source) -> None:
    """Raise `InputError` unless the model takes images of this size; those that are not ours are tried when they are made."""
    entry, (H, W, _) = models.entry(args.model), source.x_train.shape[1:]
    where = f"--model {args.model}"
    if min(H, W) < entry.least_side:
        raise InputError(f"{where}: needs images of at least {entry.least_side} pixels, not {min(H, W)}")
    if H % entry.multiple or W % entry.multiple:
        raise InputError(f"{where}: needs images whose sides are multiples of {entry.multiple}, not {H} x {W}")


def split(args, source: Source) -> tuple[Tensor, Tensor]:
    """`data.split` of the training examples; all of them, and none held out, for a set with a validation set of its own."""
    if source.x_val is None:
        return data.split(len(source.y_train), args.val_frac, args.split_seed, args.subset)
    if args.val_frac != data.VAL_FRAC:
        raise InputError(f"--val-frac {args.val_frac}: {args.dataset} has a validation set of its own; leave it out")
    index = data.drawn(len(source.y_train), args.split_seed, args.subset)
    return index, index[:0]


def read_inputs(args) -> Inputs:
    """Load and split the set and make its labels, as the options say. Raises `InputError` where they do not go together."""
    source = sources.load(args)
    index, held = split(args, source)
    if args.bs > len(index):
        raise InputError(f"--bs {args.bs}: larger than the training split of {len(index)} examples")
    check_network(args, source)
    labels, ledger, by_epoch = relabel(args, source, index)
    if args.fake_mask is not None and ledger["changed"]:
        raise InputError(
            f"--fake-mask {args.fake_mask}: only over clean labels, and {ledger['changed']} are changed here"
        )
    if args.examples and by_epoch:
        raise InputError(
            f"--examples: the labels of --noise-type {args.noise_type} are drawn anew each epoch: none to rank"
        )
    val_given = relabel_held_out(args, source, (index, held), labels)
    return Inputs(source, (index, held), labels, ledger, by_epoch, val_given)
