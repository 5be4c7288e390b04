"""Make, inspect and compare label noise without training.

python noise.py make pair.npz --dataset cifar10 --noise-type pair --noise 0.4     # what train.py would draw
python noise.py inspect CIFAR-10_human.pt                                         # rates, or one set's matrix
python noise.py compare pair.npz CIFAR-10_human.pt:worse_label                    # agreement of two files
"""

import os
import sys
from pathlib import Path

import torch

import data
from data import InputError, Source, one_line
from engine import checks, cmdline, noisefile, options, sources
from engine.labels import relabel
from noises import NOISES


def command_line():
    """The parser of `python noise.py`; its data and noise options are train.py's own."""
    p = cmdline.Parser(prog="noise.py", description="Make, inspect and compare label noise.", allow_abbrev=False)
    sub = p.add_subparsers(dest="command", required=True, parser_class=cmdline.Parser)
    m = sub.add_parser("make", help="write the noise.npz that train.py would", allow_abbrev=False)
    m.add_argument("out", type=cmdline.path, metavar="OUT.npz")
    m.add_argument(
        "--true", type=cmdline.path, metavar="FILE.npy", help="true labels (N,) of any data set, in place of --dataset"
    )
    options.data_options(m)
    options.noise_options(m)
    m.add_argument("--noise-seed", type=cmdline.seed, default=0, help="label noise")
    m.add_argument("--split-seed", type=cmdline.seed, default=0, help="validation split (and --subset)")
    i = sub.add_parser("inspect", help="rate, matrix, hash of a file", allow_abbrev=False)
    i.add_argument("file", type=cmdline.path, metavar="FILE", help="a noise.npz, or FILE.pt[:LABELS]")
    c = sub.add_parser("compare", help="agreement of two files", allow_abbrev=False)
    c.add_argument("files", type=cmdline.path, nargs=2, metavar="FILE", help="a noise.npz, or FILE.pt:LABELS")
    return p


def make(args) -> str:
    """Write `args.out` as a run with these options would, and return the lines that say what it holds.

    With `--val-frac 0` all of the training set (or of `--subset`) is labelled, with `--true` all there are. Raises
    `InputError`.
    """
    out = Path(args.out)
    wrong = checks.noise_problems(args) + (idle(args) if args.true else checks.data_problems(args))
    if out.suffix != ".npz":
        wrong.append(f"{out}: must end in .npz")
    elif os.path.lexists(out):
        wrong.append(f"{out}: exists already")
    elif not os.path.isdir(out.parent):
        wrong.append(f"{out}: there is no folder {out.parent}")
    if args.true and "images" in NOISES[args.noise_type].needs:
        wrong.append(f"--noise-type {args.noise_type}: needs the images, --true gives labels only")
    if wrong:
        raise InputError("; ".join(wrong))
    source = bare(args) if args.true else sources.load(args)
    N = len(source.y_train)
    if args.true or args.val_frac == 0:
        index = data.drawn(N, args.split_seed, args.subset)
    else:
        index, _ = data.split(N, args.val_frac, args.split_seed, args.subset)
    labels, ledger, _ = relabel(args, source, index)
    try:
        noisefile.save(out, index, source.y_train[index], labels, ledger["dynamic"])
    except OSError as e:
        raise InputError(f"{out}: cannot be written ({one_line(e)})") from e
    return noisefile.describe_labels(ledger, source.classes) + f"\n{out}: sha256 {ledger['noise_npz_sha256']}"


def idle(args) -> list[str]:
    """What is wrong with data options beside `--true`: they would do nothing."""
    p = cmdline.Parser()
    options.data_options(p)
    unset = vars(p.parse_args([])) | {"split_seed": 0}
    given = [f"--{name.replace('_', '-')}" for name, value in unset.items() if getattr(args, name) != value]
    return [f"{', '.join(given)}: no data set is read with --true"] if given else []


def bare(args) -> Source:
    """A set of which only the true labels are known, from `--true`. Raises `InputError`."""
    y = noisefile.read_true(args.true)
    args.dataset, none = args.true, torch.empty(0, dtype=torch.int64)
    names = tuple(map(str, range(int(y.max()) + 1)))
    return Source(none, y, None, none, none, names, (), ())


def main(argv: list[str] | None = None) -> int:
    """Make, inspect or compare; bad input is one line and status 2."""
    cmdline.show_anything()
    try:
        args = command_line().parse_args(argv)
        if args.command == "make":
            print(make(args))
        else:
            print(noisefile.show(args.file) if args.command == "inspect" else noisefile.compare(*args.files))
    except InputError as e:
        cmdline.complain(e, "noise.py")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
