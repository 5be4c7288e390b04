"""Whether options go together: data, noise, model and optimizer. Each check returns what is wrong, a line for each problem.

Also the types of the options whose values have a form of their own.
"""

import argparse
import math
import os
import re

from datasets import DATASETS, SIDES
from engine.cmdline import NUMBER
from losses import LOSSES, Value, spelled
from models import GROUP, MODELS, TORCHVISION, entry, is_own
from noises import NOISES
from optim import OPTIMIZERS


def model(text: str) -> str:
    """An argparse type: a name of a network, whose file or function need not be there."""
    if text in MODELS or re.fullmatch(r"torchvision:\w+|[^\0\n]+\.py:\w+", text):
        return os.path.expanduser(text)
    raise argparse.ArgumentTypeError(
        f"'{text}' is not one of {', '.join(MODELS)}, torchvision:NAME or FILE.py:FUNCTION"
    )


def image_size(text: str) -> int | str:
    """An argparse type: pixels a side, or HEIGHTxWIDTH."""
    sides = text.split("x")
    if not (len(sides) <= 2 and all(re.fullmatch("[0-9]{2,3}", s) and SIDES[0] <= int(s) <= SIDES[1] for s in sides)):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number of pixels from {SIDES[0]} to {SIDES[1]}, or two as in 48x64"
        )
    return int(sides[0]) if len(set(sides)) == 1 else text


def loss(text: str) -> str:
    """An argparse type: a loss, with all of its numbers in one spelling each; a matrix's file need not be there.

    Numbers are joined by commas or by +, for grids divide at commas.
    """
    name, colon, given = text.partition(":")
    if name not in LOSSES:
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(map(spelled, LOSSES))}")
    entry = LOSSES[name]
    if entry.matrix and (given or not colon) and "\0" not in given:
        return f"{name}:{os.path.expanduser(given)}" if given else name
    parts = re.split("[,+]", given) if colon else [repr(value.default) for value in entry.values]
    if entry.matrix or len(parts) != len(entry.values) or not all(map(fits, entry.values, parts)):
        what = " and ".join(f"{value.name} {value.what}" for value in entry.values)
        joined = " (in a grid joined by +)" * (len(entry.values) > 1)
        raise argparse.ArgumentTypeError(f"'{text}' is not {spelled(name)}{f', {what}' * bool(what)}{joined}")
    numbers = ",".join(repr(float(part)).removesuffix(".0") for part in parts)
    return f"{name}:{numbers}" if numbers else name


def fits(value: Value, text: str) -> bool:
    """Whether `text` is a finite number that a loss's `value` may be."""
    return bool(NUMBER.fullmatch(text)) and math.isfinite(float(text)) and value.holds(float(text))


def data_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the choice of the data set; fills in a folder's image size."""
    wrong, folder = [], args.dataset not in DATASETS and os.path.isdir(args.dataset)
    if args.dataset not in DATASETS and not folder:
        if not args.dataset.endswith(".npz"):
            sets = ", ".join(DATASETS)
            wrong.append(f"--dataset '{args.dataset}': neither one of {sets} nor a path to an .npz or a folder")
        elif not os.path.isfile(args.dataset):
            wrong.append(f"--dataset {args.dataset}: there is no such file")
    if folder:
        args.image_size = args.image_size or 32
    elif args.image_size:
        wrong.append(f"--image-size {args.image_size}: only a folder of images is resized, not {args.dataset}")
    return wrong


def noise_problems(args: argparse.Namespace) -> list[str]:
    """What does not go together in the choice of the noise."""
    wrong, kind, needs = [], args.noise_type, NOISES[args.noise_type].needs
    if "file" in needs and args.noise is not None:
        wrong.append(f"--noise {args.noise}: --noise-type {kind} has the rate of its file; leave --noise out")
    for option, value, wanted in (
        ("--noise-file", args.noise_file, "file" in needs),
        ("--noise-matrix", args.noise_matrix, "matrix" in needs),
    ):
        if wanted and value is None:
            wrong.append(f"--noise-type {kind}: needs {option} FILE")
        if value is not None and not wanted:
            wrong.append(f"{option} {value}: --noise-type {kind} takes none")
    if args.noise_labels is not None and "file" not in needs:
        wrong.append(f"--noise-labels {args.noise_labels}: --noise-type {kind} takes none")
    if "label set" in needs and args.noise_labels is None:
        names = "worse_label, aggre_label, random_label1, random_label2, random_label3"
        wrong.append(f"--noise-type {kind}: needs --noise-labels, for CIFAR-10N one of {names}")
    return wrong


def optimizer_problems(args: argparse.Namespace) -> list[str]:
    """What the optimizer cannot be given."""
    if OPTIMIZERS[args.optimizer].needs_momentum and args.momentum == 0:
        return [f"--momentum {args.momentum:g}: --optimizer {args.optimizer} needs one above 0"]
    return []


def loss_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the file of a loss's matrix; puts its full path into the option."""
    name, _, file = args.loss.partition(":")
    if not LOSSES[name].matrix or not file:
        return []
    args.loss = f"{name}:{os.path.realpath(file)}"  # by where it lies, from wherever the run is resumed
    return [] if os.path.isfile(file) else [f"--loss {name}:{file}: there is no such file"]


LIKE = "resnet34", "vit_b_16", "efficientnet_b0", "convnext_tiny"  # as a message shows them


def torchvision_models() -> list[str]:
    """Names of its classifiers."""
    import torchvision.models

    return torchvision.models.list_models(module=torchvision.models)


def model_problems(args: argparse.Namespace) -> list[str]:
    """What the model does not have."""
    wrong, own = [], args.model.rpartition(":")[0]
    if is_own(args.model) and not os.path.isfile(own):
        wrong.append(f"--model {args.model}: there is no file {own}")
    if args.model.startswith(TORCHVISION) and args.model.removeprefix(TORCHVISION) not in torchvision_models():
        wrong.append(f"--model {args.model}: not one of torchvision's classifiers, like {', '.join(LIKE)}")
    if not entry(args.model).adjustable:
        adjustable = " and ".join(name for name, model in MODELS.items() if model.adjustable)
        if args.width != 64:
            wrong.append(f"--width {args.width}: only {adjustable} has a width, not {args.model}")
        if args.norm != "bn":
            wrong.append(f"--norm {args.norm}: only {adjustable} has it, not {args.model}")
    elif args.norm == "gn" and args.width % GROUP:
        wrong.append(f"--width {args.width}: --norm gn needs a multiple of {GROUP}")
    return wrong
