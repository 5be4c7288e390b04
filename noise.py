"""Make, inspect and compare label noise without training.

python noise.py make pair.npz --dataset cifar10 --noise-type pair --noise 0.4     # what train.py would draw
python noise.py inspect CIFAR-10_human.pt                                         # rates, or one set's matrix
python noise.py compare pair.npz CIFAR-10_human.pt:worse_label                    # agreement of two files
"""

import os
import sys
from pathlib import Path

from engine import machine

machine.wait_briefly()
if __name__ == "__main__":
    machine.explain_loading("noise.py")

import numpy as np
import torch

import data
from data import InputError, Source, one_line
from engine import checks, cmdline, inputs, noisefile, options, sources
from engine.labels import relabel
from noises import NOISES


def command_line():
    """The parser of `python noise.py`; its data and noise options are train.py's own."""
    p = cmdline.Parser(prog="noise.py", description="Make, inspect and compare label noise.", allow_abbrev=False)
    sub = p.add_subparsers(dest="command", required=True, parser_class=cmdline.Parser)
    m = sub.add_parser("make", help="write the noise.npz that train.py would", allow_abbrev=False)
    m.add_argument("out", type=cmdline.path, metavar="OUT.npz")
    m.add_argument(
        "--true",
        type=cmdline.path,
        metavar="FILE",
        help="true labels (N,) of any data set (.npy, .json, .csv), in place of --dataset",
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
        index, _ = inputs.split(args, source)
    for note in source.notes:
        print(f"noise.py: {note}", file=sys.stderr)
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
    notes = sources.absent_classes(
        y, len(names), f"--true {args.true}:", "to renumber: np.unique(y, return_inverse=True)[1]"
    )
    return Source(none, y, None, none, none, names, (), (), notes=tuple(notes))


def named(text: str) -> tuple[str, str | None]:
    """FILE.pt:LABELS -> (FILE.pt, LABELS), anything else -> (text, None)."""
    path, colon, name = text.rpartition(":")
    return (path, name) if colon and path.endswith(".pt") else (text, None)


def show(text: str) -> str:
    """What `inspect` prints: a file's ledger, or the rate of each label set where there are several."""
    path, name = named(text)
    if path.endswith(".pt") and name is None and os.path.isfile(path):
        sets = [k for k in noisefile.load_pt(path, "inspect") if k != noisefile.CLEAN]
        width = max(map(len, sets), default=0)
        files = [(k, noisefile.read(path, k, "inspect")) for k in sets]
        rates = "\n".join(f"{k:<{width}}  {(f.label != f.true).double().mean().item():.4f}" for k, f in files)
        return f"{path}: {len(sets)} sets of labels, share that is wrong\n{rates}"
    file = with_truth(noisefile.read(path, name, "inspect"), f"inspect {text}")
    index = file.known
    K = int(torch.cat([file.true, file.label]).max()) + 1
    rate, seed = file.dynamic or ((file.label != file.true).double().mean().item(), None)
    drawn = noisefile.ledger("file", rate, seed, index, file.true, file.label, K, dynamic=file.dynamic is not None)
    return f"{text}: examples {int(index.min())}..{int(index.max())}\n" + noisefile.describe_labels(
        drawn, tuple(map(str, range(K)))
    )


def with_truth(file: noisefile.LabelFile, source: str) -> noisefile.LabelFile:
    """The file, if it has true labels. Raises `InputError`."""
    if file.true is None:
        raise InputError(f"{source}: holds no true labels (true) beside label, from which a rate could be told")
    return file


def compare(one: str, other: str) -> str:
    """What `compare` prints: rates and agreement of two files on the examples that both know.

    Beside the agreement stands what two independent draws with the same two matrices would have. Raises `InputError`.
    """
    a, b = (with_truth(noisefile.read(*named(text), "compare"), f"compare {text}") for text in (one, other))
    common, at_a, at_b = np.intersect1d(a.known.numpy(), b.known.numpy(), assume_unique=True, return_indices=True)
    if len(common) == 0:
        raise InputError(f"compare {one}, {other}: the files have no example in common")
    true, la, lb = a.true[at_a], a.label[at_a], b.label[at_b]
    different = int((true != b.true[at_b]).sum())
    if different:
        raise InputError(
            f"compare {one}, {other}: true labels differ for {different} of {len(common)} examples: "
            "made for different data sets or orders"
        )
    K = int(torch.cat([true, la, lb]).max()) + 1
    na, nb = la != true, lb != true
    both = na & nb
    rows = {
        "examples in common": f"{len(common)} of {len(a.true)} and {len(b.true)}",
        "share that is wrong": f"{na.double().mean().item():.4f} and {nb.double().mean().item():.4f}",
        "same label": f"{(la == lb).double().mean().item():.4f}",
        "wrong in both": f"{both.double().mean().item():.4f}",
        "the same there": f"{(la == lb)[both].double().mean().item():.4f}" if both.any() else "-",
    }
    if K <= noisefile.LARGEST:
        Ta, Tb = (noisefile.shares(noisefile.transitions(true, x, K)) for x in (la, lb))
        chance = float((Ta * Tb).sum(1) @ torch.bincount(true, minlength=K).double()) / len(true)
        rows["same label"] += f" ({chance:.4f} expected of independent draws)"
        rows["matrices differ by"] = f"{float((Ta - Tb).abs().max()):.4f} at most"
    return "\n".join(f"{name:<20}  {value}" for name, value in rows.items())


def main(argv: list[str] | None = None) -> int:
    """Make, inspect or compare; bad input is one line and status 2."""
    cmdline.show_anything()
    try:
        args = command_line().parse_args(argv)
        if args.command == "make":
            print(make(args))
        else:
            print(show(args.file) if args.command == "inspect" else compare(*args.files))
    except InputError as e:
        cmdline.complain(e, "noise.py")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
