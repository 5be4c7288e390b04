"""Label noise: which training examples are re-labelled, and the ledger that says so.

    python noise.py make pair.npz --dataset cifar10 --noise-type pair --noise 0.4     # what train.py would draw
    python noise.py inspect CIFAR-10_human.pt                                         # rates, or one set's matrix
    python noise.py compare pair.npz CIFAR-10_human.pt:worse_label                    # agreement of two files

A generator of noise is one function (true labels (n,) int64, K, rate, generator) -> labels (n,) int64, entered in
`NOISES`; what else it needs (`images`, `flips`, `matrix`) it asks for by the name of a further argument. "Noisy"
always means label != true label: a re-drawn label that came out as the true one is clean. `rate` is always the
nominal share: exactly round(rate n) examples are selected, and the law of the type is applied to those.

Shapes: n examples of the training split, K classes, D values of an image.
"""

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import data
import noisefile
import sources
from data import InputError, Source, generator
from noisefile import LabelFile, ledger

# ----------------------------------------------------------------------------------------------------------- the types


def select(n: int, rate: float, g: torch.Generator) -> Tensor:
    """Exactly round(rate n) of `n` positions, (m,) int64, each set of that size being equally likely."""
    return torch.randperm(n, generator=g)[: round(rate * n)]


def uniform(true: Tensor, K: int, rate: float, g: torch.Generator) -> Tensor:
    """Exactly round(rate n) of the `n` examples get a label drawn uniformly from all K classes, their own included.

    The report's noise (section 3), so a share of about rate (K - 1) / K ends up wrong.
    `true` (n,) int64 -> (n,) int64.
    """
    selected = select(len(true), rate, g)
    labels = true.clone()
    labels[selected] = torch.randint(K, selected.shape, generator=g)
    return labels


def symmetric(true: Tensor, K: int, rate: float, g: torch.Generator) -> Tensor:
    """Exactly round(rate n) examples get a label drawn uniformly from the K - 1 wrong classes.

    `true` (n,) int64 -> (n,) int64. Source: Patrini et al. 2017 (1609.03683), section 5.
    """
    selected = select(len(true), rate, g)
    labels = true.clone()
    labels[selected] = (true[selected] + torch.randint(1, K, selected.shape, generator=g)) % K
    return labels


def pair(true: Tensor, K: int, rate: float, g: torch.Generator) -> Tensor:
    """Exactly round(rate n) examples of class k get k + 1, the last class 0.

    `true` (n,) int64 -> (n,) int64. Source: pair flipping of Han et al. 2018 (1804.06872), section 4.
    """
    return asymmetric(true, K, rate, g, (torch.arange(K) + 1) % K)


def asymmetric(true: Tensor, K: int, rate: float, g: torch.Generator, flips: Tensor) -> Tensor:
    """Exactly round(rate n) examples get the class that theirs is taken for, `flips` (K,) int64.

    One look-up at the true label, so that no example flips twice where the map runs on (cat -> dog -> cat). A class
    that maps to itself keeps its labels, so the share of wrong labels is the rate times the share of the other
    classes. `true` (n,) int64 -> (n,) int64. Source: Patrini et al. 2017 (1609.03683), section 5.
    """
    selected = select(len(true), rate, g)
    labels = true.clone()
    labels[selected] = flips[true[selected]]
    return labels


def by_matrix(true: Tensor, K: int, rate: float, g: torch.Generator, matrix: Tensor) -> Tensor:
    """Exactly round(rate n) examples get a label drawn from their class's row of `matrix` (K, K) float64.

    At rate 1 the labels follow the matrix itself, at another rate (1 - rate) I + rate `matrix`. A class of
    probability 0 is never drawn. `true` (n,) int64 -> (n,) int64.
    """
    selected = select(len(true), rate, g)
    of, labels = true[selected], true.clone()
    u = torch.rand(len(of), generator=g, dtype=torch.float64)
    upto = matrix.cumsum(1)
    upto = upto / upto[:, -1:]  # exactly 1 at the end, so that u < 1 finds a class
    for k in range(K):
        mine = of == k
        labels[selected[mine]] = torch.searchsorted(upto[k], u[mine], right=True)
    return labels


SPREAD = 0.1  # standard deviation of the instance noise's flip rates, as in the paper
BLOCK = 1000  # images projected at a time


def flip_rates(n: int, rate: float, g: torch.Generator) -> Tensor:
    """Flip probabilities (n,) float64: normal around `rate` with deviation 0.1, truncated to 0..1, sum round(rate n).

    Truncation pulls the mean of such rates away from `rate` (to 0.2055 for 0.2, to 0.10 for 0.05); they are scaled
    towards 0, or their complements towards 0, to make it exact.
    """
    low, high = (torch.special.ndtr(torch.tensor((edge - rate) / SPREAD, dtype=torch.float64)) for edge in (0, 1))
    u = torch.rand(n, generator=g, dtype=torch.float64)
    q = (rate + SPREAD * torch.special.ndtri(low + u * (high - low))).clamp(0, 1)
    want, have = round(rate * n), float(q.sum())
    return q * (want / have) if want <= have else 1 - (1 - q) * ((n - want) / (n - have))


def draw_exactly(q: Tensor, g: torch.Generator) -> Tensor:
    """Sum q positions (m,) of `q` (n,), position i among them with probability q_i: exactly as many every time.

    Systematic sampling (Madow 1949) in random order; the sum must be whole.
    """
    order = torch.randperm(len(q), generator=g)
    upto = q[order].cumsum(0)
    upto[-1] = round(float(upto[-1]))
    steps = (upto + torch.rand((), generator=g, dtype=torch.float64)).floor()
    return order[steps.diff(prepend=steps.new_zeros(1)) > 0]


def instance(true: Tensor, K: int, rate: float, g: torch.Generator, images: Tensor) -> Tensor:
    """Exactly round(rate n) examples get a wrong label that depends on what is in the image.

    Each example has a flip probability of its own (`flip_rates`). The label comes from softmax(x W[k]) without the
    true class k, x (D,) the flattened image with mean and deviation of these n images taken out, not of the whole set
    (so another split changes labels), W[k] (D, K) standard normal: similar images of a class get similar labels.
    `images` (n, H, W, C) uint8, `true` (n,) int64 -> (n,) int64. Holds BLOCK images and one class's W at a time, in
    float64 for the same labels under any number of threads.
    Source: the part-dependent noise of Xia et al. 2020 (2006.07836), algorithm 2, in the form common since (whole
    image as one part).
    """
    n, labels = len(true), true.clone()
    if rate == 0:
        return labels
    selected = draw_exactly(flip_rates(n, rate, g), g).sort().values
    u = torch.rand(n, 1, generator=g, dtype=torch.float64)
    mean, std = (torch.tensor(s, dtype=torch.float64) * 255 for s in data.pixel_statistics(images))
    for k in range(K):
        W = torch.randn(images[0].numel(), K, generator=g, dtype=torch.float64)
        for some in selected[true[selected] == k].split(BLOCK):
            x = ((images[some].double() - mean) / std).flatten(1)  # (m, D)
            score = x @ W  # (m, K)
            score[:, k] = -torch.inf
            upto = score.softmax(1).cumsum(1)
            labels[some] = (upto / upto[:, -1:] <= u[some]).sum(1)
    return labels


NOISES = {  # a new noise is one function, entered here
    "uniform": uniform,
    "symmetric": symmetric,
    "pair": pair,
    "asymmetric": asymmetric,
    "matrix": by_matrix,
    "instance": instance,
}
FROM_FILE = ("human", "file", "matched")  # these take their labels and their rate from --noise-file
TYPES = (*NOISES, "dynamic", *FROM_FILE)


def needs(kind: str) -> set[str]:
    """What else the generator of `kind` asks for: names of its arguments beyond the four that all have."""
    return set(list(inspect.signature(NOISES[kind]).parameters)[4:])


def apply(kind: str, true: Tensor, K: int, rate: float, seed: int, **more: Tensor) -> Tensor:
    """Labels (n,) to train on: noise `kind` at the nominal `rate`, from the noise seed's own stream."""
    return NOISES[kind](true, K, rate, generator(seed, "noise"), **more)


def dynamic(true: Tensor, K: int, rate: float, seed: int, epoch: int) -> Tensor:
    """Labels (n,) of one epoch of noise that is never the same twice: `uniform`, drawn anew for every epoch.

    An epoch visits each example once, so every batch sees a fresh draw, as in label-noise SGD (Damian et al. 2021,
    2106.06530). A function of the seed and the epoch: batches on any number of devices are slices of it.
    """
    return uniform(true, K, rate, generator(seed, "dynamic", epoch))


def matched(true: Tensor, label: Tensor, K: int, g: torch.Generator) -> Tensor:
    """The given labels (n,), shuffled among the examples of each true class.

    The same transition matrix to the last example, and nothing else of what `label` knew of the images.
    `true`, `label` (n,) int64 -> (n,) int64.
    """
    labels = label.clone()
    for k in range(K):
        mine = (true == k).nonzero().squeeze(1)
        labels[mine] = label[mine[torch.randperm(len(mine), generator=g)]]
    return labels


# ----------------------------------------------------------------------------------------------------- from the options

ByEpoch = Callable[[int], Tensor]  # epoch -> labels (n,)


def relabel(args, source: Source, index: Tensor) -> tuple[Tensor, dict, ByEpoch | None]:
    """Labels (n,) for the training split `index` (n,) of `source`, as the options say, and their ledger.

    The third is a function epoch -> labels (n,) where they change with the epoch; the first are then epoch 0's.
    Labels that came with the set are taken as they are, unless a file is given. Raises `InputError` where options,
    files and set do not go together.
    """
    true, K, kind = source.y_train[index], len(source.classes), args.noise_type
    if kind in FROM_FILE:
        return from_file(args, source, index)
    if source.given is not None:
        if args.noise is not None or kind != "uniform":
            option = f"--noise {args.noise}" if args.noise is not None else f"--noise-type {kind}"
            where = "y_train_noisy" if args.dataset.endswith(".npz") else sources.GIVEN
            raise InputError(f"{option}: {args.dataset} brings its own noisy labels ({where})")
        labels = source.given[index]
        rate = (source.given != source.y_train).double().mean().item()
        return labels, ledger("given", rate, None, index, true, labels, K), None
    rate, seed = args.noise or 0.0, args.noise_seed
    if kind == "dynamic":
        return drawn_anew(kind, rate, seed, index, true, K)
    more, wanted = {}, needs(kind)
    if "flips" in wanted:
        if source.flips is None:
            raise InputError(
                f"--noise-type {kind}: {args.dataset} has no map of classes taken for one another; "
                "use --noise-type matrix or pair"
            )
        more["flips"] = source.flips
    if "matrix" in wanted:
        more["matrix"] = noisefile.read_matrix(args.noise_matrix, K)
    if "images" in wanted:
        more["images"] = source.x_train[index]
    if kind == "instance" and rate == 1:
        raise InputError(f"--noise {args.noise}: instance noise cannot reach 1, its flip rates spread below it")
    labels = apply(kind, true, K, rate, seed, **more)
    return labels, ledger(kind, rate, seed, index, true, labels, K), None


def fake_mask(n: int, share: float, g: torch.Generator) -> Tensor:
    """A mask (n,) bool of exactly round(share n) examples: "noisy" ones whose labels are true, for an A/A run."""
    return torch.zeros(n, dtype=torch.bool).scatter(0, torch.randperm(n, generator=g)[: round(share * n)], True)


def drawn_anew(kind: str, rate: float, seed: int, index: Tensor, true: Tensor, K: int) -> tuple[Tensor, dict, ByEpoch]:
    """`relabel` for dynamic noise."""

    def by_epoch(epoch: int) -> Tensor:
        return dynamic(true, K, rate, seed, epoch)

    labels = by_epoch(0)
    return labels, ledger(kind, rate, seed, index, true, labels, K, dynamic=True), by_epoch


def from_file(args, source: Source, index: Tensor) -> tuple[Tensor, dict, ByEpoch | None]:
    """`relabel` for the types that come from a file, whose true labels must be the data set's."""
    said, kind, K, true = f"--noise-file {args.noise_file}", args.noise_type, len(source.classes), source.y_train[index]
    file = noisefile.read(args.noise_file, args.noise_labels)
    at = locate(file, source, index, args.dataset, said)
    if file.dynamic is not None:
        if kind == "matched":
            raise InputError(f"{said}: its labels are drawn anew each epoch, so there is no matrix to match")
        if file.index is None or not torch.equal(file.index, index):
            raise InputError(f"{said}: dynamic noise needs the same split (--split-seed, --val-frac, --subset)")
        return drawn_anew(kind, *file.dynamic, index, true, K)
    rate = (file.label != file.true).double().mean().item()
    labels, seed = file.label[at], None
    if kind == "matched":
        seed = args.noise_seed
        labels = matched(true, labels, K, generator(seed, "noise"))
    return labels, ledger(kind, rate, seed, index, true, labels, K), None


def locate(file: LabelFile, source: Source, index: Tensor, dataset: str, said: str) -> Tensor:
    """Where in `file` the examples `index` (n,) of `source` stand, (n,) int64.

    Raises `InputError` unless the file's true labels are the set's, its labels classes of it, and none is missing.
    """
    N, K = len(source.y_train), len(source.classes)
    known = torch.arange(len(file.true)) if file.index is None else file.index
    size = int(known.max()) + 1
    if size > N or (file.index is None and size < N):
        raise InputError(f"{said}: is for a training set of {size} examples and {dataset} has {N}: another data set")
    different = int((file.true != source.y_train[known]).sum())
    if different:
        raise InputError(
            f"{said}: its true labels are not {dataset}'s for {different} of {len(known)} examples: "
            "made for another data set or in another order"
        )
    if int(file.label.max()) >= K:
        raise InputError(f"{said}: holds label {int(file.label.max())}, {dataset} has classes 0..{K - 1}")
    at = torch.full((N,), -1)
    at[known] = torch.arange(len(known))
    absent = int((at[index] < 0).sum())
    if absent:
        raise InputError(
            f"{said}: has no label for {absent} of the {len(index)} training examples; "
            "use the --split-seed, --val-frac and --subset it was made with"
        )
    return at[index]


# ------------------------------------------------------------------------------------------------------ the command line


def command_line():
    """The parser of `python noise.py`; its data and noise options are train.py's own."""
    import options  # which imports this module

    p = options.Parser(prog="noise.py", description="Make, inspect and compare label noise.", allow_abbrev=False)
    sub = p.add_subparsers(dest="command", required=True, parser_class=options.Parser)
    m = sub.add_parser("make", help="write the noise.npz that train.py would", allow_abbrev=False)
    m.add_argument("out", type=options.path, metavar="OUT.npz")
    m.add_argument(
        "--true", type=options.path, metavar="FILE.npy", help="true labels (N,) of any data set, in place of --dataset"
    )
    options.data_options(m)
    options.noise_options(m)
    m.add_argument("--noise-seed", type=options.seed, default=0, help="label noise")
    m.add_argument("--split-seed", type=options.seed, default=0, help="validation split (and --subset)")
    i = sub.add_parser("inspect", help="rate, matrix, hash of a file", allow_abbrev=False)
    i.add_argument("file", type=options.path, metavar="FILE", help="a noise.npz, or FILE.pt[:LABELS]")
    c = sub.add_parser("compare", help="agreement of two files", allow_abbrev=False)
    c.add_argument("files", type=options.path, nargs=2, metavar="FILE", help="a noise.npz, or FILE.pt:LABELS")
    return p


def make(args) -> str:
    """Write `args.out` as a run with these options would, and return the lines that say what it holds.

    With `--val-frac 0` all of the training set (or of `--subset`) is labelled, with `--true` all there are. Raises
    `InputError`.
    """
    import options

    out = Path(args.out)
    wrong = options.noise_problems(args) + (idle(args) if args.true else options.data_problems(args))
    if out.suffix != ".npz":
        wrong.append(f"{out}: must end in .npz")
    elif os.path.lexists(out):
        wrong.append(f"{out}: exists already")
    elif not os.path.isdir(out.parent):
        wrong.append(f"{out}: there is no folder {out.parent}")
    if args.true and args.noise_type == "instance":
        wrong.append("--noise-type instance: needs the images, --true gives labels only")
    if wrong:
        raise InputError("; ".join(wrong))
    source = bare(args) if args.true else sources.load(args)
    N = len(source.y_train)
    if args.true or args.val_frac == 0:
        index = data.drawn(N, args.split_seed, args.subset)
    else:
        index, _ = data.split(N, args.val_frac, args.split_seed, args.subset)
    labels, said, _ = relabel(args, source, index)
    try:
        noisefile.save(out, index, source.y_train[index], labels, said["dynamic"])
    except OSError as e:
        raise InputError(f"{out}: cannot be written ({e.strerror})") from e
    return noisefile.describe(said, source.classes) + f"\n{out}: sha256 {said['noise_npz_sha256']}"


def idle(args) -> list[str]:
    """What is wrong with data options beside `--true`: they would do nothing."""
    import options

    p = options.Parser()
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
    import options

    options.show_anything()
    try:
        args = command_line().parse_args(argv)
        if args.command == "make":
            print(make(args))
        else:
            print(noisefile.show(args.file) if args.command == "inspect" else noisefile.compare(*args.files))
    except InputError as e:
        options.complain(e, "noise.py")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
