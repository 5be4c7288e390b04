"""The command line of train.py: options, their checks, and what follows from them (run name, schedule length).

Importing this starts nothing; sweeps, benchmarks and tests use this parser, there is no other.
"""

import argparse
import hashlib
import math
import os
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

from data import VAL_FRAC, InputError
from datasets import DATASETS, DataSet, default_model
from engine import checks, course, launchers, roles, startfrom
from engine.cmdline import (
    Parser,
    below_one,
    count,
    devices,
    few,
    not_negative,
    number,
    part,
    path,
    positive,
    seed,
    share,
    shortened,
)
from losses import LOSSES, spelled
from models import MODELS, is_own
from noises import NOISES
from optim import OPTIMIZERS
from schedules import SCHEDULES

KNOWN = {  # checked here and not by the parser, for under `fabric run` they do not come through the parser
    "precision": ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true"),
    "accelerator": ("auto", "cpu", "gpu", "cuda"),
    "strategy": ("auto", "ddp"),
}
# Fabric's command line takes these for itself, before or after the script's name, and leaves them in LT_* variables.
FABRIC = {"accelerator": "auto", "devices": 1, "strategy": "auto", "num_nodes": 1, "precision": "auto"}
# Defaults that follow from --measure.
MEASURE_DEFAULTS = {
    "off": {"permutations": 0, "null_every": None, "measure_budget": 0.0},
    "split": {"permutations": 1, "null_every": 2, "measure_budget": 0.01},
    "full": {"permutations": 4, "null_every": None, "measure_budget": 0.05},
}
LONGEST_NAME = 255  # bytes that file systems allow for a folder's name
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}  # Fabric's short spellings


def data_options(p: Parser):
    """Add the options that choose a data set; returns their group."""
    g = p.add_argument_group("data")
    g.add_argument(
        "--dataset",
        type=path,
        default="cifar10",
        metavar="SET",
        help=f"{', '.join(DATASETS)}, a path to an .npz or a folder",
    )
    g.add_argument("--data-dir", type=path, default="data", metavar="DIR", help="where torchvision's folders lie or go")
    g.add_argument(
        "--image-size",
        type=checks.image_size,
        metavar="PIXELS",
        help="of a folder's images, 28 to 224, or HxW (default: 32)",
    )
    g.add_argument("--val-frac", type=share, default=VAL_FRAC, metavar="X", help="share held out for validation")
    g.add_argument("--subset", type=count, metavar="N", help="use only N training examples, drawn before the split")
    g.add_argument("--synthetic-train", type=count, default=10_000, metavar="N", help="drawn training images")
    g.add_argument("--synthetic-test", type=count, default=2_000, metavar="N", help="drawn test images")
    return g


def noise_options(p: Parser) -> None:
    """Add the options that choose the label noise, but for its seed."""
    g = p.add_argument_group("noise")
    g.add_argument(
        "--noise",
        type=share,
        metavar="X",
        help="share of the training split that is selected (default: 0, or the file's own)",
    )
    g.add_argument("--noise-type", choices=list(NOISES), default="uniform", help="law of a selected example's label")
    g.add_argument("--noise-matrix", type=path, metavar="FILE", help="for matrix: K x K probabilities, .npy or .csv")
    g.add_argument(
        "--noise-file",
        type=path,
        metavar="FILE",
        help="for human, file, matched: a noise.npz, a .csv, .json or .npy of labels, or CIFAR-10N's .pt",
    )
    g.add_argument("--noise-labels", metavar="NAME", help="which labels of a .pt: worse_label, aggre_label, ...")


def parser() -> Parser:
    """The options of docs/options.md. Defaults of None mean "follows from other options" (see `check`)."""
    p = Parser(prog="train.py", description="Train and measure SGD under label noise.", allow_abbrev=False)
    data_options(p).add_argument("--no-augment", action="store_true", help="no random crop and flip")
    noise_options(p)
    g = p.add_argument_group("model")
    others = [f"{entry.model} for {name}" for name, entry in DATASETS.items() if entry.model != DataSet.model]
    defaults = ", ".join([*others, f"else {DataSet.model}"])
    others = "torchvision:NAME, FILE.py:FUNCTION"
    g.add_argument(
        "--model", type=checks.model, metavar="NET", help=f"{', '.join(MODELS)}, {others}; default: {defaults}"
    )
    g.add_argument("--width", type=few, default=64, metavar="CHANNELS", help="ResNet-18's first stage")
    g.add_argument("--norm", choices=["bn", "gn"], default="bn", help="BatchNorm or GroupNorm (ResNet-18)")
    g = p.add_argument_group("optimization")
    moved = "; ".join(f"{name}: {sched.help}" for name, sched in SCHEDULES.items() if sched.moves)
    g.add_argument("--bs", type=count, default=128, metavar="B", help="global batch size, in examples")
    about = "; ".join(f"{name}: {entry.about}" for name, entry in OPTIMIZERS.items())
    g.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd", help=about)
    about = "; ".join(f"{spelled(name)}: {entry.about}" for name, entry in LOSSES.items())
    g.add_argument("--loss", type=checks.loss, default="ce", metavar="LOSS", help=about)
    g.add_argument("--lr", type=positive, default=0.1, help="(maximum) learning rate")
    g.add_argument(
        "--momentum", type=below_one, default=0.9, help="of SGD and RMSprop, beta1 of Adam; onecycle sets its own"
    )
    g.add_argument("--wd", type=not_negative, default=5e-4, help="weight decay")
    g.add_argument("--epochs", type=count, default=64, help="passes over the training split")
    g.add_argument("--max-steps", type=count, metavar="STEPS", help="stop after so many optimizer steps")
    g.add_argument("--sched", choices=list(SCHEDULES), default="constant", help=moved)
    g.add_argument(
        "--sched-steps", type=count, metavar="STEPS", help="schedule's length, optimizer steps (default: 5000)"
    )
    g.add_argument("--sched-epochs", type=count, metavar="EPOCHS", help="schedule's length, epochs")
    g.add_argument("--sched-examples", type=count, metavar="N", help="schedule's length, training examples")
    ends = "at its last epoch, or already when its schedule has ended"
    g.add_argument("--end", choices=["epochs", "schedule"], default="epochs", help=f"when the run ends: {ends}")
    takes = {
        name: ", ".join(s for s, entry in SCHEDULES.items() if name in entry.takes) for name in ("factor", "cycles")
    }
    g.add_argument(
        "--sched-milestones",
        type=course.milestones,
        default="0.5,0.75",
        metavar="X,X",
        help="step: shares of its length",
    )
    g.add_argument(
        "--sched-factor",
        type=part,
        default=0.1,
        metavar="X",
        help=f"{takes['factor']}: of the rate, at a milestone, at least",
    )
    g.add_argument(
        "--sched-cycles", type=count, default=4, metavar="N", help=f"{takes['cycles']}: triangles in its length"
    )
    g.add_argument(
        "--sched-delay", type=count, metavar="N", help="hold its first value so long, in the unit of its length"
    )
    g.add_argument("--warmup-steps", type=count, metavar="STEPS", help="linear rise before it, optimizer steps")
    g.add_argument("--warmup-epochs", type=count, metavar="EPOCHS", help="linear rise before it, epochs")
    g = p.add_argument_group("measurement")
    g.add_argument("--measure", choices=["off", "split", "full"], default="split", help="full: all nulls and controls")
    g.add_argument("--measure-every", type=count, default=50, metavar="STEPS", help="steps between measured steps")
    g.add_argument("--measure-bn", choices=["train", "eval", "separate"], default="train", help="BatchNorm's mode")
    g.add_argument(
        "--measure-budget",
        type=not_negative,
        metavar="X",
        help="cost as a share of the run's, full: of all (0.05); split: of its probe (0.01)",
    )
    g.add_argument(
        "--permutations",
        type=number(0, 1000, "a whole number from 0 to 1000", int),
        metavar="R",
        help="random masks of a measurement, the null (full: 4, split: 1)",
    )
    g.add_argument(
        "--null-every", type=count, metavar="N", help="split: measured steps between those with random masks (2)"
    )
    g.add_argument("--stratify", action="store_true", help="random masks keep each class's share of noisy examples")
    g.add_argument(
        "--chunks",
        type=number(2, 64, "a whole number from 2 to 64", int),
        default=4,
        metavar="k",
        help="disjoint parts",
    )
    g.add_argument(
        "--window", type=count, default=20, metavar="M", help="full measurements, at most, of one corrected estimate"
    )
    g.add_argument(
        "--fake-mask", type=share, metavar="X", help="A/A run: call this share of a clean training split noisy"
    )
    g = p.add_argument_group("randomness")
    g.add_argument("--seed", type=seed, default=0, help="initialization, order, augmentation")
    g.add_argument("--noise-seed", type=seed, default=0, help="label noise")
    g.add_argument("--split-seed", type=seed, default=0, help="validation split (and --subset)")
    g = p.add_argument_group("hardware (under `fabric run`, Fabric's own options of these names decide)")
    g.add_argument("--precision", help="auto, 32-true, bf16-mixed, 16-mixed or 64-true (default: auto)")
    g.add_argument("--accelerator", help="auto, cpu, gpu or cuda (default: auto)")
    g.add_argument("--devices", type=devices, metavar="N", help="processes on this machine (default: 1)")
    g.add_argument("--strategy", help="auto or ddp (default: auto)")
    g.add_argument("--num-nodes", type=count, metavar="N", help="machines (default: 1)")
    g.add_argument("--sync-bn", choices=["on", "off"], default="on", help="one BatchNorm over all GPUs")
    g.add_argument("--threads", type=few, metavar="N", help="CPU threads a process (default: cores / processes here)")
    g = p.add_argument_group("speed")
    choice = {"choices": ["auto", "on", "off"], "default": "auto"}
    g.add_argument("--compile", nargs="?", const="on", **choice, help="torch.compile for plain steps")
    g.add_argument("--graph", nargs="?", const="on", **choice, help="replay plain steps as a CUDA graph (one GPU)")
    chosen = "cuDNN's kernels: the same at every start (on), or the fastest as timed at the start"
    g.add_argument("--deterministic", choices=["on", "off"], default="on", help=chosen)
    g.add_argument("--profile", type=count, metavar="STEPS", help="write a trace of so many steps")
    g = p.add_argument_group("run folder")
    g.add_argument("--runs", type=path, default="runs", metavar="DIR", help="the run is written to DIR/NAME")
    g.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    g.add_argument(
        "--checkpoint-minutes",
        type=not_negative,
        default=2.0,
        metavar="MIN",
        help="time between checkpoints; 0: one after each epoch",
    )
    g.add_argument("--best", action="store_true", help="also keep the weights of the best validation, as best.ckpt")
    g.add_argument(
        "--examples",
        action="store_true",
        help="also rank the training examples by how likely their label is wrong, in examples.npz",
    )
    g.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help="a run's config.json: its options hold where the command line gives none, but for those of hardware, speed "
        "and run folder",
    )
    g.add_argument("--name", help="default: made from the options that change the result and are not default")
    return p


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed and checked options. Raises `InputError`."""
    words = sys.argv[1:] if argv is None else argv
    try:
        args = parser().parse_args(words)
        if args.config is not None:
            args = parser().parse_args([*startfrom.arguments(args.config, parser(), words), *words])
        for name, default in FABRIC.items():
            own = getattr(args, name)
            given = os.environ.get(f"LT_{name.upper()}") if under_fabric_run() else None
            setattr(args, name, given or (default if own is None else own))
        args.precision = PRECISIONS.get(args.precision, args.precision)
        check(args)
    except InputError as e:
        raise InputError(shortened(str(e), words)) from None
    return args


def under_fabric_run() -> bool:
    """Whether `fabric run` started this process; its own options then decide."""
    return os.environ.get("LT_CLI_USED", "0") == "1" and launchers.started() is not None


def check(args: argparse.Namespace) -> None:
    """Check combinations, all problems in one `InputError`, and fill in what follows from other options."""
    args.model = args.model or default_model(args.dataset)
    if not SCHEDULES[args.sched].moves:
        args.end = "epochs"  # there is no other end
    if is_own(args.model):  # by where it lies, from wherever the run is resumed
        file, _, function = args.model.rpartition(":")
        args.model = f"{os.path.realpath(file)}:{function}"
    wrong = checks.data_problems(args) + checks.noise_problems(args) + checks.model_problems(args)
    wrong += (
        checks.optimizer_problems(args) + checks.loss_problems(args) + course.problems(args, parser().parse_args([]))
    )
    for name, known in KNOWN.items():
        if getattr(args, name) not in known:
            wrong.append(f"--{name} {getattr(args, name)}: not one of {', '.join(known)}")
    if args.null_every and args.measure != "split":
        wrong.append(f"--null-every {args.null_every}: only --measure split spaces its masks so, not {args.measure}")
    for name, default in MEASURE_DEFAULTS[args.measure].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    lengths = [f"--sched-{unit}" for unit in ("steps", "epochs", "examples") if getattr(args, f"sched_{unit}")]
    if len(lengths) > 1:
        wrong.append(f"{' and '.join(lengths)}: give the schedule's length once")
    for name in ("runs", "data_dir"):
        if os.path.isfile(getattr(args, name)):
            wrong.append(f"--{name.replace('_', '-')} {getattr(args, name)}: is a file, not a folder")
    if args.name is None:
        args.name = run_name(args)
    elif not re.fullmatch(r"[^/\\\0]+", args.name) or args.name in (".", ".."):
        wrong.append(f"--name '{args.name}': not the name of a folder")
    folder = os.path.join(args.runs, args.name)
    if os.path.isfile(folder):
        wrong.append(f"--name {args.name}: {folder} is a file, not a run's folder")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(folder).parts):
        wrong.append(f"--runs {args.runs}, --name {args.name}: a folder's name has more than {LONGEST_NAME} bytes")
    if folder != folder.encode("utf-8", "ignore").decode():
        wrong.append(f"--runs, --name: TensorBoard cannot write to {folder!a}, whose name is not UTF-8")
    if wrong:
        raise InputError("; ".join(wrong))


def run_name(args: argparse.Namespace, always: Collection[str] = ()) -> str:
    """Folder name made from every option that changes the result and is not default: `noise0.5_sched-onecycle_bs1024`.

    Options of `always` are in it at their default too: `noise0`, `bs128`, `no-augment-off`; not one that has no value.
    """
    return joined(name_parts(args, always).values())


def name_parts(args: argparse.Namespace, always: Collection[str] = ()) -> dict[str, str]:
    """{option: its part} of a `run_name`."""
    always = set(always) - set(roles.having(roles.PLACE))
    args = argparse.Namespace(**vars(args))
    if "noise" in always and args.noise is None and not NOISES[args.noise_type].from_file:
        args.noise = 0
    if "sched_steps" in always and not (args.sched_epochs or args.sched_examples):
        args.sched_steps = args.sched_steps or 5000
    defaults = vars(parser().parse_args([]))
    defaults |= {"model": default_model(args.dataset), "precision": "auto", "sched_steps": 5000}
    defaults |= {"image_size": 32} | MEASURE_DEFAULTS[args.measure]  # the size is that of a folder's images
    parts, place, files = {}, roles.having(roles.PLACE), roles.having(roles.FILE)
    for option, value in vars(args).items():
        default = value in (None, defaults[option]) or (option == "noise" and value == 0)
        if option in place or value is None or (default and option not in always):
            continue
        key = option.replace("_", "-")
        if isinstance(value, bool):
            parts[option] = key if value else f"{key}-off"
        elif key == "dataset":
            stem = Path(value).name.removesuffix(".npz")
            parts[option] = stem + (f"-{path_hash(value)}" if value not in DATASETS else "")
        elif key == "model" and is_own(value):
            file, _, function = value.rpartition(":")
            parts[option] = f"{key}-{Path(file).stem}-{function}-{path_hash(file)}"
        elif key == "loss" and LOSSES[value.partition(":")[0]].matrix and ":" in value:
            loss, _, file = value.partition(":")
            parts[option] = f"{key}-{loss}-{Path(file).stem}-{path_hash(file)}"
        elif option in files:
            path = Path(value)  # noise.npz is called so in every run's folder: then the folder tells
            stem = path.parent.name if path.name == "noise.npz" else path.stem
            parts[option] = f"{key}-{stem}-{path_hash(value)}"
        else:
            shown = f"{value:g}" if default and isinstance(value, float) else value
            parts[option] = f"{key}-{value}" if isinstance(value, str) else f"{key}{shown}"
    return parts


def joined(parts: Iterable[str]) -> str:
    """The parts of a name as the name of a folder, shortened by a hash of the whole where it is long."""
    name = re.sub(r"[^A-Za-z0-9._=+-]", "-", "_".join(parts)).lstrip("-") or "default"  # -x would be an option
    if len(name) > 180:  # well below LONGEST_NAME
        name = f"{name[:160]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def path_hash(path: str) -> str:
    """Six digits that tell a path from others of the same last part."""
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:6]


def sched_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """The schedule's length in optimizer steps, with its warm-up and delay, from whichever unit it was given in."""
    return sum(course.in_steps(args, steps_per_epoch))


def run_steps(args: argparse.Namespace, steps_per_epoch: int) -> tuple[int, int]:
    """(optimizer steps that the run makes, those of all its epochs or of `--max-steps`): fewer with `--end schedule`, where
    the schedule ends before."""
    whole = int(min(args.epochs * steps_per_epoch, args.max_steps or math.inf))
    return min(whole, sched_steps(args, steps_per_epoch)) if args.end == "schedule" else whole, whole
